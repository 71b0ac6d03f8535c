//! Training: hours of updates that end with the same bytes however often they are stopped.
//!
//! [`TrainPlan::new`] turns a recipe and tokenised rows into a plan; [`train`] carries it out in a run directory, on
//! anything [`Trainable`]. Reports go out as [`RunEvent`]s. The clock is the caller's: it dates the reports and paces
//! the checkpoints, and nothing else depends on it.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use bantam_kernels::Compute;
use serde::{Deserialize, Serialize};

use crate::events::RunEvent;

pub mod adamw;
mod batch;
mod checkpoint;
mod error;
mod estimate;
mod full;
mod guard;
mod looper;
mod lora;
mod memory;
mod objective;
mod plan;
pub mod preference;
pub mod rng;
mod run_dir;
pub mod schedule;
mod step;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod toy;
mod tree;

pub use bantam_model::{LossReport, PackedBatch, Segment, Target};
pub use batch::{BatchOrder, TrainRow, Verdict, epoch_batches, rows_sha256};
pub use error::TrainError;
pub use estimate::{Estimate, estimate};
pub use full::FullTrainer;
pub use lora::{LoraTrainer, initial_lora};
pub use memory::Memory;
pub use plan::{PlanInput, TrainPlan};
pub use preference::PreferenceStats;
pub use tree::{micro_batches, pack, pack_owned};

/// What the loop needs of a model: a flat vector of parameters, a loss and its gradient.
///
/// It is a trait so that the loop's laws (resuming, batching, validation) are tested on a model small enough to run
/// thousands of times.
pub trait Trainable {
    /// Parameters being trained.
    fn n_params(&self) -> usize;

    /// The parameters a run begins with.
    fn initial_params(&self, seed: u64) -> Vec<f32>;

    /// Makes `params` the ones that losses are of.
    fn set_params(&mut self, params: &[f32]);

    /// Loss of a batch; adds `scale` times its gradient to `grads`.
    fn loss_and_grads(
        &mut self,
        batch: &PackedBatch,
        scale: f64,
        grads: &mut [f32],
    ) -> Result<LossReport, TrainError>;

    /// What to compute with.
    fn compute(&self) -> &Compute;

    /// Loss of a batch.
    fn loss(&mut self, batch: &PackedBatch) -> Result<LossReport, TrainError>;

    /// The unweighted loss of each target of a batch, in their order: minus the log-probability of its token.
    fn target_losses(
        &mut self,
        batch: &PackedBatch,
        losses: &mut Vec<f64>,
    ) -> Result<(), TrainError>;

    /// As [`Trainable::loss_and_grads`] where `weigh` makes the targets' weights from their losses.
    fn weighed_loss_and_grads(
        &mut self,
        batch: &PackedBatch,
        scale: f64,
        weigh: &mut bantam_model::Weigh<'_>,
        grads: &mut [f32],
    ) -> Result<(), TrainError> {
        let mut losses = Vec::new();
        self.target_losses(batch, &mut losses)?;
        let mut weighed = batch.clone();
        let targets = weighed.targets.iter_mut().zip(weigh(&losses));
        targets.for_each(|(target, weight)| target.weight = weight);
        self.loss_and_grads(&weighed, scale, grads)?;
        Ok(())
    }

    /// What the parameters become on disk.
    fn form(&self) -> Form<'_>;
}

/// What a run's parameters become on disk.
#[derive(Clone, Copy)]
pub enum Form<'a> {
    /// An adapter: small, and in a checkpoint what it will be in the end.
    Adapter(&'a dyn AdapterForm),
    /// A model: plain numbers in a checkpoint, a folder that other programs open in the end.
    Model(&'a dyn ModelForm),
}

/// Parameters that are an adapter.
pub trait AdapterForm {
    /// The files of an adapter with these parameters: equal parameters, equal bytes. The first one holds the weights.
    fn files(&self, params: &[f32]) -> Result<Vec<AdapterFile>, TrainError>;

    /// Reads the parameters back, to the bit.
    fn read(&self, dir: &Path) -> Result<Vec<f32>, TrainError>;
}

/// Parameters that are a whole model.
pub trait ModelForm {
    /// Writes the model into an empty folder. Gives the name of the file that holds the weights.
    fn write(&self, params: &[f32], dir: &Path) -> Result<&'static str, TrainError>;
}

impl Form<'_> {
    /// Folder of the result inside the run's.
    pub fn name(&self) -> &'static str {
        match self {
            Form::Adapter(_) => "adapter",
            Form::Model(_) => "model",
        }
    }

    /// Writes the result with these parameters into a folder of this path, which appears whole. Gives the SHA-256 of
    /// its weights.
    fn write(&self, params: &[f32], path: &Path) -> Result<String, TrainError> {
        match self {
            Form::Adapter(adapter) => checkpoint::write_adapter(path, &adapter.files(params)?),
            Form::Model(model) => checkpoint::write_folder(path, |dir| {
                let weights = model.write(params, dir)?;
                checkpoint::file_sha256(&dir.join(weights))
            }),
        }
    }
}

/// One file of an adapter folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFile {
    /// Name inside the folder.
    pub name: String,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// What a run amounts to: the object of `bantam train --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainResult {
    /// Rows seen, each time it was seen.
    pub rows: u64,
    /// Tokens of those rows.
    pub tokens: u64,
    /// Tokens that went through the model for them: a prefix that rows of a batch share goes through once, a row's
    /// last token never.
    #[serde(default)]
    pub computed_tokens: u64,
    /// Seconds of training steps, over all sessions.
    pub train_s: f64,
    /// Seconds of validation, over all sessions.
    #[serde(default)]
    pub valid_s: f64,
    /// Seconds of saving, over all sessions.
    #[serde(default)]
    pub checkpoint_s: f64,
    /// Tokens of rows a second of training steps.
    pub tok_per_s: f64,
    /// Tokens through the model a second of training steps.
    #[serde(default)]
    pub computed_tok_per_s: f64,
    /// Rows a second.
    pub rows_per_s: f64,
    /// Loss of the last batch.
    pub last_loss: f64,
    /// Best validation loss, if there was validation: the one of the adapter.
    pub valid_loss: Option<f64>,
    /// How well answers were told apart in that validation, if preferences were learnt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub valid_preference: Option<PreferenceStats>,
    /// Rows that were left out because the model makes no sense of them, as `file:line`.
    #[serde(default)]
    pub dropped: Vec<String>,
    /// Largest resident memory of this process, in MiB.
    pub peak_rss_mb: u64,
    /// The folder of the adapter, or of the model where every weight was trained.
    pub adapter: PathBuf,
    /// SHA-256 of its weights.
    pub sha256: String,
}

/// How a call of [`train`] ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// The run is over.
    Finished(TrainResult),
    /// The run was over before; this is its result again.
    AlreadyFinished(TrainResult),
    /// The run was asked to stop; a checkpoint is on disk and the same plan goes on from it.
    Interrupted {
        /// Steps finished.
        step: usize,
    },
}

/// Carries out a plan, or goes on with it where its run directory left off.
///
/// `clock` gives the time since any fixed moment. `cancel` is looked at between steps. Every event is in the log on
/// disk before `on_event` sees it.
pub fn train<T: Trainable + ?Sized>(
    plan: &TrainPlan,
    model: &mut T,
    clock: &dyn Fn() -> Duration,
    on_event: &mut dyn FnMut(&RunEvent),
    cancel: &AtomicBool,
) -> Result<Outcome, TrainError> {
    looper::run(plan, model, clock, on_event, cancel)
}

/// Largest resident memory of this process so far, in MiB; 0 where the system does not tell.
pub fn peak_rss_mb() -> u64 {
    status_mb("VmHWM:")
}

/// One of the sizes that the system keeps of this process, in MiB.
fn status_mb(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let kib = line
        .and_then(|line| line.split_whitespace().next())
        .and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or(0) / 1024
}
