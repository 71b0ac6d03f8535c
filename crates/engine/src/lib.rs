//! Generation: queue, slots, sampler, prefix reuse, constraints.
//!
//! [`Engine`] owns all the mutable state of generation and moves it only in
//! [`Engine::step`], which is synchronous and single-threaded: one step is one forward
//! pass of the model over every running request (continuous batching), one token
//! sampled for each that is past its prompt, and the events that follow from it.
//!
//! What holds at every step, and is tested with a mock model whose logits are a hash
//! of the whole history:
//!
//! - a request's output depends on the request and its adapter alone: not on its neighbours, the
//!   chunks its prompt was read in, what was in the prefix cache, which tokens were guessed ahead,
//!   whether it was paused for want of memory, or who was cancelled;
//! - every accepted request ends with exactly one [`Event::Done`];
//! - a constraint fails closed: an error ends its request, never lifts the mask;
//! - a failure in the model ends the request it belongs to, and no other.
//!
//! The engine knows token ids and text, and nothing of HTTP or of files.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod answer;
mod batch;
mod constraint;
mod draft;
mod embed;
mod engine;
mod error;
pub mod exact;
mod llama;
mod lm;
mod mask;
mod memory;
mod output;
mod plan;
mod prefix;
mod queue;
mod request;
mod sampler;
mod scan;
mod score;

pub use batch::{Completion, Progress, generate_all};
pub use constraint::{BoxedConstraint, TokenConstraint};
pub use embed::{
    DecoderEmbedder, EmbedError, Embedder, SentenceEncoder, check as check_inputs, cosine, shorten,
};
pub use engine::{Engine, EngineConfig};
pub use error::{ModelError, RequestError, SubmitError};
pub use llama::Llama;
pub use lm::{CacheBlock, LanguageModel, Span, Wants};
pub use request::{
    AdapterId, Event, Finish, Request, RequestId, Sampling, Timings, TokenEvent, TokenLogprobs,
    Usage,
};
