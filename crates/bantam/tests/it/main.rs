//! The binary as its users run it, one file a subject. One program holds them all: linking is most of what they cost.
#![cfg(unix)]
#![allow(clippy::unwrap_used, missing_docs)]

mod answer;
mod cli;
mod embed;
#[cfg(target_os = "linux")]
mod jobs;
mod support;
mod train;
