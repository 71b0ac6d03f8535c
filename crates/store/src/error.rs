//! What can go wrong with the database.

use std::path::PathBuf;

use thiserror::Error;

/// Any failure of this crate.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file cannot be opened as a database.
    #[error("cannot open the database {}: {source}; hint: it must be a file this program made", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// SQLite's reason.
        source: rusqlite::Error,
    },
    /// A newer program wrote it.
    #[error("the database {} is of version {found}, newer than this program's {known}; hint: update bantam", path.display())]
    TooNew {
        /// The file.
        path: PathBuf,
        /// The file's version.
        found: i64,
        /// The newest version this program knows.
        known: i64,
    },
    /// A statement failed.
    #[error("the database failed: {0}")]
    Sql(#[from] rusqlite::Error),
    /// The system has no randomness to give.
    #[error("the system's randomness failed: {0}")]
    Random(String),
    /// What was read back is not what was written.
    #[error("the database holds a damaged {what}: {reason}")]
    Damaged {
        /// Of what kind.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}
