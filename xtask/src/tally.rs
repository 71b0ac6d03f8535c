//! Counting what passed, in the words that CI looks for.

use std::time::Instant;

use anyhow::Result;

/// Passes and failures so far.
#[derive(Default)]
pub(crate) struct Tally {
    passed: u64,
    failed: u64,
    failures: Vec<String>,
}

impl Tally {
    /// Runs one check, says how it went and how long it took, and counts it.
    pub(crate) fn check(&mut self, name: &str, body: impl FnOnce() -> Result<()>) {
        eprintln!("\n==> {name}");
        let began = Instant::now();
        match body() {
            Ok(()) => {
                self.passed += 1;
                eprintln!("    ok: {name} ({:.1} s)", began.elapsed().as_secs_f64());
            }
            Err(error) => {
                eprintln!("    FAILED: {name}: {error:#}");
                self.fail(name);
            }
        }
    }

    /// Counts one failure.
    pub(crate) fn fail(&mut self, name: &str) {
        self.failed += 1;
        self.failures.push(name.to_owned());
    }

    /// Reads a closing line of `cargo test`: `test result: ok. 3 passed; 0 failed; ...`.
    pub(crate) fn read_cargo_line(&mut self, line: &str) {
        let Some((_, counts)) = line
            .strip_prefix("test result: ")
            .and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for part in counts.split("; ") {
            if let Some((n, what)) = part.split_once(' ')
                && let Ok(n) = n.parse::<u64>()
            {
                match what {
                    "passed" => self.passed += n,
                    "failed" => self.failed += n,
                    _ => {}
                }
            }
        }
    }

    /// Failures so far.
    pub(crate) fn failed(&self) -> u64 {
        self.failed
    }

    /// Prints the closing line on stdout; whether all passed.
    pub(crate) fn close(&self) -> bool {
        eprintln!();
        for name in &self.failures {
            eprintln!("failed: {name}");
        }
        println!("{} passed, {} failed", self.passed, self.failed);
        self.failed == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_cargo_test_are_counted() {
        let mut tally = Tally::default();
        tally.read_cargo_line("test result: ok. 14 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.25s");
        tally.read_cargo_line("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s");
        tally.read_cargo_line("test some::result ... ok");
        assert_eq!((tally.passed, tally.failed), (17, 2));
    }

    #[test]
    fn a_failed_check_is_named_and_counted() {
        let mut tally = Tally::default();
        tally.check("good", || Ok(()));
        tally.check("bad", || anyhow::bail!("no"));
        assert_eq!((tally.passed, tally.failed), (1, 1));
        assert_eq!(tally.failures, ["bad"]);
    }
}
