//! The only way out: data on stdout, talk on stderr, progress bars that step aside for both.

use std::io::{self, IsTerminal as _, Write as _};

use indicatif::{MultiProgress, ProgressDrawTarget};
use serde::Serialize;

use crate::error::Style;

/// Prints for one command. Cheap to clone; clones share the progress bars.
#[derive(Debug, Clone)]
pub(crate) struct Printer {
    quiet: bool,
    out_style: Style,
    err_style: Style,
    bars: MultiProgress,
}

impl Printer {
    /// A printer for this process; `color` is what the environment allows (`NO_COLOR`).
    pub(crate) fn new(quiet: bool, color: bool) -> Self {
        let err_tty = io::stderr().is_terminal();
        let target = if quiet || !err_tty {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        Self {
            quiet,
            out_style: Style {
                color: color && io::stdout().is_terminal(),
            },
            err_style: Style {
                color: color && err_tty,
            },
            bars: MultiProgress::with_draw_target(target),
        }
    }

    /// Colours for stdout.
    pub(crate) fn out_style(&self) -> Style {
        self.out_style
    }

    /// Colours for stderr.
    pub(crate) fn err_style(&self) -> Style {
        self.err_style
    }

    /// Whether progress is shown at all.
    pub(crate) fn shows_progress(&self) -> bool {
        !self.bars.is_hidden()
    }

    /// The bars of this process; [`crate::progress`] adds to them.
    pub(crate) fn bars(&self) -> &MultiProgress {
        &self.bars
    }

    /// Writes a line of data to stdout. Fails with `BrokenPipe` when nobody reads any more.
    pub(crate) fn line(&self, text: impl AsRef<str>) -> io::Result<()> {
        self.bars.suspend(|| {
            let mut out = io::stdout().lock();
            out.write_all(text.as_ref().as_bytes())?;
            out.write_all(b"\n")
        })
    }

    /// Writes a piece of text to stdout at once: an answer as it comes.
    pub(crate) fn piece(&self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }

    /// Writes `value` as one line of JSON to stdout.
    pub(crate) fn json(&self, value: &impl Serialize) -> anyhow::Result<()> {
        self.line(serde_json::to_string(value)?)?;
        Ok(())
    }

    /// Says what is going on, on stderr, unless `--quiet`.
    pub(crate) fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            self.bars.suspend(|| eprintln!("{}", text.as_ref()));
        }
    }

    /// Warns on stderr, `--quiet` or not.
    pub(crate) fn warn(&self, text: impl AsRef<str>) {
        self.bars
            .suspend(|| eprintln!("{} {}", self.err_style.yellow("warning:"), text.as_ref()));
    }
}

/// Which way a column's cells lean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A plain table: columns as wide as their widest cell, two spaces between, no lines.
#[derive(Debug)]
pub(crate) struct Table {
    headed: bool,
    columns: Vec<(String, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings.
    pub(crate) fn new<S: Into<String>>(columns: impl IntoIterator<Item = (S, Align)>) -> Self {
        let columns = columns
            .into_iter()
            .map(|(name, align)| (name.into(), align))
            .collect();
        Self {
            headed: true,
            columns,
            rows: Vec::new(),
        }
    }

    /// A table of names and values, without headings.
    pub(crate) fn facts() -> Self {
        let columns = vec![(String::new(), Align::Left), (String::new(), Align::Left)];
        Self {
            headed: false,
            columns,
            rows: Vec::new(),
        }
    }

    /// Adds a row; missing cells are empty.
    pub(crate) fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let mut cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        cells.resize(self.columns.len(), String::new());
        self.rows.push(cells);
    }

    /// The table's lines, the heading in bold.
    pub(crate) fn render(&self, style: Style) -> String {
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|i| {
                let cells = self.rows.iter().map(|row| width(&row[i]));
                cells.chain([width(&self.columns[i].0)]).max().unwrap_or(0)
            })
            .collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut out = String::new();
            for (i, cell) in cells.enumerate() {
                let pad = " ".repeat(widths[i].saturating_sub(width(cell)));
                if i > 0 {
                    out.push_str("  ");
                }
                match self.columns[i].1 {
                    Align::Left => out.extend([cell, &pad]),
                    Align::Right => out.extend([&pad, cell]),
                }
            }
            out.truncate(out.trim_end().len());
            out
        };
        let mut lines = Vec::with_capacity(self.rows.len() + 1);
        if self.headed {
            lines.push(style.bold(&line(
                &mut self.columns.iter().map(|(name, _)| name.as_str()),
            )));
        }
        lines.extend(
            self.rows
                .iter()
                .map(|row| line(&mut row.iter().map(String::as_str))),
        );
        lines.join("\n")
    }
}

/// Columns that `text` takes on a terminal.
fn width(text: &str) -> usize {
    text.chars().count()
}

/// `1234567` as `1,234,567`.
pub(crate) fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Bytes in the decimal units that disks and downloads are sold in: `91.7 MB`.
pub(crate) fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    if n < 1000 {
        return format!("{n} B");
    }
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.95 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// A parameter count as people say it: `134.5M`, `1.2B`.
pub(crate) fn parameters(n: u64) -> String {
    match n {
        0..1_000 => n.to_string(),
        1_000..1_000_000 => format!("{:.1}K", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", n as f64 / 1e6),
        _ => format!("{:.2}B", n as f64 / 1e9),
    }
}

/// A duration as people say it: `41 s`, `3 min 05 s`, `2 h 04 min`.
pub(crate) fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..10 => format!("{:.1} s", seconds.max(0.0)),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up() {
        let mut table = Table::new([("name", Align::Left), ("size", Align::Right)]);
        table.row(["é", "9"]);
        table.row(["longer", "1,000"]);
        assert_eq!(
            table.render(Style { color: false }),
            "name     size\né           9\nlonger  1,000"
        );
    }

    #[test]
    fn numbers_read_well() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(1_234_567), "1,234,567");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(999_949), "999.9 kB");
        assert_eq!(bytes(999_999), "1.0 MB");
        assert_eq!(bytes(91_700_000), "91.7 MB");
        assert_eq!(parameters(134_515_008), "134.5M");
        assert_eq!(duration(1.25), "1.2 s");
        assert_eq!(duration(185.0), "3 min 05 s");
        assert_eq!(duration(7440.0), "2 h 04 min");
    }
}
