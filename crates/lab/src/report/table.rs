//! The scorecard as plain text: aligned columns, no colour, readable in a log.

use std::fmt::Write;

use super::scorecard::{Measurement, Scorecard, Verdict};

/// Renders the scorecard for a terminal.
pub fn text_table(card: &Scorecard) -> String {
    let mut out = String::new();
    for set in &card.test_sets {
        let metrics = card.metrics(&set.id);
        let mut table = vec![vec!["system".to_owned()]];
        table[0].extend(metrics.iter().map(|metric| format!("{metric} % [95% CI]")));
        table[0].extend(["p50 ms", "p95 ms", "tok/s", "failed"].map(str::to_owned));
        for system in &card.systems {
            let Some(result) = card.result(&system.id, &set.id) else {
                continue;
            };
            let mut row = vec![system.name.clone()];
            for metric in &metrics {
                row.push(result.score(metric).map_or("-".to_owned(), |score| {
                    percent_with_interval(score.value, score.ci95)
                }));
            }
            row.extend([
                number(result.p50_ms),
                number(result.p95_ms),
                number(result.tok_per_s),
                failed(result),
            ]);
            table.push(row);
        }
        let _ = writeln!(out, "{} ({} rows)", set.name, set.rows);
        aligned(&mut out, &table);
        out.push('\n');
    }
    let mut costs = vec![
        ["system", "model", "peak memory", "training"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for system in &card.systems {
        costs.push(vec![
            system.name.clone(),
            system.model_bytes.map_or("-".to_owned(), bytes),
            system
                .peak_rss_mb
                .map_or("-".to_owned(), |mb| format!("{mb:.0} MB")),
            system.train_s.map_or("-".to_owned(), duration),
        ]);
    }
    aligned(&mut out, &costs);
    if !card.comparisons.is_empty() {
        out.push_str("\npaired differences, in points\n");
        let mut table = vec![
            ["", "on", "score", "difference [95% CI]", "p", "verdict"]
                .map(str::to_owned)
                .to_vec(),
        ];
        for comparison in &card.comparisons {
            let difference = &comparison.difference;
            table.push(vec![
                format!(
                    "{} - {}",
                    card.system_name(&comparison.system),
                    card.system_name(&comparison.against)
                ),
                comparison.test_set.clone(),
                comparison.metric.clone(),
                signed_with_interval(difference.value, difference.ci95),
                comparison
                    .mcnemar
                    .map_or("-".to_owned(), |test| p_value(test.p_value)),
                verdict(comparison.verdict).to_owned(),
            ]);
        }
        aligned(&mut out, &table);
    }
    out
}

fn aligned(out: &mut String, table: &[Vec<String>]) {
    let n_columns = table.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        table
            .iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..n_columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    for (i, row) in table.iter().enumerate() {
        let mut line = String::from("  ");
        for (column, cell) in row.iter().enumerate() {
            // Names to the left, numbers to the right.
            let _ = match column {
                0 => write!(line, "{cell:<width$}", width = widths[0]),
                _ => write!(line, "  {cell:>width$}", width = widths[column]),
            };
        }
        let _ = writeln!(out, "{}", line.trim_end());
        if i == 0 {
            let rule = widths.iter().sum::<usize>() + 2 * (n_columns - 1);
            let _ = writeln!(out, "  {}", "-".repeat(rule));
        }
    }
}

/// `71.4 [68.2, 74.4]`.
pub(super) fn percent_with_interval(value: f64, ci95: [f64; 2]) -> String {
    format!(
        "{:.1} [{:.1}, {:.1}]",
        100.0 * value,
        100.0 * ci95[0],
        100.0 * ci95[1]
    )
}

/// `+51.0 [+47.2, +54.9]`.
pub(super) fn signed_with_interval(value: f64, ci95: [f64; 2]) -> String {
    format!(
        "{:+.1} [{:+.1}, {:+.1}]",
        100.0 * value,
        100.0 * ci95[0],
        100.0 * ci95[1]
    )
}

pub(super) fn p_value(p: f64) -> String {
    if p < 0.0001 {
        "< 0.0001".to_owned()
    } else {
        format!("{p:.4}")
    }
}

pub(super) fn verdict(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Better => "better",
        Verdict::Unclear => "unclear",
        Verdict::Worse => "worse",
    }
}

/// Three digits or so, `-` for nothing.
pub(super) fn number(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(x) if x.abs() < 9.995 => format!("{x:.2}"),
        Some(x) if x.abs() < 99.95 => format!("{x:.1}"),
        Some(x) => format!("{x:.0}"),
    }
}

/// The rows that went wrong, by kind; `0` when none did.
pub(super) fn failed(result: &Measurement) -> String {
    let failures = result.failures;
    let kinds = [
        (failures.no_answer, "no answer"),
        (failures.cut_off, "cut off"),
        (failures.invalid_json, "not JSON"),
    ];
    let named: Vec<String> = kinds
        .iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, kind)| format!("{n} {kind}"))
        .collect();
    if named.is_empty() {
        "0".to_owned()
    } else {
        named.join(", ")
    }
}

/// `98.9 MB`, in powers of ten.
pub(super) fn bytes(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}

/// `6 min 12 s`.
pub(super) fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}
