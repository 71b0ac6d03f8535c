//! A comparison's result: a table for people, one JSON line for programs.

use serde_json::{Map, Value, json};

/// What one comparison found.
pub(super) struct Report {
    name: &'static str,
    lines: Vec<Line>,
    details: Map<String, Value>,
}

struct Line {
    what: String,
    value: f64,
    bound: Option<Bound>,
    /// Where the value is a ratio: ours, theirs, and what would be better still.
    sides: Option<(f64, f64, f64)>,
}

/// What a value must satisfy. NaN satisfies nothing.
#[derive(Clone, Copy)]
pub(super) enum Bound {
    /// At most this.
    Max(f64),
    /// At least this.
    Min(f64),
}

impl Bound {
    fn holds(self, value: f64) -> bool {
        match self {
            Bound::Max(limit) => value <= limit,
            Bound::Min(limit) => value >= limit,
        }
    }
}

impl Report {
    /// An empty report.
    pub(super) fn new(name: &'static str) -> Report {
        Report {
            name,
            lines: Vec::new(),
            details: Map::new(),
        }
    }

    /// A value that must hold.
    pub(super) fn must(&mut self, what: impl Into<String>, value: f64, bound: Bound) {
        self.lines.push(Line {
            what: what.into(),
            value,
            bound: Some(bound),
            sides: None,
        });
    }

    /// A value that is only told.
    pub(super) fn tell(&mut self, what: impl Into<String>, value: f64) {
        self.lines.push(Line {
            what: what.into(),
            value,
            bound: None,
            sides: None,
        });
    }

    /// Ours over theirs, to be at least `target`, better at least `stretch`.
    pub(super) fn ratio(
        &mut self,
        what: impl Into<String>,
        (ours, theirs): (f64, f64),
        target: f64,
        stretch: f64,
    ) {
        self.lines.push(Line {
            what: what.into(),
            value: ours / theirs,
            bound: Some(Bound::Min(target)),
            sides: Some((ours, theirs, stretch)),
        });
    }

    /// Ours over theirs, to be at most `target`, better at most `stretch`.
    pub(super) fn share(
        &mut self,
        what: impl Into<String>,
        (ours, theirs): (f64, f64),
        target: f64,
        stretch: f64,
    ) {
        self.lines.push(Line {
            what: what.into(),
            value: ours / theirs,
            bound: Some(Bound::Max(target)),
            sides: Some((ours, theirs, stretch)),
        });
    }

    /// Ours beside theirs, without a target.
    pub(super) fn beside(&mut self, what: impl Into<String>, (ours, theirs): (f64, f64)) {
        self.lines.push(Line {
            what: what.into(),
            value: ours / theirs,
            bound: None,
            sides: Some((ours, theirs, f64::NAN)),
        });
    }

    /// Something for the JSON line alone.
    pub(super) fn detail(&mut self, key: &str, value: Value) {
        self.details.insert(key.to_owned(), value);
    }

    /// Whether every bound holds.
    pub(super) fn passed(&self) -> bool {
        self.lines.iter().all(Line::passed)
    }

    /// Prints the table (unless JSON alone is wanted) and the JSON line; whether every bound holds.
    pub(super) fn print(&self, json_only: bool) -> bool {
        if !json_only {
            println!("\n{}", self.name);
        }
        for line in self.lines.iter().filter(|_| !json_only) {
            println!(
                "  {:<52} {:>12}  {}",
                line.what,
                number(line.value),
                line.verdict()
            );
        }
        let lines: Vec<Value> = self.lines.iter().map(Line::json).collect();
        println!(
            "{}",
            json!({"peers": self.name, "passed": self.passed(), "lines": lines, "details": self.details})
        );
        self.passed()
    }
}

impl Line {
    fn passed(&self) -> bool {
        self.bound.is_none_or(|bound| bound.holds(self.value))
    }

    fn verdict(&self) -> String {
        let word = if self.passed() { "PASS" } else { "FAIL" };
        let (ours, stretch) = match self.sides {
            None => (String::new(), String::new()),
            Some((ours, theirs, stretch)) => (
                format!("{} against {}  ", number(ours), number(theirs)),
                format!(", better {}", number(stretch)),
            ),
        };
        match self.bound {
            None => ours,
            Some(Bound::Max(limit)) => {
                format!("{word}  {ours}(at most {}{stretch})", number(limit))
            }
            Some(Bound::Min(limit)) => {
                format!("{word}  {ours}(at least {}{stretch})", number(limit))
            }
        }
    }

    fn json(&self) -> Value {
        let (at_most, at_least) = match self.bound {
            Some(Bound::Max(limit)) => (Some(limit), None),
            Some(Bound::Min(limit)) => (None, Some(limit)),
            None => (None, None),
        };
        let mut line = json!({"what": self.what, "value": self.value, "at_most": at_most, "at_least": at_least, "passed": self.passed()});
        if let Some((ours, theirs, stretch)) = self.sides {
            line["bantam"] = ours.into();
            line["peer"] = theirs.into();
            line["stretch"] = stretch.is_finite().then_some(stretch).into();
        }
        line
    }
}

/// Short, and exact where it is whole.
fn number(value: f64) -> String {
    if value == value.trunc() && value.abs() < 1e15 {
        format!("{value}")
    } else if (0.001..1e6).contains(&value.abs()) {
        format!("{value:.4}")
    } else {
        format!("{value:.2e}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_met_or_not_and_nan_never_meets_it() {
        for (value, bound, passes) in [
            (1.0, Bound::Max(1.0), true),
            (1.1, Bound::Max(1.0), false),
            (1.0, Bound::Min(1.5), false),
            (f64::NAN, Bound::Max(1.0), false),
            (f64::NAN, Bound::Min(1.0), false),
        ] {
            let mut report = Report::new("x");
            report.must("value", value, bound);
            assert_eq!(report.passed(), passes);
        }
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(number(1280.0), "1280");
        assert_eq!(number(0.25), "0.2500");
        assert_eq!(number(1.5e-9), "1.50e-9");
    }
}
