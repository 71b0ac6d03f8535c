//! Why a request was not taken, and why one that was taken failed.

use thiserror::Error;

/// A request was refused at the door; nothing of it was run.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// Prompt and answer together are longer than the model can read.
    #[error(
        "the prompt has {prompt_tokens} tokens and `max_tokens` is {max_tokens}, together more than the model's context of {max_context} tokens"
    )]
    ContextOverflow {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// Tokens the model can hold.
        max_context: usize,
    },
    /// The prompt has no tokens.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Nothing was asked for.
    #[error("`max_tokens` must be at least 1")]
    NoTokensWanted,
    /// A token id that the model does not have.
    #[error("token {token} is not in the model's vocabulary of {vocab}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// The size of the vocabulary.
        vocab: usize,
    },
    /// A sampling parameter outside its range.
    #[error("`{name}` must be {range}, not {value}")]
    BadSampling {
        /// The parameter.
        name: &'static str,
        /// What it may be.
        range: &'static str,
        /// What it is.
        value: String,
    },
    /// An adapter that is not loaded, or no longer.
    #[error("adapter {id} is not loaded")]
    UnknownAdapter {
        /// Its name.
        id: u64,
    },
    /// Too many requests are waiting.
    #[error("{waiting} requests are waiting already; try again later")]
    QueueFull {
        /// How many.
        waiting: usize,
    },
}

/// A request that was accepted and could not be finished.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RequestError {
    /// The model returned an error or panicked.
    #[error("the model failed: {0}")]
    Model(String),
    /// The model's logits are not numbers.
    #[error("the model's logits are not finite after {at} tokens")]
    NotFinite {
        /// The length of the sequence.
        at: usize,
    },
    /// The constraint failed; the answer so far must not be taken as valid.
    #[error("the constraint failed: {0}")]
    Constraint(String),
    /// The constraint allows no token at all.
    #[error("the constraint allows no token after {at} tokens of the answer")]
    DeadEnd {
        /// The length of the answer.
        at: usize,
    },
    /// Refused by [`crate::Engine::submit`], where a batch reports it as a result.
    #[error(transparent)]
    Refused(#[from] SubmitError),
}

/// A model's own error, in words.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct ModelError(pub String);
