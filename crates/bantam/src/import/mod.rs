//! Evals of other systems, as evals of the API: pure functions from files' contents to requests.
//!
//! What cannot be said with the API's graders is named, with its place; nothing is dropped in silence.

mod openai;
mod promptfoo;

use std::path::Path;

use anyhow::Context as _;
use serde_json::{Map, Value};

/// An eval to be made, with its rows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Imported {
    /// The body of `POST /v1/evals`.
    pub(crate) eval: Value,
    /// Sets of rows, each for runs of its own.
    pub(crate) sets: Vec<RowSet>,
}

/// Rows, and the runs over them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RowSet {
    /// What they are called.
    pub(crate) name: String,
    /// Lines of a file of purpose `evals`.
    pub(crate) rows: Vec<Value>,
    /// Data sources without their rows, by the name of the run.
    pub(crate) runs: Vec<(String, Value)>,
}

/// Everything that was found in a file.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Found {
    /// The evals.
    pub(crate) evals: Vec<Imported>,
    /// What could not be taken over, each with its place.
    pub(crate) unsupported: Vec<String>,
    /// What is different from where it came from.
    pub(crate) notes: Vec<String>,
}

/// Models that were said on the command line.
#[derive(Debug, Clone, Default)]
pub(crate) struct Models {
    /// Who is judged, in place of whoever the file names.
    pub(crate) judged: Option<String>,
    /// Who judges.
    pub(crate) judge: Option<String>,
}

/// Reads a file: promptfoo's if it is YAML with `prompts` or `tests`, else what OpenAI's Evals API gave.
pub(crate) fn read(path: &Path, models: &Models) -> anyhow::Result<Found> {
    let text = fs_err::read_to_string(path)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let ending = path
        .extension()
        .and_then(|ending| ending.to_str())
        .unwrap_or_default();
    let place = || format!("{}", path.display());
    if ending == "jsonl" {
        let lines = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.trim().is_empty());
        let values: anyhow::Result<Vec<Value>> = lines
            .map(|(i, line)| {
                serde_json::from_str(line).with_context(|| format!("{}:{}", place(), i + 1))
            })
            .collect();
        return openai::read(&Value::Array(values?)).with_context(place);
    }
    // JSON is YAML, but for the characters that may stand in it.
    let value: Value = match serde_json::from_str(&text) {
        Ok(value) => value,
        Err(_) => serde_yaml_ng::from_str(&text)
            .with_context(|| format!("{} is neither JSON nor YAML", place()))?,
    };
    if value.get("prompts").is_some() || value.get("tests").is_some() {
        promptfoo::read(&value, folder, models).with_context(place)
    } else {
        openai::read(&value).with_context(place)
    }
}

/// A path into the row, as templates have it.
fn item(key: &str) -> String {
    let is_plain = !key.is_empty() && key.chars().all(|c| c.is_alphanumeric() || c == '_');
    if is_plain {
        format!("item.{key}")
    } else {
        format!("item[\"{key}\"]")
    }
}

/// The schema of rows with these fields.
fn schema(fields: &Map<String, Value>) -> Value {
    let properties: Map<String, Value> = fields
        .keys()
        .map(|key| (key.clone(), serde_json::json!({})))
        .collect();
    serde_json::json!({"type": "object", "properties": properties})
}
