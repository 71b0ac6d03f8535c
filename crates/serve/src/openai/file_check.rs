//! What is checked of a file before it is one: every line, and nothing is kept of a file with a bad one.

use std::collections::HashSet;
use std::sync::Arc;

use bantam_store::Store;
use serde_json::Value;

use super::batch_run;
use super::fields::Fields;
use super::files::LineBuffer;
use crate::error::ApiError;

/// Judges the lines of one file; the error is why a line cannot stand in it.
pub type CheckLine = Box<dyn FnMut(&str) -> Result<(), String> + Send>;

/// Begins to judge a file for training. The server knows no training, so whoever trains brings it.
pub type CheckRows = Arc<dyn Fn() -> CheckLine + Send + Sync>;

/// Bad lines that are named.
const NAMED: usize = 20;
/// Letters of a reason that are told.
const REASON_MAX: usize = 300;

/// Reads all of a file that is to serve `purpose`; takes its time.
pub(crate) fn check(
    store: &Store,
    file: &str,
    purpose: &str,
    rows: Option<&CheckRows>,
) -> Result<(), ApiError> {
    let mut judge: CheckLine = match purpose {
        "batch" => batch(),
        "evals" => Box::new(eval),
        "fine-tune" => match rows {
            Some(rows) => rows(),
            None => Box::new(|line| Fields::of_body(line.as_bytes()).map(drop).map_err(reason)),
        },
        _ => return Ok(()),
    };
    // A batch's answers are told by line, so its lines are counted without exception.
    let skips_blank = purpose != "batch";
    let mut lines = LineBuffer::default();
    let (mut n, mut n_read, mut n_bad, mut named) = (0u64, 0u64, 0u64, Vec::new());
    for piece in 0.. {
        let bytes = store.chunk(file, piece).map_err(ApiError::store)?;
        lines.feed(bytes);
        while let Some(line) = lines.take()? {
            n += 1;
            if skips_blank && line.trim_ascii().is_empty() {
                continue;
            }
            n_read += 1;
            let judged = match std::str::from_utf8(&line) {
                Ok(line) => judge(line),
                Err(error) => Err(format!("not UTF-8 at byte {}", error.valid_up_to() + 1)),
            };
            if let Err(reason) = judged {
                n_bad += 1;
                if named.len() < NAMED {
                    let reason: String = reason.chars().take(REASON_MAX).collect();
                    named.push(format!("line {n}: {reason}"));
                }
            }
        }
        if lines.is_over() {
            break;
        }
    }
    if n_read == 0 {
        return Err(ApiError::bad_file("`file` holds no lines"));
    }
    if n_bad == 0 {
        return Ok(());
    }
    let more = n_bad - named.len() as u64;
    let more = if more == 0 {
        String::new()
    } else {
        format!("; and {more} more")
    };
    let lines = if n_bad == 1 {
        "a bad line"
    } else {
        "bad lines"
    };
    let named = named.join("; ");
    Err(ApiError::bad_file(format!(
        "`file` has {lines}, and nothing of it was kept: {named}{more}"
    )))
}

fn reason(error: ApiError) -> String {
    error.message
}

/// The requests of a batch: all to one endpoint, each with a name of its own.
fn batch() -> CheckLine {
    let mut endpoint: Option<String> = None;
    let mut seen = HashSet::new();
    let mut n = 0;
    Box::new(move |line| {
        n += 1;
        if n > batch_run::LINES_MAX {
            return Err(format!(
                "a batch has at most {} lines",
                batch_run::LINES_MAX
            ));
        }
        let ask = batch_run::read(n - 1, line.as_bytes()).map_err(reason)?;
        let first = endpoint.get_or_insert_with(|| ask.url.clone());
        if *first != ask.url {
            return Err(format!("`url` is not that of the first line, `{first}`"));
        }
        if !seen.insert(ask.custom_id.clone()) {
            return Err(format!("`custom_id` {:?} is there twice", ask.custom_id));
        }
        Ok(())
    })
}

/// An item of an evaluation, and perhaps the answer to be judged.
fn eval(line: &str) -> Result<(), String> {
    let mut fields = Fields::of_body(line.as_bytes()).map_err(reason)?;
    for (name, is_needed) in [("item", true), ("sample", false)] {
        match fields.take::<Value>(name).map_err(reason)? {
            Some(Value::Object(_)) => {}
            Some(_) => return Err(format!("`{name}` must be an object")),
            None if is_needed => return Err(format!("`{name}` is missing")),
            None => {}
        }
    }
    fields.finish(&[]).map_err(reason)
}
