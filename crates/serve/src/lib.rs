//! The OpenAI API over the engine.
//!
//! `/openapi.json` lists the addresses, `/docs` shows them as a page; [`openai`](self) holds one file for each family of
//! them: chat and stored completions, text completions, responses, files, uploads and batches, models, tokens.
//!
//! The rule of this room: the only async code and the only wire types. Requests are parsed into
//! types that prove them (every field is honoured, a hint, or refused by name), the engine runs on a thread of its own behind channels, and every failure leaves in OpenAI's
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
//! Checked, without effect: `user`, `safety_identifier`, `prompt_cache_key`, `prompt_cache_options`,
//! `prompt_cache_retention`, `service_tier: auto | default`, a text part's `prompt_cache_breakpoint`. A schema is always
//! enforced, whatever `strict` says, and so are the arguments of tools.
//!
//! # Tools
//!
//! A template that knows tools is given them; any other model is told of them in the system message (see
//! [`bantam_text::ToolSyntax`]). Calls are constrained while they are generated: a call that comes back names a tool of
//! the request, with arguments that its schema allows. An answer that is cut by `max_tokens` says `length`.
//!
//! # Who may call
//!
//! On a loopback address anyone on this machine may, under a loopback name. Any other address needs keys, and the
//! server refuses to start without. Only the SHA-256 of a key is kept. Keys of a database have scopes, limits of
//! requests and tokens a minute, and a budget of tokens a day; what is kept for one is not shown to another.
//! `/health`, `/ready`, `/openapi.json` and `/docs` need no key.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod apart;
mod auth;
mod caller;
mod config;
mod cors;
mod error;
pub mod fuzz;
mod hooks;
mod ids;
mod listen;
mod metrics;
mod models;
mod once;
mod openai;
mod openapi;
mod outside;
mod query;
mod residents;
mod router;
mod served;
mod server;
mod training;
mod worker;
mod write_timeout;

pub use auth::ApiKey;
pub use config::ServeConfig;
pub use cors::Origin;
pub use error::ServeError;
pub use hooks::{Courier, HookTarget, Hooks};
pub use listen::Tls;
pub use models::{ADAPTER_BYTES, Models};
pub use openai::{CheckLine, CheckRows};
pub use outside::{ProviderAnswer, Providers, Sandbox, SandboxError};
pub use served::{LoadedAdapter, ServedAdapter, ServedEmbedder, ServedModel};
pub use server::{Server, run};
pub use training::{
    Chosen, Ended, Trainer, TrainingConfig, TrainingEvent, TrainingJob, TrainingMethod,
};
