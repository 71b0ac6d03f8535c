//! Learning from preferences: what a batch of scored answers comes to under each method.
//!
//! | method | a reward is | held to |
//! |---|---|---|
//! | dpo | beta times the gain on the reference | the model that the run began with |
//! | kto | the same, of answers that are each called desirable or not | the same |
//! | simpo | beta times the average log-probability | nothing |
//! | orpo | the average log-probability | the likelihood of the preferred answers |

pub(super) mod kto;
pub mod loss;

use serde::{Deserialize, Serialize};

use super::Verdict;
use crate::recipe::PreferenceSettings;
use crate::stats::{CONFIDENCE, wilson};
use loss::{Kto, Pair};

/// How well answers are told apart: part of a run's events. Means over a batch, or over all validation examples.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct PreferenceStats {
    /// Examples.
    pub examples: usize,
    /// Mean reward of preferred (or desirable) answers, if there are any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewards_chosen: Option<f64>,
    /// Mean reward of the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewards_rejected: Option<f64>,
    /// The difference of the two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rewards_margin: Option<f64>,
    /// Share of pairs whose preferred answer has the greater reward; of single answers, share on their side of the
    /// reference point. Equal is not greater: where nothing was learnt yet, the policy is the reference.
    pub accuracy: f64,
    /// Its 95% interval (Wilson), in a validation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy_ci95: Option<[f64; 2]>,
}

impl PreferenceStats {
    /// With the interval of its accuracy.
    #[must_use]
    pub fn with_interval(self) -> Self {
        let right = (self.accuracy * self.examples as f64).round() as usize;
        let ci = wilson(right, self.examples, CONFIDENCE);
        Self {
            accuracy_ci95: Some([ci.lo, ci.hi]),
            ..self
        }
    }
}

/// A row's answer with its scores.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scored {
    pub(super) verdict: Verdict,
    /// Summed log-probability of its tokens under the policy.
    pub(super) policy: f64,
    /// The same under the reference, if the method has one.
    pub(super) reference: f64,
    /// Its tokens.
    pub(super) tokens: usize,
}

impl Scored {
    fn gain(&self) -> f64 {
        self.policy - self.reference
    }

    fn mean(&self) -> f64 {
        self.policy / self.tokens as f64
    }
}

/// What a batch comes to.
pub(super) struct Judged {
    /// Mean loss over examples.
    pub(super) loss: f64,
    pub(super) shown: PreferenceStats,
}

/// Adds up to [`PreferenceStats`].
#[derive(Default)]
struct Tally {
    loss: f64,
    examples: usize,
    right: usize,
    chosen: (f64, usize),
    rejected: (f64, usize),
}

impl Tally {
    fn reward(&mut self, desirable: bool, reward: f64) {
        let (sum, n) = if desirable {
            &mut self.chosen
        } else {
            &mut self.rejected
        };
        *sum += reward;
        *n += 1;
    }

    fn example(&mut self, loss: f64, is_right: bool) {
        self.loss += loss;
        self.examples += 1;
        self.right += usize::from(is_right);
    }

    fn judged(self) -> Judged {
        let mean = |(sum, n): (f64, usize)| (n > 0).then(|| sum / n as f64);
        let (chosen, rejected) = (mean(self.chosen), mean(self.rejected));
        let n = self.examples as f64;
        Judged {
            loss: self.loss / n,
            shown: PreferenceStats {
                examples: self.examples,
                rewards_chosen: chosen,
                rewards_rejected: rejected,
                rewards_margin: chosen
                    .zip(rejected)
                    .map(|(chosen, rejected)| chosen - rejected),
                accuracy: self.right as f64 / n,
                accuracy_ci95: None,
            },
        }
    }
}

/// The loss of examples of two rows each, and the derivative of each example's loss by each row's log-probability.
pub(super) fn judge(settings: &PreferenceSettings, rows: &[Scored]) -> (Judged, Vec<f64>) {
    let mut tally = Tally::default();
    let mut factors = Vec::with_capacity(rows.len());
    let pairs = rows.chunks_exact(2).map(|pair| (&pair[0], &pair[1]));
    if let PreferenceSettings::Kto {
        beta,
        desirable_weight,
        undesirable_weight,
    } = *settings
    {
        let gains: Vec<f64> = pairs.clone().map(|(_, other)| other.gain()).collect();
        let kl = loss::kto_kl(&gains);
        for (row, _) in pairs {
            let desirable = row.verdict == Verdict::Chosen;
            let weight = if desirable {
                desirable_weight
            } else {
                undesirable_weight
            };
            let how = Kto {
                beta,
                weight,
                desirable,
                kl,
            };
            let mut d = 0.0;
            loss::kto_backward(&mut d, row.policy, row.reference, &how);
            factors.extend([d, 0.0]);
            tally.reward(desirable, beta * row.gain());
            let above = row.gain() - kl;
            let is_right = if desirable { above > 0.0 } else { above < 0.0 };
            tally.example(loss::kto(row.policy, row.reference, &how), is_right);
        }
        return (tally.judged(), factors);
    }
    for (chosen, rejected) in pairs {
        let pair = |of: fn(&Scored) -> f64| Pair {
            chosen: of(chosen),
            rejected: of(rejected),
        };
        let mut d = Pair::default();
        let (policy, reference) = (pair(|row| row.policy), pair(|row| row.reference));
        let mean = pair(Scored::mean);
        let (loss, scale) = match *settings {
            PreferenceSettings::Dpo { beta } => {
                loss::dpo_backward(&mut d, policy, reference, beta);
                (loss::dpo(policy, reference, beta), beta)
            }
            PreferenceSettings::Simpo { beta, gamma } => {
                loss::simpo_backward(&mut d, mean, beta, gamma);
                (loss::simpo(mean, beta, gamma), beta)
            }
            PreferenceSettings::Orpo { lambda } => {
                loss::orpo_backward(&mut d, mean, lambda);
                (loss::orpo(mean, lambda), 1.0)
            }
            PreferenceSettings::Kto { .. } => unreachable!("judged above"),
        };
        // A derivative by an average is one by the sum, a token's share of it.
        let (of_sum, reward) = if settings.has_reference() {
            ([1.0, 1.0], pair(Scored::gain))
        } else {
            ([chosen, rejected].map(|row| 1.0 / row.tokens as f64), mean)
        };
        factors.extend([d.chosen * of_sum[0], d.rejected * of_sum[1]]);
        tally.reward(true, scale * reward.chosen);
        tally.reward(false, scale * reward.rejected);
        tally.example(loss, reward.chosen > reward.rejected);
    }
    (tally.judged(), factors)
}
