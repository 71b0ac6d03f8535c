//! Judging answers: four metrics, each with an interval, every row kept.
//!
//! | metric | a row scores | the score | its interval | besides |
//! |---|---|---|---|---|
//! | `exact` | 1 if the trimmed strings are equal | mean | Wilson | |
//! | `json` | 1 if the parsed values are equal | mean | Wilson | field micro-F1 (bootstrap) |
//! | `label` | 1 if the trimmed labels are equal | mean | Wilson | macro-F1, confusions |
//! | `rouge-l` | the F-measure of the common subsequence | mean | bootstrap | |
//!
//! A row without an answer (the prompt does not fit, the engine failed) scores 0 and is counted; no row is dropped.
//! To add a metric: a file beside these, an arm of [`Metric`], a five-row fixture with its known score.

mod calibration;
mod json;
mod label;
pub mod preference;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use bantam_judge::text::{rouge_l_words, rouge_words};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use calibration::{Calibration, ScoredRow, calibrate};
pub use json::{FieldCounts, same_json};
pub use label::{Confusion, LabelSummary};

use crate::data::{Message, Row, Tool, parse_strict};
use crate::stats::{self, Bootstrap, CONFIDENCE, Interval, Part};

/// How answers are judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// Equal strings, but for white space at the ends.
    Exact,
    /// Equal JSON, whatever the order of keys.
    Json,
    /// Equal labels, but for white space at the ends.
    Label,
    /// Word-level longest common subsequence, F-measure.
    RougeL,
}

impl Metric {
    /// Every metric, by the name it is asked for.
    pub const ALL: [(&'static str, Metric); 4] = [
        ("exact", Metric::Exact),
        ("json", Metric::Json),
        ("label", Metric::Label),
        ("rouge-l", Metric::RougeL),
    ];

    /// What the score is called in a table.
    pub fn score_name(self) -> &'static str {
        match self {
            Metric::Exact | Metric::Json => "exact match",
            Metric::Label => "accuracy",
            Metric::RougeL => "ROUGE-L",
        }
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Metric::ALL
            .iter()
            .find(|(_, metric)| metric == self)
            .map_or("", |(name, _)| name);
        f.write_str(name)
    }
}

impl FromStr for Metric {
    type Err = EvalError;

    fn from_str(name: &str) -> Result<Metric, EvalError> {
        let found = Metric::ALL.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, metric)| *metric)
            .ok_or_else(|| EvalError::UnknownMetric(name.to_owned()))
    }
}

/// Why rows cannot be judged.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// No metric of that name.
    #[error("unknown metric `{0}`\nhint: one of `exact`, `json`, `label`, `rouge-l`")]
    UnknownMetric(String),
    /// A row that asks for nothing that can be judged.
    #[error("{}:{line}: the row does not end in an assistant's text, so there is nothing to expect", path.display())]
    NoAnswer {
        /// The file.
        path: PathBuf,
        /// The row's line.
        line: usize,
    },
    /// A row whose expected answer is not JSON.
    #[error("{}:{line}: the expected answer is not JSON: {source}\nhint: `--metric exact` compares plain text", path.display())]
    ExpectedNotJson {
        /// The file.
        path: PathBuf,
        /// The row's line.
        line: usize,
        /// The parser's reason.
        source: serde_json::Error,
    },
    /// Not one answer a question.
    #[error("{answers} answers to {questions} questions")]
    Count {
        /// How many answers.
        answers: usize,
        /// How many questions.
        questions: usize,
    },
}

/// One question with its expected answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Question {
    /// The conversation up to the answer.
    pub messages: Vec<Message>,
    /// The tools that may be called.
    pub tools: Vec<Tool>,
    /// The answer that is right.
    pub expected: Expected,
    /// The row's line in its file.
    pub line: usize,
}

/// An expected answer: its text, and its value where the metric compares values.
#[derive(Debug, Clone, PartialEq)]
pub struct Expected {
    /// As the row has it.
    pub text: String,
    json: Option<Value>,
}

impl Question {
    /// The last message before the answer: what a reader needs to see.
    pub fn asked(&self) -> &str {
        self.messages
            .last()
            .and_then(|message| message.content.as_deref())
            .unwrap_or("")
    }
}

/// Turns rows into questions, checking before the first is asked that every answer can be judged.
///
/// Errors: a row of `path` that does not end in an assistant's text, or under `json` one whose answer is not JSON.
pub fn questions(rows: &[Row], metric: Metric, path: &Path) -> Result<Vec<Question>, EvalError> {
    let question = |row: &Row| {
        let no_answer = || EvalError::NoAnswer {
            path: path.to_owned(),
            line: row.line,
        };
        let (before, answer) = row.question_and_answer().ok_or_else(no_answer)?;
        let json = match metric {
            Metric::Json => {
                Some(
                    parse_strict(answer).map_err(|source| EvalError::ExpectedNotJson {
                        path: path.to_owned(),
                        line: row.line,
                        source,
                    })?,
                )
            }
            Metric::Exact | Metric::Label | Metric::RougeL => None,
        };
        let expected = Expected {
            text: answer.to_owned(),
            json,
        };
        Ok(Question {
            messages: before.to_vec(),
            tools: row.tools.clone(),
            expected,
            line: row.line,
        })
    };
    rows.iter().map(question).collect()
}

/// What a system answered to one question.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// The text; empty when there is none.
    pub text: String,
    /// Why there is no answer, when there is none.
    pub failure: Option<String>,
    /// Whether the answer was cut off at its limit of tokens.
    pub cut_off: bool,
    /// From sending the request to its last token, measured by the caller; `None` if it never ran.
    pub latency_ms: Option<f64>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
}

impl Answer {
    /// An answer that needed no model, or whose costs nobody counts.
    pub fn text(text: impl Into<String>) -> Answer {
        Answer {
            text: text.into(),
            ..Answer::default()
        }
    }

    /// No answer, and why.
    pub fn failed(why: impl fmt::Display) -> Answer {
        Answer {
            failure: Some(why.to_string()),
            ..Answer::default()
        }
    }
}

/// One row, judged: a line of `--rows-out`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowResult {
    /// The row's line in its file.
    pub line: usize,
    /// The last message before the answer.
    pub asked: String,
    /// The answer that is right.
    pub expected: String,
    /// The answer given.
    pub answer: String,
    /// Whether the answer is wholly right.
    pub correct: bool,
    /// The row's share of the score, 0 to 1.
    pub score: f64,
    /// Fields right, answered and expected (`json` only).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub fields: Option<FieldCounts>,
    /// Why the row could not be answered, or not be read as what it should be.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub failure: Option<String>,
    /// Whether the answer was cut off at its limit of tokens.
    pub cut_off: bool,
    /// From sending the request to its last token.
    pub latency_ms: Option<f64>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
}

/// Rows that went wrong in a way that is worth knowing. All of them are in the score.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failures {
    /// Rows without an answer: the prompt did not fit, the engine failed.
    pub no_answer: usize,
    /// Answers cut off at their limit of tokens.
    pub cut_off: usize,
    /// Answers that are not JSON (`json` only).
    pub invalid_json: usize,
}

/// What a metric says besides its score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Extras {
    /// `json`.
    Fields {
        /// Micro-F1 of path and value pairs.
        field_f1: f64,
        /// Its 95% interval.
        field_f1_ci95: [f64; 2],
        /// How the interval was made.
        field_f1_interval: String,
        /// Share of the answered pairs that are right.
        field_precision: f64,
        /// Share of the expected pairs that were found.
        field_recall: f64,
    },
    /// `label`.
    Labels(LabelSummary),
    /// `rouge-l`.
    Words {
        /// Rows whose expected answer has no word, which score 0 whatever is answered.
        expected_without_words: usize,
    },
    /// `exact`.
    None {},
}

/// How the costs of an evaluation are defined; part of every output that shows them.
pub const COST_DEFINITIONS: &str = "latency is measured per request, from sending it to its last token, queueing \
     included; p50 and p95 are nearest-rank percentiles over the requests that ran; tok_per_s is generated tokens \
     over the wall time of the whole set";

/// The result of judging one system on one set of rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalOutcome {
    /// Rows judged: all of them.
    pub rows: usize,
    /// By which metric.
    pub metric: Metric,
    /// The mean of the rows' scores.
    pub score: f64,
    /// The score's 95% interval.
    pub ci95: [f64; 2],
    /// How the interval was made.
    pub interval: String,
    /// What the metric says besides.
    pub extras: Extras,
    /// Rows that went wrong; they are in the score.
    pub failures: Failures,
    /// Generated tokens a second over the whole set.
    pub tok_per_s: Option<f64>,
    /// Half the requests were no slower.
    pub p50_ms: Option<f64>,
    /// 95% of the requests were no slower.
    pub p95_ms: Option<f64>,
    /// Wall time of the whole set.
    pub wall_s: f64,
    /// How the costs are defined.
    pub definitions: String,
    /// Every row, in order; written as JSONL by [`rows_jsonl`], not part of the summary.
    #[serde(skip)]
    pub per_row: Vec<RowResult>,
}

/// Asks every question of `answer`, one after the other, and judges what comes back.
///
/// For a system that answers one question at a time: rules, a remote API, a mock. Batches go through [`judge`].
pub fn run(
    questions: &[Question],
    metric: Metric,
    mut answer: impl FnMut(&Question) -> Answer,
) -> Result<EvalOutcome, EvalError> {
    let began = Instant::now();
    let answers: Vec<Answer> = questions.iter().map(&mut answer).collect();
    judge(questions, answers, began.elapsed().as_secs_f64(), metric)
}

/// Judges answers, one a question in the same order; `wall_s` is how long all of them took together.
///
/// Errors: not one answer a question. Questions must come from [`questions`] under the same metric.
pub fn judge(
    questions: &[Question],
    answers: Vec<Answer>,
    wall_s: f64,
    metric: Metric,
) -> Result<EvalOutcome, EvalError> {
    if questions.len() != answers.len() {
        return Err(EvalError::Count {
            answers: answers.len(),
            questions: questions.len(),
        });
    }
    let per_row: Vec<RowResult> = questions
        .iter()
        .zip(answers)
        .map(|(question, answer)| judge_row(question, answer, metric))
        .collect();
    let parts: Vec<Part> = per_row.iter().map(|row| Part::mean(row.score)).collect();
    let interval = score_interval(&per_row, metric);
    let latencies: Vec<f64> = per_row.iter().filter_map(|row| row.latency_ms).collect();
    let generated: usize = per_row.iter().map(|row| row.completion_tokens).sum();
    let count = |test: &dyn Fn(&RowResult) -> bool| per_row.iter().filter(|row| test(row)).count();
    let no_answer = count(&|row| row.failure.is_some() && row.failure.as_deref() != Some(NOT_JSON));
    Ok(EvalOutcome {
        rows: per_row.len(),
        metric,
        score: stats::ratio(&parts),
        ci95: [interval.lo, interval.hi],
        interval: interval.method,
        extras: extras(&per_row, metric),
        failures: Failures {
            no_answer,
            cut_off: count(&|row| row.cut_off),
            invalid_json: count(&|row| row.failure.as_deref() == Some(NOT_JSON)),
        },
        tok_per_s: (generated > 0 && wall_s > 0.0).then(|| generated as f64 / wall_s),
        p50_ms: stats::percentile(&latencies, 50.0),
        p95_ms: stats::percentile(&latencies, 95.0),
        wall_s,
        definitions: COST_DEFINITIONS.to_owned(),
        per_row,
    })
}

/// Every row as one line of JSON.
pub fn rows_jsonl(rows: &[RowResult]) -> Result<String, serde_json::Error> {
    let mut out = String::new();
    for row in rows {
        out.push_str(&serde_json::to_string(row)?);
        out.push('\n');
    }
    Ok(out)
}

const NOT_JSON: &str = "the answer is not JSON";

fn judge_row(question: &Question, answer: Answer, metric: Metric) -> RowResult {
    let expected = &question.expected;
    let mut failure = answer.failure;
    let mut fields = None;
    let score = match metric {
        Metric::Exact | Metric::Label => {
            f64::from(failure.is_none() && answer.text.trim() == expected.text.trim())
        }
        Metric::Json => {
            let wanted = expected.json.as_ref().unwrap_or(&Value::Null);
            let given = if failure.is_none() {
                parse_strict(answer.text.trim()).ok()
            } else {
                None
            };
            if given.is_none() {
                failure.get_or_insert_with(|| NOT_JSON.to_owned());
            }
            fields = Some(FieldCounts::of(given.as_ref(), wanted));
            f64::from(given.is_some_and(|given| same_json(&given, wanted)))
        }
        Metric::RougeL => {
            let given = if failure.is_none() {
                rouge_words(&answer.text)
            } else {
                Vec::new()
            };
            rouge_l_words(&given, &rouge_words(&expected.text))
        }
    };
    RowResult {
        line: question.line,
        asked: question.asked().to_owned(),
        expected: expected.text.clone(),
        correct: score == 1.0,
        score,
        fields,
        failure,
        answer: answer.text,
        cut_off: answer.cut_off,
        latency_ms: answer.latency_ms,
        prompt_tokens: answer.prompt_tokens,
        completion_tokens: answer.completion_tokens,
    }
}

fn score_interval(rows: &[RowResult], metric: Metric) -> Interval {
    match metric {
        Metric::Exact | Metric::Json | Metric::Label => stats::wilson(
            rows.iter().filter(|row| row.correct).count(),
            rows.len(),
            CONFIDENCE,
        ),
        Metric::RougeL => {
            let parts: Vec<Part> = rows.iter().map(|row| Part::mean(row.score)).collect();
            stats::bootstrap(&parts, &Bootstrap::default())
        }
    }
}

fn extras(rows: &[RowResult], metric: Metric) -> Extras {
    match metric {
        Metric::Exact => Extras::None {},
        Metric::Json => {
            let mut total = FieldCounts::default();
            let mut parts = Vec::with_capacity(rows.len());
            for fields in rows.iter().filter_map(|row| row.fields) {
                total += fields;
                parts.push(fields.part());
            }
            let interval = stats::bootstrap(&parts, &Bootstrap::default());
            Extras::Fields {
                field_f1: total.f1(),
                field_f1_ci95: [interval.lo, interval.hi],
                field_f1_interval: interval.method,
                field_precision: total.precision(),
                field_recall: total.recall(),
            }
        }
        Metric::Label => {
            let pairs: Vec<(&str, Option<&str>)> = rows
                .iter()
                .map(|row| {
                    (
                        row.expected.trim(),
                        row.failure.is_none().then(|| row.answer.trim()),
                    )
                })
                .collect();
            Extras::Labels(LabelSummary::of(&pairs))
        }
        Metric::RougeL => Extras::Words {
            expected_without_words: rows
                .iter()
                .filter(|row| rouge_words(&row.expected).is_empty())
                .count(),
        },
    }
}

#[cfg(test)]
mod tests;
