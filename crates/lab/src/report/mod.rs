//! What a run has to show: `scorecard.json`, a table for the terminal, and `report.html`, one file that needs
//! nothing else: no script, no font, no request.

mod chart;
mod scorecard;
mod table;

use std::path::Path;

use askama::Template;

pub use chart::LossCurve;
pub use scorecard::{
    Comparison, Environment, Estimate, Measurement, ReportError, SCHEMA, Score, Scorecard, Source,
    System, SystemKind, TestSet, Verdict,
};
pub use table::text_table;

use crate::eval::EvalOutcome;
use chart::{Dot, Panel, dot_chart, loss_chart};

/// The widths, in CSS pixels, that charts are drawn for; the page shows the one that fits.
const WIDE: f64 = 880.0;
const NARROW: f64 = 360.0;

/// All that the page shows.
#[derive(Debug, Clone)]
pub struct Report {
    /// The numbers.
    pub scorecard: Scorecard,
    /// The losses, if something was trained.
    pub curve: Option<LossCurve>,
    /// Rows with every system's answer.
    pub examples: Vec<Example>,
    /// Settings as name and value, in the order to show.
    pub recipe: Vec<(String, String)>,
    /// Commands to type next.
    pub next: Vec<String>,
}

/// One row with every system's answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// What was asked.
    pub asked: String,
    /// The right answer.
    pub expected: String,
    /// Each system's answer.
    pub answers: Vec<ExampleAnswer>,
}

/// One system's answer to one row.
#[derive(Debug, Clone, PartialEq)]
pub struct ExampleAnswer {
    /// The system's name.
    pub system: String,
    /// What it said, or why it said nothing.
    pub text: String,
    /// Whether that is wholly right.
    pub correct: bool,
}

/// `n` rows spread evenly over a set, with the answers of the systems named: not picked for effect.
///
/// All outcomes must be of the same rows.
pub fn examples(outcomes: &[(&str, &EvalOutcome)], n: usize) -> Vec<Example> {
    let Some((_, first)) = outcomes.first() else {
        return Vec::new();
    };
    let n = n.min(first.per_row.len());
    let row_at = |i: usize| i * first.per_row.len() / n;
    let example = |idx: usize| Example {
        asked: first.per_row[idx].asked.clone(),
        expected: first.per_row[idx].expected.clone(),
        answers: outcomes
            .iter()
            .filter_map(|(name, outcome)| outcome.per_row.get(idx).map(|row| (name, row)))
            .map(|(name, row)| ExampleAnswer {
                system: (*name).to_owned(),
                text: match &row.failure {
                    Some(why) if row.answer.is_empty() => format!("({why})"),
                    _ => row.answer.clone(),
                },
                correct: row.correct,
            })
            .collect(),
    };
    (0..n).map(|i| example(row_at(i))).collect()
}

impl Report {
    /// The page.
    pub fn to_html(&self) -> Result<String, ReportError> {
        Ok(Page::of(self).render()?)
    }

    /// Writes `report.html`, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), ReportError> {
        Ok(bantam_formats::atomic::write(
            path,
            self.to_html()?.as_bytes(),
        )?)
    }
}

#[derive(Template)]
#[template(path = "report.html")]
struct Page<'a> {
    report: &'a Report,
    card: &'a Scorecard,
    tiles: Vec<Tile>,
    charts: Vec<Chart>,
    loss: Option<Chart>,
    loss_rows: Vec<[String; 3]>,
    sets: Vec<SetTable>,
    costs: Vec<[String; 5]>,
    differences: Vec<[String; 7]>,
    methods: Vec<String>,
}

/// A headline number.
struct Tile {
    label: String,
    value: String,
    note: String,
}

/// One drawing in its two widths.
struct Chart {
    title: String,
    wide: String,
    narrow: String,
}

/// One test set's table.
struct SetTable {
    name: String,
    note: String,
    heads: Vec<String>,
    rows: Vec<SetRow>,
}

struct SetRow {
    name: String,
    is_ours: bool,
    cells: Vec<String>,
}

impl<'a> Page<'a> {
    fn of(report: &'a Report) -> Page<'a> {
        let card = &report.scorecard;
        let curve = report
            .curve
            .as_ref()
            .filter(|curve| !curve.train.is_empty());
        Page {
            report,
            card,
            tiles: tiles(card),
            charts: charts(card),
            loss: curve.map(|curve| Chart {
                title: "Loss".to_owned(),
                wide: loss_chart(curve, WIDE),
                narrow: loss_chart(curve, NARROW),
            }),
            loss_rows: curve.map(loss_rows).unwrap_or_default(),
            sets: card
                .test_sets
                .iter()
                .map(|set| set_table(card, set))
                .collect(),
            costs: card.systems.iter().map(cost_row).collect(),
            differences: card
                .comparisons
                .iter()
                .map(|comparison| difference_row(card, comparison))
                .collect(),
            methods: methods(card),
        }
    }
}

/// For each set the specialised system's headline score beside the best of the others.
fn tiles(card: &Scorecard) -> Vec<Tile> {
    let mut tiles = Vec::new();
    let Some(ours) = card
        .systems
        .iter()
        .find(|system| system.kind == SystemKind::Specialised)
    else {
        return tiles;
    };
    for set in &card.test_sets {
        let Some(score) = card
            .result(&ours.id, &set.id)
            .and_then(|result| result.scores.first())
        else {
            continue;
        };
        let others = card.systems.iter().filter(|system| system.id != ours.id);
        let best = others
            .filter_map(|system| {
                Some((
                    system,
                    card.result(&system.id, &set.id)?
                        .score(&score.metric)?
                        .value,
                ))
            })
            .max_by(|a, b| a.1.total_cmp(&b.1));
        tiles.push(Tile {
            label: format!("{}, {}", score.metric, set.name),
            value: format!("{:.1}%", 100.0 * score.estimate.value),
            note: best.map_or(String::new(), |(system, value)| {
                format!("best other: {:.1}% ({})", 100.0 * value, system.name)
            }),
        });
    }
    if let Some(bytes) = ours.model_bytes {
        let note = ours.peak_rss_mb.map_or(String::new(), |mb| {
            format!("{mb:.0} MB of memory at its peak")
        });
        tiles.push(Tile {
            label: "model size".to_owned(),
            value: table::bytes(bytes),
            note,
        });
    }
    if let Some(seconds) = ours.train_s {
        let note = format!("on {} threads", card.environment.threads);
        tiles.push(Tile {
            label: "training".to_owned(),
            value: table::duration(seconds),
            note,
        });
    }
    tiles
}

/// One chart a metric, one panel a test set.
fn charts(card: &Scorecard) -> Vec<Chart> {
    let mut metrics: Vec<&str> = Vec::new();
    for set in &card.test_sets {
        for metric in card.metrics(&set.id) {
            if !metrics.contains(&metric) {
                metrics.push(metric);
            }
        }
    }
    let dot = |system: &System, set: &TestSet, metric: &str| {
        let score = card.result(&system.id, &set.id)?.score(metric)?;
        let is_ours = system.kind == SystemKind::Specialised;
        Some(Dot {
            name: system.name.clone(),
            value: score.value,
            ci95: score.ci95,
            is_ours,
        })
    };
    let panel = |set: &TestSet, metric: &str| Panel {
        heading: format!("{} ({} rows)", set.name, set.rows),
        dots: card
            .systems
            .iter()
            .filter_map(|system| dot(system, set, metric))
            .collect(),
    };
    let chart = |metric: &&str| {
        let panels: Vec<Panel> = card
            .test_sets
            .iter()
            .map(|set| panel(set, metric))
            .filter(|p| !p.dots.is_empty())
            .collect();
        let draw = |width| dot_chart(metric, &panels, width);
        Chart {
            title: (*metric).to_owned(),
            wide: draw(WIDE),
            narrow: draw(NARROW),
        }
    };
    metrics.iter().map(chart).collect()
}

/// The loss curve as a table of at most about twenty rows: every validation, else even steps.
fn loss_rows(curve: &LossCurve) -> Vec<[String; 3]> {
    let smooth = curve.smoothed();
    let mut steps: Vec<f64> = curve.valid.iter().map(|point| point.0).collect();
    if steps.is_empty() {
        let every = smooth.len().div_ceil(20).max(1);
        steps = smooth.iter().step_by(every).map(|point| point.0).collect();
    }
    let at = |points: &[(f64, f64)], step: f64| {
        points
            .iter()
            .rev()
            .find(|point| point.0 <= step)
            .map(|point| point.1)
    };
    let show = |loss: Option<f64>| loss.map_or("-".to_owned(), |loss| format!("{loss:.4}"));
    let row = |step: f64| {
        let valid = curve
            .valid
            .iter()
            .find(|point| point.0 == step)
            .map(|point| point.1);
        [format!("{step}"), show(at(&smooth, step)), show(valid)]
    };
    steps.into_iter().map(row).collect()
}

fn set_table(card: &Scorecard, set: &TestSet) -> SetTable {
    let metrics = card.metrics(&set.id);
    let mut heads: Vec<String> = metrics
        .iter()
        .map(|metric| format!("{metric}, % [95% CI]"))
        .collect();
    heads.extend(["p50 ms", "p95 ms", "tok/s", "failed rows"].map(str::to_owned));
    let row = |system: &System| {
        let result = card.result(&system.id, &set.id)?;
        let score = |metric: &&str| {
            result.score(metric).map_or("-".to_owned(), |score| {
                table::percent_with_interval(score.value, score.ci95)
            })
        };
        let mut cells: Vec<String> = metrics.iter().map(score).collect();
        cells.extend([result.p50_ms, result.p95_ms, result.tok_per_s].map(table::number));
        cells.push(table::failed(result));
        let is_ours = system.kind == SystemKind::Specialised;
        Some(SetRow {
            name: system.name.clone(),
            is_ours,
            cells,
        })
    };
    SetTable {
        name: format!("{} ({} rows)", set.name, set.rows),
        note: set.note.clone(),
        heads,
        rows: card.systems.iter().filter_map(row).collect(),
    }
}

fn cost_row(system: &System) -> [String; 5] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        system.name.clone(),
        or_dash(system.model_bytes.map(table::bytes)),
        or_dash(system.peak_rss_mb.map(|mb| format!("{mb:.0} MB"))),
        or_dash(system.train_s.map(table::duration)),
        system.note.clone(),
    ]
}

fn difference_row(card: &Scorecard, comparison: &Comparison) -> [String; 7] {
    let set = card
        .test_sets
        .iter()
        .find(|set| set.id == comparison.test_set);
    let difference = &comparison.difference;
    [
        format!(
            "{} − {}",
            card.system_name(&comparison.system),
            card.system_name(&comparison.against)
        ),
        set.map_or(comparison.test_set.clone(), |set| set.name.clone()),
        comparison.metric.clone(),
        table::signed_with_interval(difference.value, difference.ci95),
        comparison
            .mcnemar
            .map_or("-".to_owned(), |test| table::p_value(test.p_value)),
        if comparison.intervals_disjoint {
            "disjoint"
        } else {
            "overlap"
        }
        .to_owned(),
        table::verdict(comparison.verdict).to_owned(),
    ]
}

/// Which interval belongs to which score, each said once.
fn methods(card: &Scorecard) -> Vec<String> {
    let mut methods: Vec<String> = Vec::new();
    let of_scores = card.results.iter().flat_map(|result| &result.scores);
    let scores = of_scores.map(|score| format!("{}: {}", score.metric, score.estimate.interval));
    let differences = card.comparisons.iter();
    let differences =
        differences.map(|c| format!("difference of {}: {}", c.metric, c.difference.interval));
    for method in scores.chain(differences) {
        if !methods.contains(&method) {
            methods.push(method);
        }
    }
    methods
}

#[cfg(test)]
mod tests;
