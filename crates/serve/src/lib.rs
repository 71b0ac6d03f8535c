//! The OpenAI API over the engine.
//!
//! ```text
//! GET  /health                 is it alive, how much waits
//! GET  /v1/models              what is served
//! GET  /v1/models/{id}
//! POST /v1/chat/completions    whole, or as server-sent events
//! ```
//!
//! The rule of this room: the only async code and the only wire types. Requests are parsed into
//! types that prove them ([`openai`](self) tables every field as honoured, a hint, or refused),
//! the engine runs on a thread of its own behind channels, and every failure leaves in OpenAI's
//! shape with an `x-request-id`.
//!
//! # Beyond OpenAI's fields
//!
//! | field | meaning |
//! |---|---|
//! | `top_k` | keep this many of the likeliest tokens; 0 or -1 keeps all |
//! | `min_p` | drop tokens less likely than this share of the likeliest |
//! | `repetition_penalty` | above 1, makes tokens of the prompt and the answer less likely |
//! | `guided_regex` | the answer matches this regular expression |
//! | `guided_choice` | the answer is one of these strings |
//!
//! # Fields that are hints
//!
//! Checked, without effect: `user`, `metadata`, `safety_identifier`, `prompt_cache_key`,
//! `prompt_cache_options`, `prompt_cache_retention`, `parallel_tool_calls` (there are no tools to
//! call), `store: false`, `service_tier: auto | default`, a text part's `prompt_cache_breakpoint`.
//! A schema is always enforced, whatever `strict` says.
//!
//! # Who may call
//!
//! On a loopback address anyone on this machine may, under a loopback name. Any other address
//! needs an API key, and the server refuses to start without one. Only the SHA-256 of a key is
//! kept. `/health` needs no key.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod auth;
mod config;
mod error;
mod ids;
mod openai;
mod server;
mod worker;

pub use auth::ApiKey;
pub use config::{ServeConfig, ServedModel};
pub use error::ServeError;
pub use server::{Server, run};
