//! What a run reports: one enum, one line of JSON an event, in `events.jsonl`.
//!
//! The lab prints nothing. It hands each [`RunEvent`] to its caller and appends it to the run's event log; a dashboard
//! or a report can be rebuilt from that file alone. On resume the log is cut back to the length the checkpoint
//! remembers, so no step is ever told twice.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::train::{PreferenceStats, TrainError, TrainResult};

/// Something that happened in a run. Wall-clock fields end in `_s`; everything else is reproducible.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum RunEvent {
    /// A run began from step 0.
    RunStarted {
        /// Rows trained on.
        rows: usize,
        /// Tokens of those rows.
        tokens: u64,
        /// Tokens of those rows that carry a loss.
        trained_tokens: u64,
        /// Rows held out for validation.
        valid_rows: usize,
        /// Parameters being trained.
        params: usize,
        /// Optimizer steps planned.
        total: usize,
    },
    /// One optimizer step is done; `step` counts finished steps, from 1.
    Step {
        /// Steps finished.
        step: usize,
        /// Steps planned.
        total: usize,
        /// Mean loss per trained token of this batch, before the update; per pair where preferences are learnt.
        loss: f64,
        /// Learning rate of this update.
        lr: f64,
        /// Tokens of this batch's rows.
        tokens: u64,
        /// Tokens that went through the model for them.
        computed: u64,
        /// Global gradient norm before clipping.
        grad_norm: f64,
        /// Seconds of training steps so far, over all sessions of this run.
        elapsed_s: f64,
        /// Tokens of rows a second so far.
        tok_per_s: f64,
        /// How well the answers of this batch are told apart, if preferences are learnt.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        preference: Option<PreferenceStats>,
    },
    /// A step made no update: none of its rows is left, or it does harm.
    StepSkipped {
        /// Steps finished.
        step: usize,
        /// Steps planned.
        total: usize,
    },
    /// Rows were left out because the model makes no sense of them.
    RowsDropped {
        /// The step, from 1.
        step: usize,
        /// Which, and why.
        rows: Vec<DroppedRow>,
        /// Whether they are left out of all later steps too.
        for_good: bool,
    },
    /// An update did harm: the run goes on from before it, without it.
    RolledBack {
        /// The step of the update, from 1.
        step: usize,
        /// Steps finished where the run goes on.
        to: usize,
        /// What happened.
        reason: String,
        /// The rows of that update, as `file:line`.
        rows: Vec<String>,
    },
    /// The validation rows were scored.
    Valid {
        /// Steps finished.
        step: usize,
        /// Mean loss per trained token of the validation rows; per pair where preferences are learnt.
        loss: f64,
        /// Whether this is the best so far.
        best: bool,
        /// How well their answers are told apart, if preferences are learnt.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        preference: Option<PreferenceStats>,
    },
    /// A checkpoint is complete on disk.
    Checkpoint {
        /// Steps finished.
        step: usize,
    },
    /// Validation stopped improving; the best adapter is kept.
    EarlyStop {
        /// Steps finished.
        step: usize,
        /// Step of the best validation loss.
        best_step: usize,
        /// The best validation loss.
        best_loss: f64,
    },
    /// A run goes on from a checkpoint.
    Resumed {
        /// Steps already finished.
        step: usize,
        /// Steps planned.
        total: usize,
    },
    /// The run is done and its adapter is on disk.
    Finished {
        /// Steps finished.
        step: usize,
        /// What the run amounts to.
        result: TrainResult,
    },
    /// Something the user should know that stops nothing.
    Warning {
        /// The words.
        message: String,
    },
}

/// A row that is left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DroppedRow {
    /// `file:line`
    pub place: String,
    /// What is wrong with it.
    pub reason: String,
}

/// The append-only event log of a run.
#[derive(Debug)]
pub struct EventLog {
    path: PathBuf,
    file: File,
    len: u64,
}

impl EventLog {
    /// Opens the log and cuts it back to `keep` bytes. Says in the second value whether it held that many.
    pub fn open(path: &Path, keep: u64) -> Result<(Self, bool), TrainError> {
        let io = |e| TrainError::io(path, e);
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(io)?;
        let found = file.metadata().map_err(io)?.len();
        let len = found.min(keep);
        file.set_len(len).map_err(io)?;
        file.seek(SeekFrom::End(0)).map_err(io)?;
        Ok((
            Self {
                path: path.to_path_buf(),
                file,
                len,
            },
            found >= keep,
        ))
    }

    /// Appends one event as one line.
    pub fn append(&mut self, event: &RunEvent) -> Result<(), TrainError> {
        let mut line =
            serde_json::to_vec(event).map_err(|e| TrainError::io(&self.path, e.into()))?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .map_err(|e| TrainError::io(&self.path, e))?;
        self.len += line.len() as u64;
        Ok(())
    }

    /// Forces what was appended to disk and returns the log's length.
    pub fn sync(&mut self) -> Result<u64, TrainError> {
        self.file
            .sync_all()
            .map_err(|e| TrainError::io(&self.path, e))?;
        Ok(self.len)
    }
}

/// Reads a log back; a torn last line (the process was killed while writing it) is left out.
pub fn read_events(path: &Path) -> Result<Vec<RunEvent>, TrainError> {
    let text = std::fs::read_to_string(path).map_err(|e| TrainError::io(path, e))?;
    let mut events = Vec::new();
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let Some(line) = line.strip_suffix('\n') else {
            break;
        };
        events.push(serde_json::from_str(line).map_err(|e| TrainError::Corrupt {
            path: path.to_path_buf(),
            reason: format!("line {}: {e}", index + 1),
        })?);
    }
    Ok(events)
}
