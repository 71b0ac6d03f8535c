//! Rows of JSON lines, and the task they belong to.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

/// The system prompt of Banking77, the same as the PEFT script's.
pub(crate) const SYSTEM: &str = "Classify the banking customer query into one intent label.";

/// Every label of rows of `text`/`label`, once, sorted.
pub(super) fn labels_of(rows: &Path) -> Result<Vec<String>> {
    let rows = json_lines(rows)?;
    let labels: std::collections::BTreeSet<String> = rows
        .iter()
        .filter_map(|row| row["label"].as_str())
        .map(str::to_owned)
        .collect();
    Ok(labels.into_iter().collect())
}

/// `n` rows spread over the whole file, which may be sorted by label.
pub(super) fn spread_rows(from: &Path, n: usize, to: &Path) -> Result<PathBuf> {
    let all = fs::read_to_string(from)?;
    let lines: Vec<&str> = all.lines().collect();
    let some: Vec<&str> = lines
        .iter()
        .copied()
        .step_by((lines.len() / n).max(1))
        .take(n)
        .collect();
    fs::write(to, some.join("\n") + "\n")?;
    Ok(to.to_path_buf())
}

pub(super) fn json_lines(path: &Path) -> Result<Vec<Value>> {
    let all = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    all.lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect()
}

pub(super) fn num(value: &Value, field: &str) -> Result<f64> {
    value[field]
        .as_f64()
        .with_context(|| format!("no number `{field}` in {value}"))
}
