//! The bytes of files, in pieces.

use rusqlite::{OptionalExtension, params};

use crate::{Store, StoreError};

impl Store {
    /// Keeps piece `n` of a file, counted from 0.
    pub fn append_chunk(&self, file: &str, n: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.lock().execute(
            "INSERT OR REPLACE INTO chunks (file, n, bytes) VALUES (?1, ?2, ?3)",
            params![file, n, bytes],
        )?;
        Ok(())
    }

    /// Piece `n` of a file; `None` past the end.
    pub fn chunk(&self, file: &str, n: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let db = self.lock();
        let mut statement =
            db.prepare_cached("SELECT bytes FROM chunks WHERE file = ?1 AND n = ?2")?;
        Ok(statement
            .query_row(params![file, n], |row| row.get(0))
            .optional()?)
    }

    /// Drops the pieces of files that were never finished, as after a crash.
    pub fn sweep(&self) -> Result<usize, StoreError> {
        Ok(self.lock().execute(
            "DELETE FROM chunks WHERE file NOT IN (SELECT id FROM objects)",
            [],
        )?)
    }

    /// Drops all pieces of a file that was not finished.
    pub fn drop_chunks(&self, file: &str) -> Result<(), StoreError> {
        self.lock()
            .execute("DELETE FROM chunks WHERE file = ?1", [file])?;
        Ok(())
    }
}
