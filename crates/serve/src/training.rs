//! What the server needs of whoever trains: it keeps the jobs and hands them over one by one, and does not know how a
//! model is trained.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// What is learnt, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TrainingMethod {
    /// The answers of conversations.
    Supervised,
    /// Which of two answers is preferred, by direct preference optimisation.
    Dpo {
        /// How closely the model is held to the one it begins with, if that was said.
        beta: Option<f64>,
    },
}

/// A training that was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainingJob {
    /// The job's name.
    pub id: String,
    /// The served model to begin from.
    pub base: String,
    /// The run's folder: everything that a training leaves is in it, and one that was stopped goes on from there.
    pub run: PathBuf,
    /// Rows to learn from, as JSON lines.
    pub train: PathBuf,
    /// Rows to validate on.
    pub valid: Option<PathBuf>,
    /// What the rows are and how they are learnt.
    pub method: TrainingMethod,
    /// Seed of everything random.
    pub seed: u64,
    /// Times each row is seen, if that was said.
    pub epochs: Option<usize>,
    /// Rows an update, if that was said.
    pub batch_rows: Option<usize>,
    /// Multiplies the learning rate that would be chosen.
    pub lr_multiplier: Option<f64>,
}

/// What was chosen where nothing was said.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chosen {
    /// Times each row is seen.
    pub epochs: usize,
    /// Rows an update.
    pub batch_rows: usize,
    /// Updates in all.
    pub steps: usize,
    /// How closely the model is held to the one it begins with, where preferences are learnt.
    pub beta: Option<f64>,
}

/// How a training ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// Its model is in the run's folder.
    Finished,
    /// It was told to stop, and goes on from there when it is started again.
    Stopped,
    /// It came to nothing, and would again; the words are for who asked for it.
    Failed(String),
    /// Its process died. Started again, it goes on from its last checkpoint.
    Died(String),
}

/// Something that happened in a training, in the order it happened.
#[derive(Debug, Clone, PartialEq)]
pub enum TrainingEvent {
    /// An update was made.
    Step {
        /// Updates so far.
        step: usize,
        /// Updates in all.
        total: usize,
        /// Mean loss per trained token.
        loss: f64,
        /// Tokens of the update's rows.
        tokens: u64,
        /// Seconds of training so far.
        elapsed_s: f64,
    },
    /// The validation rows were scored.
    Valid {
        /// Updates so far.
        step: usize,
        /// Mean loss per trained token.
        loss: f64,
    },
    /// Something that the owner should know.
    Warning {
        /// Updates so far.
        step: usize,
        /// The words.
        message: String,
    },
}

/// Trains, on behalf of the server. Its methods block.
pub trait Trainer: Send + Sync {
    /// Why a served model cannot be trained on, if it cannot.
    fn refusal(&self, model: &str) -> Option<String>;

    /// How many rows a file holds, or what keeps it from being learnt from, by line.
    fn check(&self, rows: &Path, method: TrainingMethod) -> Result<usize, String>;

    /// Trains until it is over or `stop` is set.
    fn train(&self, job: &TrainingJob, stop: &AtomicBool) -> Ended;

    /// What happened so far.
    fn events(&self, run: &Path) -> Vec<TrainingEvent>;

    /// What was chosen, once the training has begun.
    fn chosen(&self, run: &Path) -> Option<Chosen>;

    /// Folders of the models as they were at the ends of epochs, by step.
    fn epochs(&self, run: &Path) -> Vec<(usize, PathBuf)>;

    /// Serves what lies in a folder under a name.
    fn serve(&self, folder: &Path, id: &str) -> Result<(), String>;
}

/// Where jobs are worked on.
#[derive(Clone)]
pub struct TrainingConfig {
    /// Who trains.
    pub trainer: Arc<dyn Trainer>,
    /// Each job has a folder of its own in here.
    pub folder: PathBuf,
}
