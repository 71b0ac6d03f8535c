//! Labels: accuracy, macro-F1 and what is taken for what.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a run over labelled rows says besides accuracy.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LabelSummary {
    /// The mean of the labels' F1, over the labels that occur in the expected answers.
    pub macro_f1: f64,
    /// How many labels that is.
    pub labels: usize,
    /// Rows whose answer is no label that occurs in the expected answers.
    pub off_list: usize,
    /// The most frequent confusions, most frequent first, at most [`LabelSummary::LISTED`].
    pub confusions: Vec<Confusion>,
}

/// One label taken for another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confusion {
    /// What was right.
    pub expected: String,
    /// What was answered.
    pub answered: String,
    /// In how many rows.
    pub rows: usize,
}

impl LabelSummary {
    /// How many confusions a summary lists.
    pub const LISTED: usize = 10;

    /// Summarises pairs of expected and answered label, both trimmed; no answer is `None`.
    pub fn of(pairs: &[(&str, Option<&str>)]) -> LabelSummary {
        #[derive(Default)]
        struct Counts {
            right: usize,
            expected: usize,
            answered: usize,
        }
        let mut counts: BTreeMap<&str, Counts> = BTreeMap::new();
        for (expected, _) in pairs {
            counts.entry(expected).or_default().expected += 1;
        }
        let mut confused: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        let mut off_list = 0;
        for &(expected, answered) in pairs {
            let Some(label) = answered.and_then(|answer| counts.get_mut(answer)) else {
                off_list += 1;
                *confused
                    .entry((expected, answered.unwrap_or("(no answer)")))
                    .or_default() += 1;
                continue;
            };
            label.answered += 1;
            if answered == Some(expected) {
                label.right += 1;
            } else {
                *confused
                    .entry((expected, answered.unwrap_or_default()))
                    .or_default() += 1;
            }
        }
        let f1 =
            |label: &Counts| 2.0 * label.right as f64 / (label.expected + label.answered) as f64;
        let macro_f1 = counts.values().map(f1).sum::<f64>() / counts.len().max(1) as f64;
        let mut confusions: Vec<Confusion> = confused
            .into_iter()
            .map(|((expected, answered), rows)| Confusion {
                expected: expected.into(),
                answered: answered.into(),
                rows,
            })
            .collect();
        confusions.sort_by_key(|confusion| std::cmp::Reverse(confusion.rows));
        confusions.truncate(LabelSummary::LISTED);
        LabelSummary {
            macro_f1,
            labels: counts.len(),
            off_list,
            confusions,
        }
    }
}
