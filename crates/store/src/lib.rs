//! Keys, files, batches and captured calls, in one SQLite database.
//!
//! The rule of this room: it is the only one that knows SQL. What it keeps of the API's objects is their JSON and
//! the few columns that lists are ordered and filtered by; what the JSON means is the server's business.
//!
//! - [`Store::create_key`] and its neighbours: API keys, of which only the SHA-256 is kept;
//! - [`Store::insert`], [`Store::list`] and theirs: objects of any [kind](Object), with cursors and metadata;
//! - [`Store::append_chunk`] and theirs: the bytes of files, in pieces, so that none is ever whole in memory;
//! - [`Store::put_line`] and theirs: the answers of a batch, line by line, from which it resumes;
//! - [`Store::remember`] and theirs: answers to requests that may be sent twice.
//!
//! Every method takes `&self`, is short, and may be called from any thread.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod chunks;
mod db;
mod error;
mod keys;
mod lines;
mod objects;
mod once;

pub use db::Store;
pub use error::StoreError;
pub use keys::{Key, KeyLimits, NewKey, Scope, hash_secret};
pub use lines::Line;
pub use objects::{ListQuery, Object, Page};
pub use once::Remembered;
