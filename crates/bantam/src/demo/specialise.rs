//! The demo's training: the recipe that fits its quarter of an hour, on the rows it has written.

use std::sync::atomic::AtomicBool;

use bantam_lab::recipe::{
    CheckpointRecipe, DataRecipe, LoraRecipe, OptimRecipe, Recipe, ValidRecipe,
};

use super::data::DemoData;
use super::rows::SYSTEM;
use super::scorecard::Training;
use crate::commands::{Context, train};
use crate::loader::{self, Base};
use crate::settings::{DemoSettings, TrainMode, TrainSettings};

/// Short rows want small batches; the rate is high because the whole run has under 900 updates.
const RANK: usize = 16;
const ALPHA: f64 = 32.0;
const LR: f64 = 1.5e-3;
const BATCH: usize = 4;
const EPOCHS: usize = 3;
const WARMUP_STEPS: usize = 30;
/// Updates between validations: one an epoch.
const VALID_EVERY: usize = 284;
/// Seconds of work that a crash may cost.
const CHECKPOINT_S: f64 = 60.0;

/// Trains in `DIR/run`, or goes on there, or finds it done.
pub(crate) fn specialise(
    context: &Context,
    settings: &DemoSettings,
    base: &Base,
    data: &DemoData,
    cancel: &AtomicBool,
) -> anyhow::Result<Training> {
    let out = settings.out.join("run");
    let recipe = recipe(settings, data, &base.name);
    let settings = TrainSettings {
        recipe,
        base: base.name.clone(),
        train: data.train_file.clone(),
        mode: TrainMode::Run(out.clone()),
        allow_other_machine: false,
        worker: None,
        threads: settings.threads,
        json: false,
    };
    let result = train::fit(&context.printer, base, &settings, &out, cancel)?;
    Ok(Training {
        run: out,
        rank: RANK,
        alpha: ALPHA,
        lr: LR,
        batch: BATCH,
        epochs: EPOCHS,
        rows: result.rows,
        tokens: result.tokens,
        train_s: result.train_s,
        tok_per_s: result.tok_per_s,
        last_loss: result.last_loss,
        valid_loss: result.valid_loss,
        peak_rss_mb: result.peak_rss_mb,
        adapter_bytes: loader::bytes(&result.adapter),
        adapter_sha256: result.sha256,
    })
}

fn recipe(settings: &DemoSettings, data: &DemoData, base: &str) -> Recipe {
    let max_steps = usize::try_from(settings.max_steps)
        .ok()
        .filter(|steps| *steps < usize::MAX);
    Recipe {
        base: Some(base.to_owned()),
        seed: Some(settings.seed),
        data: DataRecipe {
            train: Some(data.train_file.clone()),
            valid: Some(data.valid_file.clone()),
            system: Some(SYSTEM.to_owned()),
            ..DataRecipe::default()
        },
        lora: LoraRecipe {
            rank: Some(RANK),
            alpha: Some(ALPHA),
            ..LoraRecipe::default()
        },
        optim: OptimRecipe {
            lr: Some(LR),
            epochs: Some(EPOCHS),
            batch_rows: Some(BATCH),
            warmup_steps: Some(WARMUP_STEPS),
            max_steps,
            ..OptimRecipe::default()
        },
        valid: ValidRecipe {
            every: Some(VALID_EVERY),
            patience: Some(0),
        },
        checkpoint: CheckpointRecipe {
            every_steps: None,
            every_s: Some(CHECKPOINT_S),
            each_epoch: None,
        },
        ..Recipe::default()
    }
}
