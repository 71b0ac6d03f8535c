//! The settings of `bantam bench`.

use std::path::PathBuf;

use super::threads;
use crate::args::{BenchArgs, BenchPart};
use bantam_model::Weights;

/// `bantam bench`
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BenchSettings {
    /// The model's name or path.
    pub(crate) model: String,
    /// What to measure; empty for everything.
    parts: Vec<BenchPart>,
    /// Fewer rounds, and not the longest measurements.
    pub(crate) quick: bool,
    /// The chats to time instead of those that are built in.
    pub(crate) chats: Option<PathBuf>,
    /// Compare digests instead of measuring.
    pub(crate) same_bits: bool,
    /// Give one answer and say when, for the process that measures.
    pub(crate) one_answer: bool,
    /// How weights are held.
    pub(crate) weights: Weights,
    /// Threads to compute with.
    pub(crate) threads: usize,
    /// End with one JSON object.
    pub(crate) json: bool,
}

impl BenchSettings {
    pub(super) fn resolve(args: BenchArgs) -> Self {
        Self {
            model: args.model,
            parts: args.only,
            quick: args.quick,
            chats: args.chats,
            same_bits: args.same_bits,
            one_answer: args.one_answer,
            weights: args.weights.weights.into(),
            threads: threads(args.threads),
            json: args.json.json,
        }
    }

    /// Whether a part is to be measured.
    pub(crate) fn wants(&self, part: BenchPart) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }

    /// How often everything is measured.
    pub(crate) fn rounds(&self) -> usize {
        if self.quick { 3 } else { 5 }
    }
}
