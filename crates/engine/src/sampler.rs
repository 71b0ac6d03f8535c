//! From a row of logits to a token.
//!
//! A sampler belongs to one request: its generator is seeded by the request alone and is
//! drawn from only where there is a choice, so neighbours cannot change an answer, and a token
//! that is only confirmed (speculation) is the token that would have been drawn.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

use bantam_kernels::Isa;

use crate::mask::Mask;
use crate::scan::{Scan, WEIGHT_MIN, likeliest, pick, scan, total, weigh};
use crate::{Sampling, SubmitError, TokenLogprobs};

/// Buffers that every request may use in turn.
pub(crate) struct Scratch {
    isa: Isa,
    values: Vec<f32>,
    weights: Vec<f32>,
    kept: Vec<Kept>,
    top: Vec<(u32, f32)>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            isa: Isa::detect(),
            values: Vec::new(),
            weights: Vec::new(),
            kept: Vec::new(),
            top: Vec::new(),
        }
    }
}

/// A candidate that the filters left: its place among the values, its logit, its weight.
#[derive(Clone, Copy)]
struct Kept {
    idx: u32,
    logit: f32,
    weight: f32,
}

/// The logits that a choice is made from.
#[derive(Clone, Copy)]
pub(crate) enum Row<'a> {
    /// Of the whole vocabulary.
    Full(&'a [f32]),
    /// Of the ids of a narrow [`Mask`] alone, in their order.
    Narrow(&'a [f32]),
}

/// What came of a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pick {
    /// This token.
    Token(u32),
    /// The mask allows none that has any probability.
    DeadEnd,
    /// The logits are no numbers.
    NotFinite,
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

    /// Chooses among the first `n_tokens` tokens, or those of them that the mask allows.
    ///
    /// Whether a mask is narrow decides which way the choice is computed, not which kind of
    /// row is at hand: the choice is the same from a whole row and from a narrow one.
    pub(crate) fn choose(
        &mut self,
        row: Row<'_>,
        n_tokens: usize,
        mask: Option<&Mask>,
        scratch: &mut Scratch,
    ) -> Pick {
        let Scratch {
            isa,
            values,
            weights,
            kept,
            top,
        } = scratch;
        let ids = mask.and_then(Mask::ids);
        // As they are, or a copy in `values`.
        let given: Option<&[f32]> = match (row, mask, ids) {
            (Row::Narrow(logits), ..) => Some(logits),
            (Row::Full(row), None, _) => Some(&row[..n_tokens]),
            (Row::Full(row), Some(_), Some(ids)) => {
                values.clear();
                values.extend(ids.iter().map(|&id| row[id as usize]));
                None
            }
            (Row::Full(row), Some(mask), None) => {
                masked(values, &row[..n_tokens], mask.words());
                None
            }
        };
        let changes = self.sampling.changes_logits();
        if let Some(given) = given.filter(|_| changes) {
            values.clear();
            values.extend_from_slice(given);
        }
        if changes {
            self.adjust(values, ids);
        }
        let values: &[f32] = match given {
            Some(given) if !changes => given,
            _ => values,
        };
        let (best, max) = match scan(*isa, values) {
            Scan::Best(idx, max) => (idx, max),
            Scan::Nothing if mask.is_some() => return Pick::DeadEnd,
            Scan::Nothing | Scan::Bad => return Pick::NotFinite,
        };
        // A lone candidate is no choice, so nothing is drawn: as if it had been forced.
        let idx = if self.sampling.temperature == 0.0 || mask.is_some_and(|m| m.n_allowed() == 1) {
            best
        } else {
            self.draw(*isa, values, max, weights, kept, top)
        };
        Pick::Token(ids.map_or(idx as u32, |ids| ids[idx]))
    }

    /// Penalties and bias, in place; the values are those of `ids`, or of all tokens.
    fn adjust(&self, values: &mut [f32], ids: Option<&[u32]>) {
        let s = &self.sampling;
        let place = |token: u32| match ids {
            None => Some(token as usize),
            Some(ids) => ids.binary_search(&token).ok(),
        };
        for &token in &self.seen {
            if let Some(logit) = place(token).and_then(|idx| values.get_mut(idx)) {
                *logit = if *logit > 0.0 {
                    *logit / s.repetition_penalty
                } else {
                    *logit * s.repetition_penalty
                };
            }
        }
        for (&token, &count) in &self.counts {
            if let Some(logit) = place(token).and_then(|idx| values.get_mut(idx)) {
                *logit -= s.frequency_penalty * count as f32 + s.presence_penalty;
            }
        }
        for &(token, bias) in &s.logit_bias {
            if let Some(logit) = place(token).and_then(|idx| values.get_mut(idx)) {
                *logit += bias;
            }
        }
    }

    /// Temperature, `top_k`, `top_p`, `min_p`, and one draw among what is left; `max` is the
    /// greatest of the values.
    fn draw(
        &mut self,
        isa: Isa,
        values: &[f32],
        max: f32,
        weights: &mut Vec<f32>,
        kept: &mut Vec<Kept>,
        top: &mut Vec<(u32, f32)>,
    ) -> usize {
        let s = &self.sampling;
        let scale = 1.0 / s.temperature.max(f32::MIN_POSITIVE);
        kept.clear();
        weights.clear();
        let (best, sum_of_all) = if s.top_k > 0 && s.top_k < values.len() {
            likeliest(values, s.top_k, top);
            // In the order of ids: the sum must not depend on how the selection moved things.
            top.sort_unstable_by_key(|t| t.0);
            weights.extend(top.iter().map(|t| t.1));
            let best = weigh(isa, weights, max, scale);
            kept.extend(
                top.iter()
                    .zip(&*weights)
                    .map(|(&(idx, logit), &weight)| Kept { idx, logit, weight }),
            );
            (best, total(weights))
        } else {
            weights.extend_from_slice(values);
            let best = weigh(isa, weights, max, scale);
            let sum_of_all = total(weights);
            if s.top_p == 1.0 && s.min_p == 0.0 {
                return pick(weights, unit(&mut self.rng) * sum_of_all);
            }
            // Tokens below this cannot be in the nucleus: all of them together weigh less than
            // what the nucleus may leave out. Dropping them first spares sorting the vocabulary.
            let share = (1.0 - f64::from(s.top_p)) / values.len() as f64;
            let floor = ((share * sum_of_all * 0.999) as f32)
                .max(s.min_p * best)
                .max(WEIGHT_MIN);
            let heavy = weights.iter().enumerate().filter(|w| *w.1 >= floor);
            kept.extend(heavy.map(|(idx, &weight)| Kept {
                idx: idx as u32,
                logit: values[idx],
                weight,
            }));
            (best, sum_of_all)
        };
        if s.top_p < 1.0 {
            kept.sort_unstable_by(|a, b| likelier(&(a.idx, a.logit), &(b.idx, b.logit)));
            let mut sum = 0.0;
            let last = kept.iter().position(|k| {
                sum += f64::from(k.weight);
                sum >= f64::from(s.top_p) * sum_of_all
            });
            kept.truncate(last.map_or(kept.len(), |last| last + 1));
        }
        if s.min_p > 0.0 {
            kept.retain(|k| k.weight >= s.min_p * best);
        }
        if let [only] = kept[..] {
            return only.idx as usize;
        }
        kept.sort_unstable_by_key(|k| k.idx);
        weights.clear();
        weights.extend(kept.iter().map(|k| k.weight));
        kept[pick(weights, unit(&mut self.rng) * total(weights))].idx as usize
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

/// `out` becomes `row`, with minus infinity where the mask has no bit.
fn masked(out: &mut Vec<f32>, row: &[f32], mask: &[u32]) {
    out.resize(row.len(), 0.0);
    for (word_idx, (out, row)) in out.chunks_mut(32).zip(row.chunks(32)).enumerate() {
        match mask.get(word_idx).copied().unwrap_or(0) {
            0 => out.fill(f32::NEG_INFINITY),
            u32::MAX => out.copy_from_slice(row),
            word => {
                for (bit, (out, &logit)) in out.iter_mut().zip(row).enumerate() {
                    *out = if word >> bit & 1 == 1 {
                        logit
                    } else {
                        f32::NEG_INFINITY
                    };
                }
            }
        }
    }
}

/// The log-probability of `token`, and the `n_top` likeliest of the first `n_tokens`.
pub(crate) fn logprobs(
    row: &[f32],
    n_tokens: usize,
    token: u32,
    n_top: usize,
    scratch: &mut Scratch,
) -> TokenLogprobs {
    let norm = log_sum(row, scratch);
    let of = |logit: f32| (f64::from(logit) - norm) as f32;
    let top = &mut scratch.top;
    likeliest(&row[..n_tokens], n_top, top);
    top.sort_unstable_by(likelier);
    TokenLogprobs {
        logprob: of(row[token as usize]),
        top: top.iter().map(|&(id, l)| (id, of(l))).collect(),
    }
}

/// `ln(sum(exp(row)))`
pub(crate) fn log_sum(row: &[f32], scratch: &mut Scratch) -> f64 {
    let Scan::Best(_, max) = scan(scratch.isa, row) else {
        return f64::NAN;
    };
    scratch.weights.clear();
    scratch.weights.extend_from_slice(row);
    let best = weigh(scratch.isa, &mut scratch.weights, max, 1.0);
    f64::from(max) - f64::from(best).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Through the mask's own way and through a whole row: both must agree.
    fn choose(sampling: Sampling, row: &[f32], mask: Option<&[u32]>) -> Option<u32> {
        let mask = mask.map(|words| Mask::new(words, row.len()));
        let choose = |row| {
            Sampler::new(sampling.clone(), &[]).choose(
                row,
                4,
                mask.as_ref(),
                &mut Scratch::default(),
            )
        };
        let pick = choose(Row::Full(row));
        if let Some(ids) = mask.as_ref().and_then(Mask::ids) {
            let narrow: Vec<f32> = ids.iter().map(|&id| row[id as usize]).collect();
            assert_eq!(choose(Row::Narrow(&narrow)), pick);
        }
        match pick {
            Pick::Token(token) => Some(token),
            Pick::DeadEnd | Pick::NotFinite => None,
        }
    }

    fn histogram(sampling: &Sampling, row: &[f32]) -> Vec<u32> {
        let mut counts = vec![0; row.len()];
        let mut sampler = Sampler::new(sampling.clone(), &[]);
        let mut scratch = Scratch::default();
        for _ in 0..4000 {
            match sampler.choose(Row::Full(row), row.len(), None, &mut scratch) {
                Pick::Token(token) => counts[token as usize] += 1,
                other => panic!("{other:?}"),
            }
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
            let mut kept = Vec::new();
            let (max, mut weights, mut top) = (sorted[0].1, Vec::new(), Vec::new());
            Sampler::new(warm, &[]).draw(
                Isa::detect(),
                &row,
                max,
                &mut weights,
                &mut kept,
                &mut top,
            );
            let kept: Vec<u32> = kept.iter().map(|k| k.idx).collect();
            assert_eq!(kept, nucleus, "top_p {top_p}");
        }
    }

    #[test]
    fn penalties_and_bias_move_the_argmax() {
        let row = [1.0, 0.9, -1.0, -1.1];
        let run = |sampling: Sampling, prompt: &[u32], answer: &[u32]| {
            let mut sampler = Sampler::new(sampling, prompt);
            answer.iter().for_each(|&t| sampler.took(t));
            match sampler.choose(Row::Full(&row), 4, None, &mut Scratch::default()) {
                Pick::Token(token) => Some(token),
                Pick::DeadEnd | Pick::NotFinite => None,
            }
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
    fn a_narrow_row_gives_the_choice_of_a_whole_one() {
        let row: Vec<f32> = (0..300u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 20) as f32 / 600.0)
            .collect();
        let mut words = [0u32; 10];
        (0..30).for_each(|i| words[i * 7 % 10] |= 1 << (i * 11 % 32));
        let mask = Mask::new(&words, 300);
        let ids = mask.ids().unwrap();
        let narrow: Vec<f32> = ids.iter().map(|&id| row[id as usize]).collect();
        for seed in 0..50 {
            let sampling = Sampling {
                temperature: 0.4 * (seed % 4) as f32,
                top_p: [1.0, 0.7][seed % 2],
                top_k: [0, 5, 9][seed % 3],
                repetition_penalty: [1.0, 1.3][seed / 2 % 2],
                logit_bias: vec![(ids[2], 0.5), (ids[2], 0.25), (1, 9.0)],
                seed: seed as u64,
                ..Sampling::default()
            };
            let choose = |row| {
                let mut sampler = Sampler::new(sampling.clone(), &[ids[0], ids[5]]);
                sampler.took(ids[1]);
                sampler.choose(row, 300, Some(&mask), &mut Scratch::default())
            };
            assert_eq!(choose(Row::Narrow(&narrow)), choose(Row::Full(&row)));
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_refused() {
        let pick = |row: &[f32]| {
            let mut sampler = Sampler::new(Sampling::default(), &[]);
            sampler.choose(Row::Full(row), row.len(), None, &mut Scratch::default())
        };
        assert_eq!(pick(&[0.0, f32::NAN]), Pick::NotFinite);
        assert_eq!(pick(&[f32::INFINITY, 0.0]), Pick::NotFinite);
        assert_eq!(pick(&[f32::NEG_INFINITY; 3]), Pick::NotFinite);
        assert_eq!(pick(&[f32::NEG_INFINITY, -3.0]), Pick::Token(1));
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
