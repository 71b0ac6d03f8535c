//! New tokens of many sequences in one pass over the weights.

use crate::block::{Saved, Scratch, size};
use crate::cache::KvCache;
use crate::lora::Lora;
use crate::weights::Model;
use bantam_kernels::Compute;
use bantam_kernels::attention::{self, CachedSpan};
use std::ops::Range;

/// Some new tokens of one sequence.
#[derive(Debug)]
pub struct Span<'a> {
    /// The sequence so far; the new tokens are added to it.
    pub cache: &'a mut KvCache,
    /// At least one new token.
    pub tokens: &'a [u32],
    /// Of which new tokens the logits are wanted.
    pub logits: Wants,
    /// The adapter of this sequence.
    pub lora: Option<&'a Lora<f32>>,
}

/// For which of a span's tokens logits are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants {
    /// None: a prefix that goes on.
    None,
    /// The last.
    Last,
    /// Every one.
    All,
}

/// Buffers of a pass, kept between passes.
#[derive(Clone, Debug, Default)]
pub struct InferWorkspace {
    saved: Saved<f32>,
    scratch: Scratch<f32>,
    x: Vec<f32>,
    wanted: Vec<f32>,
    rstd: Vec<f32>,
}

impl Model<f32> {
    /// Adds each span's tokens to its cache and writes the wanted rows of logits, in order.
    ///
    /// Shapes: out [wanted rows, V]
    ///
    /// A row's bits depend on its own sequence and adapter only: not on the other spans, on
    /// how a prompt was cut into passes, or on the threads.
    ///
    /// Panics if a span is empty or a token is outside the vocabulary.
    pub fn forward(
        &self,
        spans: &mut [Span<'_>],
        out: &mut Vec<f32>,
        work: &mut InferWorkspace,
        compute: &Compute,
    ) {
        let (config, heads) = (&self.config, self.config.heads());
        let tokens = spans.iter().flat_map(|span| span.tokens);
        assert!(
            tokens.clone().all(|&token| (token as usize) < config.vocab),
            "tokens are in the vocabulary"
        );
        self.embed_rows(compute, &mut work.x, tokens);
        let (mut rows, mut positions) = (Vec::new(), Vec::new());
        for span in &mut *spans {
            assert!(!span.tokens.is_empty(), "a span has at least one token");
            let start = positions.len();
            positions.extend(span.cache.len()..span.cache.len() + span.tokens.len());
            rows.push(start..positions.len());
            span.cache.reserve(span.tokens.len());
        }
        let longest = positions.iter().max().map_or(0, |pos| pos + 1);
        work.scratch.rope.grow(longest, config);
        let adapters = adapters(spans, &rows);
        let mut caches: Vec<&mut KvCache> = spans.iter_mut().map(|span| &mut *span.cache).collect();
        for layer in 0..config.n_layers {
            let attend = |attn: &mut [f32], qkv: &[f32]| {
                let w = heads.qkv_width();
                for (cache, rows) in caches.iter_mut().zip(&rows) {
                    cache.store(layer, &qkv[rows.start * w..rows.end * w]);
                }
                let spans: Vec<_> = caches
                    .iter()
                    .zip(&rows)
                    .map(|(cache, rows)| CachedSpan {
                        rows: rows.clone(),
                        first_pos: cache.len(),
                        blocks: cache.layer(layer),
                    })
                    .collect();
                attention::cached(compute, attn, qkv, &spans, heads);
            };
            let InferWorkspace {
                saved, scratch, x, ..
            } = work;
            self.layer_forward(
                compute, layer, &adapters, &positions, x, saved, scratch, attend,
            );
        }
        drop(caches);
        drop(adapters);
        work.wanted.clear();
        let d = config.d_model;
        for (span, rows) in spans.iter_mut().zip(&rows) {
            span.cache.advance(rows.len());
            let first = match span.logits {
                Wants::None => rows.end,
                Wants::Last => rows.end - 1,
                Wants::All => rows.start,
            };
            work.wanted
                .extend_from_slice(&work.x[first * d..rows.end * d]);
        }
        let n = work.wanted.len() / d;
        size(out, n * config.vocab);
        size(&mut work.scratch.norm, n * d);
        self.norm(
            compute,
            &mut work.scratch.norm,
            &mut work.rstd,
            &work.wanted,
            &self.final_norm,
        );
        self.head()
            .forward(compute, out, &work.scratch.norm, &mut work.scratch.words);
    }
}

/// Neighbouring spans with one adapter share its products.
fn adapters<'a>(spans: &[Span<'a>], rows: &[Range<usize>]) -> Vec<(Range<usize>, &'a Lora<f32>)> {
    let mut merged: Vec<(Range<usize>, &Lora<f32>)> = Vec::new();
    for (span, rows) in spans.iter().zip(rows) {
        let Some(lora) = span.lora else { continue };
        match merged.last_mut() {
            Some((range, last)) if std::ptr::eq(*last, lora) && range.end == rows.start => {
                range.end = rows.end
            }
            _ => merged.push((rows.clone(), lora)),
        }
    }
    merged
}
