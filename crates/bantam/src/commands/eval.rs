//! `bantam eval`: a model answers held-out rows and is marked, with an interval.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, anyhow};
use bantam_engine::{
    BoxedConstraint, Completion, Engine, EngineConfig, Finish, Llama, Request, generate_all,
};
use bantam_kernels::Compute;
use bantam_lab::data::{self, Row, RowOptions};
use bantam_lab::eval::{
    self, Answer, Calibration, EvalOutcome, Extras, Metric, Question, ScoredRow,
};
use bantam_lab::train::peak_rss_mb;
use bantam_text::{Chat, ConstraintEngine, ConstraintSpec};
use serde::Serialize;

use super::Context;
use crate::cache::write_atomic;
use crate::error::{HintExt as _, advise};
use crate::interrupt;
use crate::loader::{CALIBRATION, Loaded, Place, place};
use crate::printer::{self, Printer, Table};
use crate::progress::Progress;
use crate::settings::{ConstraintChoice, EvalSettings, MetricChoice};

/// The `--json` object.
#[derive(Serialize)]
struct Report<'a> {
    rows: usize,
    metric: Metric,
    score: f64,
    ci95: [f64; 2],
    tok_per_s: Option<f64>,
    p50_ms: Option<f64>,
    p95_ms: Option<f64>,
    peak_rss_mb: u64,
    model: &'a str,
    weights: &'static str,
    constraint: &'static str,
    interval: &'a str,
    wall_s: f64,
    failures: eval::Failures,
    extras: &'a Extras,
    definitions: &'a str,
    /// What was fitted, with `--calibrate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    calibration: Option<Calibration>,
}

/// Asks, marks, reports.
pub(crate) fn run(context: &Context, settings: &EvalSettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let cancel = interrupt::watch()?;
    let loaded = Loaded::open(context, &settings.model, &cancel)?;
    interrupt::end_at_once(&cancel);
    let run = settings.calibrate.then(|| run_folder(context, settings));
    let run = run.transpose()?;
    let chat = &loaded.base.chat;
    let system = settings.system.or(loaded.system()).map(str::to_owned);
    let mut rows = data::load_rows(&settings.data, &RowOptions { system })?;
    rows.truncate(settings.limit);
    let metric = metric(settings, &rows);
    let questions = eval::questions(&rows, metric, &settings.data)?;
    // What is wrong with the constraint is better said before the weights are loaded.
    let constraint = constraint(&settings.constraint, chat, &questions, metric)?;
    let max_context = loaded.max_context()?;
    let requests = requests(chat, &questions, constraint.as_ref(), settings, max_context)?;

    let spinner = Progress::spinner(printer, format!("loading {}", loaded.base.name));
    let model = loaded.load(&Compute::new(settings.threads), settings.weights)?;
    let mut engine = Engine::new(model, chat.tokenizer().clone(), EngineConfig::default());
    drop(spinner);

    let bar = Progress::steps(
        printer,
        format!("asking {}", settings.model),
        requests.len() as u64,
    );
    let began = Instant::now();
    let mut answers = vec![Answer::default(); requests.len()];
    let (mut places, mut asked) = (Vec::new(), Vec::new());
    for (place, request) in requests.into_iter().enumerate() {
        match request {
            Ok(request) => {
                places.push(place);
                asked.push(request);
            }
            Err(why) => answers[place] = Answer::failed(why),
        }
    }
    let refused = (answers.len() - places.len()) as u64;
    let completions = generate_all(&mut engine, asked, &mut |progress| {
        bar.set(refused + progress.done as u64);
        bar.detail(format!(
            "{:.0} tok/s",
            progress.completion_tokens as f64 / began.elapsed().as_secs_f64()
        ));
    });
    let wall_s = began.elapsed().as_secs_f64();
    drop(bar);
    for (place, completion) in places.into_iter().zip(completions) {
        answers[place] = answer(completion);
    }
    let outcome = eval::judge(&questions, answers, wall_s, metric)?;
    if let Some(path) = &settings.rows_out {
        let text = eval::rows_jsonl(&outcome.per_row)?;
        write_atomic(path, text.as_bytes())
            .with_context(|| format!("could not write `{}`", path.display()))?;
    }
    let calibration = match (&run, &settings.constraint) {
        (Some(folder), ConstraintChoice::Labels(path)) => {
            let labels = read_labels(path)?;
            let fitted = calibrate(&mut engine, chat, &questions, &labels)?;
            let text = serde_json::to_string_pretty(&fitted)? + "\n";
            write_atomic(&folder.join(CALIBRATION), text.as_bytes())?;
            Some(fitted)
        }
        _ => None,
    };
    let report = Report {
        rows: outcome.rows,
        metric,
        score: outcome.score,
        ci95: outcome.ci95,
        tok_per_s: outcome.tok_per_s,
        p50_ms: outcome.p50_ms,
        p95_ms: outcome.p95_ms,
        peak_rss_mb: peak_rss_mb(),
        model: &settings.model,
        weights: settings.weights.name(),
        constraint: match settings.constraint {
            ConstraintChoice::Free => "none",
            ConstraintChoice::Schema(_) => "schema",
            ConstraintChoice::Labels(_) => "labels",
        },
        interval: &outcome.interval,
        wall_s,
        failures: outcome.failures,
        extras: &outcome.extras,
        definitions: &outcome.definitions,
        calibration,
    };
    if settings.json {
        printer.json(&report)
    } else {
        show(printer, &report, &outcome, settings)
    }
}

/// The folder that a calibration is kept in.
fn run_folder(context: &Context, settings: &EvalSettings) -> anyhow::Result<PathBuf> {
    match place(&context.catalogue, &settings.model)? {
        Place::Run(folder) => Ok(folder),
        _ => Err(advise(
            anyhow!("`{}` is no run directory", settings.model),
            "a calibration is kept in the folder of the run that it is of",
        )),
    }
}

/// Scores every label for every row, its end included as `/v1/decisions` does, and fits the temperature.
fn calibrate(
    engine: &mut Engine<Llama>,
    chat: &Chat,
    questions: &[Question],
    labels: &[String],
) -> anyhow::Result<Calibration> {
    let tokenizer = chat.tokenizer();
    let options: Vec<Vec<u32>> = labels
        .iter()
        .map(|label| {
            let mut ids = tokenizer.encode_plain(label);
            ids.extend(chat.end_tokens().first());
            ids
        })
        .collect();
    let mut rows = Vec::with_capacity(questions.len());
    for question in questions {
        let expected = question.expected.text.trim();
        let Some(right) = labels.iter().position(|label| label == expected) else {
            continue;
        };
        let prompt = chat.prompt(&question.messages, &question.tools)?;
        let scores = engine.score_options(&prompt, &options, None);
        let scores = scores.map_err(|error| anyhow!("line {}: {error}", question.line))?;
        rows.push(ScoredRow { scores, right });
    }
    eval::calibrate(&rows).context("the labels of these rows have no likelihoods to fit")
}

/// The metric asked for, or the one that fits the rows.
fn metric(settings: &EvalSettings, rows: &[Row]) -> Metric {
    let is_object = |row: &Row| {
        let answer = row.question_and_answer().map(|(_, answer)| answer);
        answer.is_some_and(|text| data::parse_strict(text).is_ok_and(|value| value.is_object()))
    };
    match (settings.metric, &settings.constraint) {
        (MetricChoice::Given(metric), _) => metric,
        (MetricChoice::FromRows, ConstraintChoice::Labels(_)) => Metric::Label,
        (MetricChoice::FromRows, ConstraintChoice::Schema(_)) => Metric::Json,
        (MetricChoice::FromRows, ConstraintChoice::Free) if rows.iter().all(is_object) => {
            Metric::Json
        }
        (MetricChoice::FromRows, ConstraintChoice::Free) => Metric::Exact,
    }
}

/// Compiles what answers are held to.
fn constraint(
    choice: &ConstraintChoice,
    chat: &Chat,
    questions: &[Question],
    metric: Metric,
) -> anyhow::Result<Option<BoxedConstraint>> {
    let (path, spec) = match choice {
        ConstraintChoice::Free => return Ok(None),
        ConstraintChoice::Schema(path) => {
            let text = fs_err::read_to_string(path)?;
            let schema = serde_json::from_str(&text)
                .with_context(|| format!("`{}` is not JSON", path.display()))?;
            (path, ConstraintSpec::JsonSchema(schema))
        }
        ConstraintChoice::Labels(path) => {
            let labels = read_labels(path)?;
            if matches!(metric, Metric::Label | Metric::Exact) {
                check_labels(path, &labels, questions)?;
            }
            (path, ConstraintSpec::Labels(labels))
        }
    };
    let engine = ConstraintEngine::new(chat.tokenizer(), chat.end_tokens())?;
    let compiled = engine
        .compile(&spec)
        .with_context(|| format!("cannot hold answers to `{}`", path.display()))?;
    Ok(Some(compiled.into()))
}

/// One label a line; empty lines are skipped.
fn read_labels(path: &Path) -> anyhow::Result<Vec<String>> {
    let text = fs_err::read_to_string(path)?;
    let labels: Vec<String> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .map(str::to_owned)
        .collect();
    if labels.is_empty() {
        return Err(advise(
            anyhow!("`{}` holds no labels", path.display()),
            "write one label a line",
        ));
    }
    Ok(labels)
}

/// A reference that is no label can never be answered: that is a mistake in one of the files.
fn check_labels(path: &Path, labels: &[String], questions: &[Question]) -> anyhow::Result<()> {
    let stray = questions
        .iter()
        .find(|q| !labels.iter().any(|label| label == q.expected.text.trim()));
    match stray {
        None => Ok(()),
        Some(question) => Err(anyhow!(
            "line {} of the rows expects `{}`, which is not in `{}`",
            question.line,
            question.expected.text.trim(),
            path.display()
        ))
        .hint("add the label, or leave out `--labels` to let the model answer freely"),
    }
}

/// One request a question; a question that leaves no room for an answer has a reason instead.
fn requests(
    chat: &Chat,
    questions: &[Question],
    constraint: Option<&BoxedConstraint>,
    settings: &EvalSettings,
    max_context: usize,
) -> anyhow::Result<Vec<Result<Request, String>>> {
    let request = |question: &Question| {
        let prompt = chat
            .prompt(&question.messages, &question.tools)
            .with_context(|| {
                format!(
                    "{}:{}: cannot be asked",
                    settings.data.display(),
                    question.line
                )
            })?;
        let room = max_context.saturating_sub(prompt.len());
        if room == 0 {
            return Ok(Err(format!(
                "the prompt has {} tokens, the model reads {max_context}",
                prompt.len()
            )));
        }
        Ok(Ok(Request {
            prompt,
            max_tokens: settings.max_tokens.min(room),
            end_tokens: chat.end_tokens().to_vec(),
            constraint: constraint.cloned(),
            ..Request::default()
        }))
    };
    questions.iter().map(request).collect()
}

/// A completion as the lab judges it.
fn answer(completion: Completion) -> Answer {
    let timings = completion.timings;
    let latency = timings.queue + timings.prefill + timings.decode;
    let failure = match &completion.finish {
        Finish::Error(error) => Some(error.to_string()),
        Finish::Cancelled => Some("cancelled".to_owned()),
        Finish::Stop | Finish::Length => None,
    };
    Answer {
        text: completion.text,
        latency_ms: failure.is_none().then_some(latency.as_secs_f64() * 1e3),
        failure,
        cut_off: completion.finish == Finish::Length,
        prompt_tokens: completion.usage.prompt_tokens,
        completion_tokens: completion.usage.completion_tokens,
    }
}

fn show(
    printer: &Printer,
    report: &Report<'_>,
    outcome: &EvalOutcome,
    settings: &EvalSettings,
) -> anyhow::Result<()> {
    let percent = |x: f64| format!("{:.1}%", 100.0 * x);
    let range = |ci: [f64; 2]| format!("{} to {}", percent(ci[0]), percent(ci[1]));
    let style = printer.out_style();
    printer.line(style.bold(&format!(
        "{} on {}",
        settings.model,
        settings.data.display()
    )))?;
    let mut table = Table::facts();
    table.row(["rows", &printer::thousands(report.rows as u64)]);
    if let Some(fitted) = &report.calibration {
        let [before, after] = fitted.ece.map(percent);
        let temperature = format!("{:.2}", fitted.temperature);
        table.row(["temperature fitted", &temperature]);
        table.row(["calibration error", &format!("{before}, with it {after}")]);
    }
    let score = format!(
        "{} (95% interval {})",
        percent(report.score),
        range(report.ci95)
    );
    table.row([report.metric.score_name(), &score]);
    match report.extras {
        Extras::Fields {
            field_f1,
            field_f1_ci95,
            ..
        } => {
            let score = format!(
                "{} (95% interval {})",
                percent(*field_f1),
                range(*field_f1_ci95)
            );
            table.row(["field F1", &score]);
        }
        Extras::Labels(labels) => table.row(["macro F1", &percent(labels.macro_f1)]),
        Extras::Words { .. } | Extras::None {} => {}
    }
    let failures = outcome.failures;
    let counts = [
        ("without an answer", failures.no_answer, " (scored 0)"),
        (
            "cut off",
            failures.cut_off,
            ", at `--max-tokens` or the end of the context",
        ),
        ("not JSON", failures.invalid_json, " (scored 0)"),
    ];
    for (name, n, what) in counts {
        if n > 0 {
            table.row([name, &format!("{n} rows{what}")]);
        }
    }
    if let (Some(p50), Some(p95)) = (report.p50_ms, report.p95_ms) {
        table.row(["latency", &format!("p50 {p50:.0} ms, p95 {p95:.0} ms")]);
    }
    if let Some(speed) = report.tok_per_s {
        table.row([
            "speed",
            &format!("{speed:.0} tok/s in {}", printer::duration(report.wall_s)),
        ]);
    }
    table.row(["peak memory", &format!("{} MiB", report.peak_rss_mb)]);
    printer.line(table.render(style))?;
    if let Some(path) = &settings.rows_out {
        printer.note(format!("every row is in `{}`", path.display()));
    }
    Ok(())
}
