//! The fixed split: which side an address falls on depends on its normalised text and nothing else.
//!
//! So a copy of an address, in other capitals or with other punctuation, is always on the same side, and
//! adding or dropping rows never moves the others. Rows whose text occurs in the messiest set are set
//! aside altogether, and validation and test keep one row of each text, so that every row judged is one
//! more observation. [`leak_check`] proves it afterwards, from the rows that came out.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::xml::Labelled;

/// Hundredths of the hash range that go to the test side, then to the validation side; the rest trains.
const TEST_PERCENT: u128 = 18;
const VALID_PERCENT: u128 = 7;

/// The four sets of rows.
#[derive(Debug, Default)]
pub(crate) struct Split {
    pub(crate) train: Vec<Labelled>,
    pub(crate) valid: Vec<Labelled>,
    pub(crate) test: Vec<Labelled>,
    /// The second, harder test: another file, never trained on.
    pub(crate) messiest: Vec<Labelled>,
    /// Rows of the first file dropped because their text occurs in the messiest set.
    pub(crate) set_aside: usize,
    /// Rows dropped because validation or test has the same text already.
    pub(crate) repeats_dropped: usize,
}

/// What the leak check counts. The first six must be zero, and [`LeakCheck::is_clean`] says whether they are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LeakCheck {
    pub(crate) test_in_train: usize,
    pub(crate) test_in_valid: usize,
    pub(crate) valid_in_train: usize,
    pub(crate) messiest_in_train: usize,
    pub(crate) messiest_in_valid: usize,
    pub(crate) messiest_in_test: usize,
    /// Rows of the labelled file set aside because the messiest set has the same text.
    pub(crate) set_aside: usize,
    /// Rows of the labelled file dropped because validation or test has the same text already.
    pub(crate) repeats_dropped: usize,
    /// Rows of the test that repeat an earlier one; none.
    pub(crate) repeats_in_test: usize,
    /// Rows of the messiest set that repeat an earlier one; they are kept, as the set is small and fixed.
    pub(crate) repeats_in_messiest: usize,
    /// Test rows that differ from some training row in digits only: not copies, but easy ones.
    pub(crate) test_like_train_but_for_digits: usize,
    /// The same for the messiest set.
    pub(crate) messiest_like_train_but_for_digits: usize,
}

impl LeakCheck {
    /// True when no text is on two sides.
    pub(crate) fn is_clean(&self) -> bool {
        [
            self.test_in_train,
            self.test_in_valid,
            self.valid_in_train,
            self.messiest_in_train,
            self.messiest_in_valid,
            self.messiest_in_test,
        ] == [0; 6]
    }
}

/// Lower case, letters and digits only, single-spaced: what makes two addresses the same.
pub(crate) fn normalise(text: &str) -> String {
    let lower = text.to_lowercase();
    let words = lower
        .split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

/// Splits the labelled rows and keeps the messiest ones apart.
pub(crate) fn split(labelled: Vec<Labelled>, messiest: Vec<Labelled>) -> Split {
    let mut judged = HashSet::new();
    let apart: HashSet<String> = messiest.iter().map(|row| normalise(&row.text)).collect();
    let mut split = Split {
        messiest,
        ..Split::default()
    };
    for row in labelled {
        let text = normalise(&row.text);
        if apart.contains(&text) {
            split.set_aside += 1;
            continue;
        }
        let side = match percentile(&text) {
            p if p < TEST_PERCENT => &mut split.test,
            p if p < TEST_PERCENT + VALID_PERCENT => &mut split.valid,
            _ => {
                split.train.push(row);
                continue;
            }
        };
        if judged.insert(text) {
            side.push(row);
        } else {
            split.repeats_dropped += 1;
        }
    }
    split
}

/// Where a normalised text's hash lies in its range, in hundredths.
fn percentile(normalised: &str) -> u128 {
    let digest = Sha256::digest(normalised.as_bytes());
    let mut head = [0; 8];
    head.copy_from_slice(&digest[..8]);
    (u128::from(u64::from_be_bytes(head)) * 100) >> 64
}

/// Counts every text that is on two sides, from scratch.
pub(crate) fn leak_check(split: &Split) -> LeakCheck {
    let texts = |rows: &[Labelled]| -> Vec<String> {
        rows.iter().map(|row| normalise(&row.text)).collect()
    };
    let (train, valid) = (texts(&split.train), texts(&split.valid));
    let (test, messiest) = (texts(&split.test), texts(&split.messiest));
    let digitless =
        |texts: &[String]| -> Vec<String> { texts.iter().map(|text| mask_numbers(text)).collect() };
    let train_digitless = digitless(&train);
    LeakCheck {
        test_in_train: common(&test, &train),
        test_in_valid: common(&test, &valid),
        valid_in_train: common(&valid, &train),
        messiest_in_train: common(&messiest, &train),
        messiest_in_valid: common(&messiest, &valid),
        messiest_in_test: common(&messiest, &test),
        set_aside: split.set_aside,
        repeats_dropped: split.repeats_dropped,
        repeats_in_test: repeats(&test),
        repeats_in_messiest: repeats(&messiest),
        test_like_train_but_for_digits: common(&digitless(&test), &train_digitless),
        messiest_like_train_but_for_digits: common(&digitless(&messiest), &train_digitless),
    }
}

/// How many of `these` occur in `those`.
fn common(these: &[String], those: &[String]) -> usize {
    let those: HashSet<&String> = those.iter().collect();
    these.iter().filter(|text| those.contains(text)).count()
}

/// How many repeat an earlier one.
fn repeats(texts: &[String]) -> usize {
    texts.len() - texts.iter().collect::<HashSet<_>>().len()
}

/// Writes every run of digits as one `0`.
fn mask_numbers(text: &str) -> String {
    let mut masked = String::with_capacity(text.len());
    for c in text.chars() {
        if !c.is_numeric() {
            masked.push(c);
        } else if !masked.ends_with('0') {
            masked.push('0');
        }
    }
    masked
}

#[cfg(test)]
mod tests {
    use super::super::answer::Token;
    use super::*;

    fn rows(texts: &[&str]) -> Vec<Labelled> {
        texts
            .iter()
            .map(|text| Labelled {
                text: (*text).to_owned(),
                tokens: vec![Token {
                    tag: "StreetName",
                    text: (*text).to_owned(),
                }],
                line: 1,
            })
            .collect()
    }

    fn many() -> Vec<String> {
        (0..2000)
            .map(|i| format!("{i} Main St., Town {}", i % 7))
            .collect()
    }

    #[test]
    fn normalise_ignores_case_punctuation_and_spacing() {
        assert_eq!(normalise("  12-A  N. Élm St.,#4 "), "12 a n élm st 4");
        assert_eq!(
            normalise("12 a n ÉLM ST 4"),
            normalise("12-A N. Élm St., #4")
        );
    }

    #[test]
    fn sides_do_not_depend_on_order_company_or_spelling() {
        let texts = many();
        let forward = split(
            rows(&texts.iter().map(String::as_str).collect::<Vec<_>>()),
            vec![],
        );
        let shout: Vec<String> = texts
            .iter()
            .rev()
            .step_by(3)
            .map(|t| t.to_uppercase())
            .collect();
        let backward = split(
            rows(&shout.iter().map(String::as_str).collect::<Vec<_>>()),
            vec![],
        );
        let side = |split: &Split, text: &str| {
            let has =
                |rows: &[Labelled]| rows.iter().any(|r| normalise(&r.text) == normalise(text));
            (has(&split.train), has(&split.valid), has(&split.test))
        };
        for text in shout.iter().take(100) {
            assert_eq!(side(&forward, text), side(&backward, text), "{text}");
        }
        let n_test = forward.test.len();
        assert!((300..420).contains(&n_test), "{n_test} of 2000");
    }

    #[test]
    fn nothing_is_on_two_sides_and_messiest_texts_are_set_aside() {
        let mut texts = many();
        texts.extend(many().iter().map(|t| t.to_lowercase().replace(',', " ")));
        let labelled = rows(&texts.iter().map(String::as_str).collect::<Vec<_>>());
        let split = split(
            labelled,
            rows(&["5 main st town 5", "5 MAIN ST, TOWN 5", "elsewhere"]),
        );
        let leaks = leak_check(&split);
        assert!(leaks.is_clean(), "{leaks:?}");
        assert_eq!(leaks.set_aside, 2);
        assert_eq!(leaks.repeats_in_messiest, 1);
        assert_eq!(leaks.repeats_in_test, 0);
        let judged = split.valid.len() + split.test.len();
        assert_eq!(judged, leaks.repeats_dropped);
        let dropped = leaks.set_aside + leaks.repeats_dropped;
        assert_eq!(split.train.len() + judged + dropped, texts.len());
    }

    #[test]
    fn a_leak_is_seen() {
        let leaks = leak_check(&Split {
            train: rows(&["1 Elm St", "2 Oak"]),
            test: rows(&["1 ELM ST.", "33 Oak"]),
            ..Split::default()
        });
        assert_eq!(
            (leaks.test_in_train, leaks.test_like_train_but_for_digits),
            (1, 2)
        );
        assert!(!leaks.is_clean());
    }
}
