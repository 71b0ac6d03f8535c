//! What Kahneman-Tversky optimisation needs of its rows: for each, an answer that belongs to another prompt.

use std::path::Path;

use crate::train::{TrainRow, Verdict};

/// Puts behind each row the same prompt with the answer of the next row, in file order, for which there is room: what
/// tells how far the policy has moved on answers that nobody judged.
pub(crate) fn mismatched(rows: Vec<TrainRow>, max_seq_len: usize) -> Vec<TrainRow> {
    let answer = |row: &TrainRow| {
        let start = row.prompt_len();
        (row.tokens[start..].to_vec(), row.trained[start..].to_vec())
    };
    let mut both = Vec::with_capacity(2 * rows.len());
    for (i, row) in rows.iter().enumerate() {
        let prompt = row.prompt_len();
        let mut others = (1..=rows.len()).map(|step| &rows[(i + step) % rows.len()]);
        let fits =
            |other: &&TrainRow| prompt + other.tokens.len() - other.prompt_len() <= max_seq_len;
        // The last one looked at is the row itself, which fits.
        let other = others.find(fits).unwrap_or(row);
        let (tokens, trained) = answer(other);
        both.push(row.clone());
        both.push(TrainRow {
            tokens: [&row.tokens[..prompt], &tokens[..]].concat(),
            trained: [&row.trained[..prompt], &trained[..]].concat(),
            line: row.line,
            verdict: Verdict::Mismatched,
        });
    }
    both
}

/// What there is to say of answers that are all desirable, or none.
pub(crate) fn one_sided(rows: &[TrainRow], path: &Path) -> Option<String> {
    let n = rows
        .iter()
        .filter(|row| row.verdict == Verdict::Chosen)
        .count();
    let all = match n {
        0 => "undesirable",
        n if n == rows.len() => "desirable",
        _ => return None,
    };
    let path = path.display();
    Some(format!(
        "{path}: all answers are {all}; it takes both kinds to learn a difference"
    ))
}
