//! The same example twice: inside one file, and across files that must not meet.
//!
//! Two rows ask the same when their *normalised* input is equal: the text of every message that is not the
//! system's and not an answer, lowercased, with runs of anything that is neither letter nor digit as one space.
//! So "14 Main St." and "14 main st" meet; a paraphrase does not, and no claim is made about paraphrases.

use std::collections::HashMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::{Message, Role, Row};

/// Lowercased words of letters and digits (of any script), one space between them.
pub fn normalise(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut gap = false;
    for c in text.chars() {
        if c.is_alphanumeric() {
            if gap && !out.is_empty() {
                out.push(' ');
            }
            gap = false;
            out.extend(c.to_lowercase());
        } else {
            gap = true;
        }
    }
    out
}

/// What a row asks, normalised: equal keys mean that two rows ask the same.
///
/// Text without a letter or digit is kept as it is, so that rows of symbols do not all meet in one key.
pub fn input_key(row: &Row) -> String {
    key(row, |message| {
        !matches!(
            message.role,
            Role::System | Role::Developer | Role::Assistant
        )
    })
}

fn answer_key(row: &Row) -> String {
    key(row, |message| message.role == Role::Assistant)
}

fn key(row: &Row, takes: impl Fn(&Message) -> bool) -> String {
    let mut out = String::new();
    for message in row.messages.iter().filter(|message| takes(message)) {
        let text = message.content.as_deref().unwrap_or("");
        let words = normalise(text);
        out.push_str(if words.is_empty() {
            text.trim()
        } else {
            &words
        });
        for call in &message.tool_calls {
            out.push_str(&call.function.name);
            out.push_str(&call.function.arguments);
        }
        out.push('\n');
    }
    out
}

/// Two rows, by line, that ask the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    /// Line of the first (of the training file, in a leak check).
    pub first: usize,
    /// Line of the second (of the other file, in a leak check).
    pub second: usize,
    /// Whether their answers are the same too.
    pub same_answer: bool,
}

/// Rows of one file that ask what an earlier row asks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DuplicateReport {
    /// Rows looked at.
    pub rows: usize,
    /// Rows that repeat an earlier row's input.
    pub repeats: usize,
    /// Of these, rows whose answer differs from the first's: two answers to one question.
    pub contradictions: usize,
    /// The repeats, in order, up to [`DuplicateReport::LISTED`].
    pub pairs: Vec<Conflict>,
}

impl DuplicateReport {
    /// How many pairs a report lists; the counts are always whole.
    pub const LISTED: usize = 20;
}

/// Rows of one file whose input stands in another.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeakReport {
    /// Training rows looked at.
    pub train_rows: usize,
    /// Rows of the other file looked at.
    pub other_rows: usize,
    /// Rows of the other file whose input is also in the training file.
    pub leaked: usize,
    /// Of these, rows whose answer is the same too: the model has seen the very row.
    pub leaked_with_answer: usize,
    /// The leaks, in order, up to [`DuplicateReport::LISTED`].
    pub pairs: Vec<Conflict>,
}

impl LeakReport {
    /// Whether no row leaks.
    pub fn is_clean(&self) -> bool {
        self.leaked == 0
    }
}

impl fmt::Display for LeakReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} rows also stand in the {} training rows",
            self.leaked, self.other_rows, self.train_rows
        )?;
        if let Some(pair) = self.pairs.first() {
            write!(
                f,
                " ({} with the same answer; first: line {} = training line {})",
                self.leaked_with_answer, pair.second, pair.first
            )?;
        }
        Ok(())
    }
}

/// Finds rows that ask what an earlier row of the same file asks.
pub fn duplicates(rows: &[Row]) -> DuplicateReport {
    let mut first_of: HashMap<String, usize> = HashMap::with_capacity(rows.len());
    let mut report = DuplicateReport {
        rows: rows.len(),
        ..Default::default()
    };
    for (i, row) in rows.iter().enumerate() {
        let first = *first_of.entry(input_key(row)).or_insert(i);
        if first == i {
            continue;
        }
        let same_answer = answer_key(&rows[first]) == answer_key(row);
        report.repeats += 1;
        report.contradictions += usize::from(!same_answer);
        if report.pairs.len() < DuplicateReport::LISTED {
            report.pairs.push(Conflict {
                first: rows[first].line,
                second: row.line,
                same_answer,
            });
        }
    }
    report
}

/// Finds rows of `other` (validation or test) whose input is in `train`.
pub fn leak_check(train: &[Row], other: &[Row]) -> LeakReport {
    let mut in_train: HashMap<String, Vec<usize>> = HashMap::with_capacity(train.len());
    for (i, row) in train.iter().enumerate() {
        in_train.entry(input_key(row)).or_default().push(i);
    }
    let mut report = LeakReport {
        train_rows: train.len(),
        other_rows: other.len(),
        ..Default::default()
    };
    for row in other {
        let Some(seen) = in_train.get(&input_key(row)) else {
            continue;
        };
        let answer = answer_key(row);
        let twin = seen
            .iter()
            .copied()
            .find(|i| answer_key(&train[*i]) == answer);
        report.leaked += 1;
        report.leaked_with_answer += usize::from(twin.is_some());
        if report.pairs.len() < DuplicateReport::LISTED {
            let first = train[twin.unwrap_or(seen[0])].line;
            report.pairs.push(Conflict {
                first,
                second: row.line,
                same_answer: twin.is_some(),
            });
        }
    }
    report
}
