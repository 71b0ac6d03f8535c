//! The binary as its users run it, one file a subject. One program holds them all: linking is most of what they cost.
#![cfg(unix)]
#![allow(clippy::unwrap_used, missing_docs)]

mod answer;
mod cli;
mod embed;
#[cfg(target_os = "linux")]
mod evals;
#[cfg(target_os = "linux")]
mod hooks;
#[cfg(target_os = "linux")]
mod jobs;
#[cfg(target_os = "linux")]
mod jobs_command;
mod support;
mod train;
