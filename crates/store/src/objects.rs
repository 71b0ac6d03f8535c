//! The API's objects as JSON, with what lists are ordered and filtered by.

use rusqlite::types::Value as Sql;
use rusqlite::{Connection, OptionalExtension, Row, TransactionBehavior, params, params_from_iter};
use serde_json::{Map, Value};

use crate::{Store, StoreError};

/// An object of the API.
#[derive(Debug, Clone, PartialEq)]
pub struct Object {
    /// Its kind, such as `chat.completion`.
    pub kind: String,
    /// Its name, unique among all kinds.
    pub id: String,
    /// The key it belongs to; empty where there are no keys.
    pub owner: String,
    /// The object it is part of, and goes with; empty if there is none.
    pub parent: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// What lists of this kind are filtered by: a model, a purpose, a status.
    pub label: String,
    /// When it may be forgotten.
    pub expires: Option<u64>,
    /// Pairs that lists are filtered by.
    pub metadata: Map<String, Value>,
    /// What the API shows.
    pub body: Value,
    /// What it does not: the request that made it.
    pub extra: Value,
}

/// Which objects of a kind, in which order.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// Begin after this one.
    pub after: Option<String>,
    /// At most so many.
    pub limit: usize,
    /// Oldest first.
    pub ascending: bool,
    /// Only those that are part of this object.
    pub parent: Option<String>,
    /// Only those with this label.
    pub label: Option<String>,
    /// Only those with all of these pairs.
    pub metadata: Vec<(String, String)>,
}

/// Some objects, and whether there are more.
#[derive(Debug, Clone)]
pub struct Page {
    /// The objects.
    pub objects: Vec<Object>,
    /// Are there more after them?
    pub has_more: bool,
}

const COLUMNS: &str = "kind, id, owner, created, label, expires, metadata, body, extra, parent";

fn read(row: &Row<'_>) -> rusqlite::Result<(Object, [String; 3])> {
    let object = Object {
        kind: row.get(0)?,
        id: row.get(1)?,
        owner: row.get(2)?,
        parent: row.get(9)?,
        created: row.get(3)?,
        label: row.get(4)?,
        expires: row.get(5)?,
        metadata: Map::new(),
        body: Value::Null,
        extra: Value::Null,
    };
    Ok((object, [row.get(6)?, row.get(7)?, row.get(8)?]))
}

fn whole(
    (mut object, [metadata, body, extra]): (Object, [String; 3]),
) -> Result<Object, StoreError> {
    let parse = |text: &str| {
        serde_json::from_str::<Value>(text).map_err(|e| StoreError::Damaged {
            what: "object",
            reason: e.to_string(),
        })
    };
    object.metadata = match parse(&metadata)? {
        Value::Object(pairs) => pairs,
        _ => Map::new(),
    };
    object.body = parse(&body)?;
    object.extra = parse(&extra)?;
    Ok(object)
}

/// Writes what of an object may change; how many there were of its name.
fn write(db: &Connection, object: &Object) -> rusqlite::Result<usize> {
    db.execute(
        "UPDATE objects SET label = ?2, metadata = ?3, body = ?4, extra = ?5, expires = ?6 WHERE id = ?1",
        params![
            object.id,
            object.label,
            Value::Object(object.metadata.clone()).to_string(),
            object.body.to_string(),
            object.extra.to_string(),
            object.expires
        ],
    )
}

/// Writes a new object.
fn insert(db: &Connection, object: &Object, or: &str) -> rusqlite::Result<usize> {
    let sql = format!(
        "INSERT {or} INTO objects (kind, id, owner, created, label, expires, metadata, body, extra, parent)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)"
    );
    db.prepare_cached(&sql)?.execute(params![
        object.kind,
        object.id,
        object.owner,
        object.created,
        object.label,
        object.expires,
        Value::Object(object.metadata.clone()).to_string(),
        object.body.to_string(),
        object.extra.to_string(),
        object.parent
    ])
}

impl Store {
    /// Keeps a new object.
    pub fn insert(&self, object: &Object) -> Result<(), StoreError> {
        insert(&self.lock(), object, "")?;
        Ok(())
    }

    /// An object by its name, if it is of this kind and belongs to `owner`.
    pub fn get(&self, kind: &str, owner: &str, id: &str) -> Result<Option<Object>, StoreError> {
        let sql =
            format!("SELECT {COLUMNS} FROM objects WHERE id = ?1 AND kind = ?2 AND owner = ?3");
        let row = {
            let db = self.lock();
            let mut statement = db.prepare_cached(&sql)?;
            statement.query_row([id, kind, owner], read).optional()?
        };
        row.map(whole).transpose()
    }

    /// Replaces an object's label, metadata, body and extra; `false` if it is gone.
    pub fn update(&self, object: &Object) -> Result<bool, StoreError> {
        let n = write(&self.lock(), object)?;
        Ok(n > 0)
    }

    /// The same, and keeps new objects with it, all or nothing; those that are there already stay as they are.
    pub fn update_with(&self, object: &Object, new: &[Object]) -> Result<bool, StoreError> {
        if new.is_empty() {
            return self.update(object);
        }
        let mut db = self.lock();
        let all = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let n = write(&all, object)?;
        if n > 0 {
            for one in new {
                insert(&all, one, "OR IGNORE")?;
            }
        }
        all.commit()?;
        Ok(n > 0)
    }

    /// Changes an object as it is by now, with nobody changing it meanwhile; `change` says whether to keep what it
    /// did. `false` if it does not, or if there is none.
    pub fn amend(
        &self,
        kind: &str,
        owner: &str,
        id: &str,
        change: impl FnOnce(&mut Object) -> bool,
    ) -> Result<bool, StoreError> {
        let mut db = self.lock();
        let all = db.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let sql =
            format!("SELECT {COLUMNS} FROM objects WHERE id = ?1 AND kind = ?2 AND owner = ?3");
        let row = all.query_row(&sql, [id, kind, owner], read).optional()?;
        let Some(mut object) = row.map(whole).transpose()? else {
            return Ok(false);
        };
        let is_changed = change(&mut object);
        if is_changed {
            write(&all, &object)?;
        }
        all.commit()?;
        Ok(is_changed)
    }

    /// Forgets an object, with the bytes and lines that belong to it and the objects that are part of it; `false` if
    /// there is none.
    pub fn delete(&self, kind: &str, owner: &str, id: &str) -> Result<bool, StoreError> {
        let mut db = self.lock();
        let all = db.transaction()?;
        let n = all.execute(
            "DELETE FROM objects WHERE id = ?1 AND kind = ?2 AND owner = ?3",
            [id, kind, owner],
        )?;
        if n > 0 {
            all.execute("DELETE FROM chunks WHERE file = ?1", [id])?;
            all.execute(
                "DELETE FROM lines WHERE batch = ?1
                 OR batch IN (SELECT id FROM objects WHERE parent = ?1)",
                [id],
            )?;
            all.execute("DELETE FROM objects WHERE parent = ?1", [id])?;
        }
        all.commit()?;
        Ok(n > 0)
    }

    /// Some objects of a kind; `None` if `after` is not one of them.
    pub fn list(
        &self,
        kind: &str,
        owner: &str,
        query: &ListQuery,
    ) -> Result<Option<Page>, StoreError> {
        let mut sql = format!("SELECT {COLUMNS} FROM objects WHERE kind = ? AND owner = ?");
        let mut values = vec![Sql::from(kind.to_string()), Sql::from(owner.to_string())];
        if let Some(parent) = &query.parent {
            sql.push_str(" AND parent = ?");
            values.push(parent.clone().into());
        }
        if let Some(label) = &query.label {
            sql.push_str(" AND label = ?");
            values.push(label.clone().into());
        }
        for (name, value) in &query.metadata {
            sql.push_str(
                " AND EXISTS (SELECT 1 FROM json_each(metadata) AS pair WHERE pair.key = ? AND pair.value = ?)",
            );
            values.push(name.clone().into());
            values.push(value.clone().into());
        }
        let db = self.lock();
        if let Some(after) = &query.after {
            let seq: Option<i64> = db
                .query_row(
                    "SELECT seq FROM objects WHERE id = ?1 AND kind = ?2 AND owner = ?3",
                    [after.as_str(), kind, owner],
                    |row| row.get(0),
                )
                .optional()?;
            let Some(seq) = seq else { return Ok(None) };
            sql.push_str(if query.ascending {
                " AND seq > ?"
            } else {
                " AND seq < ?"
            });
            values.push(seq.into());
        }
        let order = if query.ascending { "ASC" } else { "DESC" };
        sql.push_str(&format!(" ORDER BY seq {order} LIMIT ?"));
        values.push(
            i64::try_from(query.limit.saturating_add(1))
                .unwrap_or(i64::MAX)
                .into(),
        );
        let mut statement = db.prepare_cached(&sql)?;
        let rows: Vec<_> = statement
            .query_map(params_from_iter(values), read)?
            .collect::<Result<_, _>>()?;
        drop(statement);
        drop(db);
        let has_more = rows.len() > query.limit;
        let objects: Result<Vec<Object>, _> =
            rows.into_iter().take(query.limit).map(whole).collect();
        Ok(Some(Page {
            objects: objects?,
            has_more,
        }))
    }

    /// All objects of a kind with one of these labels, whoever owns them, oldest first: what a server that
    /// starts has to take up again.
    pub fn unfinished(&self, kind: &str, labels: &[&str]) -> Result<Vec<Object>, StoreError> {
        let some = vec!["?"; labels.len()].join(", ");
        let sql = format!(
            "SELECT {COLUMNS} FROM objects WHERE kind = ? AND label IN ({some}) ORDER BY seq"
        );
        let values = std::iter::once(&kind).chain(labels);
        let rows: Vec<_> = {
            let db = self.lock();
            let mut statement = db.prepare_cached(&sql)?;
            let rows = statement.query_map(params_from_iter(values), read)?;
            rows.collect::<Result<_, _>>()?
        };
        rows.into_iter().map(whole).collect()
    }

    /// Forgets what has expired; tells how many objects that were.
    pub fn forget_expired(&self, now: u64) -> Result<usize, StoreError> {
        let mut db = self.lock();
        let all = db.transaction()?;
        for (table, column) in [("chunks", "file"), ("lines", "batch")] {
            all.execute(
                &format!("DELETE FROM {table} WHERE {column} IN (SELECT id FROM objects WHERE expires <= ?1)"),
                [now],
            )?;
        }
        let n = all.execute("DELETE FROM objects WHERE expires <= ?1", [now])?;
        all.commit()?;
        Ok(n)
    }
}
