//! How likely given tokens are: the engine is made to say them, and reports what it thought of each.

use std::sync::Arc;

use bantam_engine::{BoxedConstraint, Request, TokenConstraint};

/// Allows one sequence of tokens.
#[derive(Clone)]
struct Forced {
    tokens: Arc<[u32]>,
    at: usize,
    mask: Vec<u32>,
}

impl TokenConstraint for Forced {
    fn allowed(&mut self) -> Result<&[u32], String> {
        self.mask.fill(0);
        match self.tokens.get(self.at) {
            Some(&token) => {
                let word = token as usize / 32;
                if word >= self.mask.len() {
                    self.mask.resize(word + 1, 0);
                }
                self.mask[word] = 1 << (token % 32);
                Ok(&self.mask)
            }
            None => Err("there is nothing left to say".to_string()),
        }
    }

    fn commit(&mut self, token: u32) -> Result<(), String> {
        if self.tokens.get(self.at) != Some(&token) {
            return Err(format!("token {token} is not the one that was to be said"));
        }
        self.at += 1;
        Ok(())
    }

    fn is_done(&mut self) -> bool {
        self.at == self.tokens.len()
    }

    /// All of them: with this the engine reads them in few passes.
    fn forced(&mut self) -> Vec<u32> {
        self.tokens[self.at..].to_vec()
    }

    fn boxed_clone(&self) -> BoxedConstraint {
        Box::new(self.clone())
    }
}

/// A request that reports the log-probabilities of `said` after `before`, and `top` likeliest beside each. Neither
/// may be empty.
pub(crate) fn request(before: Vec<u32>, said: &[u32], top: usize) -> Request {
    Request {
        prompt: before,
        max_tokens: said.len(),
        constraint: Some(Box::new(Forced {
            tokens: said.into(),
            at: 0,
            mask: Vec::new(),
        })),
        logprobs: Some(top),
        ..Request::default()
    }
}
