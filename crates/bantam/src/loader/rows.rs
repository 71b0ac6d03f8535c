//! Rows as tokens and loss masks.

use std::path::Path;

use anyhow::{Context as _, anyhow};
use bantam_lab::data::{self, JudgedRow, PairRow, Preferences, Row, RowOptions};
use bantam_lab::recipe::Lines;
use bantam_lab::train::{TrainRow, Verdict};
use bantam_text::{Chat, Example};

use crate::error::advise;

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

/// A row as the trainer takes it.
fn train_row(chat: &Chat, row: &Row, verdict: Verdict, path: &Path) -> anyhow::Result<TrainRow> {
    let Example { tokens, trained } = example(chat, row, path)?;
    Ok(TrainRow {
        tokens,
        trained,
        line: row.line,
        verdict,
    })
}

/// The rows of a file with what is known of their answers; of a pair, the preferred answer's before the other's.
pub(crate) fn load(
    lines: Lines,
    path: &Path,
    options: &RowOptions,
) -> anyhow::Result<Vec<(Row, Verdict)>> {
    if lines == Lines::Rows {
        let rows = data::load_rows(path, options)?;
        return Ok(rows.into_iter().map(|row| (row, Verdict::Taught)).collect());
    }
    Ok(match data::load_preferences(path, options)? {
        // Where answers are judged one by one, a pair is two of them.
        Preferences::Pairs(pairs) => {
            let both = |PairRow { chosen, rejected }| {
                [(chosen, Verdict::Chosen), (rejected, Verdict::Rejected)]
            };
            pairs.into_iter().flat_map(both).collect()
        }
        Preferences::Judged(rows) if lines == Lines::Judged => {
            let judged = |JudgedRow { row, desirable }| match desirable {
                true => (row, Verdict::Chosen),
                false => (row, Verdict::Rejected),
            };
            rows.into_iter().map(judged).collect()
        }
        Preferences::Judged(_) => {
            let path = path.display();
            return Err(advise(
                anyhow!("`{path}` holds answers that are judged one by one, not pairs"),
                "train on them with `method = \"kto\"`",
            ));
        }
    })
}

/// The same as tokens and loss masks.
pub(crate) fn train_rows(
    chat: &Chat,
    rows: &[(Row, Verdict)],
    path: &Path,
) -> anyhow::Result<Vec<TrainRow>> {
    rows.iter()
        .map(|(row, verdict)| train_row(chat, row, *verdict, path))
        .collect()
}
