//! `bantam demo`: messy US addresses to JSON, end to end.
//!
//! | step | file |
//! |---|---|
//! | fetch, convert, split, check for leaks | `data`, `xml`, `answer`, `split`, `rows` |
//! | train | `specialise` |
//! | answer, mark, compare | `contest`, `ask`, `score`, `baseline` |
//! | report | `scorecard` |
//!
//! Everything lands in one folder: the rows as JSON lines, the run, every answer of every contestant,
//! `scorecard.json` and `report.html`. The same command again goes on where the last one stopped, and
//! repeats nothing that is there already.

mod answer;
mod ask;
mod baseline;
mod contest;
mod data;
mod rows;
mod score;
mod scorecard;
mod specialise;
mod split;
mod xml;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bantam_engine::{Engine, EngineConfig, Llama};
use bantam_kernels::Compute;
use bantam_lab::events::read_events;
use bantam_lab::report::{
    self, Environment, LossCurve, Report, Scorecard, Source, SystemKind, TestSet,
};
use bantam_model::Weights;
use bantam_text::{ConstraintEngine, ConstraintSpec};

use self::baseline::MostFrequentTag;
use self::contest::{Contest, Entry, Judged, LATENCY_ROWS, MAX_TOKENS, SLOTS};
use self::data::DemoData;
use self::scorecard::{DemoCard, Step, Training};
use crate::commands::Context;
use crate::interrupt;
use crate::loader::{self, Base, Loaded};
use crate::printer::{self, Printer, duration};
use crate::settings::DemoSettings;

/// Catalogue name of the base model.
const BASE: &str = "smollm2-135m-instruct";

/// Name that the printed `bantam serve` line gives the model.
const MODEL_ID: &str = "addresses";

/// Rows that the report shows with every answer.
const EXAMPLES: usize = 8;

/// Runs the demo.
pub(crate) fn run(context: &Context, settings: &DemoSettings) -> anyhow::Result<()> {
    let cancel = interrupt::watch()?;
    let printer = &context.printer;
    let out = &settings.out;
    fs_err::create_dir_all(out.join("answers"))?;
    let compute = Compute::new(settings.threads);
    let mut steps = Steps::new(printer);

    let base = Base::open(context, BASE, &cancel)?;
    let base_bytes = loader::bytes(base.files.path());
    steps.done(
        "base model",
        &format!("{} ({})", base.name, printer::bytes(base_bytes)),
    );

    let data = data::prepare(&context.fetcher(&cancel), out, settings.limit)?;
    let counts = &data.summary;
    steps.done(
        "data",
        &format!(
            "{}: {} rows to train on, {} to validate, {} to test, {} messy ones",
            counts.package, counts.train, counts.valid, counts.test, counts.messiest
        ),
    );
    data::leak_lines(counts)
        .iter()
        .for_each(|line| printer.note(line));

    let training = specialise::specialise(context, settings, &base, &data, &cancel)?;
    steps.done(
        "training",
        &format!(
            "{} rows seen in {}, validation loss {}",
            training.rows,
            duration(training.train_s),
            training
                .valid_loss
                .map_or("unknown".to_owned(), |loss| format!("{loss:.3}")),
        ),
    );

    let judged = judge(
        context, settings, &base, &training, &data, &compute, &cancel, &mut steps,
    )?;
    let card = DemoCard {
        card: scorecard(&judged, &base, &training, &data, &compute)?,
        notes: notes(&data),
        next: next(settings, &data),
        data: data.summary,
        training,
        total_s: steps.began.elapsed().as_secs_f64(),
        steps: steps.done,
    };
    write(settings, &card, &judged)?;
    show(printer, settings, &card)
}

/// Has every contestant answer and marks it, from the weakest means to ours.
fn judge(
    context: &Context,
    settings: &DemoSettings,
    base: &Base,
    training: &Training,
    data: &DemoData,
    compute: &Compute,
    cancel: &AtomicBool,
    steps: &mut Steps<'_>,
) -> anyhow::Result<Vec<Judged>> {
    let answers = settings.out.join("answers");
    let contest = Contest {
        sets: &data.sets,
        folder: &answers,
        printer: &context.printer,
        cancel,
    };
    let mut judged = vec![contest.enter_baseline(&MostFrequentTag::learn(&data.train))?];
    steps.done("baseline", &exact_matches(&judged[0], data));

    let base_bytes = loader::bytes(base.files.path());
    let schema = answer::schema();
    let constraint = ConstraintEngine::new(base.chat.tokenizer(), base.chat.end_tokens())?
        .compile(&ConstraintSpec::JsonSchema(schema.clone()))?;
    let shots = rows::pick_shots(&data.train, rows::SHOTS);
    let entries = [
        Entry {
            id: "base-zero-shot",
            name: "base, zero-shot",
            kind: SystemKind::BaseZeroShot,
            how: format!(
                "the base model with the full instruction and the names of all components; free text, at most \
                 {MAX_TOKENS} tokens, of which the first JSON object counts"
            ),
            prompt: &|address| rows::base_prompt(&[], address),
            constraint: None,
            depends_on: base.sha256()?.to_owned(),
            model_bytes: base_bytes,
            train_s: None,
        },
        Entry {
            id: "base-few-shot",
            name: "base, few-shot",
            kind: SystemKind::BaseFewShot,
            how: format!(
                "the same with {} worked examples from the training rows, held to the JSON schema by a grammar, its \
                 weights in bf16; at most {MAX_TOKENS} tokens",
                shots.len()
            ),
            prompt: &|address| rows::base_prompt(&shots, address),
            constraint: Some(constraint.into()),
            depends_on: format!("{} bf16 {schema}", base.sha256()?),
            model_bytes: base_bytes,
            train_s: None,
        },
        Entry {
            id: "specialised",
            name: "specialised",
            kind: SystemKind::Specialised,
            how: format!(
                "the base model with the adapter trained here, no examples, no grammar; at most {MAX_TOKENS} tokens"
            ),
            prompt: &rows::specialised_prompt,
            constraint: None,
            depends_on: format!("{} {}", base.sha256()?, training.adapter_sha256),
            model_bytes: base_bytes + training.adapter_bytes,
            train_s: Some(training.train_s),
        },
    ];

    let run = training.run.display().to_string();
    // Examples in the prompt are worth less to activations in 8 bits: an opponent is judged at its best.
    let models = [
        (BASE, Weights::default()),
        (BASE, Weights::Bf16),
        (run.as_str(), Weights::default()),
    ];
    for (entry, (model, weights)) in entries.iter().zip(models) {
        let engine = || -> anyhow::Result<Engine<Llama>> {
            let llama = Loaded::open(context, model, cancel)?.load(compute, weights)?;
            let config = EngineConfig {
                slots: SLOTS,
                ..EngineConfig::default()
            };
            Ok(Engine::new(
                llama,
                Arc::clone(base.chat.tokenizer()),
                config,
            ))
        };
        judged.push(contest.enter(entry, engine, &base.chat)?);
        steps.done(entry.name, &exact_matches(&judged[judged.len() - 1], data));
    }
    Ok(judged)
}

/// A contestant's exact matches in words.
fn exact_matches(judged: &Judged, data: &DemoData) -> String {
    let pairs = data.sets.all().into_iter().zip(&judged.outcomes);
    let words = pairs.map(|(set, outcome)| format!("{} {:.1}%", set.name, 100.0 * outcome.score));
    format!("exact match: {}", words.collect::<Vec<_>>().join(", "))
}

/// The scores, the paired differences of the last contestant to each of the others, and what went in.
fn scorecard(
    judged: &[Judged],
    base: &Base,
    training: &Training,
    data: &DemoData,
    compute: &Compute,
) -> anyhow::Result<Scorecard> {
    let environment = Environment {
        cpu: cpu(),
        isa: compute.isa().name().to_owned(),
        threads: compute.threads(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let mut card = Scorecard::new("Messy US addresses to JSON", now(), environment);
    card.definitions
        .retain(|definition| definition != bantam_lab::eval::COST_DEFINITIONS);
    card.definitions.push(format!(
        "p50 and p95 are from sending a request to its last token, over the first {LATENCY_ROWS} rows of the \
         held-out test asked one at a time; tok/s is generated tokens over the wall time of a set asked all at \
         once, {SLOTS} at a time; peak memory is that of the process while the system answered"
    ));
    card.definitions.push(
        "the first JSON object in an answer is marked, whatever stands around it, and numbers count as text"
            .to_owned(),
    );
    for set in data.sets.all() {
        let note = match set.id {
            "test" => data::leak_lines(&data.summary).join("; "),
            "messiest" => {
                "a second file of the same package, never trained on, as it was labelled".to_owned()
            }
            _ => format!(
                "the same answers against labels in which {} rows have directions and street types moved to \
                 the reading of the training rows",
                data.summary.relabelled
            ),
        };
        card.test_sets.push(TestSet {
            id: set.id.to_owned(),
            name: set.name.to_owned(),
            rows: set.rows.len(),
            note,
        });
    }
    for contestant in judged {
        card.systems.push(contestant.system.clone());
        for (set, outcome) in data.sets.all().into_iter().zip(&contestant.outcomes) {
            card.record(&contestant.system.id, set.id, outcome);
        }
    }
    if let Some((ours, others)) = judged.split_last() {
        for theirs in others {
            for (i, set) in data.sets.all().into_iter().enumerate() {
                let pair =
                    |judged: &'_ Judged| (judged.system.id.clone(), judged.outcomes[i].clone());
                let ((our_id, ours), (their_id, theirs)) = (pair(ours), pair(theirs));
                card.compare(set.id, (&our_id, &ours), (&their_id, &theirs));
            }
        }
    }
    let source = |role: &str, name: &str, sha256: &str, licence: &str| Source {
        role: role.to_owned(),
        name: name.to_owned(),
        sha256: sha256.to_owned(),
        licence: licence.to_owned(),
    };
    card.provenance = vec![
        source("base model", &base.name, base.sha256()?, "Apache-2.0"),
        source(
            "data",
            &data.summary.package,
            &data.summary.sha256,
            &data.summary.licence,
        ),
        source(
            "adapter",
            &training.run.display().to_string(),
            &training.adapter_sha256,
            "",
        ),
    ];
    Ok(card)
}

/// Writes `scorecard.json` and `report.html`.
fn write(settings: &DemoSettings, card: &DemoCard, judged: &[Judged]) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(card)? + "\n";
    bantam_formats::atomic::write(&settings.out.join("scorecard.json"), text.as_bytes())?;
    let events = read_events(&card.training.run.join("events.jsonl"))?;
    // The messiest rows are the ones a reader wants to see.
    let outcomes: Vec<_> = judged
        .iter()
        .map(|j| (j.system.name.as_str(), &j.outcomes[1]))
        .collect();
    let report = Report {
        scorecard: card.card.clone(),
        curve: Some(LossCurve::from_events(&events)),
        examples: report::examples(&outcomes, EXAMPLES),
        recipe: card.recipe(),
        next: card.next.clone(),
    };
    report.write(&settings.out.join("report.html"))?;
    Ok(())
}

/// The processor's name, where the system tells it.
fn cpu() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    name.map_or_else(
        || std::env::consts::ARCH.to_owned(),
        |name| name.trim_start_matches([' ', '\t', ':']).to_owned(),
    )
}

/// The time as RFC 3339, in UTC.
fn now() -> String {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let (year, month, day) = civil(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// The Gregorian date of a day since 1970, by counting from the first of March of the year 0.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// What a reader of the figures should know, from what was counted.
fn notes(data: &DemoData) -> Vec<String> {
    let (counts, leaks) = (&data.summary, &data.summary.leak_check);
    vec![
        format!(
            "{} of the {} messiest rows were labelled under another reading of directions and street types than \
             the training rows (`7th Street Southeast` as a direction before the name); the relabelled set moves \
             these to the reading of the training rows, by rule, and asks nothing anew",
            counts.relabelled,
            data.sets.messiest.rows.len()
        ),
        format!(
            "{} test rows are like a training row but for their digits; {} of the messiest rows repeat another",
            leaks.test_like_train_but_for_digits, leaks.repeats_in_messiest
        ),
    ]
}

/// What to type next: serve the model, ask it.
fn next(settings: &DemoSettings, data: &DemoData) -> Vec<String> {
    let run = settings.out.join("run");
    // An address without an apostrophe goes through a shell in single quotes as it is; one with a number shows more.
    let plain =
        |text: &&str| !text.contains('\'') && text.starts_with(|c: char| c.is_ascii_digit());
    let address = data
        .sets
        .messiest
        .rows
        .iter()
        .map(|row| row.text.as_str())
        .find(plain);
    let body = serde_json::json!({
        "model": MODEL_ID,
        "messages": [
            {"role": "system", "content": rows::SYSTEM},
            {"role": "user", "content": address.unwrap_or("19 Main St, Deale, MD 20751")},
        ],
    });
    vec![
        format!(
            "{} serve --model {} --model-id {MODEL_ID}",
            quoted(&program()),
            quoted(&run.display().to_string())
        ),
        format!(
            "curl -s http://127.0.0.1:8080/v1/chat/completions -H 'content-type: application/json' -d '{body}'"
        ),
    ]
}

/// This program as it was called, so that the printed line works where no `bantam` is on the path.
fn program() -> String {
    std::env::args()
        .next()
        .unwrap_or_else(|| "bantam".to_owned())
}

/// A word for a POSIX shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Prints the end of the demo.
fn show(printer: &Printer, settings: &DemoSettings, card: &DemoCard) -> anyhow::Result<()> {
    if settings.json {
        return printer.json(card);
    }
    printer.line("")?;
    printer.line(card.render())?;
    let out = settings.out.display();
    printer.line(format!(
        "{out}/report.html and {out}/scorecard.json after {}",
        duration(card.total_s)
    ))?;
    printer.line("")?;
    printer.line("next:")?;
    for line in &card.next {
        printer.line(format!("  {line}"))?;
    }
    Ok(())
}

/// Prints each step as it is done and remembers how long it took.
struct Steps<'a> {
    printer: &'a Printer,
    began: Instant,
    last: Instant,
    done: Vec<Step>,
}

impl<'a> Steps<'a> {
    fn new(printer: &'a Printer) -> Self {
        let now = Instant::now();
        Steps {
            printer,
            began: now,
            last: now,
            done: Vec::new(),
        }
    }

    fn done(&mut self, name: &str, what: &str) {
        let seconds = self.last.elapsed().as_secs_f64();
        self.last = Instant::now();
        self.printer
            .note(format!("{name:<16} {what} [{}]", duration(seconds)));
        self.done.push(Step {
            name: name.to_owned(),
            seconds,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_779), (2026, 11, 22));
    }

    #[test]
    fn words_for_the_shell() {
        assert_eq!(quoted("bantam-demo/run"), "bantam-demo/run");
        assert_eq!(quoted("my demo/it's"), r"'my demo/it'\''s'");
    }
}
