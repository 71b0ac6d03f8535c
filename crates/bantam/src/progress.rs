//! Progress bars: what is being done, how far it is, when it will end. Hidden off-tty and under `--quiet`.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::printer::Printer;

const BYTES: &str = "{msg:<28!} {bar:24} {decimal_bytes:>9} of {decimal_total_bytes:<9} {decimal_bytes_per_sec:>11}  eta {eta}";
const STEPS: &str = "{msg:<28!} {bar:24} {pos:>6} of {len:<6} eta {eta:<6} {prefix}";
const SPINNER: &str = "{msg:<28!} {spinner} {elapsed} {prefix}";
const BYTE_SPINNER: &str = "{msg:<28!} {spinner} {decimal_bytes} {decimal_bytes_per_sec}";

/// One bar; it vanishes when dropped, so that what stays on the screen is what was printed.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar over bytes; without a known total it only counts.
    pub(crate) fn bytes(printer: &Printer, what: impl Into<String>, total: Option<u64>) -> Self {
        match total {
            Some(total) => Self::start(printer, ProgressBar::new(total), BYTES, what.into()),
            None => Self::start(printer, ProgressBar::no_length(), BYTE_SPINNER, what.into()),
        }
    }

    /// A bar over steps, rows or questions; [`Progress::detail`] shows figures beside it.
    pub(crate) fn steps(printer: &Printer, what: impl Into<String>, total: u64) -> Self {
        Self::start(printer, ProgressBar::new(total), STEPS, what.into())
    }

    /// A spinner with the time passed, for work of unknown length.
    pub(crate) fn spinner(printer: &Printer, what: impl Into<String>) -> Self {
        Self::start(printer, ProgressBar::no_length(), SPINNER, what.into())
    }

    fn start(printer: &Printer, bar: ProgressBar, template: &str, what: String) -> Self {
        let style =
            ProgressStyle::with_template(template).expect("the templates above are well formed");
        let bar = printer.bars().add(
            bar.with_style(style.progress_chars("━╸─"))
                .with_message(what),
        );
        if printer.shows_progress() {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Self { bar }
    }

    /// Moves to `position`.
    pub(crate) fn set(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// Moves by `n`.
    pub(crate) fn add(&self, n: u64) {
        self.bar.inc(n);
    }

    /// Tells the bar that `position` was reached before this process began, so that speed and ETA leave it out.
    pub(crate) fn resume_at(&self, position: u64) {
        self.bar.set_position(position);
        self.bar.reset_eta();
    }

    /// Shows figures beside the bar: loss, tokens per second.
    pub(crate) fn detail(&self, text: impl Into<String>) {
        self.bar.set_prefix(text.into());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_parses_and_a_hidden_bar_costs_nothing() {
        let printer = Printer::new(true, false);
        for bar in [
            Progress::bytes(&printer, "a", Some(3)),
            Progress::bytes(&printer, "b", None),
            Progress::steps(&printer, "c", 2),
            Progress::spinner(&printer, "d"),
        ] {
            bar.add(1);
            bar.resume_at(2);
            bar.set(3);
            bar.detail("loss 1.0");
        }
    }
}
