//! The OpenAI API: its wire types, and nothing of them beyond this folder.

mod answers;
mod ask;
pub(crate) mod batch_run;
pub(crate) mod batches;
pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod decisions;
pub(crate) mod embeddings;
pub(crate) mod evals;
mod fields;
mod file_check;
pub(crate) mod files;
pub(crate) mod fine_tuning;
mod format;
mod messages;
pub(crate) mod models;
mod objects;
mod prompt;
mod request;
mod response;
pub(crate) mod responses;
pub(crate) mod running;
mod score;
pub(crate) mod sse;
pub(crate) mod stored;
pub(crate) mod tokens;
mod tools;
pub(crate) mod uploads;

pub use file_check::{CheckLine, CheckRows};
pub(crate) use responses::background;

/// Reads bytes as a body of each kind; what comes of it is dropped.
pub(crate) fn read_any(body: &[u8], store: &bantam_store::Store) {
    let _ = request::ChatRequest::parse(body);
    let _ = completions::CompletionRequest::parse(body);
    let _ = responses::parse(body, store);
}

/// For the test that every documented field is known.
#[cfg(test)]
pub(crate) fn chat_fields(body: &[u8]) -> Result<(), crate::error::ApiError> {
    request::ChatRequest::parse(body).map(|_| ())
}

/// The same for text completions.
#[cfg(test)]
pub(crate) fn completion_fields(body: &[u8]) -> Result<(), crate::error::ApiError> {
    completions::CompletionRequest::parse(body).map(|_| ())
}
