//! What can go wrong in a training run.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use bantam_formats::FormatError;

/// Why a run could not be planned, started, continued or written.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The recipe does not parse; `field` is the path of the setting inside it.
    #[error("{}: {field}: {reason}", .path.display())]
    Recipe {
        /// The recipe file.
        path: PathBuf,
        /// Where in it, as `section.key`.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// A setting has a value that cannot be used.
    #[error("`{field}` {reason}")]
    Setting {
        /// The setting, as `section.key`.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Nothing to train on.
    #[error("{}: there are no rows to train on", .path.display())]
    NoRows {
        /// The data file.
        path: PathBuf,
    },
    /// A row whose mask trains nothing.
    #[error("{}:{line}: no token of this row is trained", .path.display())]
    NothingTrained {
        /// The data file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
    },
    /// Rows longer than `max_seq_len`; nothing is ever cut silently.
    #[error(
        "{}:{line}: this row has {tokens} tokens but `max_seq_len` is {max_seq_len} ({count} of {rows} rows are too long, \
         the longest has {longest}); raise `max_seq_len`, shorten them, or set `skip_long = true`", .path.display()
    )]
    TooLong {
        /// The data file.
        path: PathBuf,
        /// Line of the first such row, from 1.
        line: usize,
        /// Its length.
        tokens: usize,
        /// The limit.
        max_seq_len: usize,
        /// How many rows are over it.
        count: usize,
        /// Of how many.
        rows: usize,
        /// Length of the longest row.
        longest: usize,
    },
    /// An order file that does not fit the rows.
    #[error("{}: batch {batch}: {reason}", .path.display())]
    Order {
        /// The order file.
        path: PathBuf,
        /// Index of the batch, from 0.
        batch: usize,
        /// What is wrong.
        reason: String,
    },
    /// Another process holds the run directory.
    #[error("{}: another process is training into this run directory; wait for it or choose another `--out`", .path.display())]
    Locked {
        /// The run directory.
        path: PathBuf,
    },
    /// The directory holds a run with other settings.
    #[error(
        "{}: this run was started with `{field}` = {was}, now it is {now}; give the same value to resume it, or choose another `--out`",
        .path.display()
    )]
    Differs {
        /// The run directory.
        path: PathBuf,
        /// The first field that differs, as `section.key`.
        field: String,
        /// Its value in the run.
        was: String,
        /// Its value now.
        now: String,
    },
    /// The directory holds something that is not a run.
    #[error("{}: this folder is not empty and holds no bantam run; choose another `--out`", .path.display())]
    NotARun {
        /// The folder.
        path: PathBuf,
    },
    /// The loss or the gradient stopped being a number.
    #[error(
        "the {what} is not a finite number at step {step}{}; lower `optim.lr` or look for broken rows",
        if *.undone > 0 { format!(", after {undone} updates were left out already") } else { String::new() }
    )]
    Diverged {
        /// `loss`, `gradient`, `update` or `validation loss`.
        what: &'static str,
        /// The step, from 1.
        step: usize,
        /// Updates left out before.
        undone: usize,
    },
    /// More rows are poisoned than can be put down to chance.
    #[error(
        "{count} of {rows} rows were left out by step {step} because the model makes no sense of them; \
         lower `optim.lr`, look at the rows named above, or set `optim.spike_z = 0` to train on all whose loss is a number"
    )]
    TooManyDropped {
        /// Rows left out.
        count: usize,
        /// Rows in all.
        rows: usize,
        /// The step, from 1.
        step: usize,
    },
    /// The run was begun elsewhere.
    #[error(
        "{}: this run was begun by bantam {was} and this is {now}: the bits would differ; go on there, choose another `--out`, \
         or accept another result of the same quality with `--allow-other-machine`", .path.display()
    )]
    OtherMachine {
        /// The run directory.
        path: PathBuf,
        /// Version and instruction set of the run.
        was: String,
        /// Those of this process.
        now: String,
    },
    /// A file of the run cannot be believed.
    #[error("{}: {reason}", .path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// An adapter that does not fit, or is not one.
    #[error("{}: {reason}", .path.display())]
    Adapter {
        /// The adapter file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A merged model that cannot be written this way.
    #[error("{}: {reason}", .path.display())]
    Export {
        /// The base or the target.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The base does not make a model.
    #[error(transparent)]
    Model(#[from] bantam_model::LoadError),
    /// A file of another format's.
    #[error(transparent)]
    Format(FormatError),
    /// The disk is full; the last complete checkpoint is untouched.
    #[error("{}: no space left to write; the last complete checkpoint is whole, so free some space and run the same command again", .path.display())]
    DiskFull {
        /// The file being written.
        path: PathBuf,
    },
    /// Any other trouble with a file.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The trouble.
        source: io::Error,
    },
}

impl From<FormatError> for TrainError {
    fn from(error: FormatError) -> Self {
        match error {
            FormatError::DiskFull { path, .. } => Self::DiskFull { path },
            error => Self::Format(error),
        }
    }
}

impl TrainError {
    /// Sorts an I/O error: a full disk (or quota, or file size limit) is its own kind.
    pub fn io(path: &Path, source: io::Error) -> Self {
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                Self::DiskFull {
                    path: path.to_path_buf(),
                }
            }
            _ => Self::Io {
                path: path.to_path_buf(),
                source,
            },
        }
    }
}
