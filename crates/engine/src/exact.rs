//! The same bits, whatever the threads, the concurrency, the caches and the guesses: requests of every
//! kind, and one digest of all that they were answered with.
//!
//! A test runs [`requests`] through engines of every [`Variant`] and compares what [`digest`] says.

use std::collections::HashMap;
use std::sync::Arc;

use bantam_model::{Lora, LoraConfig, ModelConfig, Proj};
use bantam_text::{ConstraintEngine, ConstraintSpec, TextError, Tokenizer};
use serde_json::json;

use crate::answer::Digest;
use crate::{
    AdapterId, BoxedConstraint, Engine, EngineConfig, Event, Finish, LanguageModel, Request,
    RequestId, Sampling, Usage,
};

/// How many requests [`requests`] makes.
pub const N_REQUESTS: usize = 64;

/// One way to run the same requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    /// Threads of the model.
    pub threads: usize,
    /// Requests at the same time.
    pub concurrency: usize,
    /// Whether read beginnings are used again.
    pub cache: bool,
    /// Whether tokens are guessed ahead.
    pub speculation: bool,
}

impl Variant {
    /// Every combination of 1, 2, 4 threads, 1, 7, 64 requests at a time, cache and speculation
    /// on and off.
    pub fn all() -> Vec<Variant> {
        let mut all = Vec::new();
        for threads in [1, 2, 4] {
            for concurrency in [1, 7, 64] {
                for switches in 0..4 {
                    all.push(Variant {
                        threads,
                        concurrency,
                        cache: switches & 1 != 0,
                        speculation: switches & 2 != 0,
                    });
                }
            }
        }
        all
    }

    /// The engine for it. Steps are of different sizes too, so that prompts are cut in different
    /// places.
    pub fn config(&self) -> EngineConfig {
        let usual = EngineConfig::default();
        EngineConfig {
            slots: self.concurrency,
            step_tokens: 100 + 57 * self.concurrency,
            busy_step_tokens: 40 + 11 * self.threads,
            prefix_bytes: if self.cache { usual.prefix_bytes } else { 0 },
            draft_tokens: if self.speculation {
                usual.draft_tokens
            } else {
                0
            },
            digests: true,
            ..usual
        }
    }
}

/// What all the answers together came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Of every answer's tokens, text and end, and of every logit that a token was chosen from.
    pub digest: u64,
    /// All the answers' tokens, for showing that the ways differed and the answers did not.
    pub usage: Usage,
    /// Requests that failed.
    pub n_failed: usize,
}

/// Two adapters with weights made of nothing but a seed, large enough to change every answer.
pub fn adapters(model: &ModelConfig) -> [Arc<Lora<f32>>; 2] {
    [1u64, 2].map(|seed| {
        let config = LoraConfig {
            rank: 4 * seed as usize,
            alpha: 8.0,
            targets: Proj::ALL.to_vec(),
        };
        let mut lora = Lora::new(config, model);
        let mut noise = Noise(seed);
        for param in &mut lora.params {
            *param = (noise.below(2001) as f32 - 1000.0) * 4e-5;
        }
        lora.refresh();
        Arc::new(lora)
    })
}

/// [`N_REQUESTS`] requests of every kind: greedy and sampled, free and constrained, short prompts and
/// long ones, with shared beginnings, predictions, stop strings, log-probabilities, and with
/// `adapters` and none in turn. `max_context` is the model's.
pub fn requests(
    tokenizer: &Arc<Tokenizer>,
    end_tokens: &[u32],
    adapters: &[AdapterId],
    max_context: usize,
) -> Result<Vec<Request>, TextError> {
    let constraints = ConstraintEngine::new(tokenizer, end_tokens)?;
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "kind": {"enum": ["noise", "signal", "neither of the two"]},
            "count": {"type": "integer"},
        },
        "required": ["name", "kind", "count"],
        "additionalProperties": false,
    });
    let labels = ["the river", "the road", "the roadside", "winter", "window"];
    let labels = ConstraintSpec::Labels(labels.map(str::to_owned).to_vec());
    let schema: BoxedConstraint = constraints
        .compile(&ConstraintSpec::JsonSchema(schema))?
        .into();
    let labels: BoxedConstraint = constraints.compile(&labels)?.into();
    let longest = (max_context * 5 / 8).min(700);
    let request = |i: usize| {
        let mut noise = Noise(1000 + i as u64);
        let shared = Noise(i as u64 % 3).words(40);
        let text = match i % 8 {
            // So long that the prompt is read in many pieces.
            7 => noise.words(longest),
            // Words that come again, for guesses to come true.
            5 => format!("{shared} {}", (noise.words(6) + " ").repeat(6)),
            3 => noise.words(3),
            _ => format!("{shared} {}", noise.words(12 + i)),
        };
        let mut prompt = tokenizer.encode_plain(&text);
        prompt.truncate(longest);
        let max_tokens = 8 + i % 5 * 5;
        let mut sampling = Sampling {
            seed: i as u64,
            ..Sampling::default()
        };
        if i % 2 == 1 {
            sampling.temperature = 0.3 + 0.1 * (i % 9) as f32;
        }
        match i % 9 {
            2 => sampling.top_p = 0.9,
            4 => sampling.top_k = 20,
            5 => sampling.min_p = 0.02,
            7 => {
                sampling.repetition_penalty = 1.2;
                sampling.frequency_penalty = 0.3;
                sampling.logit_bias = vec![(prompt[0], 1.5)];
            }
            _ => {}
        }
        let constraint = match i % 4 {
            1 => Some(schema.clone()),
            2 if i % 8 == 2 => Some(labels.clone()),
            _ => None,
        };
        Request {
            max_tokens: if i % 4 == 1 { 48 } else { max_tokens },
            sampling,
            stop: if i.is_multiple_of(6) {
                vec!["e".repeat(3), "zq".to_owned()]
            } else {
                Vec::new()
            },
            end_tokens: end_tokens.to_vec(),
            constraint,
            logprobs: i.is_multiple_of(5).then_some(i % 4),
            adapter: match i % (adapters.len() + 1) {
                0 => None,
                n => Some(adapters[n - 1]),
            },
            client: i as u64 % 4,
            prediction: (i % 8 == 4).then(|| prompt[prompt.len() / 2..].to_vec()),
            prompt,
        }
    };
    Ok((0..N_REQUESTS).map(request).collect())
}

/// Runs the requests, as many at a time as there are slots, and digests what comes of them. The engine
/// must keep [digests](EngineConfig::digests) and have nothing else to do.
pub fn digest<M: LanguageModel>(engine: &mut Engine<M>, requests: &[Request]) -> Outcome {
    let mut outcome = Outcome {
        digest: 0,
        usage: Usage::default(),
        n_failed: 0,
    };
    let mut answers = vec![Digest::default(); requests.len()];
    let mut places: HashMap<RequestId, usize> = HashMap::new();
    let mut waiting = requests.iter().enumerate();
    let mut n_done = 0;
    while n_done < requests.len() {
        while engine.queue_room() > 0 {
            let Some((place, request)) = waiting.next() else {
                break;
            };
            match engine.submit(request.clone()) {
                Ok(id) => {
                    places.insert(id, place);
                }
                Err(_) => {
                    n_done += 1;
                    outcome.n_failed += 1;
                }
            }
        }
        engine.step(&mut |id, event| {
            let Some(&place) = places.get(&id) else {
                return;
            };
            let answer = &mut answers[place];
            match event {
                Event::Token(token) => {
                    answer.word(token.id);
                    let text = token.text_delta.bytes().map(u32::from);
                    text.for_each(|byte| answer.word(byte));
                    if let Some(logprobs) = token.logprobs {
                        answer.word(logprobs.logprob.to_bits());
                        for (id, logprob) in logprobs.top {
                            answer.word(id);
                            answer.word(logprob.to_bits());
                        }
                    }
                }
                Event::Done { finish, usage, .. } => {
                    n_done += 1;
                    outcome.n_failed += usize::from(matches!(finish, Finish::Error(_)));
                    answer.word(match finish {
                        Finish::Stop => 1,
                        Finish::Length => 2,
                        Finish::Cancelled => 3,
                        Finish::Error(_) => 4,
                    });
                    let all = &mut outcome.usage;
                    all.prompt_tokens += usage.prompt_tokens;
                    all.cached_tokens += usage.cached_tokens;
                    all.completion_tokens += usage.completion_tokens;
                    all.forced_tokens += usage.forced_tokens;
                    all.drafted_tokens += usage.drafted_tokens;
                    all.accepted_tokens += usage.accepted_tokens;
                }
            }
        });
    }
    for (id, digest) in engine.take_digests() {
        if let Some(&place) = places.get(&id) {
            answers[place].word(digest as u32);
            answers[place].word((digest >> 32) as u32);
        }
    }
    let mut all = Digest::default();
    for Digest(answer) in answers {
        all.word(answer as u32);
        all.word((answer >> 32) as u32);
    }
    outcome.digest = all.0;
    outcome
}

/// Numbers that look random and are the same everywhere.
struct Noise(u64);

impl Noise {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) % n
    }

    fn words(&mut self, n: usize) -> String {
        const WORDS: [&str; 24] = [
            "the",
            "river",
            "runs",
            "under",
            "a",
            "bridge",
            "of",
            "stone",
            "and",
            "nobody",
            "remembers",
            "who",
            "built",
            "it",
            "in",
            "winter",
            "snow",
            "falls",
            "on",
            "road",
            "to",
            "town",
            "where",
            "windows",
        ];
        let words: Vec<&str> = (0..n)
            .map(|_| WORDS[self.below(WORDS.len() as u64) as usize])
            .collect();
        words.join(" ")
    }
}
