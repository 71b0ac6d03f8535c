//! A batch's answers, line by line: what is there need not be asked again.

use rusqlite::{OptionalExtension, Row, params};

use crate::{Store, StoreError};

/// The answer to one line of a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Which line of the input, from 0.
    pub n: u64,
    /// Does it belong into the error file?
    pub failed: bool,
    /// Tokens it took.
    pub tokens: u64,
    /// The line of the output or error file.
    pub body: String,
}

fn read(row: &Row<'_>) -> rusqlite::Result<Line> {
    Ok(Line {
        n: row.get(0)?,
        failed: row.get(1)?,
        tokens: row.get(2)?,
        body: row.get(3)?,
    })
}

impl Store {
    /// Keeps an answer; a second one to the same line is dropped.
    pub fn put_line(&self, batch: &str, line: &Line) -> Result<(), StoreError> {
        self.lock().execute(
            "INSERT OR IGNORE INTO lines (batch, n, failed, tokens, body) VALUES (?1, ?2, ?3, ?4, ?5)",
            params![batch, line.n, line.failed, line.tokens, line.body],
        )?;
        Ok(())
    }

    /// Which lines are answered, ascending, and whether each failed.
    pub fn answered(&self, batch: &str) -> Result<Vec<(u64, bool)>, StoreError> {
        let db = self.lock();
        let mut statement =
            db.prepare_cached("SELECT n, failed FROM lines WHERE batch = ?1 ORDER BY n")?;
        let rows = statement.query_map([batch], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Up to `limit` answers from line `from` on, of those that failed or of those that did not.
    pub fn lines(
        &self,
        batch: &str,
        failed: bool,
        from: u64,
        limit: usize,
    ) -> Result<Vec<Line>, StoreError> {
        let db = self.lock();
        let mut statement = db.prepare_cached(
            "SELECT n, failed, tokens, body FROM lines
             WHERE batch = ?1 AND failed = ?2 AND n >= ?3 ORDER BY n LIMIT ?4",
        )?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = statement.query_map(params![batch, failed, from, limit], read)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// One answer.
    pub fn line(&self, batch: &str, n: u64) -> Result<Option<Line>, StoreError> {
        let db = self.lock();
        let mut statement = db.prepare_cached(
            "SELECT n, failed, tokens, body FROM lines WHERE batch = ?1 AND n = ?2",
        )?;
        Ok(statement.query_row(params![batch, n], read).optional()?)
    }

    /// Up to `limit` answers after line `after`, in either order; of those that failed or did not, or of both.
    pub fn page_of_lines(
        &self,
        batch: &str,
        after: Option<u64>,
        ascending: bool,
        failed: Option<bool>,
        limit: usize,
    ) -> Result<Vec<Line>, StoreError> {
        let (beyond, order) = if ascending {
            (">", "ASC")
        } else {
            ("<", "DESC")
        };
        let db = self.lock();
        let mut statement = db.prepare_cached(&format!(
            "SELECT n, failed, tokens, body FROM lines
             WHERE batch = ?1 AND (?2 IS NULL OR n {beyond} ?2) AND (?3 IS NULL OR failed = ?3)
             ORDER BY n {order} LIMIT ?4"
        ))?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let rows = statement.query_map(params![batch, after, failed, limit], read)?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Drops the lines of a batch whose files are written.
    pub fn drop_lines(&self, batch: &str) -> Result<(), StoreError> {
        self.lock()
            .execute("DELETE FROM lines WHERE batch = ?1", [batch])?;
        Ok(())
    }
}
