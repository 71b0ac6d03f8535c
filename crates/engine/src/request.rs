//! What is asked of the engine, and the events it answers with.

use std::time::Duration;

use crate::{BoxedConstraint, RequestError};

/// The name of an accepted request, unique in its engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// The name of a loaded adapter, unique in its engine and never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u64);

/// One answer to generate.
#[derive(Clone, Default)]
pub struct Request {
    /// The prompt's tokens, special tokens and all. Not empty.
    pub prompt: Vec<u32>,
    /// The most tokens to generate; prompt and answer must fit the model's context together.
    pub max_tokens: usize,
    /// How a token is chosen.
    pub sampling: Sampling,
    /// The answer ends before the first of these that it would contain.
    pub stop: Vec<String>,
    /// Tokens that end the answer and are no part of its text.
    pub end_tokens: Vec<u32>,
    /// The answers that are allowed; all, if there is none.
    pub constraint: Option<BoxedConstraint>,
    /// Report each token's log-probability, and those of this many of the likeliest.
    pub logprobs: Option<usize>,
    /// What to answer with; the bare model, if there is none.
    pub adapter: Option<AdapterId>,
    /// Whose request it is: clients take turns.
    pub client: u64,
    /// What the answer is likely to say, if that is known. It makes a true guess faster and
    /// changes nothing else.
    pub prediction: Option<Vec<u32>>,
}

/// How the next token is chosen.
///
/// Applied in this order: repetition, frequency and presence penalties, `logit_bias`, the
/// constraint's mask, temperature, `top_k`, `top_p`, `min_p`. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the likeliest token, the lowest id among equals.
    pub temperature: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the likeliest tokens until their probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this share of the likeliest; 0 drops none.
    pub min_p: f32,
    /// Divides the positive and multiplies the negative logits of every token of the prompt
    /// or the answer; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken off the logit of every token that is in the answer.
    pub presence_penalty: f32,
    /// Taken off a token's logit for each time it is in the answer.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed and request give the same answer.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// What happened to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token of the answer.
    Token(TokenEvent),
    /// The end; nothing follows.
    Done {
        /// Why.
        finish: Finish,
        /// Tokens read and written.
        usage: Usage,
        /// Where the time went.
        timings: Timings,
    },
}

/// A token of the answer. End tokens, and tokens that became part of a stop string, are never
/// reported; a token that may yet become part of one is reported once it cannot.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenEvent {
    /// The token.
    pub id: u32,
    /// The text it adds: empty while a character is incomplete, cut where a stop string begins.
    pub text_delta: String,
    /// If asked for.
    pub logprobs: Option<TokenLogprobs>,
}

/// Log-probabilities under the model's own distribution, before penalties, bias, constraint
/// and temperature.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that was taken.
    pub logprob: f32,
    /// Of the likeliest tokens, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// An end token, a stop string, or a constraint that is complete.
    Stop,
    /// `max_tokens` were generated.
    Length,
    /// [`crate::Engine::cancel`].
    Cancelled,
    /// It could not be finished.
    Error(RequestError),
}

/// Tokens read and written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that were not computed again, but taken from an earlier request.
    pub cached_tokens: usize,
    /// Tokens generated, the end token and those of a stop string included.
    pub completion_tokens: usize,
    /// Those of them that a constraint left no choice about and the model was not asked for.
    pub forced_tokens: usize,
    /// Tokens that were guessed ahead ...
    pub drafted_tokens: usize,
    /// ... and those of them that came true.
    pub accepted_tokens: usize,
}

/// Where a request's time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// From submission to a slot.
    pub queue: Duration,
    /// From the slot to the end of the prompt.
    pub prefill: Duration,
    /// From the end of the prompt to the end of the answer.
    pub decode: Duration,
    /// From submission to the first token.
    pub first_token: Duration,
}
