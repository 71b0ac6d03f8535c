//! The losses of preference training, each as a pair: the loss of one example, and its derivative by the policy's
//! log-probabilities.
//!
//! A policy enters only through the log-probability of each answer, so a derivative is one number an answer: the factor by
//! which the gradient of that answer's log-probability is multiplied. Inside, all is f64; `R` is what comes in and goes
//! out.

use bantam_kernels::Real;

/// A number for each of the two answers to one prompt: log-probabilities, or derivatives by them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pair<T> {
    /// Of the answer that is preferred.
    pub chosen: T,
    /// Of the other.
    pub rejected: T,
}

/// An average log-probability above this counts as this: the odds of a certain answer are no number.
const MOST_CERTAIN: f64 = -1e-9;

/// `ln(1 + e^x)`, without overflow and exact to the last digits at both ends.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `1 / (1 + e^-x)`
fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        let e = x.exp();
        e / (1.0 + e)
    }
}

/// `-ln sigmoid(x)`, for which every loss here but KTO's is a name.
fn log_loss(x: f64) -> f64 {
    softplus(-x)
}

/// The derivative of [`log_loss`]: `-sigmoid(-x)`.
fn log_loss_backward(x: f64) -> f64 {
    -sigmoid(-x)
}

fn dpo_margin<R: Real>(policy: Pair<R>, reference: Pair<R>, beta: f64) -> f64 {
    let gain = |policy: R, reference: R| policy.to_f64() - reference.to_f64();
    beta * (gain(policy.chosen, reference.chosen) - gain(policy.rejected, reference.rejected))
}

/// Direct preference optimisation: the preferred answer should gain more on the reference than the other.
///
/// Shapes:   policy, reference: summed log-probability of each answer's tokens; the loss is of one pair
/// Math:     z = beta ((policy_w - reference_w) - (policy_l - reference_l));  loss = -ln sigmoid(z)
/// Numerics: in f64 inside, finite for every finite input; the loss is ln 2 where policy and reference are equal
/// Errors:   none; what is no number stays none
/// Source:   Rafailov et al. 2023, arXiv:2305.18290, eq. 7
pub fn dpo<R: Real>(policy: Pair<R>, reference: Pair<R>, beta: f64) -> R {
    R::from_f64(log_loss(dpo_margin(policy, reference, beta)))
}

/// The derivative of [`dpo`] by the policy's log-probabilities, added to `d_policy`.
///
/// `z = beta (policy_w - policy_l + ...)`, hence `d_w += beta loss'(z)` and `d_l -= beta loss'(z)`.
pub fn dpo_backward<R: Real>(
    d_policy: &mut Pair<R>,
    policy: Pair<R>,
    reference: Pair<R>,
    beta: f64,
) {
    let d = beta * log_loss_backward(dpo_margin(policy, reference, beta));
    d_policy.chosen += R::from_f64(d);
    d_policy.rejected += R::from_f64(-d);
}

fn simpo_margin<R: Real>(mean: Pair<R>, beta: f64, gamma: f64) -> f64 {
    beta * (mean.chosen.to_f64() - mean.rejected.to_f64()) - gamma
}

/// Simple preference optimisation: the preferred answer's average log-probability should lead by a margin; no reference.
///
/// Shapes:   mean: average log-probability of each answer's tokens; the loss is of one pair
/// Math:     z = beta (mean_w - mean_l) - gamma;  loss = -ln sigmoid(z)
/// Numerics: in f64 inside, finite for every finite input
/// Errors:   none; what is no number stays none
/// Source:   Meng et al. 2024, arXiv:2405.14734, eq. 6
pub fn simpo<R: Real>(mean: Pair<R>, beta: f64, gamma: f64) -> R {
    R::from_f64(log_loss(simpo_margin(mean, beta, gamma)))
}

/// The derivative of [`simpo`] by the average log-probabilities, added to `d_mean`.
///
/// `z = beta (mean_w - mean_l) - gamma`, hence `d_w += beta loss'(z)` and `d_l -= beta loss'(z)`.
pub fn simpo_backward<R: Real>(d_mean: &mut Pair<R>, mean: Pair<R>, beta: f64, gamma: f64) {
    let d = beta * log_loss_backward(simpo_margin(mean, beta, gamma));
    d_mean.chosen += R::from_f64(d);
    d_mean.rejected += R::from_f64(-d);
}

/// Not `min`, which would turn what is no number into one.
fn not_certain(mean: f64) -> f64 {
    if mean > MOST_CERTAIN {
        MOST_CERTAIN
    } else {
        mean
    }
}

/// `ln(p / (1 - p))` of an average log-probability `ln p`.
fn log_odds(mean: f64) -> f64 {
    let mean = not_certain(mean);
    // Two forms of ln(1 - e^mean), each where it loses nothing.
    let rest = if mean > -std::f64::consts::LN_2 {
        (-mean.exp_m1()).ln()
    } else {
        (-mean.exp()).ln_1p()
    };
    mean - rest
}

/// The derivative of [`log_odds`]: `1 + e^mean / (1 - e^mean) = -1 / (e^mean - 1)`.
fn log_odds_backward(mean: f64) -> f64 {
    -1.0 / not_certain(mean).exp_m1()
}

/// The odds-ratio part of [`orpo`]: `-ln sigmoid(log_odds_w - log_odds_l)`.
pub fn odds_ratio<R: Real>(mean: Pair<R>) -> R {
    R::from_f64(log_loss(odds_margin(mean)))
}

fn odds_margin<R: Real>(mean: Pair<R>) -> f64 {
    log_odds(mean.chosen.to_f64()) - log_odds(mean.rejected.to_f64())
}

/// Odds-ratio preference optimisation: the preferred answer is learnt, and its odds should lead; no reference.
///
/// Shapes:   mean: average log-probability of each answer's tokens; the loss is of one pair
/// Math:     odds(p) = p / (1 - p);  loss = -mean_w - lambda ln sigmoid(ln odds(e^mean_w) - ln odds(e^mean_l))
/// Numerics: in f64 inside; an average log-probability above -1e-9 counts as -1e-9, so that odds stay finite
/// Errors:   none; what is no number stays none
/// Source:   Hong et al. 2024, arXiv:2403.07691, eqs. 6 and 7
pub fn orpo<R: Real>(mean: Pair<R>, lambda: f64) -> R {
    R::from_f64(lambda * log_loss(odds_margin(mean)) - mean.chosen.to_f64())
}

/// The derivative of [`orpo`] by the average log-probabilities, added to `d_mean`.
///
/// `loss = -mean_w + lambda log_loss(z)` with `z = log_odds(mean_w) - log_odds(mean_l)`, hence
/// `d_w += -1 + lambda log_loss'(z) log_odds'(mean_w)` and `d_l -= lambda log_loss'(z) log_odds'(mean_l)`.
pub fn orpo_backward<R: Real>(d_mean: &mut Pair<R>, mean: Pair<R>, lambda: f64) {
    let d = lambda * log_loss_backward(odds_margin(mean));
    d_mean.chosen += R::from_f64(d * log_odds_backward(mean.chosen.to_f64()) - 1.0);
    d_mean.rejected += R::from_f64(-d * log_odds_backward(mean.rejected.to_f64()));
}

/// What [`kto`] needs beside an answer's two log-probabilities.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kto {
    /// How soon gains and losses saturate.
    pub beta: f64,
    /// Weight of this answer: one of two, as it is desirable or not.
    pub weight: f64,
    /// Whether the answer is desirable.
    pub desirable: bool,
    /// The reference point: how far the policy has moved from the reference on answers to other prompts, at least 0.
    /// It is a constant of the batch, and nothing is derived by it.
    pub kl: f64,
}

impl Kto {
    /// Up for an answer that is treated as it should be.
    fn margin(&self, policy: f64, reference: f64) -> f64 {
        let sign = if self.desirable { 1.0 } else { -1.0 };
        sign * self.beta * (policy - reference - self.kl)
    }
}

/// The reference point of [`kto`]: the mean gain of answers that belong to other prompts, and 0 where that is negative.
///
/// Shapes:   gains: policy minus reference log-probability of each mismatched answer of a batch
/// Math:     kl = max(0, mean_i gains_i)
/// Numerics: in f64; 0 for an empty batch
/// Errors:   none; what is no number stays none
/// Source:   Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1
pub fn kto_kl(gains: &[f64]) -> f64 {
    if gains.is_empty() {
        return 0.0;
    }
    let mean = gains.iter().sum::<f64>() / gains.len() as f64;
    // Not `max`, which would turn what is no number into 0.
    if mean < 0.0 { 0.0 } else { mean }
}

/// Kahneman-Tversky optimisation: a desirable answer should gain on the reference, an undesirable one lose.
///
/// Shapes:   policy, reference: summed log-probability of one answer's tokens; the loss is of one answer
/// Math:     z = +-beta (policy - reference - kl), plus where desirable;  loss = weight (1 - sigmoid(z))
/// Numerics: in f64 inside, between 0 and `weight` for every finite input
/// Errors:   none; what is no number stays none
/// Source:   Ethayarajh et al. 2024, arXiv:2402.01306, section 4.1, L_KTO
pub fn kto<R: Real>(policy: R, reference: R, how: &Kto) -> R {
    let z = how.margin(policy.to_f64(), reference.to_f64());
    R::from_f64(how.weight * sigmoid(-z))
}

/// The derivative of [`kto`] by the policy's log-probability, added to `d_policy`.
///
/// `loss = weight sigmoid(-z)`, hence `d += -+beta weight sigmoid(z) sigmoid(-z)`.
pub fn kto_backward<R: Real>(d_policy: &mut R, policy: R, reference: R, how: &Kto) {
    let z = how.margin(policy.to_f64(), reference.to_f64());
    let d = -how.beta * how.weight * sigmoid(z) * sigmoid(-z);
    *d_policy += R::from_f64(if how.desirable { d } else { -d });
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Compares a derivative with central differences.
    fn check(f: impl Fn(f64) -> f64, at: f64, derivative: f64) -> Result<(), TestCaseError> {
        let h = 1e-5 * at.abs().max(1.0);
        let expected = (f(at + h) - f(at - h)) / (2.0 * h);
        let error = (derivative - expected).abs();
        prop_assert!(
            error <= 1e-6 * expected.abs().max(1.0),
            "at {at}: {derivative} {expected}"
        );
        Ok(())
    }

    fn check_pair(
        f: impl Fn(Pair<f64>) -> f64,
        at: Pair<f64>,
        d: Pair<f64>,
    ) -> Result<(), TestCaseError> {
        check(|chosen| f(Pair { chosen, ..at }), at.chosen, d.chosen)?;
        check(
            |rejected| f(Pair { rejected, ..at }),
            at.rejected,
            d.rejected,
        )
    }

    fn narrow(pair: Pair<f64>) -> Pair<f32> {
        Pair {
            chosen: pair.chosen as f32,
            rejected: pair.rejected as f32,
        }
    }

    proptest! {
        #[test]
        fn gradients_close(
            (chosen, rejected, r_chosen, r_rejected) in (-90.0f64..-0.5, -90.0f64..-0.5, -90.0f64..-0.5, -90.0f64..-0.5),
            (beta, gamma, lambda, kl, weight) in (0.01f64..2.0, 0.0f64..2.0, 0.0f64..1.0, 0.0f64..3.0, 0.2f64..2.0),
            desirable: bool,
        ) {
            let (policy, reference) = (Pair { chosen, rejected }, Pair { chosen: r_chosen, rejected: r_rejected });
            let mut d = Pair::default();
            dpo_backward(&mut d, policy, reference, beta);
            check_pair(|policy| dpo(policy, reference, beta), policy, d)?;

            let mean = Pair { chosen: chosen / 30.0, rejected: rejected / 30.0 };
            let mut d = Pair::default();
            simpo_backward(&mut d, mean, beta, gamma);
            check_pair(|mean| simpo(mean, beta, gamma), mean, d)?;
            let mut d = Pair::default();
            orpo_backward(&mut d, mean, lambda);
            check_pair(|mean| orpo(mean, lambda), mean, d)?;

            let how = Kto { beta, weight, desirable, kl };
            let mut d = 0.0;
            kto_backward(&mut d, chosen, r_chosen, &how);
            check(|policy| kto(policy, r_chosen, &how), chosen, d)?;

            // In f32 the same, as near as f32 is.
            let loss = f64::from(dpo(narrow(policy), narrow(reference), beta));
            prop_assert!((loss - dpo(policy, reference, beta)).abs() < 1e-4 * loss.max(1.0));
            let mut d32 = Pair::default();
            orpo_backward(&mut d32, narrow(mean), lambda);
            let mut d = Pair::default();
            orpo_backward(&mut d, mean, lambda);
            prop_assert!(f64::from(d32.chosen - d.chosen as f32).abs() < 1e-3 * d.chosen.abs().max(1.0));
        }
    }

    #[test]
    fn a_backward_adds() {
        let (policy, reference) = (
            Pair {
                chosen: -3.0,
                rejected: -4.0,
            },
            Pair::default(),
        );
        let (mut once, mut twice) = (Pair::default(), Pair::default());
        dpo_backward(&mut once, policy, reference, 0.1);
        dpo_backward(&mut twice, policy, reference, 0.1);
        dpo_backward(&mut twice, policy, reference, 0.1);
        assert_eq!(twice.chosen, 2.0 * once.chosen);
        assert_eq!(twice.rejected, 2.0 * once.rejected);
    }

    #[test]
    fn extremes_stay_finite_and_what_is_no_number_shows() {
        let far = Pair {
            chosen: -1e6,
            rejected: 0.0,
        };
        let near = Pair {
            chosen: 0.0,
            rejected: -1e6,
        };
        for pair in [far, near, Pair::default()] {
            let mut d = Pair::<f64>::default();
            orpo_backward(&mut d, pair, 0.1);
            dpo_backward(&mut d, pair, Pair::default(), 0.1);
            simpo_backward(&mut d, pair, 2.0, 1.0);
            assert!(d.chosen.is_finite() && d.rejected.is_finite(), "{pair:?}");
            let losses = [
                orpo(pair, 0.1),
                dpo(pair, Pair::default(), 0.1),
                simpo(pair, 2.0, 1.0),
            ];
            assert!(losses.iter().all(|loss: &f64| loss.is_finite()));
        }
        let none = Pair {
            chosen: f64::NAN,
            rejected: -1.0,
        };
        assert!(dpo(none, Pair::default(), 0.1).is_nan());
        assert!(simpo(none, 2.0, 1.0).is_nan());
        assert!(orpo(none, 0.1).is_nan());
        assert!(kto_kl(&[f64::NAN]).is_nan());
        assert_eq!(
            (kto_kl(&[]), kto_kl(&[-2.0, 1.0]), kto_kl(&[2.0, 1.0])),
            (0.0, 0.0, 1.5)
        );
        let equal = dpo(near, near, 0.1);
        assert_eq!(equal, std::f64::consts::LN_2);
    }

    /// Losses and derivatives from TRL's trainers; `make_preference.py` beside the file made it.
    #[derive(serde::Deserialize)]
    struct Golden {
        policy: [Vec<f64>; 2],
        reference: [Vec<f64>; 2],
        mismatched: [Vec<f64>; 2],
        tokens: [Vec<f64>; 2],
        dpo: Vec<Pairs>,
        kto: Vec<Batch>,
        simpo: Vec<Pairs>,
        orpo: Vec<Pairs>,
    }

    /// Of every pair: the loss, and its derivatives by the log-probabilities of the two.
    #[derive(serde::Deserialize)]
    struct Pairs {
        #[serde(default)]
        beta: f64,
        #[serde(default)]
        gamma: f64,
        #[serde(default)]
        lambda: f64,
        rows: Vec<[f64; 3]>,
    }

    /// The mean loss of all answers, the first half desirable.
    #[derive(serde::Deserialize)]
    struct Batch {
        beta: f64,
        weights: [f64; 2],
        loss: f64,
        kl: f64,
        grads: Vec<f64>,
    }

    fn close(ours: f64, trl: f64) {
        let error = (ours - trl).abs();
        assert!(error <= 1e-6 * trl.abs().max(1.0), "{ours} {trl}");
    }

    #[test]
    fn losses_are_those_of_trl() {
        let text = include_str!("../../../../testkit/goldens/preference/losses.json");
        let golden: Golden = serde_json::from_str(text).unwrap();
        let pair = |[chosen, rejected]: &[Vec<f64>; 2], i: usize| Pair {
            chosen: chosen[i],
            rejected: rejected[i],
        };
        let n = golden.policy[0].len();
        for i in 0..n {
            let (policy, reference) = (pair(&golden.policy, i), pair(&golden.reference, i));
            let tokens = pair(&golden.tokens, i);
            let mean = Pair {
                chosen: policy.chosen / tokens.chosen,
                rejected: policy.rejected / tokens.rejected,
            };
            let compare = |loss: f64, d: Pair<f64>, [trl, d_chosen, d_rejected]: [f64; 3]| {
                close(loss, trl);
                close(d.chosen, d_chosen);
                close(d.rejected, d_rejected);
            };
            for Pairs { beta, rows, .. } in &golden.dpo {
                let mut d = Pair::default();
                dpo_backward(&mut d, policy, reference, *beta);
                compare(dpo(policy, reference, *beta), d, rows[i]);
            }
            for Pairs {
                beta, gamma, rows, ..
            } in &golden.simpo
            {
                let mut d = Pair::default();
                simpo_backward(&mut d, mean, *beta, *gamma);
                compare(simpo(mean, *beta, *gamma), d, rows[i]);
            }
            for Pairs { lambda, rows, .. } in &golden.orpo {
                let mut d = Pair::default();
                orpo_backward(&mut d, mean, *lambda);
                compare(orpo(mean, *lambda), d, rows[i]);
            }
        }
        let [moved, begun] = &golden.mismatched;
        let gains: Vec<f64> = moved.iter().zip(begun).map(|(a, b)| a - b).collect();
        for batch in &golden.kto {
            let kl = kto_kl(&gains);
            close(kl, batch.kl);
            let mut sum = 0.0;
            for side in 0..2 {
                let how = Kto {
                    beta: batch.beta,
                    weight: batch.weights[side],
                    desirable: side == 0,
                    kl,
                };
                for i in 0..n {
                    let (policy, reference) = (golden.policy[side][i], golden.reference[side][i]);
                    sum += kto(policy, reference, &how);
                    let mut d = 0.0;
                    kto_backward(&mut d, policy, reference, &how);
                    close(d / (2 * n) as f64, batch.grads[side * n + i]);
                }
            }
            close(sum / (2 * n) as f64, batch.loss);
        }
    }
}
