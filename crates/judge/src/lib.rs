//! From texts to scores, and from scores to what may be said of them.
//!
//! Everything here is a function of its arguments: no file, no clock, no model. A metric of texts agrees with its
//! reference implementation on the pairs of `tests/data`; a statement about scores holds as often as it says, which
//! its tests simulate.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod canonical;
pub mod compare;
pub mod expression;
pub mod grader;
pub mod stats;
pub mod template;
pub mod text;

pub use canonical::canonical;
