//! JSON answers: whole equality, and the share of fields that are right.
//!
//! *Exact match* is equality after parsing: key order and white space do not count, the order of an array does, and
//! `1` equals `1.0`. *Field micro-F1* flattens both sides to pairs of path and scalar, the elements of an array
//! sharing one path, and counts pairs as multisets: an array's order does not count here. Empty objects and arrays
//! hold no pair. An answer that is not JSON (or has a key twice) has no pairs: all that was expected is missed.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};

use crate::stats::Part;

/// How many fields one row, or many, got right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldCounts {
    /// Pairs that stand in both.
    pub right: usize,
    /// Pairs in the answer.
    pub answered: usize,
    /// Pairs in the expected answer.
    pub expected: usize,
}

impl FieldCounts {
    /// Counts the pairs of an answer (`None`: it was not JSON) against the expected ones.
    pub fn of(answer: Option<&Value>, expected: &Value) -> FieldCounts {
        let mut open: HashMap<(String, String), usize> = HashMap::new();
        let mut counts = FieldCounts::default();
        each_pair(expected, &mut String::new(), &mut |path, value| {
            counts.expected += 1;
            *open.entry((path.to_owned(), value)).or_default() += 1;
        });
        let Some(answer) = answer else { return counts };
        each_pair(answer, &mut String::new(), &mut |path, value| {
            counts.answered += 1;
            if let Some(left) = open
                .get_mut(&(path.to_owned(), value))
                .filter(|left| **left > 0)
            {
                *left -= 1;
                counts.right += 1;
            }
        });
        counts
    }

    /// Share of the answered pairs that are right.
    pub fn precision(&self) -> f64 {
        share(self.right, self.answered)
    }

    /// Share of the expected pairs that were found.
    pub fn recall(&self) -> f64 {
        share(self.right, self.expected)
    }

    /// `2 right / (answered + expected)`; 1 when nothing was expected and nothing answered.
    pub fn f1(&self) -> f64 {
        if self.answered + self.expected == 0 {
            1.0
        } else {
            share(2 * self.right, self.answered + self.expected)
        }
    }

    /// This row's part of the micro-F1.
    pub fn part(&self) -> Part {
        Part {
            num: 2.0 * self.right as f64,
            den: (self.answered + self.expected) as f64,
        }
    }
}

impl std::ops::AddAssign for FieldCounts {
    fn add_assign(&mut self, other: FieldCounts) {
        self.right += other.right;
        self.answered += other.answered;
        self.expected += other.expected;
    }
}

fn share(part: usize, whole: usize) -> f64 {
    if whole == 0 {
        0.0
    } else {
        part as f64 / whole as f64
    }
}

/// Equality that does not see key order, nor how a number is spelt.
pub fn same_json(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len()
                && a.iter()
                    .all(|(key, x)| b.get(key).is_some_and(|y| same_json(x, y)))
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(x, y)| same_json(x, y))
        }
        (Value::Number(a), Value::Number(b)) => spell(a) == spell(b),
        _ => a == b,
    }
}

/// Hands every scalar with its path to `each`. Paths are JSON pointers; every element of an array stands at `/~*`,
/// which no key can spell, since `~` in a key becomes `~0`.
fn each_pair(value: &Value, path: &mut String, each: &mut impl FnMut(&str, String)) {
    let length = path.len();
    match value {
        Value::Object(object) => {
            for (key, value) in object {
                path.push('/');
                path.push_str(&key.replace('~', "~0").replace('/', "~1"));
                each_pair(value, path, each);
                path.truncate(length);
            }
        }
        Value::Array(items) => {
            path.push_str("/~*");
            for item in items {
                each_pair(item, path, each);
            }
            path.truncate(length);
        }
        Value::Number(number) => each(path, spell(number)),
        // Strings keep their quotes here, so that "1" is not 1.
        scalar => each(path, scalar.to_string()),
    }
}

/// One spelling for each number: whole numbers without a point.
fn spell(number: &Number) -> String {
    match number.as_f64() {
        Some(x) if !number.is_i64() && !number.is_u64() && x.fract() == 0.0 && x.abs() < 9e15 => {
            format!("{}", x as i64)
        }
        _ => number.to_string(),
    }
}
