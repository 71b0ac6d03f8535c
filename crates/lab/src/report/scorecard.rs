//! The scorecard: every system on every test set, with intervals, costs and paired differences.
//!
//! It is the machine's copy of the report: `scorecard.json` holds each number that the page and the table show.

use std::path::Path;

use bantam_formats::FormatError;
use serde::{Deserialize, Serialize};

use crate::eval::{COST_DEFINITIONS, EvalOutcome, Extras, Failures, Metric};
use crate::stats::{self, Bootstrap, Interval, McNemar, Part};

/// Version of the shape of `scorecard.json`; a change that breaks a reader raises it.
pub const SCHEMA: &str = "bantam.scorecard/1";

/// Everything that was measured, and on what.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Scorecard {
    /// [`SCHEMA`].
    pub schema: String,
    /// What was specialised for what.
    pub title: String,
    /// When, as RFC 3339.
    pub created: String,
    /// The sets that the systems were judged on; none was trained on.
    pub test_sets: Vec<TestSet>,
    /// The systems, in the order they are shown.
    pub systems: Vec<System>,
    /// One for each system on each set it was judged on.
    pub results: Vec<Measurement>,
    /// Paired differences of one system against others.
    pub comparisons: Vec<Comparison>,
    /// Where the numbers were measured.
    pub environment: Environment,
    /// What went in, by digest.
    pub provenance: Vec<Source>,
    /// How scores, intervals and costs are defined.
    pub definitions: Vec<String>,
}

/// Rows that systems are judged on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TestSet {
    /// Short and unique.
    pub id: String,
    /// For people.
    pub name: String,
    /// How many rows.
    pub rows: usize,
    /// What kind of rows they are, or how they were checked for leaks.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// What kind of opponent a system is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SystemKind {
    /// Rules, or the most frequent answer.
    #[default]
    Trivial,
    /// The base model with instructions alone.
    BaseZeroShot,
    /// The base model with examples in the prompt.
    BaseFewShot,
    /// The model that was trained on the team's rows.
    Specialised,
    /// Anything else, a remote API for one.
    Other,
}

/// One system and what it costs to have.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct System {
    /// Short and unique.
    pub id: String,
    /// For people.
    pub name: String,
    /// What kind of opponent it is.
    pub kind: SystemKind,
    /// How it was asked: the prompt, the constraint, the number of examples.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
    /// Bytes of its weights.
    pub model_bytes: Option<u64>,
    /// Peak resident memory of the process while it answered.
    pub peak_rss_mb: Option<f64>,
    /// Seconds of training.
    pub train_s: Option<f64>,
}

/// A number with its interval.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The measured value.
    pub value: f64,
    /// Its 95% interval.
    pub ci95: [f64; 2],
    /// How the interval was made.
    pub interval: String,
}

impl Estimate {
    fn new(value: f64, interval: Interval) -> Estimate {
        Estimate {
            value,
            ci95: [interval.lo, interval.hi],
            interval: interval.method,
        }
    }

    fn is_disjoint(&self, other: &Estimate) -> bool {
        self.ci95[1] < other.ci95[0] || other.ci95[1] < self.ci95[0]
    }
}

/// One named score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// `exact match`, `field F1`, `accuracy`, `ROUGE-L`.
    pub metric: String,
    /// Its value and interval.
    #[serde(flatten)]
    pub estimate: Estimate,
}

/// One system on one test set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// The system's id.
    pub system: String,
    /// The test set's id.
    pub test_set: String,
    /// Rows judged.
    pub rows: usize,
    /// The headline score first.
    pub scores: Vec<Score>,
    /// Rows that went wrong; all are in the scores.
    pub failures: Failures,
    /// Half the requests were no slower.
    pub p50_ms: Option<f64>,
    /// 95% of the requests were no slower.
    pub p95_ms: Option<f64>,
    /// Generated tokens a second.
    pub tok_per_s: Option<f64>,
}

/// What a paired difference says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// The whole interval lies above 0.
    Better,
    /// The interval holds 0: these rows cannot tell the two apart.
    Unclear,
    /// The whole interval lies below 0.
    Worse,
}

/// A paired difference on one metric and one set: the same rows, resampled together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The test set's id.
    pub test_set: String,
    /// Whose score counts positive.
    pub system: String,
    /// Whose score is taken off.
    pub against: String,
    /// Which score.
    pub metric: String,
    /// The difference.
    pub difference: Estimate,
    /// The exact test, for scores that are right or wrong a row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mcnemar: Option<McNemar>,
    /// Whether the two systems' own intervals share no value: more than the difference needs.
    pub intervals_disjoint: bool,
    /// What the interval of the difference says.
    pub verdict: Verdict,
}

/// Where the numbers were measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// The processor's name.
    pub cpu: String,
    /// The instruction set in use.
    pub isa: String,
    /// Threads in use.
    pub threads: usize,
    /// Bantam's version.
    pub version: String,
}

/// Something that went in, by digest.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// What it is: `base model`, `training rows`, `adapter`.
    pub role: String,
    /// Its name or where it came from.
    pub name: String,
    /// SHA-256 of its bytes, in hex.
    pub sha256: String,
    /// Its licence, where it has one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub licence: String,
}

impl Scorecard {
    /// A scorecard without results.
    pub fn new(
        title: impl Into<String>,
        created: impl Into<String>,
        environment: Environment,
    ) -> Scorecard {
        Scorecard {
            schema: SCHEMA.to_owned(),
            title: title.into(),
            created: created.into(),
            test_sets: Vec::new(),
            systems: Vec::new(),
            results: Vec::new(),
            comparisons: Vec::new(),
            environment,
            provenance: Vec::new(),
            definitions: vec![
                "every row is in every score; a row without an answer scores 0".to_owned(),
                "intervals are 95%; those of a difference resample the same rows of both systems"
                    .to_owned(),
                COST_DEFINITIONS.to_owned(),
            ],
        }
    }

    /// Writes down how `system` did on `test_set` (both ids).
    pub fn record(&mut self, system: &str, test_set: &str, outcome: &EvalOutcome) {
        self.results.push(Measurement {
            system: system.to_owned(),
            test_set: test_set.to_owned(),
            rows: outcome.rows,
            scores: scores(outcome),
            failures: outcome.failures,
            p50_ms: outcome.p50_ms,
            p95_ms: outcome.p95_ms,
            tok_per_s: outcome.tok_per_s,
        });
    }

    /// Adds the paired differences of one system to another on one set, one for each score they share.
    ///
    /// Panics if the two were not judged on the same rows by the same metric.
    pub fn compare(
        &mut self,
        test_set: &str,
        ours: (&str, &EvalOutcome),
        theirs: (&str, &EvalOutcome),
    ) {
        let (a, b) = (ours.1, theirs.1);
        assert_eq!(
            (a.metric, a.rows),
            (b.metric, b.rows),
            "a paired comparison needs the same rows and metric"
        );
        let parts = |outcome: &EvalOutcome| -> Vec<Part> {
            outcome
                .per_row
                .iter()
                .map(|row| Part::mean(row.score))
                .collect()
        };
        let field_parts = |outcome: &EvalOutcome| -> Vec<Part> {
            outcome
                .per_row
                .iter()
                .filter_map(|row| row.fields)
                .map(|fields| fields.part())
                .collect()
        };
        let right = |outcome: &EvalOutcome| -> Vec<bool> {
            outcome.per_row.iter().map(|row| row.correct).collect()
        };
        for (i, (our_score, their_score)) in scores(a).into_iter().zip(scores(b)).enumerate() {
            let (x, y) = if i == 0 {
                (parts(a), parts(b))
            } else {
                (field_parts(a), field_parts(b))
            };
            let interval = stats::paired_bootstrap(&x, &y, &Bootstrap::default());
            let verdict = match () {
                () if interval.lo > 0.0 => Verdict::Better,
                () if interval.hi < 0.0 => Verdict::Worse,
                () => Verdict::Unclear,
            };
            let is_right_or_wrong = i == 0 && a.metric != Metric::RougeL;
            self.comparisons.push(Comparison {
                test_set: test_set.to_owned(),
                system: ours.0.to_owned(),
                against: theirs.0.to_owned(),
                metric: our_score.metric,
                intervals_disjoint: our_score.estimate.is_disjoint(&their_score.estimate),
                difference: Estimate::new(stats::ratio(&x) - stats::ratio(&y), interval),
                mcnemar: is_right_or_wrong.then(|| stats::mcnemar(&right(a), &right(b))),
                verdict,
            });
        }
    }

    /// The result of a system on a set, both by id.
    pub fn result(&self, system: &str, test_set: &str) -> Option<&Measurement> {
        self.results
            .iter()
            .find(|result| result.system == system && result.test_set == test_set)
    }

    /// The name of the system with this id, or the id.
    pub fn system_name<'a>(&'a self, id: &'a str) -> &'a str {
        self.systems
            .iter()
            .find(|system| system.id == id)
            .map_or(id, |system| &system.name)
    }

    /// The scores that any system has on this set, in the order they first appear.
    pub fn metrics(&self, test_set: &str) -> Vec<&str> {
        let mut metrics: Vec<&str> = Vec::new();
        for result in self
            .results
            .iter()
            .filter(|result| result.test_set == test_set)
        {
            for score in &result.scores {
                if !metrics.contains(&score.metric.as_str()) {
                    metrics.push(&score.metric);
                }
            }
        }
        metrics
    }

    /// As indented JSON in a stable order, with a line end.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self).map(|json| json + "\n")
    }

    /// Writes `scorecard.json`, whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), ReportError> {
        Ok(bantam_formats::atomic::write(
            path,
            self.to_json()?.as_bytes(),
        )?)
    }
}

impl Measurement {
    /// The score of this name.
    pub fn score(&self, metric: &str) -> Option<&Estimate> {
        self.scores
            .iter()
            .find(|score| score.metric == metric)
            .map(|score| &score.estimate)
    }
}

fn scores(outcome: &EvalOutcome) -> Vec<Score> {
    let headline = Estimate {
        value: outcome.score,
        ci95: outcome.ci95,
        interval: outcome.interval.clone(),
    };
    let mut scores = vec![Score {
        metric: outcome.metric.score_name().to_owned(),
        estimate: headline,
    }];
    if let Extras::Fields {
        field_f1,
        field_f1_ci95,
        field_f1_interval,
        ..
    } = &outcome.extras
    {
        let estimate = Estimate {
            value: *field_f1,
            ci95: *field_f1_ci95,
            interval: field_f1_interval.clone(),
        };
        scores.push(Score {
            metric: "field F1".to_owned(),
            estimate,
        });
    }
    scores
}

/// Why a report could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// The page's template failed.
    #[error("cannot render the report: {0}")]
    Render(#[from] askama::Error),
    /// A number that JSON cannot hold.
    #[error("cannot write the scorecard as json: {0}")]
    Json(#[from] serde_json::Error),
    /// The file could not be written.
    #[error(transparent)]
    Write(#[from] FormatError),
}
