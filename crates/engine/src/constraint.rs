//! What the engine asks of a constraint: a mask for the next token, and to be told of it.

/// A set of allowed answers, read token by token.
///
/// An error from any method ends the request with an error: the engine never falls back to
/// an unconstrained answer.
pub trait TokenConstraint: Send {
    /// One bit for each token, lowest id in the lowest bit of the first word. Tokens beyond
    /// the last word are not allowed. Includes the end tokens where the answer may end.
    fn allowed(&mut self) -> Result<&[u32], String>;

    /// Takes a token that [`Self::allowed`] allowed.
    fn commit(&mut self, token: u32) -> Result<(), String>;

    /// Whether the answer is complete and nothing but its end may follow.
    fn is_done(&mut self) -> bool;

    /// How many of these tokens, one after the other, could be taken from here; a guess that
    /// is too high costs time and nothing else.
    fn n_possible(&mut self, tokens: &[u32]) -> usize {
        tokens.len()
    }

    /// Tokens that are known to be the only ones allowed next, one after the other; may be
    /// fewer than there are.
    fn forced(&mut self) -> Vec<u32> {
        Vec::new()
    }

    /// A copy in the same state.
    fn boxed_clone(&self) -> BoxedConstraint;
}

/// A [`TokenConstraint`] of any kind.
pub type BoxedConstraint = Box<dyn TokenConstraint>;

impl Clone for BoxedConstraint {
    fn clone(&self) -> Self {
        self.boxed_clone()
    }
}

impl TokenConstraint for bantam_text::Constraint {
    fn allowed(&mut self) -> Result<&[u32], String> {
        match bantam_text::Constraint::allowed(self) {
            Ok(mask) => Ok(mask.words()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn commit(&mut self, token: u32) -> Result<(), String> {
        bantam_text::Constraint::commit(self, token).map_err(|error| error.to_string())
    }

    fn is_done(&mut self) -> bool {
        bantam_text::Constraint::is_done(self)
    }

    fn n_possible(&mut self, tokens: &[u32]) -> usize {
        bantam_text::Constraint::n_possible(self, tokens)
    }

    fn forced(&mut self) -> Vec<u32> {
        bantam_text::Constraint::forced(self)
    }

    fn boxed_clone(&self) -> BoxedConstraint {
        Box::new(self.clone())
    }
}

impl From<bantam_text::Constraint> for BoxedConstraint {
    fn from(constraint: bantam_text::Constraint) -> Self {
        Box::new(constraint)
    }
}
