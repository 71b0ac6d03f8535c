//! Tiny models, goldens and closeness, for the tests of every other crate. A dev-dependency only.
//!
//! - [`golden`]: reference values from PyTorch for miniature Llama models, committed beside the script that made them;
//! - [`close`]: how near two slices of numbers are, so that a NaN fails and the first difference is shown;
//! - [`tiny`]: a two-layer chat model with its tokenizer, written to a folder in milliseconds.
//!
//! It depends on no other crate of the workspace, so that any of them may use it in its tests. Panics are how
//! it reports trouble: it only ever runs inside a test.

#![allow(clippy::unwrap_used, reason = "test support: a panic is the report")]

pub mod close;
pub mod encoder;
pub mod golden;
pub mod rng;
pub mod tiny;
