//! What tells a poisoned row or a ruined state from noise.
//!
//! A loss is judged against the recent ones by median and median absolute deviation, which a few outliers cannot move.
//! The window is part of the checkpoint, so a resumed run judges as an uninterrupted one does.

use std::collections::{BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

/// Losses that are remembered.
const WINDOW: usize = 50;
/// Losses it takes before any can be told from the others.
const ENOUGH: usize = 16;
/// From a median absolute deviation to the standard deviation of a normal distribution.
const TO_SIGMA: f64 = 1.4826;
/// Least rise, in nats, that is a spike: when all rows are learnt by heart, any deviation is many deviations.
const LEAST_RISE: f64 = 0.5;
/// The same of a single row: rows differ.
const LEAST_ROW_RISE: f64 = 2.0;
/// Times that an update may be taken back before the run fails.
pub(crate) const MAX_UNDONE: usize = 3;

/// Rows that may be dropped before the run fails.
pub(crate) fn max_dropped(n_rows: usize) -> usize {
    (n_rows / 50).max(10)
}

/// What went wrong with a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Trouble {
    /// Its loss is not a number.
    Loss,
    /// Its gradient is not a number.
    Gradient,
    /// Its loss lies far above the recent ones.
    Spike {
        /// The loss.
        loss: f64,
        /// What the recent ones allow.
        limit: Limit,
    },
    /// Its update left parameters that are not numbers.
    Update,
}

impl Trouble {
    /// The subject of the error when there is no way on.
    pub(crate) fn what(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::Gradient => "gradient",
            Self::Spike { .. } => "loss, far above those before,",
            Self::Update => "update",
        }
    }
}

/// Up to where losses are ordinary.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Limit {
    /// Median of the recent losses.
    pub(crate) median: f64,
    /// How far above it a batch may lie.
    pub(crate) rise: f64,
}

impl Limit {
    /// Whether the loss of one row of a batch of `n` is extraordinary: it spreads sqrt(n) times as far as the batch's.
    pub(crate) fn is_passed_by_row(&self, loss: f64, n: usize) -> bool {
        loss > self.median + (self.rise * (n as f64).sqrt()).max(LEAST_ROW_RISE)
    }
}

/// What a run knows of its rows' behaviour; part of a checkpoint.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Guard {
    /// Bits of the recent losses, oldest first.
    recent: VecDeque<u64>,
    /// Indices of rows that are not trained on any more.
    pub(crate) dropped: BTreeSet<usize>,
    /// Indices of rows that are not validated on any more.
    pub(crate) dropped_valid: BTreeSet<usize>,
    /// Steps, from 0, that make no update.
    pub(crate) left_out: BTreeSet<usize>,
}

impl Guard {
    /// Remembers the loss of a batch that was trained on.
    pub(crate) fn remember(&mut self, loss: f64) {
        if self.recent.len() == WINDOW {
            self.recent.pop_front();
        }
        self.recent.push_back(loss.to_bits());
    }

    /// Up to where losses are ordinary, `z` deviations from the median; `None` while too few are known or `z` is 0.
    pub(crate) fn limit(&self, z: f64) -> Option<Limit> {
        if z == 0.0 || self.recent.len() < ENOUGH {
            return None;
        }
        let losses: Vec<f64> = self
            .recent
            .iter()
            .map(|bits| f64::from_bits(*bits))
            .collect();
        let centre = median(losses.clone());
        let deviation = median(losses.iter().map(|loss| (loss - centre).abs()).collect());
        Some(Limit {
            median: centre,
            rise: (z * TO_SIGMA * deviation).max(LEAST_RISE),
        })
    }

    /// What is wrong with a batch of this loss and gradient norm, if anything is.
    pub(crate) fn judge(&self, loss: f64, grad_norm: f64, z: f64) -> Option<Trouble> {
        if !loss.is_finite() {
            return Some(Trouble::Loss);
        }
        if !grad_norm.is_finite() {
            return Some(Trouble::Gradient);
        }
        let limit = self.limit(z)?;
        let is_spike = loss > limit.median + limit.rise;
        is_spike.then_some(Trouble::Spike { loss, limit })
    }
}

/// The middle value; of an even number, the upper one of the two.
fn median(mut xs: Vec<f64>) -> f64 {
    let middle = xs.len() / 2;
    *xs.select_nth_unstable_by(middle, f64::total_cmp).1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(losses: impl IntoIterator<Item = f64>) -> Guard {
        let mut guard = Guard::default();
        losses.into_iter().for_each(|loss| guard.remember(loss));
        guard
    }

    #[test]
    fn a_spike_is_told_from_noise() {
        let noisy = after((0..40).map(|i| 2.0 + 0.1 * f64::from(i % 5)));
        let limit = noisy.limit(10.0).unwrap();
        assert_eq!(limit.median, 2.2);
        assert!((limit.rise - 1.4826).abs() < 1e-9, "{limit:?}");
        assert_eq!(noisy.judge(3.6, 1.0, 10.0), None);
        let spike = noisy.judge(3.7, 1.0, 10.0);
        assert_eq!(spike, Some(Trouble::Spike { loss: 3.7, limit }));
        assert_eq!(noisy.judge(3.7, 1.0, 0.0), None, "switched off");
        assert!(!limit.is_passed_by_row(5.1, 4) && limit.is_passed_by_row(5.2, 4));
    }

    #[test]
    fn outliers_do_not_move_the_limit_much_and_old_losses_are_forgotten() {
        let mut guard = after((0..WINDOW).map(|i| if i % 10 == 0 { 30.0 } else { 0.1 }));
        assert_eq!(guard.limit(10.0).unwrap().median, 0.1);
        assert_eq!(guard.limit(10.0).unwrap().rise, LEAST_RISE);
        (0..WINDOW).for_each(|_| guard.remember(7.0));
        assert_eq!(guard.limit(10.0).unwrap().median, 7.0);
    }

    #[test]
    fn what_is_no_number_needs_no_history() {
        let guard = after([1.0; 3]);
        assert_eq!(guard.judge(1e9, 1.0, 10.0), None);
        assert_eq!(guard.judge(f64::NAN, 1.0, 10.0), Some(Trouble::Loss));
        assert_eq!(guard.judge(f64::INFINITY, 1.0, 0.0), Some(Trouble::Loss));
        assert_eq!(guard.judge(1.0, f64::NAN, 0.0), Some(Trouble::Gradient));
    }
}
