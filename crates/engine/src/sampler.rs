//! From a row of logits to a token.
//!
//! A sampler belongs to one request: its generator is seeded by the request alone and is
//! drawn from only where there is a choice, so neighbours cannot change an answer.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

use crate::{Sampling, SubmitError, TokenLogprobs};

/// Buffers that every request may use in turn.
#[derive(Default)]
pub(crate) struct Scratch {
    logits: Vec<f32>,
    candidates: Vec<(u32, f32)>,
    weights: Vec<f64>,
}

/// The choices of one request.
pub(crate) struct Sampler {
    sampling: Sampling,
    rng: ChaCha8Rng,
    /// Tokens of the prompt and the answer; filled only if the repetition penalty needs it.
    seen: BTreeSet<u32>,
    /// How often each token is in the answer; filled only if a penalty needs it.
    counts: BTreeMap<u32, u32>,
}

impl Sampling {
    /// Whether every parameter is in its range.
    pub(crate) fn check(&self, vocab: usize) -> Result<(), SubmitError> {
        let bad = |name, range, value: f32| {
            Err(SubmitError::BadSampling {
                name,
                range,
                value: value.to_string(),
            })
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return bad("temperature", "a number of at least 0", self.temperature);
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return bad("top_p", "between 0 and 1", self.top_p);
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("min_p", "between 0 and 1", self.min_p);
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return bad(
                "repetition_penalty",
                "a number above 0",
                self.repetition_penalty,
            );
        }
        if !self.presence_penalty.is_finite() {
            return bad("presence_penalty", "a number", self.presence_penalty);
        }
        if !self.frequency_penalty.is_finite() {
            return bad("frequency_penalty", "a number", self.frequency_penalty);
        }
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocab {
                return Err(SubmitError::UnknownToken { token, vocab });
            }
            if !bias.is_finite() {
                return bad("logit_bias", "a number", bias);
            }
        }
        Ok(())
    }

    fn counts_tokens(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    fn changes_logits(&self) -> bool {
        self.repetition_penalty != 1.0 || self.counts_tokens() || !self.logit_bias.is_empty()
    }
}

impl Sampler {
    pub(crate) fn new(sampling: Sampling, prompt: &[u32]) -> Self {
        let seen = if sampling.repetition_penalty == 1.0 {
            BTreeSet::new()
        } else {
            prompt.iter().copied().collect()
        };
        let rng = ChaCha8Rng::seed_from_u64(sampling.seed);
        Self {
            sampling,
            rng,
            seen,
            counts: BTreeMap::new(),
        }
    }

    /// Tells the sampler of a token that is now in the answer.
    pub(crate) fn took(&mut self, token: u32) {
        if self.sampling.repetition_penalty != 1.0 {
            self.seen.insert(token);
        }
        if self.sampling.counts_tokens() {
            *self.counts.entry(token).or_insert(0) += 1;
        }
    }

    /// Chooses among the first `n_tokens` logits of `row`; `None` if the mask leaves none.
    pub(crate) fn choose(
        &mut self,
        row: &[f32],
        n_tokens: usize,
        mask: Option<&[u32]>,
        scratch: &mut Scratch,
    ) -> Option<u32> {
        let Scratch {
            logits,
            candidates,
            weights,
        } = scratch;
        let row = &row[..n_tokens];
        let row: &[f32] = if self.sampling.changes_logits() {
            logits.clear();
            logits.extend_from_slice(row);
            self.adjust(logits);
            logits
        } else {
            row
        };
        if self.sampling.temperature == 0.0 {
            return argmax(row, mask);
        }
        candidates.clear();
        match mask {
            None => candidates.extend(row.iter().enumerate().map(|(id, &l)| (id as u32, l))),
            Some(mask) => each_allowed(mask, row.len(), |id| {
                candidates.push((id, row[id as usize]))
            }),
        }
        candidates.retain(|&(_, logit)| logit > f32::NEG_INFINITY);
        self.draw(candidates, weights)
    }

    /// Penalties and bias, in place.
    fn adjust(&self, logits: &mut [f32]) {
        let s = &self.sampling;
        for &token in &self.seen {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 {
                    *logit / s.repetition_penalty
                } else {
                    *logit * s.repetition_penalty
                };
            }
        }
        for (&token, &count) in &self.counts {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit -= s.frequency_penalty * count as f32 + s.presence_penalty;
            }
        }
        for &(token, bias) in &s.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }

    /// Temperature, `top_k`, `top_p`, `min_p`, and one draw among what is left.
    fn draw(&mut self, candidates: &mut Vec<(u32, f32)>, weights: &mut Vec<f64>) -> Option<u32> {
        let s = &self.sampling;
        let n = candidates.len();
        if s.top_k > 0 && s.top_k < n {
            candidates.select_nth_unstable_by(s.top_k - 1, likelier);
            candidates.truncate(s.top_k);
        }
        let &(_, best) = candidates.iter().min_by(|a, b| likelier(a, b))?;
        let weight = |logit: f32| (f64::from(logit - best) / f64::from(s.temperature)).exp();
        if s.top_p < 1.0 {
            let top_p = f64::from(s.top_p);
            let total: f64 = {
                // In the order of ids: the sum must not depend on how the selection moved things.
                candidates.sort_unstable_by_key(|c| c.0);
                candidates.iter().map(|c| weight(c.1)).sum()
            };
            // Tokens below this cannot be in the nucleus: all of them together weigh less than
            // what the nucleus may leave out. Dropping them first spares sorting the vocabulary.
            let floor = (1.0 - top_p) * total / candidates.len() as f64 * 0.999;
            candidates.retain(|c| weight(c.1) >= floor);
            candidates.sort_unstable_by(likelier);
            let mut sum = 0.0;
            let kept = candidates.iter().position(|c| {
                sum += weight(c.1);
                sum >= top_p * total
            });
            candidates.truncate(kept.map_or(candidates.len(), |last| last + 1));
        }
        if s.min_p > 0.0 {
            candidates.retain(|c| weight(c.1) >= f64::from(s.min_p));
        }
        if let [(only, _)] = candidates[..] {
            return Some(only);
        }
        candidates.sort_unstable_by_key(|c| c.0);
        weights.clear();
        weights.extend(candidates.iter().map(|c| weight(c.1)));
        let total: f64 = weights.iter().sum();
        let mut left = unit(&mut self.rng) * total;
        for (candidate, weight) in candidates.iter().zip(weights.iter()) {
            left -= weight;
            if left < 0.0 {
                return Some(candidate.0);
            }
        }
        // Rounding may leave a crumb at the end: it belongs to the last that can be drawn.
        candidates
            .iter()
            .zip(weights.iter())
            .rev()
            .find(|(_, w)| **w > 0.0)
            .map(|(c, _)| c.0)
    }
}

/// The likelier first, the lower id among equals.
fn likelier(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// A number in [0, 1) of 53 random bits.
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// The likeliest token that the mask allows, the lowest id among equals.
fn argmax(row: &[f32], mask: Option<&[u32]>) -> Option<u32> {
    let mut best: Option<(u32, f32)> = None;
    let mut look = |id: u32, logit: f32| {
        if logit > best.map_or(f32::NEG_INFINITY, |b| b.1) {
            best = Some((id, logit));
        }
    };
    match mask {
        None => row
            .iter()
            .enumerate()
            .for_each(|(id, &logit)| look(id as u32, logit)),
        Some(mask) => each_allowed(mask, row.len(), |id| look(id, row[id as usize])),
    }
    best.map(|b| b.0)
}

/// Calls `f` with every token that `mask` allows, in order.
fn each_allowed(mask: &[u32], n_tokens: usize, mut f: impl FnMut(u32)) {
    for (word_idx, &word) in mask.iter().enumerate() {
        let mut bits = word;
        while bits != 0 {
            let id = word_idx * 32 + bits.trailing_zeros() as usize;
            if id >= n_tokens {
                return;
            }
            f(id as u32);
            bits &= bits - 1;
        }
    }
}

/// The token that `mask` allows, if it allows exactly one.
pub(crate) fn only_allowed(mask: &[u32], n_tokens: usize) -> Option<u32> {
    let mut found = None;
    for (word_idx, &word) in mask.iter().enumerate() {
        if word == 0 {
            continue;
        }
        if found.is_some() || word & (word - 1) != 0 {
            return None;
        }
        found = Some((word_idx * 32) as u32 + word.trailing_zeros());
    }
    found.filter(|&id| (id as usize) < n_tokens)
}

/// The log-probability of `token`, and the `n_top` likeliest of the first `n_tokens`.
pub(crate) fn logprobs(
    row: &[f32],
    n_tokens: usize,
    token: u32,
    n_top: usize,
    scratch: &mut Scratch,
) -> TokenLogprobs {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = row.iter().map(|&l| f64::from(l - max).exp()).sum();
    let norm = f64::from(max) + sum.ln();
    let of = |logit: f32| (f64::from(logit) - norm) as f32;
    let candidates = &mut scratch.candidates;
    candidates.clear();
    if n_top > 0 {
        candidates.extend(
            row[..n_tokens]
                .iter()
                .enumerate()
                .map(|(id, &l)| (id as u32, l)),
        );
        if n_top < candidates.len() {
            candidates.select_nth_unstable_by(n_top - 1, likelier);
            candidates.truncate(n_top);
        }
        candidates.sort_unstable_by(likelier);
    }
    TokenLogprobs {
        logprob: of(row[token as usize]),
        top: candidates.iter().map(|&(id, l)| (id, of(l))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(sampling: Sampling, row: &[f32], mask: Option<&[u32]>) -> Option<u32> {
        Sampler::new(sampling, &[]).choose(row, row.len(), mask, &mut Scratch::default())
    }

    fn histogram(sampling: &Sampling, row: &[f32]) -> Vec<u32> {
        let mut counts = vec![0; row.len()];
        let mut sampler = Sampler::new(sampling.clone(), &[]);
        let mut scratch = Scratch::default();
        for _ in 0..4000 {
            counts[sampler.choose(row, row.len(), None, &mut scratch).unwrap() as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        assert_eq!(
            choose(Sampling::default(), &[0.0, 2.0, 1.0, 2.0], None),
            Some(1)
        );
        assert_eq!(
            choose(Sampling::default(), &[0.0, 2.0, 1.0, 2.0], Some(&[0b1001])),
            Some(3)
        );
        assert_eq!(choose(Sampling::default(), &[0.0; 4], Some(&[0])), None);
        assert_eq!(
            choose(Sampling::default(), &[0.0; 4], Some(&[0xf0])),
            None,
            "beyond the row"
        );
        let warm = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        assert_eq!(choose(warm, &[0.0; 4], Some(&[0])), None);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let row = [0.0, 1.0, 2.0, f32::NEG_INFINITY];
        let warm = Sampling {
            temperature: 0.7,
            seed: 3,
            ..Sampling::default()
        };
        let total: f64 = row.iter().map(|&l| (f64::from(l) / 0.7).exp()).sum();
        for (count, logit) in histogram(&warm, &row).into_iter().zip(row) {
            let expected = (f64::from(logit) / 0.7).exp() / total;
            assert!(
                (f64::from(count) / 4000.0 - expected).abs() < 0.03,
                "{count} for {expected}"
            );
        }
    }

    #[test]
    fn each_filter_keeps_what_it_should() {
        // Probabilities .5 .25 .125 .125
        let row = [4f32.ln(), 2f32.ln(), 0.0, 0.0];
        let warm = Sampling {
            temperature: 1.0,
            ..Sampling::default()
        };
        let kept = |sampling: &Sampling| -> Vec<usize> {
            let counts = histogram(sampling, &row);
            (0..row.len()).filter(|&i| counts[i] > 0).collect()
        };
        assert_eq!(kept(&warm), [0, 1, 2, 3]);
        assert_eq!(
            kept(&Sampling {
                top_k: 2,
                ..warm.clone()
            }),
            [0, 1]
        );
        assert_eq!(
            kept(&Sampling {
                top_k: 3,
                ..warm.clone()
            }),
            [0, 1, 2],
            "lowest id of equals"
        );
        assert_eq!(
            kept(&Sampling {
                top_p: 0.0,
                ..warm.clone()
            }),
            [0]
        );
        assert_eq!(
            kept(&Sampling {
                top_p: 0.6,
                ..warm.clone()
            }),
            [0, 1]
        );
        assert_eq!(
            kept(&Sampling {
                top_p: 0.8,
                ..warm.clone()
            }),
            [0, 1, 2]
        );
        assert_eq!(
            kept(&Sampling {
                min_p: 0.3,
                ..warm.clone()
            }),
            [0, 1]
        );
        assert_eq!(
            kept(&Sampling {
                min_p: 1.0,
                ..warm.clone()
            }),
            [0]
        );
        let cold = Sampling {
            temperature: 1e-30,
            ..warm
        };
        assert_eq!(kept(&cold), [0]);
    }

    #[test]
    fn the_nucleus_is_that_of_a_full_sort() {
        let row: Vec<f32> = (0..500u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 600.0)
            .collect();
        for top_p in [0.05, 0.3, 0.9, 0.99, 0.9999] {
            let warm = Sampling {
                temperature: 1.3,
                top_p,
                ..Sampling::default()
            };
            let mut sorted: Vec<(u32, f32)> = row
                .iter()
                .enumerate()
                .map(|(i, &l)| (i as u32, l))
                .collect();
            sorted.sort_by(likelier);
            let weight = |l: f32| (f64::from(l - sorted[0].1) / f64::from(1.3f32)).exp();
            let total: f64 = row.iter().map(|&l| weight(l)).sum();
            let mut sum = 0.0;
            let mut nucleus: Vec<u32> = Vec::new();
            for &(id, l) in &sorted {
                nucleus.push(id);
                sum += weight(l);
                if sum >= f64::from(top_p) * total {
                    break;
                }
            }
            nucleus.sort_unstable();
            let mut candidates: Vec<(u32, f32)> = row
                .iter()
                .enumerate()
                .map(|(i, &l)| (i as u32, l))
                .collect();
            Sampler::new(warm, &[]).draw(&mut candidates, &mut Vec::new());
            let kept: Vec<u32> = candidates.iter().map(|c| c.0).collect();
            assert_eq!(kept, nucleus, "top_p {top_p}");
        }
    }

    #[test]
    fn penalties_and_bias_move_the_argmax() {
        let row = [1.0, 0.9, -1.0, -1.1];
        let run = |sampling: Sampling, prompt: &[u32], answer: &[u32]| {
            let mut sampler = Sampler::new(sampling, prompt);
            answer.iter().for_each(|&t| sampler.took(t));
            sampler.choose(&row, 4, None, &mut Scratch::default())
        };
        let plain = Sampling::default();
        assert_eq!(
            run(
                Sampling {
                    repetition_penalty: 1.2,
                    ..plain.clone()
                },
                &[0],
                &[]
            ),
            Some(1)
        );
        assert_eq!(
            run(
                Sampling {
                    presence_penalty: 0.2,
                    ..plain.clone()
                },
                &[0],
                &[]
            ),
            Some(0),
            "the prompt is not penalised"
        );
        assert_eq!(
            run(
                Sampling {
                    presence_penalty: 0.2,
                    ..plain.clone()
                },
                &[],
                &[0]
            ),
            Some(1)
        );
        assert_eq!(
            run(
                Sampling {
                    frequency_penalty: 0.06,
                    ..plain.clone()
                },
                &[],
                &[0]
            ),
            Some(0)
        );
        assert_eq!(
            run(
                Sampling {
                    frequency_penalty: 0.06,
                    ..plain.clone()
                },
                &[],
                &[0, 0]
            ),
            Some(1)
        );
        assert_eq!(
            run(
                Sampling {
                    logit_bias: vec![(3, 100.0)],
                    ..plain
                },
                &[],
                &[]
            ),
            Some(3)
        );
    }

    #[test]
    fn log_probabilities_are_a_log_softmax() {
        let row = [4f32.ln(), 2f32.ln(), 0.0, 0.0];
        let got = logprobs(&row, 4, 2, 3, &mut Scratch::default());
        assert!((got.logprob - 0.125f32.ln()).abs() < 1e-6);
        assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [0, 1, 2]);
        assert!((got.top[0].1 - 0.5f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn a_mask_of_one_bit_is_seen() {
        assert_eq!(only_allowed(&[0, 0b100], 64), Some(34));
        assert_eq!(only_allowed(&[1, 1], 64), None);
        assert_eq!(only_allowed(&[3], 64), None);
        assert_eq!(only_allowed(&[0], 64), None);
        assert_eq!(only_allowed(&[0, 0b100], 34), None);
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        let bad = Sampling {
            top_p: f32::NAN,
            ..Sampling::default()
        };
        assert_eq!(
            bad.check(4).unwrap_err().to_string(),
            "`top_p` must be between 0 and 1, not NaN"
        );
        let bad = Sampling {
            temperature: -1.0,
            ..Sampling::default()
        };
        assert!(
            bad.check(4)
                .unwrap_err()
                .to_string()
                .starts_with("`temperature`")
        );
        let bad = Sampling {
            logit_bias: vec![(4, 1.0)],
            ..Sampling::default()
        };
        assert_eq!(
            bad.check(4).unwrap_err(),
            SubmitError::UnknownToken { token: 4, vocab: 4 }
        );
    }
}
