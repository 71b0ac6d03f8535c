//! Training, judging and shrinking: hours of work that resume to the bit.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod data;
pub mod eval;
pub mod events;
pub mod export;
pub mod recipe;
pub mod report;
pub mod train;

pub use bantam_judge::stats;
