//! New tokens of many sequences in one pass over the weights.
//!
//! Few rows (decoding) share each product between the threads by its columns. Many rows
//! (prefill) are cut: a thread takes some rows from one attention to the next, so that what
//! lies between stays in its cache. Either way a row has the same bits.

use crate::block::{add_rows, size};
use crate::cache::{KvCache, Queries, attend, store};
use crate::linear::{Input, Inputs};
use crate::lora::{Fused, Lora};
use crate::rope::RopeTable;
use crate::weights::Model;
use bantam_kernels::Compute;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Most rows that a thread takes from one attention to the next: their gates and ups fit its cache.
const TASK_ROWS: usize = 42;
/// Rows that a quantised product takes together.
const TILE: usize = 6;
/// From this many rows on, threads take rows instead of columns.
const MANY_ROWS: usize = 96;

/// Some new tokens of one sequence.
#[derive(Debug)]
pub struct Span<'a> {
    /// The sequence so far; the new tokens are added to it.
    pub cache: &'a mut KvCache,
    /// At least one new token.
    pub tokens: &'a [u32],
    /// Of which new tokens the logits are wanted.
    pub logits: Wants<'a>,
    /// The adapter of this sequence.
    pub lora: Option<&'a Lora<f32>>,
}

/// For which of a span's tokens logits are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wants<'a> {
    /// None: a prefix that goes on.
    None,
    /// The last.
    Last,
    /// The last, and of it only the logits of these vocabulary entries, in this order. Spans
    /// that name the same slice share the work; ascending order costs least.
    LastOf(&'a [u32]),
    /// The last so many, or all if there are fewer.
    Tail(usize),
    /// Every one.
    All,
}

impl Wants<'_> {
    /// How many of `n` tokens have logits.
    fn n_rows(&self, n: usize) -> usize {
        match *self {
            Wants::None => 0,
            Wants::Last | Wants::LastOf(_) => 1,
            Wants::Tail(tail) => tail.min(n),
            Wants::All => n,
        }
    }
}

/// Buffers of a pass, kept between passes.
#[derive(Debug, Default)]
pub struct InferWorkspace {
    rope: RopeTable<f32>,
    /// `[T, D]`
    x: Vec<f32>,
    /// `[T, W]`
    qkv: Vec<f32>,
    /// `[T, H Dh]`
    attn: Vec<f32>,
    /// Logits on their way to their place.
    logits: Vec<f32>,
    /// One of these for each thread that works on rows.
    scratch: Mutex<Vec<Scratch>>,
}

/// Buffers of the rows that a thread takes.
#[derive(Debug, Default)]
struct Scratch {
    inputs: Inputs,
    /// What a product read, in f32: `[T, D]` or `[T, F]`.
    plain: Vec<f32>,
    /// `[T, D]`
    delta: Vec<f32>,
    /// `[T, 2F]`
    gate_up: Vec<f32>,
    /// `[T, P R]`
    hidden: Vec<f32>,
}

/// Which rows pass which adapter. Ranges are in order and cover the rows that have one.
type Adapters<'a> = Vec<(Range<usize>, &'a Lora<f32>)>;

impl Model<f32> {
    /// Adds each span's tokens to its cache and writes the wanted rows of logits, in order.
    ///
    /// Shapes: out [wanted rows, V], a row of [`Wants::LastOf`] as long as its list
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
        let wanted = self.rows(spans, work, compute);
        let logits: Vec<Wants<'_>> = spans.iter().map(|span| span.logits).collect();
        self.logits(compute, out, &logits, &wanted, work);
    }

    /// As [`Model::forward`], but the wanted rows themselves, behind the final norm.
    ///
    /// Shapes: out [wanted rows, D]
    pub(crate) fn normed(
        &self,
        spans: &mut [Span<'_>],
        out: &mut Vec<f32>,
        work: &mut InferWorkspace,
        compute: &Compute,
    ) {
        self.rows(spans, work, compute);
        size(out, work.x.len());
        let mut rstd = Vec::new();
        self.norm(compute, out, &mut rstd, &work.x, &self.final_norm);
    }

    /// Adds each span's tokens to its cache and leaves the wanted rows in `work.x`; returns where they were.
    fn rows(
        &self,
        spans: &mut [Span<'_>],
        work: &mut InferWorkspace,
        compute: &Compute,
    ) -> Vec<Range<usize>> {
        let (config, full) = (&self.config, self.embed.is_full());
        // Spans with one adapter side by side, so that it is read once for all of them.
        let mut spans: Vec<(usize, &mut Span<'_>)> = spans.iter_mut().enumerate().collect();
        let loras: Vec<_> = spans.iter().map(|(_, span)| address(span.lora)).collect();
        spans.sort_by_key(|(_, span)| loras.iter().position(|&at| at == address(span.lora)));
        let order: Vec<usize> = spans.iter().map(|&(i, _)| i).collect();
        let mut spans: Vec<&mut Span<'_>> = spans.into_iter().map(|(_, span)| span).collect();
        let tokens = spans.iter().flat_map(|span| span.tokens);
        assert!(
            tokens.clone().all(|&token| (token as usize) < config.vocab),
            "tokens are in the vocabulary"
        );
        self.embed_rows(compute, &mut work.x, tokens);
        let (mut rows, mut positions, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
        for span in &mut spans {
            let n = span.tokens.len();
            assert!(n > 0, "a span has at least one token");
            let start = positions.len();
            positions.extend(span.cache.len()..span.cache.len() + n);
            rows.push(start..start + n);
            wanted.push(start + n - span.logits.n_rows(n)..start + n);
            span.cache.reserve(n, full);
        }
        let longest = positions.iter().max().map_or(0, |pos| pos + 1);
        work.rope.grow(longest, config);
        let mut adapters = merge(spans.iter().zip(&rows).filter_map(with_lora));
        let kept = merge(spans.iter().zip(&wanted).filter_map(with_lora));
        let mut caches: Vec<&mut KvCache> = spans.iter_mut().map(|span| &mut *span.cache).collect();
        for layer in 0..config.n_layers {
            self.between(compute, layer, &adapters, &positions, work);
            store(compute, &mut caches, &rows, layer, &work.qkv);
            if layer + 1 == config.n_layers {
                // Above the last keys and values only the wanted rows matter.
                adapters = keep(&wanted, kept.clone(), &mut positions, work, self);
            }
            let mut first_row = 0;
            let queries: Vec<_> = caches
                .iter()
                .zip(&rows)
                .zip(&wanted)
                .map(|((cache, rows), wanted)| {
                    let wanted = if layer + 1 == config.n_layers {
                        wanted.clone()
                    } else {
                        rows.clone()
                    };
                    let start = first_row;
                    first_row += wanted.len();
                    Queries {
                        cache,
                        rows: start..first_row,
                        first_pos: cache.len() + wanted.start - rows.start,
                    }
                })
                .filter(|query| !query.rows.is_empty())
                .collect();
            let heads = config.heads();
            let attn = room(&mut work.attn, positions.len() * heads.out_width());
            let qkv = &work.qkv[..positions.len() * heads.qkv_width()];
            attend(compute, attn, qkv, layer, &queries);
        }
        self.between(compute, config.n_layers, &adapters, &positions, work);
        for (cache, rows) in caches.iter_mut().zip(&rows) {
            cache.advance(rows.len());
        }
        if !order.is_sorted() {
            put_back(&order, &mut wanted, work, config.d_model);
        }
        wanted
    }

    /// Bytes that a cache takes for each block of positions of this model.
    pub fn cache_block_bytes(&self) -> usize {
        let mut cache = KvCache::new(&self.config);
        cache.reserve(0, self.embed.is_full());
        cache.block_bytes()
    }

    /// What lies between two attentions, on all rows: the rest of layer `next - 1`, then the
    /// queries, keys and values of layer `next`.
    fn between(
        &self,
        compute: &Compute,
        next: usize,
        adapters: &Adapters<'_>,
        positions: &[usize],
        work: &mut InferWorkspace,
    ) {
        let InferWorkspace {
            rope,
            x,
            qkv,
            attn,
            scratch,
            ..
        } = work;
        let heads = self.config.heads();
        let (d, w, ow) = (self.config.d_model, heads.qkv_width(), heads.out_width());
        let n = positions.len();
        let qkv = room(qkv, n * w);
        if n == 0 {
            return;
        }
        let run = |first: usize, x: &mut [f32], qkv: &mut [f32]| {
            let rows = first..first + x.len() / d;
            let mut taken = lock(scratch).pop().unwrap_or_default();
            let own = cut(adapters, &rows);
            if next > 0 {
                let attn = &attn[rows.start * ow..rows.end * ow];
                self.finish(compute, next - 1, &own, x, attn, &mut taken);
            }
            if next < self.config.n_layers {
                self.start(compute, next, &own, qkv, x, &mut taken);
                self.rotate(compute, qkv, &positions[rows], rope, 1.0);
            }
            lock(scratch).push(taken);
        };
        if n < MANY_ROWS {
            run(0, x, qkv);
        } else {
            let rows = task_rows(n, compute.threads());
            compute
                .pool()
                .chunks_mut2((x, rows * d), (qkv, rows * w), |i, x, qkv| {
                    run(i * rows, x, qkv)
                });
        }
    }

    /// Queries, keys and values of a layer, not yet rotated: `qkv [T, W]` of `x [T, D]`.
    fn start(
        &self,
        compute: &Compute,
        layer: usize,
        adapters: &Adapters<'_>,
        qkv: &mut [f32],
        x: &[f32],
        scratch: &mut Scratch,
    ) {
        let gain = &self.layers[layer].attn_norm;
        let input = Input::Norm(x, gain, self.config.rms_norm_eps as f32);
        self.map(compute, (layer, Fused::Qkv), adapters, qkv, input, scratch);
    }

    /// A layer from the end of its attention on: `x [T, D]` in place.
    fn finish(
        &self,
        compute: &Compute,
        layer: usize,
        adapters: &Adapters<'_>,
        x: &mut [f32],
        attn: &[f32],
        scratch: &mut Scratch,
    ) {
        let (d, f) = (self.config.d_model, self.config.d_ffn);
        let eps = self.config.rms_norm_eps as f32;
        let mut delta = std::mem::take(&mut scratch.delta);
        let mut gate_up = std::mem::take(&mut scratch.gate_up);
        let change = room(&mut delta, x.len());
        let wide = room(&mut gate_up, x.len() / d * 2 * f);
        let mut map = |fused, y: &mut [f32], input: Input<'_>| {
            self.map(compute, (layer, fused), adapters, y, input, scratch)
        };
        map(Fused::O, change, Input::Rows(attn));
        add_rows(compute, x, change, d);
        let norm = Input::Norm(x, &self.layers[layer].mlp_norm, eps);
        map(Fused::GateUp, wide, norm);
        map(Fused::Down, change, Input::GateUp(wide));
        add_rows(compute, x, change, d);
        (scratch.delta, scratch.gate_up) = (delta, gate_up);
    }

    /// A frozen map and, on the rows that have one, the adapter.
    fn map(
        &self,
        compute: &Compute,
        (layer, fused): (usize, Fused),
        adapters: &Adapters<'_>,
        y: &mut [f32],
        input: Input<'_>,
        scratch: &mut Scratch,
    ) {
        let linear = self.layers[layer].fused(fused);
        let groups = adapters
            .iter()
            .map(|(rows, lora)| (rows, lora.group(layer, fused)))
            .filter(|(_, group)| group.width() > 0);
        let keep = groups.clone().next().is_some();
        let Scratch {
            inputs,
            plain,
            hidden,
            ..
        } = scratch;
        linear.apply(compute, y, input, (plain, keep), inputs);
        let x = match input {
            Input::Rows(x) => x,
            _ => plain,
        };
        for (rows, group) in groups {
            let hidden = room(hidden, rows.len() * group.width());
            let y = &mut y[rows.start * linear.n_out..rows.end * linear.n_out];
            let x = &x[rows.start * linear.n_in..rows.end * linear.n_in];
            group.forward(compute, y, hidden, x);
        }
    }

    /// The head on `work.x`, which holds the wanted rows.
    fn logits(
        &self,
        compute: &Compute,
        out: &mut Vec<f32>,
        wants: &[Wants<'_>],
        wanted: &[Range<usize>],
        work: &mut InferWorkspace,
    ) {
        let (d, vocab, head) = (self.config.d_model, self.config.vocab, self.head());
        let InferWorkspace {
            x, logits, scratch, ..
        } = work;
        let mut taken = lock(scratch).pop().unwrap_or_default();
        let Scratch {
            inputs,
            plain,
            delta,
            ..
        } = &mut taken;
        let eps = self.config.rms_norm_eps as f32;
        let some = |wants: &Wants<'_>| matches!(wants, Wants::LastOf(_));
        if !wants.iter().any(some) {
            size(out, x.len() / d * vocab);
            if !x.is_empty() {
                let norm = Input::Norm(x, &self.final_norm, eps);
                head.apply(compute, out, norm, (plain, false), inputs);
            }
        } else {
            size(delta, x.len());
            let mut rstd = Vec::new();
            self.norm(compute, delta, &mut rstd, x, &self.final_norm);
            // Where each span's rows are in `delta` and its logits in `out`.
            let (mut row, mut at) = (0, 0);
            let places: Vec<_> = wants
                .iter()
                .zip(wanted)
                .map(|(wants, wanted)| {
                    let (rows, start) = (row..row + wanted.len(), at);
                    row = rows.end;
                    at += match wants {
                        Wants::LastOf(list) => list.len(),
                        _ => wanted.len() * vocab,
                    };
                    (rows, start)
                })
                .collect();
            size(out, at);
            let mut done = vec![false; wants.len()];
            for i in 0..wants.len() {
                if done[i] || places[i].0.is_empty() {
                    continue;
                }
                // All spans that want the same, in one product.
                let list = |wants: &Wants<'_>| match *wants {
                    Wants::LastOf(list) => Some((list.as_ptr(), list.len())),
                    _ => None,
                };
                let same: Vec<usize> = (i..wants.len())
                    .filter(|&j| list(&wants[j]) == list(&wants[i]))
                    .collect();
                plain.clear();
                for &j in &same {
                    let rows = &places[j].0;
                    plain.extend_from_slice(&delta[rows.start * d..rows.end * d]);
                    done[j] = true;
                }
                let width = match wants[i] {
                    Wants::LastOf(list) => {
                        size(logits, same.len() * list.len());
                        head.apply_rows(compute, logits, plain, list, inputs);
                        list.len()
                    }
                    _ => {
                        let mut unused = Vec::new();
                        size(logits, plain.len() / d * vocab);
                        let rows = Input::Rows(plain);
                        head.apply(compute, logits, rows, (&mut unused, false), inputs);
                        vocab
                    }
                };
                let mut from = 0;
                for &j in &same {
                    let (rows, at) = &places[j];
                    let len = rows.len() * width;
                    out[*at..at + len].copy_from_slice(&logits[from..from + len]);
                    from += len;
                }
            }
        }
        lock(scratch).push(taken);
    }
}

/// The first `len` numbers of a buffer that only grows: what is in them is whatever was left.
pub(crate) fn room(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// How many of `n` rows a task takes, so that the threads end together.
fn task_rows(n: usize, threads: usize) -> usize {
    let time = |rows: usize| {
        let (full, rest) = (n / rows, n % rows);
        if full % threads == 0 {
            full / threads * rows + rest
        } else {
            full.div_ceil(threads) * rows
        }
    };
    let sizes = (TASK_ROWS / 2..=TASK_ROWS).rev().step_by(TILE);
    sizes.min_by_key(|&rows| time(rows)).unwrap_or(TASK_ROWS)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A poisoned lock only says that a task panicked; buffers have no state to break.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn address(lora: Option<&Lora<f32>>) -> Option<*const Lora<f32>> {
    lora.map(std::ptr::from_ref)
}

/// Puts the rows of `work.x`, those of span `order[0]` first, in the order of the spans.
fn put_back(order: &[usize], wanted: &mut Vec<Range<usize>>, work: &mut InferWorkspace, d: usize) {
    let mut places = vec![(0..0, 0..0); order.len()];
    let mut at = 0;
    for (&i, wanted) in order.iter().zip(&*wanted) {
        places[i] = (at * d..(at + wanted.len()) * d, wanted.clone());
        at += wanted.len();
    }
    let mut x = Vec::with_capacity(work.x.len());
    wanted.clear();
    for (from, rows) in places {
        x.extend_from_slice(&work.x[from]);
        wanted.push(rows);
    }
    work.x = x;
}

fn with_lora<'a>(
    (span, rows): (&&mut Span<'a>, &Range<usize>),
) -> Option<(Range<usize>, &'a Lora<f32>)> {
    span.lora.map(|lora| (rows.clone(), lora))
}

/// Neighbouring rows with one adapter share its products.
fn merge<'a>(spans: impl Iterator<Item = (Range<usize>, &'a Lora<f32>)>) -> Adapters<'a> {
    let mut merged: Adapters<'a> = Vec::new();
    for (rows, lora) in spans {
        match merged.last_mut() {
            Some((range, last)) if std::ptr::eq(*last, lora) && range.end == rows.start => {
                range.end = rows.end
            }
            _ => merged.push((rows, lora)),
        }
    }
    merged
}

/// The adapters of some rows, counted from the first of them.
fn cut<'a>(adapters: &Adapters<'a>, rows: &Range<usize>) -> Adapters<'a> {
    adapters
        .iter()
        .map(|(range, lora)| {
            let start = range.start.clamp(rows.start, rows.end) - rows.start;
            (
                start..range.end.clamp(rows.start, rows.end) - rows.start,
                *lora,
            )
        })
        .filter(|(range, _)| !range.is_empty())
        .collect()
}

/// Drops all rows but the wanted ones; returns where their adapters are now.
fn keep<'a>(
    wanted: &[Range<usize>],
    adapters: Adapters<'a>,
    positions: &mut Vec<usize>,
    work: &mut InferWorkspace,
    model: &Model<f32>,
) -> Adapters<'a> {
    let (d, w) = (model.config.d_model, model.config.heads().qkv_width());
    // Row numbers among the kept.
    let rank = |row: usize| -> usize {
        let before = wanted.iter().take_while(|range| range.start < row);
        before.map(|range| range.end.min(row) - range.start).sum()
    };
    let adapters = merge(
        adapters
            .into_iter()
            .map(|(rows, lora)| (rank(rows.start)..rank(rows.end), lora))
            .filter(|(rows, _)| !rows.is_empty()),
    );
    let mut at = 0;
    for range in wanted {
        work.x.copy_within(range.start * d..range.end * d, at * d);
        work.qkv.copy_within(range.start * w..range.end * w, at * w);
        positions.copy_within(range.clone(), at);
        at += range.len();
    }
    work.x.truncate(at * d);
    positions.truncate(at);
    adapters
}
