//! What a batch of examples comes to: its loss and the gradient of that, by the run's method.
//!
//! Answers that are taught have a mean over their tokens. Preferences have a loss that is no sum over tokens
//! ([`super::preference`]): a first pass gives the log-probability of each answer, the loss gives each answer a factor,
//! and a second pass adds up the gradient with that factor as the weight of the answer's tokens. Where one pass holds the
//! whole batch, its way forward is not repeated: the same numbers from fewer sums.

use std::collections::BTreeMap;

use super::batch::{mean_loss, rows_of};
use super::preference::{PreferenceStats, Scored, judge};
use super::tree::{micro_batches, pack, pack_weighted};
use super::{LossReport, TrainError, TrainPlan, TrainRow, Trainable};
use crate::recipe::{PreferenceSettings, Settings};

/// Which rows of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Train,
    Valid,
}

/// What a batch comes to.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct BatchLoss {
    /// Mean over trained tokens, or over examples where preferences are learnt.
    pub(super) loss: f64,
    /// Tokens that went through the model, those of two passes counted once.
    pub(super) computed: u64,
    /// What preferences add to that.
    pub(super) preference: Option<PreferenceStats>,
}

/// The loss of a run.
pub(super) struct Objective<'a> {
    plan: &'a TrainPlan,
    reference: Option<Reference>,
}

/// Log-probabilities of answers under the parameters that the run began with.
///
/// They are taken from the very passes that score the policy, rows laid out alike: a pass with another cut of shared
/// beginnings rounds otherwise, and a policy that has learnt nothing would seem to have moved. So those of a batch are
/// computed with it, and only those of the validation, whose passes stay the same, are kept.
struct Reference {
    /// The parameters.
    params: Vec<f32>,
    /// The validation's rows, with their scores.
    valid: Option<(Vec<usize>, Vec<f64>)>,
}

impl<'a> Objective<'a> {
    /// The loss of a run that began with what `initial` gives.
    pub(super) fn new(plan: &'a TrainPlan, initial: impl FnOnce() -> Vec<f32>) -> Self {
        let preference = &plan.settings.preference;
        let has_reference = preference.is_some_and(|settings| settings.has_reference());
        let reference = has_reference.then(|| Reference {
            params: initial(),
            valid: None,
        });
        Self { plan, reference }
    }

    fn rows(&self, side: Side) -> &'a [TrainRow] {
        match side {
            Side::Train => &self.plan.train,
            Side::Valid => &self.plan.valid,
        }
    }

    /// The loss of some examples under `params`, which are the model's.
    pub(super) fn loss<T: Trainable + ?Sized>(
        &mut self,
        model: &mut T,
        params: &[f32],
        side: Side,
        examples: &[usize],
    ) -> Result<BatchLoss, TrainError> {
        let settings = &self.plan.settings;
        let Some(preference) = settings.preference else {
            let loss = mean_loss(model, self.rows(side), examples, settings)?;
            return Ok(BatchLoss {
                loss,
                ..BatchLoss::default()
            });
        };
        let scored = self.score(model, params, side, examples)?;
        let (stats, _) = judge(&preference, &scored);
        Ok(BatchLoss {
            loss: stats.loss,
            computed: 0,
            preference: Some(stats.shown),
        })
    }

    /// The same of training examples, and its gradient in `grads`.
    pub(super) fn gradient<T: Trainable + ?Sized>(
        &mut self,
        model: &mut T,
        params: &[f32],
        examples: &[usize],
        grads: &mut [f32],
    ) -> Result<BatchLoss, TrainError> {
        let (settings, rows) = (&self.plan.settings, &self.plan.train);
        let (cap, share) = (settings.micro_tokens, settings.share_prefixes);
        grads.fill(0.0);
        let mut computed = 0;
        let Some(preference) = settings.preference else {
            let weight: usize = examples.iter().map(|&row| rows[row].n_trained()).sum();
            let mut report = LossReport::default();
            for micro in micro_batches(rows, examples, cap, share) {
                let packed = pack(rows, &micro, share);
                computed += packed.tokens.len() as u64;
                report.merge(&model.loss_and_grads(&packed, 1.0 / weight as f64, grads)?);
            }
            return Ok(BatchLoss {
                loss: report.mean(),
                computed,
                preference: None,
            });
        };
        let which = rows_of(examples, settings.rows_per_example());
        let passes = micro_batches(rows, &which, cap, share);
        // KTO's mismatched answers only score, and would go all the way back for nothing.
        let is_kto = matches!(preference, PreferenceSettings::Kto { .. });
        if let ([whole], false) = (&passes[..], is_kto) {
            return self.gradient_in_one(model, params, (examples, &which, whole), grads);
        }
        let scored = self.score(model, params, Side::Train, examples)?;
        let (stats, factors) = judge(&preference, &scored);
        let mut weights = vec![0f32; rows.len()];
        let mut pulled = Vec::new();
        for (&row, factor) in which.iter().zip(factors) {
            // The model's loss is minus the log-probability, hence the sign.
            weights[row] = -factor as f32;
            if weights[row] != 0.0 {
                pulled.push(row);
            }
        }
        if stats.loss.is_finite() {
            let scale = 1.0 / examples.len() as f64;
            for micro in micro_batches(rows, &pulled, cap, share) {
                let (packed, _) = pack_weighted(rows, &micro, share, &|row| weights[row]);
                computed += packed.tokens.len() as u64;
                model.loss_and_grads(&packed, scale, grads)?;
            }
        }
        Ok(BatchLoss {
            loss: stats.loss,
            computed,
            preference: Some(stats.shown),
        })
    }

    /// The same where one pass holds all rows: it need not be made twice.
    fn gradient_in_one<T: Trainable + ?Sized>(
        &mut self,
        model: &mut T,
        params: &[f32],
        (examples, which, pass): (&[usize], &[usize], &[usize]),
        grads: &mut [f32],
    ) -> Result<BatchLoss, TrainError> {
        let (settings, rows) = (&self.plan.settings, &self.plan.train);
        let Some(preference) = settings.preference else {
            return Ok(BatchLoss::default());
        };
        let reference = self.refer(model, params, Side::Train, which)?;
        let (packed, owners) = pack_weighted(rows, pass, settings.share_prefixes, &|_| 1.0);
        let mut found = None;
        let mut weigh = |losses: &[f64]| {
            let sums = sums(which, owners.iter().zip(losses));
            let (stats, factors) = judge(&preference, &scored(rows, which, &sums, &reference));
            let of_row: BTreeMap<usize, f64> = which.iter().copied().zip(factors).collect();
            found = Some(stats);
            owners.iter().map(|row| -of_row[row] as f32).collect()
        };
        model.weighed_loss_and_grads(&packed, 1.0 / examples.len() as f64, &mut weigh, grads)?;
        // A batch without a single target has no loss.
        let (loss, shown) = found.map_or((f64::NAN, None), |of| (of.loss, Some(of.shown)));
        Ok(BatchLoss {
            loss,
            computed: packed.tokens.len() as u64,
            preference: shown,
        })
    }

    /// The log-probabilities of the rows of some examples, two an example.
    fn score<T: Trainable + ?Sized>(
        &mut self,
        model: &mut T,
        params: &[f32],
        side: Side,
        examples: &[usize],
    ) -> Result<Vec<Scored>, TrainError> {
        let (settings, rows) = (&self.plan.settings, self.rows(side));
        let which = rows_of(examples, settings.rows_per_example());
        let reference = self.refer(model, params, side, &which)?;
        let sums = log_probs(model, rows, &which, settings)?;
        Ok(scored(rows, &which, &sums, &reference))
    }

    /// The reference's scores of some rows, none if the method has no reference.
    fn refer<T: Trainable + ?Sized>(
        &mut self,
        model: &mut T,
        params: &[f32],
        side: Side,
        which: &[usize],
    ) -> Result<Vec<f64>, TrainError> {
        let (settings, rows) = (&self.plan.settings, self.rows(side));
        let Some(reference) = &mut self.reference else {
            return Ok(Vec::new());
        };
        if let (Side::Valid, Some((of, known))) = (side, &reference.valid)
            && of == which
        {
            return Ok(known.clone());
        }
        model.set_params(&reference.params);
        let sums = log_probs(model, rows, which, settings);
        model.set_params(params);
        let sums = sums?;
        if side == Side::Valid {
            reference.valid = Some((which.to_vec(), sums.clone()));
        }
        Ok(sums)
    }
}

/// Rows with their log-probabilities under the policy, `sums`, and under the reference, if there is one.
fn scored(rows: &[TrainRow], which: &[usize], sums: &[f64], reference: &[f64]) -> Vec<Scored> {
    let scored = |(i, (&row, &policy)): (usize, (&usize, &f64))| Scored {
        verdict: rows[row].verdict,
        policy,
        reference: reference.get(i).copied().unwrap_or_default(),
        tokens: rows[row].n_trained(),
    };
    which.iter().zip(sums).enumerate().map(scored).collect()
}

/// The summed log-probability of each row's trained tokens, in the order of `which`.
pub(crate) fn log_probs<T: Trainable + ?Sized>(
    model: &mut T,
    rows: &[TrainRow],
    which: &[usize],
    settings: &Settings,
) -> Result<Vec<f64>, TrainError> {
    let (cap, share) = (settings.micro_tokens, settings.share_prefixes);
    let (mut all, mut losses) = (Vec::new(), Vec::new());
    for micro in micro_batches(rows, which, cap, share) {
        let (packed, owners) = pack_weighted(rows, &micro, share, &|_| 1.0);
        model.target_losses(&packed, &mut losses)?;
        all.extend(owners.into_iter().zip(losses.iter().copied()));
    }
    Ok(sums(which, all.iter().map(|(owner, loss)| (owner, loss))))
}

/// Adds up targets' losses by the row they are of; minus that, in the order of `which`.
fn sums<'a>(which: &[usize], losses: impl Iterator<Item = (&'a usize, &'a f64)>) -> Vec<f64> {
    let mut sums = BTreeMap::<usize, f64>::new();
    for (owner, loss) in losses {
        *sums.entry(*owner).or_default() -= loss;
    }
    let sum = |row: &usize| sums.get(row).copied().unwrap_or(0.0);
    which.iter().map(sum).collect()
}
