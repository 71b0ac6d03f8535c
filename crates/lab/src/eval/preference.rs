//! Judging preferences: how often a model tells the preferred answer of a pair from the other.
//!
//! | score | a pair is right where the preferred answer has the greater | of |
//! |---|---|---|
//! | likelihood | log-probability a token | any model |
//! | reward | gain of its log-probability on the base | an adapter over its base |
//!
//! Equal is not greater. Shares have Wilson intervals; a model and its base are compared pair by pair.

use bantam_kernels::Compute;
use bantam_model::{Lora, Model, Recompute, TrainWorkspace};
use serde::{Deserialize, Serialize};

use crate::stats::{self, Bootstrap, CONFIDENCE, Part};
use crate::train::{TrainRow, pack_owned};

/// Log-probabilities of the two answers of one pair, added up over their tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PairScore {
    /// Line in its file, from 1.
    pub line: usize,
    /// Tokens of the preferred answer, and of the other.
    pub tokens: [usize; 2],
    /// Their log-probabilities.
    pub log_probs: [f64; 2],
    /// The same without the adapter, if there is one.
    pub base_log_probs: Option<[f64; 2]>,
}

/// A share with its 95% interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// The share.
    pub accuracy: f64,
    /// Its interval (Wilson).
    pub ci95: [f64; 2],
}

/// How far a model is from its base, on the same pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    /// Accuracy minus that of the base.
    pub accuracy: f64,
    /// Its interval (paired bootstrap).
    pub ci95: [f64; 2],
    /// Exact two-sided p-value of McNemar's test.
    pub p_value: f64,
    /// Pairs that only the model has right.
    pub only_model: usize,
    /// Pairs that only the base has right.
    pub only_base: usize,
}

/// What all pairs come to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreferenceOutcome {
    /// Pairs.
    pub pairs: usize,
    /// By log-probability a token.
    pub likelihood: Share,
    /// The same of the base, if there is an adapter.
    pub base_likelihood: Option<Share>,
    /// The two compared.
    pub difference: Option<Difference>,
    /// By gain on the base.
    pub reward: Option<Share>,
    /// Mean of the preferred answer's gain minus the other's, in nats.
    pub mean_margin: Option<f64>,
}

/// Scores pairs of rows, the preferred one first, under the model and, if there is an adapter, under its base.
///
/// `done` hears how many pairs are scored.
pub fn score_pairs(
    model: &Model<f32>,
    lora: Option<&Lora<f32>>,
    rows: &[TrainRow],
    compute: &Compute,
    done: &mut dyn FnMut(usize),
) -> Vec<PairScore> {
    let mut work = TrainWorkspace::new(Recompute::None);
    let mut scores = Vec::with_capacity(rows.len() / 2);
    for (i, pair) in rows.chunks_exact(2).enumerate() {
        let (packed, owners) = pack_owned(pair, &[0, 1]);
        let mut under = |lora: Option<&Lora<f32>>| {
            model.loss(lora, &packed, &mut work, compute);
            let mut sums = [0.0; 2];
            for (owner, loss) in owners.iter().zip(work.target_losses()) {
                sums[*owner] -= loss;
            }
            sums
        };
        scores.push(PairScore {
            line: pair[0].line,
            tokens: [pair[0].n_trained(), pair[1].n_trained()],
            log_probs: under(lora),
            base_log_probs: lora.map(|_| under(None)),
        });
        done(i + 1);
    }
    scores
}

/// Judges scored pairs.
pub fn judge_pairs(scores: &[PairScore]) -> PreferenceOutcome {
    let likelier = |of: [f64; 2], score: &PairScore| {
        of[0] / score.tokens[0] as f64 > of[1] / score.tokens[1] as f64
    };
    let model: Vec<bool> = scores.iter().map(|s| likelier(s.log_probs, s)).collect();
    let base: Option<Vec<bool>> = scores
        .iter()
        .map(|s| s.base_log_probs.map(|of| likelier(of, s)))
        .collect();
    let margins: Option<Vec<f64>> = scores
        .iter()
        .map(|s| {
            let gain = |of: [f64; 2], i: usize| s.log_probs[i] - of[i];
            s.base_log_probs.map(|of| gain(of, 0) - gain(of, 1))
        })
        .collect();
    let reward = margins.as_ref().map(|margins| {
        let right: Vec<bool> = margins.iter().map(|margin| *margin > 0.0).collect();
        share(&right)
    });
    PreferenceOutcome {
        pairs: scores.len(),
        likelihood: share(&model),
        base_likelihood: base.as_deref().map(share),
        difference: base.as_deref().map(|base| difference(&model, base)),
        reward,
        mean_margin: margins.map(|m| m.iter().sum::<f64>() / m.len().max(1) as f64),
    }
}

fn share(right: &[bool]) -> Share {
    let n = right.iter().filter(|right| **right).count();
    let ci = stats::wilson(n, right.len(), CONFIDENCE);
    Share {
        accuracy: n as f64 / right.len().max(1) as f64,
        ci95: [ci.lo, ci.hi],
    }
}

fn difference(model: &[bool], base: &[bool]) -> Difference {
    let parts = |right: &[bool]| -> Vec<Part> {
        let part = |right: &bool| Part::mean(f64::from(u8::from(*right)));
        right.iter().map(part).collect()
    };
    let (ours, theirs) = (parts(model), parts(base));
    let ci = stats::paired_bootstrap(&ours, &theirs, &Bootstrap::default());
    let test = stats::mcnemar(model, base);
    Difference {
        accuracy: stats::ratio(&ours) - stats::ratio(&theirs),
        ci95: [ci.lo, ci.hi],
        p_value: test.p_value,
        only_model: test.only_ours,
        only_base: test.only_theirs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn score(tokens: [usize; 2], log_probs: [f64; 2], base: [f64; 2]) -> PairScore {
        PairScore {
            line: 1,
            tokens,
            log_probs,
            base_log_probs: Some(base),
        }
    }

    #[test]
    fn five_pairs_with_known_scores() {
        let scores = [
            // Likelier a token though less likely in all; gained.
            score([10, 4], [-10.0, -8.0], [-12.0, -8.0]),
            // The base had it right, the model has not.
            score([4, 4], [-8.0, -7.0], [-6.0, -7.0]),
            // Equal is not right.
            score([4, 4], [-8.0, -8.0], [-8.0, -8.0]),
            score([2, 2], [-1.0, -3.0], [-1.0, -2.0]),
            score([2, 2], [-1.0, -3.0], [-3.0, -2.0]),
        ];
        let outcome = judge_pairs(&scores);
        assert_eq!(outcome.likelihood.accuracy, 0.6);
        assert_eq!(outcome.base_likelihood.unwrap().accuracy, 0.6);
        assert_eq!(outcome.reward.unwrap().accuracy, 0.6);
        assert_eq!(outcome.mean_margin, Some((2.0 - 2.0 + 1.0 + 3.0) / 5.0));
        let difference = outcome.difference.unwrap();
        assert_eq!((difference.only_model, difference.only_base), (1, 1));
        assert_eq!((difference.accuracy, difference.p_value), (0.0, 1.0));
        assert!(difference.ci95[0] < 0.0 && difference.ci95[1] > 0.0);
    }

    #[test]
    fn a_base_has_no_reward() {
        let mut one = score([1, 1], [-1.0, -2.0], [0.0, 0.0]);
        one.base_log_probs = None;
        let outcome = judge_pairs(&[one]);
        assert_eq!(outcome.likelihood.accuracy, 1.0);
        assert!(outcome.reward.is_none() && outcome.difference.is_none());
    }
}
