//! What a run will take, before its first step: rows and tokens counted, time from a few real passes on this machine.
//!
//! The passes are made on representative micro-batches and keep nothing: the run that follows begins as if they had not
//! been made.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::batch::{Batches, rows_of};
use super::tree::{micro_batches, pack};
use super::{Form, TrainError, TrainPlan, Trainable, peak_rss_mb, status_mb};

/// Steps that are looked at; the counts of longer runs are scaled up from these.
const SAMPLE_STEPS: usize = 256;
/// Passes that are timed.
const TIMED: usize = 3;
/// Seconds after which no further pass is timed.
const ENOUGH_S: f64 = 2.0;

/// What a run will take: the object of `bantam train --dry-run --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Optimiser steps.
    pub steps: usize,
    /// Rows, each time it will be seen.
    pub rows: u64,
    /// Tokens of those rows.
    pub tokens: u64,
    /// Tokens that will go through the model for them.
    pub computed_tokens: u64,
    /// Parameters being trained.
    pub params: usize,
    /// Most tokens a backward pass.
    pub micro_tokens: usize,
    /// Tokens of rows a second of training steps.
    pub tok_per_s: f64,
    /// Seconds of training steps.
    pub train_s: f64,
    /// Seconds of validation.
    pub valid_s: f64,
    /// Largest resident memory of this process, in MiB.
    pub peak_rss_mb: u64,
}

/// Counts and times a run that has not begun.
pub fn estimate<T: Trainable + ?Sized>(
    plan: &TrainPlan,
    model: &mut T,
    clock: &dyn Fn() -> Duration,
) -> Result<Estimate, TrainError> {
    let settings = &plan.settings;
    let (cap, share, steps) = (
        settings.micro_tokens,
        settings.share_prefixes,
        settings.optim.steps,
    );
    let mut batches = Batches::new(plan);
    let n = steps.min(batches.per_epoch());
    let sampled: Vec<usize> = match n.div_ceil(SAMPLE_STEPS) {
        1 => (0..n).collect(),
        _ => (0..SAMPLE_STEPS).map(|i| i * n / SAMPLE_STEPS).collect(),
    };
    let (mut rows, mut tokens, mut passes) = (0, 0, Vec::new());
    for &step in &sampled {
        let mut batch = batches.at(step).to_vec();
        batch.retain(|row| !plan.skipped.contains(row));
        rows += batch.len() as u64;
        let batch = rows_of(&batch, settings.rows_per_example());
        let lens = batch.iter().map(|row| plan.train[*row].tokens.len() as u64);
        tokens += lens.sum::<u64>();
        passes.extend(micro_batches(&plan.train, &batch, cap, share));
    }
    let computed = |rows: &Vec<usize>| pack(&plan.train, rows, share).tokens.len() as u64;
    let mut passes: Vec<(u64, Vec<usize>)> = passes
        .into_iter()
        .map(|rows| (computed(&rows), rows))
        .collect();
    passes.sort();
    let all: u64 = passes.iter().map(|(tokens, _)| tokens).sum();
    let scaled = |count: u64| count * steps as u64 / sampled.len() as u64;
    let (rows, tokens, computed_tokens) = (scaled(rows), scaled(tokens), scaled(all));

    let params = match &plan.init {
        Some(params) => params.clone(),
        None => model.initial_params(settings.seed),
    };
    let n_params = params.len();
    model.set_params(&params);
    // Preferences take a pass that scores, and one more where there is a reference.
    let forwards = match &settings.preference {
        None => 0.0,
        Some(preference) if preference.has_reference() => 2.0,
        Some(_) => 1.0,
    };
    let (mut time, mut forward) = (Timing::default(), Timing::default());
    let mut grads = vec![0f32; n_params];
    // The largest first: it takes the memory that the others then find there.
    let middles = (0..TIMED).map(|i| (2 * i + 1) * passes.len() / (2 * TIMED));
    for (i, at) in [passes.len() - 1].into_iter().chain(middles).enumerate() {
        if i > 1 && time.seconds > ENOUGH_S {
            break;
        }
        let packed = pack(&plan.train, &passes[at].1, share);
        let began = clock();
        model.loss_and_grads(&packed, 1.0, &mut grads)?;
        let seconds = (clock() - began).as_secs_f64();
        if i == 0 && seconds < ENOUGH_S {
            continue;
        }
        time.add(packed.tokens.len(), seconds);
        if forwards > 0.0 {
            let began = clock();
            model.loss(&packed)?;
            forward.add(packed.tokens.len(), (clock() - began).as_secs_f64());
        }
    }
    let train_s = time.of(computed_tokens) + forwards * forward.of(computed_tokens);
    let mut valid_s = 0.0;
    if !plan.valid.is_empty() {
        let which: Vec<usize> = (0..plan.valid.len()).collect();
        let passes = micro_batches(&plan.valid, &which, cap, share);
        let packed = pack(&plan.valid, &passes[passes.len() / 2], share);
        let began = clock();
        model.loss(&packed)?;
        let mut time = Timing::default();
        time.add(packed.tokens.len(), (clock() - began).as_secs_f64());
        let all: usize = passes
            .iter()
            .map(|rows| pack(&plan.valid, rows, share).tokens.len())
            .sum();
        let times = steps.div_ceil(settings.valid.every);
        valid_s = time.of((all * times) as u64);
    }
    drop(grads);
    Ok(Estimate {
        steps,
        rows,
        tokens,
        computed_tokens,
        params: n_params,
        micro_tokens: cap,
        tok_per_s: super::looper::rate(tokens, train_s),
        train_s,
        valid_s,
        peak_rss_mb: peak(model.form(), n_params, !plan.valid.is_empty()),
    })
}

/// What is resident now, and what the loop adds: two moments, the gradient, the best parameters; and for an adapter's
/// checkpoint all but the gradient once more.
fn peak(form: Form<'_>, n_params: usize, validates: bool) -> u64 {
    let best = usize::from(validates);
    let again = match form {
        Form::Adapter(_) => 3 + best,
        Form::Model(_) => 0,
    };
    let floats = n_params * (2 + 1 + best + again);
    peak_rss_mb().max(status_mb("VmRSS:") + ((floats as u64 * 4) >> 20))
}

#[derive(Default)]
struct Timing {
    tokens: usize,
    seconds: f64,
}

impl Timing {
    fn add(&mut self, tokens: usize, seconds: f64) {
        self.tokens += tokens;
        self.seconds += seconds;
    }

    /// Seconds that so many tokens take.
    fn of(&self, tokens: u64) -> f64 {
        self.seconds / self.tokens.max(1) as f64 * tokens as f64
    }
}
