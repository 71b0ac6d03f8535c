//! The contest: every model answers every test address, is marked, and is timed as a lone caller sees it.

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::Context as _;
use bantam_engine::{BoxedConstraint, Engine, LanguageModel, Request};
use bantam_lab::data::{RowOptions, load_rows};
use bantam_lab::eval::{self, Answer, EvalOutcome, Metric, Question};
use bantam_lab::report::{System, SystemKind};
use bantam_lab::stats;
use bantam_text::{Chat, Message};

use super::answer::answer;
use super::ask::{self, Answers, Pace, Questions};
use super::baseline::MostFrequentTag;
use super::score::marked_part;
use super::xml::Labelled;
use crate::printer::Printer;
use crate::progress::Progress;

/// Most tokens of an answer, for every model alike. The longest reference has about a hundred.
pub(crate) const MAX_TOKENS: usize = 128;

/// Questions asked one at a time to measure the latency.
pub(crate) const LATENCY_ROWS: usize = 12;

/// Questions answered at the same time.
pub(crate) const SLOTS: usize = 16;

/// The addresses that all contestants are judged on, with the right answers.
#[derive(Debug)]
pub(crate) struct TestSets {
    pub(crate) test: TestRows,
    pub(crate) messiest: TestRows,
    /// The messiest questions again, with directions and street types relabelled as in the training set.
    pub(crate) relabelled: TestRows,
}

/// One set: its id in the scorecard, the addresses, and the questions as the lab marks them.
#[derive(Debug)]
pub(crate) struct TestRows {
    pub(crate) id: &'static str,
    pub(crate) name: &'static str,
    pub(crate) rows: Vec<Labelled>,
    pub(crate) questions: Vec<Question>,
}

impl TestRows {
    /// The rows and the file they were written to.
    pub(crate) fn new(
        id: &'static str,
        name: &'static str,
        rows: Vec<Labelled>,
        file: &Path,
    ) -> anyhow::Result<TestRows> {
        let mut written = load_rows(file, &RowOptions::default())?;
        written.truncate(rows.len());
        let questions = eval::questions(&written, Metric::Json, file)?;
        Ok(TestRows {
            id,
            name,
            rows,
            questions,
        })
    }
}

impl TestSets {
    /// All sets in the order shown.
    pub(crate) fn all(&self) -> [&TestRows; 3] {
        [&self.test, &self.messiest, &self.relabelled]
    }
}

/// A contestant with its results, in the order of [`TestSets::all`].
#[derive(Debug)]
pub(crate) struct Judged {
    pub(crate) system: System,
    pub(crate) outcomes: [EvalOutcome; 3],
}

/// What makes a contestant of a model.
pub(crate) struct Entry<'a> {
    /// Id in the scorecard and first part of the names of its files of answers.
    pub(crate) id: &'a str,
    /// Name in the scorecard.
    pub(crate) name: &'a str,
    /// What kind of opponent it is.
    pub(crate) kind: SystemKind,
    /// How it is asked, in a sentence.
    pub(crate) how: String,
    /// The conversation to complete for an address.
    pub(crate) prompt: &'a dyn Fn(&str) -> Vec<Message>,
    /// What answers are held to, if to anything.
    pub(crate) constraint: Option<BoxedConstraint>,
    /// Digest of the weights and the constraint.
    pub(crate) depends_on: String,
    /// Weights on disk.
    pub(crate) model_bytes: u64,
    /// Seconds of its training, if it was trained here.
    pub(crate) train_s: Option<f64>,
}

/// What all contestants share.
#[derive(Clone, Copy)]
pub(crate) struct Contest<'a> {
    pub(crate) sets: &'a TestSets,
    /// Where answers are kept.
    pub(crate) folder: &'a Path,
    pub(crate) printer: &'a Printer,
    pub(crate) cancel: &'a AtomicBool,
}

impl Contest<'_> {
    /// Has a model answer and marks it.
    pub(crate) fn enter<M: LanguageModel>(
        &self,
        entry: &Entry<'_>,
        engine: impl Fn() -> anyhow::Result<Engine<M>>,
        chat: &Chat,
    ) -> anyhow::Result<Judged> {
        let test = questions(entry, chat, &self.sets.test.rows)?;
        let messiest = questions(entry, chat, &self.sets.messiest.rows)?;

        // An engine is only made if something is not answered yet: weights take time to load.
        let mut made = None;
        let mut ask =
            |set, questions, pace| self.ask(entry, set, questions, pace, &engine, &mut made);
        // The lone questions come first: they also warm up the prefix that all prompts share.
        let lone = ask("latency", test.first(LATENCY_ROWS), Pace::OneAtATime)?;
        let on_test = ask("test", test, Pace::Together)?;
        let on_messiest = ask("messiest", messiest, Pace::Together)?;

        let ms: Vec<f64> = lone.answers.iter().map(|answer| answer.ms).collect();
        let judge = |rows: &TestRows, answers: &Answers| -> anyhow::Result<EvalOutcome> {
            let marked = answers.answers.iter().map(|answer| Answer {
                text: marked_part(&answer.text),
                cut_off: answer.cut_off,
                completion_tokens: answer.tokens,
                ..Answer::default()
            });
            let mut outcome = eval::judge(
                &rows.questions,
                marked.collect(),
                answers.wall_s,
                Metric::Json,
            )?;
            if rows.id == self.sets.test.id {
                (outcome.p50_ms, outcome.p95_ms) =
                    (stats::percentile(&ms, 50.0), stats::percentile(&ms, 95.0));
            }
            Ok(outcome)
        };
        let outcomes = [
            judge(&self.sets.test, &on_test)?,
            judge(&self.sets.messiest, &on_messiest)?,
            judge(&self.sets.relabelled, &on_messiest)?,
        ];
        let peak = [&lone, &on_test, &on_messiest]
            .iter()
            .map(|answers| answers.peak_rss_mb)
            .max();
        let system = System {
            id: entry.id.to_owned(),
            name: entry.name.to_owned(),
            kind: entry.kind,
            note: entry.how.clone(),
            model_bytes: Some(entry.model_bytes),
            peak_rss_mb: peak.map(|mb| mb as f64),
            train_s: entry.train_s,
        };
        Ok(Judged { system, outcomes })
    }

    /// Marks the trivial baseline, which needs no engine and no time worth measuring.
    pub(crate) fn enter_baseline(&self, baseline: &MostFrequentTag) -> anyhow::Result<Judged> {
        let judge = |rows: &TestRows| {
            let answers = rows
                .rows
                .iter()
                .map(|row| Answer::text(answer(&baseline.tag(&row.text))));
            eval::judge(&rows.questions, answers.collect(), 0.0, Metric::Json)
        };
        let [test, messiest, relabelled] = self.sets.all();
        Ok(Judged {
            system: System {
                id: "baseline".to_owned(),
                name: "most frequent tag".to_owned(),
                kind: SystemKind::Trivial,
                note: "each token gets the tag it has most often in the training rows, an unseen one the most \
                       frequent tag of its shape and place"
                    .to_owned(),
                ..System::default()
            },
            outcomes: [judge(test)?, judge(messiest)?, judge(relabelled)?],
        })
    }

    /// Asks one set of questions, with a bar, unless it was asked before.
    fn ask<M: LanguageModel>(
        &self,
        entry: &Entry<'_>,
        set: &str,
        questions: Questions,
        pace: Pace,
        make: &impl Fn() -> anyhow::Result<Engine<M>>,
        made: &mut Option<Engine<M>>,
    ) -> anyhow::Result<Answers> {
        let file = self.folder.join(format!("{}.{set}.json", entry.id));
        if let Some(found) = ask::find(&file, &questions, pace) {
            return Ok(found);
        }
        let engine = match made {
            Some(engine) => engine,
            None => made.insert(make()?),
        };
        let what = format!("{}: {set}", entry.name);
        let bar = Progress::steps(self.printer, what, questions.shown.len() as u64);
        let began = Instant::now();
        ask::ask(
            &file,
            engine,
            questions,
            pace,
            self.cancel,
            &mut |done, tokens| {
                bar.set(done as u64);
                bar.detail(format!(
                    "{:.0} tok/s",
                    tokens as f64 / began.elapsed().as_secs_f64()
                ));
            },
        )
    }
}

/// Renders a contestant's questions.
fn questions(entry: &Entry<'_>, chat: &Chat, rows: &[Labelled]) -> anyhow::Result<Questions> {
    let request = |row: &Labelled| -> anyhow::Result<Request> {
        let prompt = chat
            .prompt(&(entry.prompt)(&row.text), &[])
            .with_context(|| format!("could not render the prompt for `{}`", row.text))?;
        Ok(Request {
            prompt,
            max_tokens: MAX_TOKENS,
            end_tokens: chat.end_tokens().to_vec(),
            constraint: entry.constraint.clone(),
            ..Request::default()
        })
    };
    Ok(Questions {
        depends_on: entry.depends_on.clone(),
        shown: rows.iter().map(|row| row.text.clone()).collect(),
        requests: rows.iter().map(request).collect::<anyhow::Result<_>>()?,
    })
}
