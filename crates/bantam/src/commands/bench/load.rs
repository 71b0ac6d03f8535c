//! The work that is timed: prompts, answers and chats put to one engine.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use bantam_engine::{Engine, EngineConfig, Event, Finish, Llama, Request, Timings, Usage};
use bantam_formats::JsonlReader;
use bantam_text::{Chat, Message};
use serde::Deserialize;

/// Most answers at once, in any measurement.
const SLOTS: usize = 64;
/// Clients of the chat measurement.
const CLIENTS: usize = 16;
/// Tokens that a stream answers with.
const STREAM_TOKENS: usize = 64;
/// Tokens of the prompt of an answer that is timed; of the answer of one alone.
const SHORT_PROMPT: usize = 16;
const ANSWER: usize = 128;
/// Longest answer of a chat: about a label.
const CHAT_TOKENS: usize = 8;
/// The chats: every beginning with every thing, under one system prompt.
const SYSTEM: &str = "Classify the banking customer query into one intent label.";
const BEGINNINGS: [&str; 8] = [
    "How do I cancel",
    "I still have not received",
    "Why was I charged for",
    "Can I change the address for",
    "Something went wrong with",
    "What is the fee for",
    "I would like to know more about",
    "Who can I ask about",
];
const THINGS: [&str; 8] = [
    "my new card?",
    "a transfer to another country that I made last week?",
    "the cash I took out this morning?",
    "my top-up?",
    "an exchange from euros to pounds?",
    "a payment that shows up twice on my statement?",
    "the second card for my daughter?",
    "a refund of something that I sent back to the shop?",
];

/// A figure of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measure {
    /// Tokens a second of reading a prompt of so many tokens.
    Prefill(usize),
    /// Tokens a second of one answer.
    Decode,
    /// Tokens a second of so many answers at once, prompts and all.
    Streams(usize),
    /// Chats a second.
    Chat,
}

impl Measure {
    /// Its field in the JSON object.
    pub(crate) fn field(self) -> String {
        match self {
            Self::Prefill(n) => format!("prefill_{n}_tok_s"),
            Self::Decode => "decode_tok_s".into(),
            Self::Streams(n) => format!("decode_{n}_streams_tok_s"),
            Self::Chat => "chat_requests_per_s".into(),
        }
    }

    /// In words, with the unit.
    pub(crate) fn title(self) -> (String, &'static str) {
        match self {
            Self::Prefill(n) => (format!("prefill, {n} tokens"), "tok/s"),
            Self::Decode => ("decode, one stream".into(), "tok/s"),
            Self::Streams(n) => (format!("decode, {n} streams"), "tok/s"),
            Self::Chat => (format!("chats, {CLIENTS} clients"), "requests/s"),
        }
    }
}

/// An answer that has ended.
struct Ended {
    usage: Usage,
    timings: Timings,
}

/// The engine under load. No two prompts of tokens begin alike, so nothing but the chats' system prompt is reused.
pub(crate) struct Load {
    engine: Engine<Llama>,
    chat: Arc<Chat>,
    /// What to chat about, if not what is built in.
    given: Option<Vec<Given>>,
    seed: usize,
}

/// A chat of a user's file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Given {
    messages: Vec<Message>,
    max_tokens: usize,
    /// Of the same lines as requests, and without a meaning here.
    #[serde(rename = "model")]
    _model: Option<String>,
    #[serde(rename = "temperature")]
    _temperature: Option<f32>,
}

fn read_chats(path: &Path) -> anyhow::Result<Vec<Given>> {
    let mut chats = Vec::new();
    for line in JsonlReader::open(path)? {
        let (number, chat) = line?;
        let chat = serde_path_to_error::deserialize::<serde_json::Value, Given>(chat);
        chats.push(chat.with_context(|| format!("{}:{number}", path.display()))?);
    }
    anyhow::ensure!(!chats.is_empty(), "{} holds no chats", path.display());
    Ok(chats)
}

impl Load {
    /// An engine with room for every measurement.
    pub(crate) fn new(model: Llama, chat: Arc<Chat>, chats: Option<&Path>) -> anyhow::Result<Self> {
        let mut config = EngineConfig {
            slots: SLOTS,
            queue: SLOTS,
            ..EngineConfig::default()
        };
        let given = chats.map(read_chats).transpose()?;
        if given.is_none() {
            // A guess that comes true would say more of the text than of the machine.
            config.draft_tokens = 0;
        }
        let engine = Engine::new(model, chat.tokenizer().clone(), config);
        Ok(Self {
            engine,
            chat,
            given,
            seed: 0,
        })
    }

    /// Measures once.
    pub(crate) fn measure(&mut self, measure: Measure) -> anyhow::Result<f64> {
        match measure {
            Measure::Prefill(n) => {
                let request = self.tokens(n, 1);
                let ended = self.one(request)?;
                Ok(n as f64 / ended.timings.first_token.as_secs_f64())
            }
            Measure::Decode => {
                let request = self.tokens(SHORT_PROMPT, ANSWER);
                let ended = self.one(request)?;
                // The first token comes with the end of the prompt.
                Ok((ended.usage.completion_tokens - 1) as f64 / ended.timings.decode.as_secs_f64())
            }
            Measure::Streams(n) => {
                let requests = (0..n).map(|_| self.tokens(SHORT_PROMPT, STREAM_TOKENS));
                let requests = requests.collect();
                let (wall, ended) = self.run(requests, n)?;
                let tokens: usize = ended.iter().map(|e| e.usage.completion_tokens).sum();
                Ok(tokens as f64 / wall.as_secs_f64())
            }
            Measure::Chat => {
                let requests = self.chats()?;
                let n = requests.len();
                let (wall, _) = self.run(requests, CLIENTS)?;
                Ok(n as f64 / wall.as_secs_f64())
            }
        }
    }

    /// Whether the model reads prompts of this measurement.
    pub(crate) fn fits(&self, measure: Measure) -> bool {
        let request = match measure {
            Measure::Prefill(n) => tokens_of(n, 1, 0, usize::MAX),
            _ => tokens_of(SHORT_PROMPT, ANSWER, 0, usize::MAX),
        };
        let room = |r: &Request| Request {
            prompt: vec![0; r.prompt.len()],
            ..r.clone()
        };
        self.engine.check(&room(&request)).is_ok()
    }

    /// One answer of a word to a short question, with nothing in the caches.
    pub(crate) fn first_token(&mut self) -> anyhow::Result<()> {
        let prompt = self.chat.prompt(&[Message::user("Hello")], &[])?;
        self.one(Request {
            prompt,
            max_tokens: 1,
            ..Request::default()
        })?;
        Ok(())
    }

    /// A prompt of tokens that no other begins with, answered to the full length.
    fn tokens(&mut self, n_prompt: usize, n_answer: usize) -> Request {
        self.seed += 1;
        let vocab = self.engine.tokenizer().vocab_size();
        tokens_of(n_prompt, n_answer, self.seed, vocab)
    }

    fn chats(&self) -> anyhow::Result<Vec<Request>> {
        let request = |messages: &[Message], max_tokens| {
            Ok(Request {
                prompt: self.chat.prompt(messages, &[])?,
                max_tokens,
                end_tokens: self.chat.end_tokens().to_vec(),
                ..Request::default()
            })
        };
        if let Some(given) = &self.given {
            let chats = given.iter();
            return chats
                .map(|one| request(&one.messages, one.max_tokens))
                .collect();
        }
        let texts = BEGINNINGS
            .iter()
            .flat_map(|begin| THINGS.iter().map(move |thing| format!("{begin} {thing}")));
        texts
            .map(|text| request(&[Message::system(SYSTEM), Message::user(text)], CHAT_TOKENS))
            .collect()
    }

    fn one(&mut self, request: Request) -> anyhow::Result<Ended> {
        let (_, mut ended) = self.run(vec![request], 1)?;
        ended.pop().context("a request ends")
    }

    /// Runs all requests, `at_once` of them at a time; the wall time and how they ended.
    fn run(
        &mut self,
        requests: Vec<Request>,
        at_once: usize,
    ) -> anyhow::Result<(Duration, Vec<Ended>)> {
        let (mut waiting, mut running) = (requests.into_iter(), HashMap::new());
        let (mut ended, mut failure) = (Vec::new(), None);
        let began = Instant::now();
        loop {
            while running.len() < at_once
                && let Some(request) = waiting.next()
            {
                running.insert(self.engine.submit(request)?, ());
            }
            if running.is_empty() {
                break;
            }
            self.engine.step(&mut |id, event| {
                let Event::Done {
                    finish,
                    usage,
                    timings,
                } = event
                else {
                    return;
                };
                running.remove(&id);
                match finish {
                    Finish::Error(error) => failure = Some(anyhow!("a request failed: {error}")),
                    _ => ended.push(Ended { usage, timings }),
                }
            });
        }
        match failure {
            None => Ok((began.elapsed(), ended)),
            Some(error) => Err(error),
        }
    }
}

/// Token ids all over the vocabulary, different from the first for every seed.
fn tokens_of(n_prompt: usize, n_answer: usize, seed: usize, vocab: usize) -> Request {
    let id = |i: usize| (seed.wrapping_mul(7919) + 31 * i) % vocab;
    Request {
        prompt: (0..n_prompt)
            .map(|i| u32::try_from(id(i)).unwrap_or(0))
            .collect(),
        max_tokens: n_answer,
        ..Request::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_of_tokens_stay_in_the_vocabulary_and_begin_differently() {
        let firsts: std::collections::BTreeSet<u32> = (0..200)
            .map(|seed| tokens_of(40, 1, seed, 49152).prompt)
            .inspect(|prompt| assert!(prompt.iter().all(|&id| id < 49152)))
            .map(|prompt| prompt[0])
            .collect();
        assert_eq!(firsts.len(), 200);
    }
}
