//! Rows as tokens and loss masks.

use std::path::Path;

use anyhow::Context as _;
use bantam_lab::data::Row;
use bantam_lab::train::TrainRow;
use bantam_text::{Chat, Example};

/// A row as tokens and loss mask; the error names its file and line.
pub(crate) fn example(chat: &Chat, row: &Row, path: &Path) -> anyhow::Result<Example> {
    let example = chat.example(&row.messages, &row.tools);
    example.with_context(|| {
        format!(
            "{}:{}: this row cannot be trained on",
            path.display(),
            row.line
        )
    })
}

/// All rows of a file as tokens and loss masks.
pub(crate) fn train_rows(chat: &Chat, rows: &[Row], path: &Path) -> anyhow::Result<Vec<TrainRow>> {
    rows.iter()
        .map(|row| {
            let Example { tokens, trained } = example(chat, row, path)?;
            let line = row.line;
            Ok(TrainRow {
                tokens,
                trained,
                line,
            })
        })
        .collect()
}
