//! The connection and the schema.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rusqlite::Connection;

use crate::StoreError;

/// One database. Cheap to share behind an `Arc`.
#[derive(Debug)]
pub struct Store {
    connection: Mutex<Connection>,
}

/// The schema, one step a version. A released step is never edited: a change is a new step.
const STEPS: [&str; 2] = [
    "
    CREATE TABLE keys (
        id TEXT PRIMARY KEY, name TEXT NOT NULL, hash BLOB NOT NULL, scopes TEXT NOT NULL,
        rpm INTEGER, tpm INTEGER, tokens_per_day INTEGER,
        created INTEGER NOT NULL, last_used INTEGER, revoked INTEGER
    );
    CREATE TABLE key_days (
        key TEXT NOT NULL, day INTEGER NOT NULL, tokens INTEGER NOT NULL, PRIMARY KEY (key, day)
    ) WITHOUT ROWID;
    CREATE TABLE objects (
        seq INTEGER PRIMARY KEY AUTOINCREMENT,
        kind TEXT NOT NULL, id TEXT NOT NULL UNIQUE, owner TEXT NOT NULL, created INTEGER NOT NULL,
        label TEXT NOT NULL, expires INTEGER, metadata TEXT NOT NULL, body TEXT NOT NULL, extra TEXT NOT NULL
    );
    CREATE INDEX objects_by_kind ON objects (kind, owner, seq);
    CREATE TABLE chunks (
        file TEXT NOT NULL, n INTEGER NOT NULL, bytes BLOB NOT NULL, PRIMARY KEY (file, n)
    ) WITHOUT ROWID;
    CREATE TABLE lines (
        batch TEXT NOT NULL, n INTEGER NOT NULL, failed INTEGER NOT NULL, tokens INTEGER NOT NULL,
        body TEXT NOT NULL, PRIMARY KEY (batch, n)
    ) WITHOUT ROWID;
    CREATE TABLE once (
        owner TEXT NOT NULL, name TEXT NOT NULL, digest BLOB NOT NULL, created INTEGER NOT NULL,
        status INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (owner, name)
    ) WITHOUT ROWID;
",
    "
    ALTER TABLE objects ADD COLUMN parent TEXT NOT NULL DEFAULT '';
    CREATE INDEX objects_by_parent ON objects (parent, seq) WHERE parent != '';
",
];

/// What is kept is nobody else's business. A file system without permissions is used as it is.
fn only_ours(path: &Path) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600));
    }
    #[cfg(not(unix))]
    let _ = path;
}

impl Store {
    /// Opens or makes a database file.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let fail = |source| StoreError::Open {
            path: path.to_path_buf(),
            source,
        };
        let is_new = !path.exists();
        let connection = Connection::open(path).map_err(fail)?;
        if is_new {
            only_ours(path);
        }
        // Several processes may share it: a server, and the commands that manage its keys.
        connection
            .busy_timeout(Duration::from_secs(10))
            .map_err(fail)?;
        connection
            .pragma_update(None, "journal_mode", "WAL")
            .map_err(fail)?;
        connection
            .pragma_update(None, "synchronous", "NORMAL")
            .map_err(fail)?;
        Self::with(connection, path.to_path_buf())
    }

    /// A database that is gone with the process.
    pub fn in_memory() -> Result<Self, StoreError> {
        Self::with(Connection::open_in_memory()?, PathBuf::from(":memory:"))
    }

    fn with(mut connection: Connection, path: PathBuf) -> Result<Self, StoreError> {
        let version = |c: &Connection| c.pragma_query_value(None, "user_version", |row| row.get(0));
        let known = STEPS.len() as i64;
        let found: i64 = version(&connection).map_err(|source| StoreError::Open {
            path: path.clone(),
            source,
        })?;
        if found > known {
            return Err(StoreError::TooNew { path, found, known });
        }
        if found < known {
            let step =
                connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            // Another process may have been first.
            let found: i64 = version(&step)?;
            for sql in &STEPS[usize::try_from(found).unwrap_or(0).min(STEPS.len())..] {
                step.execute_batch(sql)?;
            }
            step.pragma_update(None, "user_version", known)?;
            step.commit()?;
        }
        Ok(Self {
            connection: Mutex::new(connection),
        })
    }

    /// The connection. A panic elsewhere leaves it usable: statements are whole or not at all.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
