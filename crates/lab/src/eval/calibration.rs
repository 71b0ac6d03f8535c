//! How sure a model is of its answers, and how sure it may be.
//!
//! One number is fitted, the temperature that its log-likelihoods are divided by before they are compared (Guo et al.
//! 2017, arXiv:1706.04599). It changes no choice, only how sure of it the model is.

use serde::{Deserialize, Serialize};

/// A row whose options were scored: the log-likelihood of each, and which one is right.
#[derive(Debug, Clone, PartialEq)]
pub struct ScoredRow {
    /// The log-likelihood of each option.
    pub scores: Vec<f64>,
    /// The one that is right.
    pub right: usize,
}

/// What was fitted, and what it changed on the rows that it was fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// What log-likelihoods are divided by.
    pub temperature: f64,
    /// Rows that it was fitted to.
    pub rows: usize,
    /// The mean of minus the log-probability of the right option, without and with it.
    pub nll: [f64; 2],
    /// The expected calibration error in fifteen bins of equal width, without and with it.
    pub ece: [f64; 2],
}

const BINS: usize = 15;
/// Temperatures that are tried lie between one over this and this.
const MOST: f64 = 50.0;
/// The search ends where this many steps have narrowed it down.
const STEPS: usize = 60;

/// Fits the temperature; `None` without rows, or with likelihoods that are no numbers.
pub fn calibrate(rows: &[ScoredRow]) -> Option<Calibration> {
    let is_sound = |row: &ScoredRow| {
        row.right < row.scores.len() && row.scores.iter().all(|score| score.is_finite())
    };
    if rows.is_empty() || !rows.iter().all(is_sound) {
        return None;
    }
    // The loss has one minimum in the inverse of the temperature, hence along its logarithm, too: golden section.
    let ratio = (5f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (-MOST.ln(), MOST.ln());
    let at = |x: f64| nll(rows, x.exp());
    let (mut left, mut right) = (high - ratio * (high - low), low + ratio * (high - low));
    let (mut at_left, mut at_right) = (at(left), at(right));
    for _ in 0..STEPS {
        if at_left <= at_right {
            (high, right, at_right) = (right, left, at_left);
            left = high - ratio * (high - low);
            at_left = at(left);
        } else {
            (low, left, at_left) = (left, right, at_right);
            right = low + ratio * (high - low);
            at_right = at(right);
        }
    }
    let temperature = (0.5 * (low + high)).exp();
    Some(Calibration {
        temperature,
        rows: rows.len(),
        nll: [nll(rows, 1.0), nll(rows, temperature)],
        ece: [ece(rows, 1.0), ece(rows, temperature)],
    })
}

fn probabilities(row: &ScoredRow, temperature: f64) -> Vec<f64> {
    let max = row.scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights = row.scores.iter().map(|s| ((s - max) / temperature).exp());
    let weights: Vec<f64> = weights.collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

fn nll(rows: &[ScoredRow], temperature: f64) -> f64 {
    let one = |row: &ScoredRow| -probabilities(row, temperature)[row.right].max(1e-300).ln();
    rows.iter().map(one).sum::<f64>() / rows.len() as f64
}

fn ece(rows: &[ScoredRow], temperature: f64) -> f64 {
    let mut bins = [(0.0, 0.0); BINS];
    for row in rows {
        let all = probabilities(row, temperature);
        let best = (0..all.len()).max_by(|a, b| all[*a].total_cmp(&all[*b]));
        let best = best.unwrap_or(0);
        let bin = &mut bins[((all[best] * BINS as f64) as usize).min(BINS - 1)];
        bin.0 += all[best];
        bin.1 += f64::from(u8::from(best == row.right));
    }
    let gap = |(sure, right): &(f64, f64)| (sure - right).abs();
    bins.iter().map(gap).sum::<f64>() / rows.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows whose right option is drawn with the probabilities that `scores / true_temperature` say.
    fn rows(n: usize, true_temperature: f64) -> Vec<ScoredRow> {
        let mut state = 1u64;
        let mut unit = move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 11) as f64 / (1u64 << 53) as f64
        };
        let mut row = || {
            let mut row = ScoredRow {
                scores: (0..4).map(|_| 12.0 * unit()).collect(),
                right: 0,
            };
            let mut left = unit();
            let all = probabilities(&row, true_temperature);
            row.right = all
                .iter()
                .position(|p| {
                    left -= p;
                    left <= 0.0
                })
                .unwrap_or(3);
            row
        };
        (0..n).map(|_| row()).collect()
    }

    #[test]
    fn the_temperature_that_made_the_rows_is_found() {
        for truth in [0.7, 1.0, 3.0] {
            let fitted = calibrate(&rows(4000, truth)).unwrap();
            assert!(
                (fitted.temperature / truth - 1.0).abs() < 0.1,
                "{truth}: {fitted:?}"
            );
            assert!(fitted.nll[1] <= fitted.nll[0] + 1e-9, "{fitted:?}");
            assert!(fitted.ece[1] < 0.03, "{fitted:?}");
        }
        let overconfident = calibrate(&rows(4000, 3.0)).unwrap();
        assert!(overconfident.ece[0] > 0.1, "{overconfident:?}");
    }

    #[test]
    fn what_cannot_be_fitted_is_not() {
        assert_eq!(calibrate(&[]), None);
        let row = |scores: Vec<f64>, right| ScoredRow { scores, right };
        assert_eq!(calibrate(&[row(vec![0.0, f64::NAN], 0)]), None);
        assert_eq!(calibrate(&[row(vec![0.0], 1)]), None);
        // Always right: as sure as is tried, and no more.
        let sure = calibrate(&[row(vec![1.0, 0.0], 0)]).unwrap();
        assert!(sure.temperature > 0.0 && sure.temperature < 0.03);
    }
}
