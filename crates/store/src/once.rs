//! Answers to requests that may be sent twice under one `Idempotency-Key`.

use rusqlite::{OptionalExtension, params};

use crate::{Store, StoreError};

/// An answer that was given before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remembered {
    /// The digest of the request it answered.
    pub digest: [u8; 32],
    /// Its HTTP status.
    pub status: u16,
    /// Its body.
    pub body: Vec<u8>,
}

impl Store {
    /// Keeps an answer under a name of the caller's.
    pub fn remember(
        &self,
        owner: &str,
        name: &str,
        now: u64,
        answer: &Remembered,
    ) -> Result<(), StoreError> {
        self.lock().execute(
            "INSERT OR REPLACE INTO once (owner, name, digest, created, status, body)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![owner, name, answer.digest, now, answer.status, answer.body],
        )?;
        Ok(())
    }

    /// The answer under this name, if one was given since `since`.
    pub fn remembered(
        &self,
        owner: &str,
        name: &str,
        since: u64,
    ) -> Result<Option<Remembered>, StoreError> {
        let db = self.lock();
        let mut statement = db.prepare_cached(
            "SELECT digest, status, body FROM once WHERE owner = ?1 AND name = ?2 AND created >= ?3",
        )?;
        Ok(statement
            .query_row(params![owner, name, since], |row| {
                Ok(Remembered {
                    digest: row.get(0)?,
                    status: row.get(1)?,
                    body: row.get(2)?,
                })
            })
            .optional()?)
    }

    /// Drops answers from before `since`.
    pub fn forget_remembered(&self, since: u64) -> Result<usize, StoreError> {
        Ok(self
            .lock()
            .execute("DELETE FROM once WHERE created < ?1", [since])?)
    }
}
