//! A model whose logits are a hash of every token of the sequence, so that any mix-up of
//! caches, positions or neighbours changes the answer; with failures that can be planned.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "test support, used in part by each test"
)]

use std::sync::{Arc, Mutex};

use bantam_engine::{CacheBlock, LanguageModel, ModelError, Request, Sampling, Span, Wants};
use bantam_text::{Specials, Tokenizer};

pub const MAX_CONTEXT: usize = 400;
pub const END: u32 = bantam_testkit::tiny::IM_END;
/// A prompt with this token makes the model panic when it reads it.
pub const PANIC: u32 = 4;
/// ... return an error.
pub const FAIL: u32 = 5;
/// ... give logits that are not numbers.
pub const NAN: u32 = 6;
/// ... lose a cache's contents while panicking.
pub const LOSE: u32 = 7;

#[derive(Default)]
pub struct Log {
    /// Tokens of each span of each forward pass.
    pub steps: Vec<Vec<usize>>,
}

pub struct Mock {
    pub log: Arc<Mutex<Log>>,
    vocab: usize,
    /// The longest sequence.
    pub max_context: usize,
    /// Slows every pass down, for tests of slow servers.
    pub delay: std::time::Duration,
}

impl Mock {
    pub fn new() -> Self {
        let vocab = tokenizer().vocab_size();
        Self {
            log: Arc::default(),
            vocab,
            max_context: MAX_CONTEXT,
            delay: std::time::Duration::ZERO,
        }
    }

    /// The log-probability of tokens after others.
    pub fn logprob(&self, adapter: Option<&u64>, prompt: &[u32], tokens: &[u32]) -> f64 {
        let mut history = prompt.to_vec();
        let mut sum = 0.0;
        for &token in tokens {
            let mut row = Vec::new();
            self.row(adapter, &history, &mut row);
            let norm: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
            sum += f64::from(row[token as usize]) - norm.ln();
            history.push(token);
        }
        sum
    }

    /// A row of logits: the adapter and the history decide all of it.
    fn row(&self, adapter: Option<&u64>, history: &[u32], logits: &mut Vec<f32>) {
        if history.contains(&NAN) {
            logits.extend(std::iter::repeat_n(f32::NAN, self.vocab));
            return;
        }
        let seed = history.iter().fold(
            adapter.map_or(0xcbf2_9ce4_8422_2325u64, |a| mix(*a)),
            |h, &t| mix(h ^ u64::from(t)),
        );
        for id in 0..self.vocab as u64 {
            let unit = (mix(seed ^ id) >> 40) as f32 / (1u64 << 24) as f32;
            let boost = match id as u32 {
                35..130 => 0.0,
                END if history.len() % 7 == 3 => 0.5,
                _ => -20.0,
            };
            logits.push(unit * 4.0 + boost);
        }
    }
}

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (x ^ (x >> 31)).wrapping_add(0x9e37_79b9_7f4a_7c15)
}

impl LanguageModel for Mock {
    type Cache = Vec<u32>;
    type Adapter = u64;

    fn vocab(&self) -> usize {
        self.vocab
    }

    fn max_context(&self) -> usize {
        self.max_context
    }

    fn new_cache(&self) -> Vec<u32> {
        Vec::new()
    }

    fn cache_len(&self, cache: &Vec<u32>) -> usize {
        cache.len()
    }

    fn cache_block(&self) -> CacheBlock {
        CacheBlock {
            tokens: 1,
            bytes: 4,
        }
    }

    fn fork(&self, cache: &Vec<u32>, len: usize) -> Vec<u32> {
        cache[..len].to_vec()
    }

    fn truncate(&self, cache: &mut Vec<u32>, len: usize) {
        assert!(len <= cache.len());
        cache.truncate(len);
    }

    fn forward(
        &mut self,
        spans: &mut [Span<'_, Self>],
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        std::thread::sleep(self.delay);
        self.log
            .lock()
            .unwrap()
            .steps
            .push(spans.iter().map(|s| s.tokens.len()).collect());
        logits.clear();
        for span in spans {
            assert!(!span.tokens.is_empty());
            span.cache.extend_from_slice(span.tokens);
            assert!(span.cache.len() <= self.max_context);
            if span.tokens.contains(&LOSE) {
                span.cache.clear();
                panic!("planned loss");
            }
            if span.tokens.contains(&PANIC) {
                panic!("planned panic");
            }
            if span.tokens.contains(&FAIL) {
                return Err(ModelError("planned failure".to_string()));
            }
            let (cache, adapter) = (&*span.cache, span.adapter);
            match span.wants {
                Wants::None => {}
                Wants::Last => self.row(adapter, cache, logits),
                Wants::LastOf(ids) => {
                    let mut row = Vec::new();
                    self.row(adapter, cache, &mut row);
                    logits.extend(ids.iter().map(|&id| row[id as usize]));
                }
                Wants::Tail(n) => {
                    for back in (0..n).rev() {
                        self.row(adapter, &cache[..cache.len() - back], logits);
                    }
                }
            }
        }
        Ok(())
    }
}

pub fn tokenizer() -> Arc<Tokenizer> {
    let json = bantam_testkit::tiny::tokenizer_json().to_string();
    Arc::new(Tokenizer::from_hf_json(json.as_bytes(), &Specials::default()).unwrap())
}

/// A greedy request for up to 40 tokens.
pub fn greedy(prompt: Vec<u32>) -> Request {
    Request {
        prompt,
        max_tokens: 40,
        end_tokens: vec![END],
        ..Request::default()
    }
}

/// The same with a temperature.
pub fn warm(prompt: Vec<u32>, seed: u64) -> Request {
    let sampling = Sampling {
        temperature: 1.0,
        seed,
        ..Sampling::default()
    };
    Request {
        sampling,
        ..greedy(prompt)
    }
}

/// `n` tokens that the model reads without harm.
pub fn prompt(seed: u64, n: usize) -> Vec<u32> {
    (0..n as u64)
        .map(|i| 35 + (mix(seed << 20 ^ i) % 95) as u32)
        .collect()
}
