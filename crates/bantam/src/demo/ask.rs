//! Puts questions to a model and keeps the answers on disk, so that none is asked twice.
//!
//! A set of answers is a file named for who answered what. It carries a digest of everything that the
//! answers depend on (weights, prompts, limits, constraint); with the same digest it is read back instead
//! of asked again, and with another it is replaced. Whoever wants to see an answer opens the file.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::Context as _;
use bantam_engine::{Engine, Event, Finish, LanguageModel, Request, Timings, Usage};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::{Interrupted, advise};

/// One answer to one question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// What was asked: the address.
    pub(crate) question: String,
    /// What came back, as it came.
    pub(crate) text: String,
    /// Tokens generated.
    pub(crate) tokens: usize,
    /// Whether it was cut off at the most tokens allowed.
    pub(crate) cut_off: bool,
    /// From the question to the end of the answer, in milliseconds. Questions asked together share the
    /// processor, so only those asked one at a time say what a lone caller waits.
    pub(crate) ms: f64,
}

/// All answers of one contestant to one set of questions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answers {
    /// Digest of all that the answers depend on.
    pub(crate) key: String,
    /// Seconds that the whole set took.
    pub(crate) wall_s: f64,
    /// Tokens of all prompts.
    pub(crate) prompt_tokens: usize,
    /// Those of them taken over from an earlier question's prompt.
    pub(crate) cached_tokens: usize,
    /// Tokens generated.
    pub(crate) completion_tokens: usize,
    /// Largest resident memory of the process meanwhile, in MiB.
    pub(crate) peak_rss_mb: u64,
    /// The answers in the order of the questions.
    pub(crate) answers: Vec<Answer>,
}

/// Questions for one model: what is shown and what is sent.
#[derive(Clone)]
pub(crate) struct Questions {
    /// Digest of all that the answers depend on beside the prompts themselves: weights, limits, constraint.
    pub(crate) depends_on: String,
    /// The addresses, for the file of answers.
    pub(crate) shown: Vec<String>,
    /// The requests, in the same order.
    pub(crate) requests: Vec<Request>,
}

impl Questions {
    /// The first `n` of them only.
    pub(crate) fn first(&self, n: usize) -> Questions {
        let mut some = self.clone();
        some.shown.truncate(n);
        some.requests.truncate(n);
        some
    }

    /// Digest of everything the answers depend on, and of how they were asked.
    fn key(&self, pace: Pace) -> String {
        let mut hasher = Sha256::new();
        let mut field = |bytes: &[u8]| {
            hasher.update((bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        field(pace.name().as_bytes());
        field(self.depends_on.as_bytes());
        for request in &self.requests {
            let ids: Vec<u8> = request
                .prompt
                .iter()
                .flat_map(|id| id.to_le_bytes())
                .collect();
            field(&ids);
            field(&(request.max_tokens as u64).to_le_bytes());
        }
        crate::cache::hex(&hasher.finalize())
    }
}

/// How questions are put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// As many at a time as the engine has slots: the fastest way through all of them.
    Together,
    /// One after the other: what a lone caller sees.
    OneAtATime,
}

impl Pace {
    fn name(self) -> &'static str {
        match self {
            Pace::Together => "together",
            Pace::OneAtATime => "one at a time",
        }
    }

    fn at_once(self) -> usize {
        match self {
            Pace::Together => usize::MAX,
            Pace::OneAtATime => 1,
        }
    }
}

/// The answers to these questions, if `file` has them.
pub(crate) fn find(file: &Path, questions: &Questions, pace: Pace) -> Option<Answers> {
    kept(file, &questions.key(pace))
}

/// Asks, and keeps the answers in `file`; `tick` hears of every step as (answers so far, tokens generated so far).
pub(crate) fn ask<M: LanguageModel>(
    file: &Path,
    engine: &mut Engine<M>,
    questions: Questions,
    pace: Pace,
    cancel: &AtomicBool,
    tick: &mut dyn FnMut(usize, usize),
) -> anyhow::Result<Answers> {
    let key = questions.key(pace);
    let answers = run(key, engine, questions, pace.at_once(), cancel, tick)?;
    let text = serde_json::to_string_pretty(&answers)?;
    crate::cache::write_atomic(file, text.as_bytes())
        .with_context(|| format!("could not write `{}`", file.display()))?;
    Ok(answers)
}

/// The answers in `file`, if they are these. A file that cannot be read is as good as none.
fn kept(file: &Path, key: &str) -> Option<Answers> {
    let text = std::fs::read_to_string(file).ok()?;
    let found: Answers = serde_json::from_str(&text).ok()?;
    (found.key == key).then_some(found)
}

/// Generates the answers, at most `at_once` of them at a time.
fn run<M: LanguageModel>(
    key: String,
    engine: &mut Engine<M>,
    questions: Questions,
    at_once: usize,
    cancel: &AtomicBool,
    tick: &mut dyn FnMut(usize, usize),
) -> anyhow::Result<Answers> {
    forget_peak_memory();
    let began = Instant::now();
    let mut all = Answers {
        key,
        wall_s: 0.0,
        prompt_tokens: 0,
        cached_tokens: 0,
        completion_tokens: 0,
        peak_rss_mb: 0,
        answers: Vec::with_capacity(questions.shown.len()),
    };
    for question in questions.shown {
        all.answers.push(Answer {
            question,
            text: String::new(),
            tokens: 0,
            cut_off: false,
            ms: 0.0,
        });
    }

    let mut waiting = questions.requests.into_iter().enumerate().peekable();
    let mut open = Vec::new(); // (request, index of its question)
    let mut n_done = 0;
    let mut n_tokens = 0;
    let mut failure = None;
    while n_done < all.answers.len() {
        if cancel.load(Ordering::Relaxed) {
            return Err(advise(
                Interrupted,
                "run the same command again to go on where it stopped",
            ));
        }
        while open.len() < at_once && engine.queue_room() > 0 {
            let Some((idx, request)) = waiting.next() else {
                break;
            };
            let id = engine
                .submit(request)
                .with_context(|| format!("could not ask about `{}`", all.answers[idx].question))?;
            open.push((id, idx));
        }
        engine.step(&mut |id, event| {
            let Some(at) = open.iter().position(|(open, _)| *open == id) else {
                return;
            };
            let answer = &mut all.answers[open[at].1];
            match event {
                Event::Token(token) => {
                    answer.text.push_str(&token.text_delta);
                    n_tokens += 1;
                }
                Event::Done {
                    finish,
                    usage,
                    timings,
                } => {
                    open.swap_remove(at);
                    n_done += 1;
                    if let Err(error) = close(answer, &finish, usage, timings) {
                        failure.get_or_insert(error);
                    }
                    all.prompt_tokens += usage.prompt_tokens;
                    all.cached_tokens += usage.cached_tokens;
                    all.completion_tokens += usage.completion_tokens;
                }
            }
        });
        if let Some(failure) = failure.take() {
            return Err(failure);
        }
        tick(n_done, n_tokens);
    }
    all.wall_s = began.elapsed().as_secs_f64();
    all.peak_rss_mb = bantam_lab::train::peak_rss_mb();
    Ok(all)
}

/// Makes the kernel count the peak of this process's memory anew, so that each contestant is charged for
/// its own. Where that is not possible the peak is the highest so far, which is not flattering either.
fn forget_peak_memory() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Fills in what is known at an answer's end; an answer that could not be finished is an error, not a zero.
fn close(
    answer: &mut Answer,
    finish: &Finish,
    usage: Usage,
    timings: Timings,
) -> anyhow::Result<()> {
    answer.cut_off = match finish {
        Finish::Stop => false,
        Finish::Length => true,
        Finish::Cancelled => anyhow::bail!("the answer to `{}` was cancelled", answer.question),
        Finish::Error(error) => {
            anyhow::bail!("the answer to `{}` failed: {error}", answer.question)
        }
    };
    answer.tokens = usage.completion_tokens;
    answer.ms = (timings.queue + timings.prefill + timings.decode).as_secs_f64() * 1e3;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(key: &str) -> Answers {
        Answers {
            key: key.into(),
            wall_s: 1.0,
            prompt_tokens: 2,
            cached_tokens: 1,
            completion_tokens: 3,
            peak_rss_mb: 4,
            answers: Vec::new(),
        }
    }

    fn questions(prompt: &[u32], max_tokens: usize) -> Questions {
        let request = Request {
            prompt: prompt.to_vec(),
            max_tokens,
            ..Request::default()
        };
        Questions {
            depends_on: "w".into(),
            shown: vec!["q".into()],
            requests: vec![request],
        }
    }

    #[test]
    fn answers_are_kept_for_their_key_only() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.json");
        assert_eq!(kept(&file, "k"), None);
        let text = serde_json::to_string_pretty(&answers("k")).unwrap();
        fs_err::write(&file, text).unwrap();
        assert_eq!(kept(&file, "k"), Some(answers("k")));
        assert_eq!(kept(&file, "other"), None);
        fs_err::write(&file, "{").unwrap();
        assert_eq!(kept(&file, "k"), None);
    }

    #[test]
    fn the_key_is_of_everything_that_matters() {
        let base = questions(&[1, 2], 9);
        let mut other_weights = base.clone();
        other_weights.depends_on = "x".into();
        let keys = [
            base.key(Pace::Together),
            base.key(Pace::OneAtATime),
            questions(&[1, 3], 9).key(Pace::Together),
            questions(&[1, 2], 8).key(Pace::Together),
            base.first(0).key(Pace::Together),
            other_weights.key(Pace::Together),
        ];
        let distinct: std::collections::HashSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
        assert_eq!(
            base.key(Pace::Together),
            questions(&[1, 2], 9).key(Pace::Together)
        );
    }
}
