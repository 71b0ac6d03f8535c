//! API keys: made once, shown once, kept as a digest.
//!
//! A key is `bt-PUBLIC-SECRET`. The public part finds the row; of the secret only the SHA-256 is kept.

use rusqlite::{OptionalExtension, Row, params};
use sha2::{Digest, Sha256};

use crate::{Store, StoreError};

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Ask models.
    Inference,
    /// Train them.
    Train,
    /// Take them away, see everything.
    Admin,
}

impl Scope {
    /// All of them.
    pub const ALL: [Scope; 3] = [Scope::Inference, Scope::Train, Scope::Admin];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Scope::Inference => "inference",
            Scope::Train => "train",
            Scope::Admin => "admin",
        }
    }

    /// The scope of this name.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.name() == name)
    }
}

/// How much a key may use; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Requests a minute.
    pub requests_per_minute: Option<u32>,
    /// Tokens a minute, read and written.
    pub tokens_per_minute: Option<u32>,
    /// Tokens a day (of UTC).
    pub tokens_per_day: Option<u64>,
}

/// A key to be made.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// The part that finds it.
    pub id: String,
    /// Whose it is, for people.
    pub name: String,
    /// [`hash_secret`] of its secret part.
    pub hash: [u8; 32],
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// How much it may use.
    pub limits: KeyLimits,
    /// Now, in seconds since 1970.
    pub created: u64,
}

impl NewKey {
    /// A key of the system's randomness, and its text, which is known to no one else and never again.
    pub fn generate(
        name: impl Into<String>,
        scopes: Vec<Scope>,
        limits: KeyLimits,
        created: u64,
    ) -> Result<(Self, String), StoreError> {
        let mut bytes = [0u8; 36];
        getrandom::fill(&mut bytes).map_err(|e| StoreError::Random(e.to_string()))?;
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let (id, secret) = (hex(&bytes[..4]), hex(&bytes[4..]));
        let text = format!("bt-{id}-{secret}");
        let key = Self {
            id,
            name: name.into(),
            hash: hash_secret(&secret),
            scopes,
            limits,
            created,
        };
        Ok((key, text))
    }
}

/// A key as it is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// The part that finds it.
    pub id: String,
    /// Whose it is.
    pub name: String,
    /// The digest of its secret part.
    pub hash: [u8; 32],
    /// What it may do.
    pub scopes: Vec<Scope>,
    /// How much it may use.
    pub limits: KeyLimits,
    /// When it was made.
    pub created: u64,
    /// When it was last used, to the minute.
    pub last_used: Option<u64>,
    /// When it was revoked.
    pub revoked: Option<u64>,
}

impl Key {
    /// Does `secret` open it? Takes as long for a near miss as for a far one.
    pub fn opens(&self, secret: &str) -> bool {
        let given = hash_secret(secret);
        let differs = self
            .hash
            .iter()
            .zip(&given)
            .fold(0u8, |acc, (a, b)| acc | (a ^ b));
        std::hint::black_box(differs) == 0 && self.revoked.is_none()
    }
}

/// What is kept of a secret.
pub fn hash_secret(secret: &str) -> [u8; 32] {
    Sha256::digest(secret.as_bytes()).into()
}

const COLUMNS: &str =
    "id, name, hash, scopes, rpm, tpm, tokens_per_day, created, last_used, revoked";

fn read(row: &Row<'_>) -> rusqlite::Result<Key> {
    let scopes: String = row.get(3)?;
    Ok(Key {
        id: row.get(0)?,
        name: row.get(1)?,
        hash: row.get(2)?,
        scopes: scopes.split(' ').filter_map(Scope::of).collect(),
        limits: KeyLimits {
            requests_per_minute: row.get(4)?,
            tokens_per_minute: row.get(5)?,
            tokens_per_day: row.get(6)?,
        },
        created: row.get(7)?,
        last_used: row.get(8)?,
        revoked: row.get(9)?,
    })
}

impl Store {
    /// Keeps a key.
    pub fn create_key(&self, key: &NewKey) -> Result<(), StoreError> {
        let scopes: Vec<&str> = key.scopes.iter().map(|scope| scope.name()).collect();
        self.lock().execute(
            "INSERT INTO keys (id, name, hash, scopes, rpm, tpm, tokens_per_day, created)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
            params![
                key.id,
                key.name,
                key.hash,
                scopes.join(" "),
                key.limits.requests_per_minute,
                key.limits.tokens_per_minute,
                key.limits.tokens_per_day,
                key.created
            ],
        )?;
        Ok(())
    }

    /// A key by its public part.
    pub fn key(&self, id: &str) -> Result<Option<Key>, StoreError> {
        let sql = format!("SELECT {COLUMNS} FROM keys WHERE id = ?1");
        let db = self.lock();
        let mut statement = db.prepare_cached(&sql)?;
        Ok(statement.query_row([id], read).optional()?)
    }

    /// All keys, oldest first.
    pub fn keys(&self) -> Result<Vec<Key>, StoreError> {
        let sql = format!("SELECT {COLUMNS} FROM keys ORDER BY created, id");
        let db = self.lock();
        let mut statement = db.prepare_cached(&sql)?;
        let keys = statement.query_map([], read)?;
        Ok(keys.collect::<Result<_, _>>()?)
    }

    /// Ends a key; `false` if there is none, or it has ended already.
    pub fn revoke_key(&self, id: &str, now: u64) -> Result<bool, StoreError> {
        let n = self.lock().execute(
            "UPDATE keys SET revoked = ?2 WHERE id = ?1 AND revoked IS NULL",
            params![id, now],
        )?;
        Ok(n > 0)
    }

    /// Notes that a key was used.
    pub fn touch_key(&self, id: &str, now: u64) -> Result<(), StoreError> {
        self.lock().execute(
            "UPDATE keys SET last_used = ?2 WHERE id = ?1",
            params![id, now],
        )?;
        Ok(())
    }

    /// Adds to what a key has used on a day (counted from 1970) and tells the sum.
    pub fn spend(&self, key: &str, day: u64, tokens: u64) -> Result<u64, StoreError> {
        Ok(self.lock().query_row(
            "INSERT INTO key_days (key, day, tokens) VALUES (?1, ?2, ?3)
             ON CONFLICT (key, day) DO UPDATE SET tokens = tokens + excluded.tokens RETURNING tokens",
            params![key, day, tokens],
            |row| row.get(0),
        )?)
    }
}
