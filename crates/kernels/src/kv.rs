//! Causal attention of new rows over a cache of bf16 keys and values.
//!
//! A row of the result is defined by its own query, its own position and the cache, so its bits
//! do not depend on the rows beside it, on how a prompt was cut or on the threads:
//!
//! * queries, keys, values and unnormalised probabilities are rounded to bf16;
//! * a score is one chain over ascending pairs of the head's columns;
//! * `p_j = exp(scale s_j - max)`, the maximum over the row's own positions; their sum is taken
//!   in sixteen chains by `j % 16` and a fixed tree;
//! * an output is one chain over ascending pairs of positions, from position 0, and a masked
//!   position adds an exact zero; the sum divides it last.
//!
//! Query heads that share a key-value head are rows of one product, as tokens are: keys and
//! values are read once for all of them. Letters are those of [`crate::attention`].

use crate::attention::{BLOCK, HeadDims};
use crate::huge::{Arena, Piece, Recycled};
use crate::isa::{Level, for_each_isa};
use crate::ops::{LANES, max_body, round_bits, round_to_bf16_pairs, tree};
use crate::par::Parts;
use crate::{Compute, Isa};
use bytemuck::{Pod, Zeroable};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

/// Query rows (heads of tokens) that are worked on together: with two vectors of positions
/// they fill 24 of the 32 registers with sums.
const TILE: usize = 12;
/// Rows of the second product that are worked on together, with four vectors of columns.
const MIX_TILE: usize = 6;
/// Tokens of one task.
const TOKENS: usize = 16;
/// Pairs of positions in a block.
const POS_PAIRS: usize = BLOCK / 2;

/// A cache line of pairs of bf16, so that blocks start at one.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line([u32; 16]);

const ZERO: Line = Line([0; 16]);

/// Keys and values of [`BLOCK`] positions in every layer, in bf16.
///
/// Layout: by layer; in a layer the keys of each key-value head as `[Dh / 2, BLOCK]` words, then
/// the values as `[BLOCK / 2, Dv]` with `Dv` the next multiple of 16. A word holds two neighbours
/// of the axis that is summed over, the even one in its low half.
#[derive(Debug)]
pub struct KvBlock {
    /// There until the block is dropped.
    lines: Option<Piece<Line>>,
    layer_len: usize,
}

/// The memory of blocks. The system would zero what is new page by page; a block need not be zero, since nothing is
/// read of it that was not stored.
static BLOCKS: Recycled<Line> = Recycled::new(Arena::new(8 << 20), 64);

impl Drop for KvBlock {
    fn drop(&mut self) {
        if let Some(lines) = self.lines.take() {
            BLOCKS.give(lines);
        }
    }
}

impl Clone for KvBlock {
    fn clone(&self) -> Self {
        let mut lines = BLOCKS.take(self.lines().len());
        lines.copy_from_slice(self.lines());
        Self {
            lines: Some(lines),
            layer_len: self.layer_len,
        }
    }
}

const THERE: &str = "only `drop` takes the lines";

impl KvBlock {
    /// A block in which nothing has been stored.
    ///
    /// Panics if the head width is odd.
    pub fn new(dims: HeadDims, n_layers: usize) -> Self {
        assert!(dims.head_dim.is_multiple_of(2), "the head width is even");
        let layer_len = layer_len(dims);
        let n_lines = (layer_len * n_layers).div_ceil(ZERO.0.len());
        Self {
            lines: Some(BLOCKS.take(n_lines)),
            layer_len,
        }
    }

    /// Bytes that a block takes.
    pub fn bytes(dims: HeadDims, n_layers: usize) -> usize {
        (layer_len(dims) * n_layers).div_ceil(ZERO.0.len()) * size_of::<Line>()
    }

    /// Rounds the keys and values of neighbouring tokens, the first at position `pos`, into their
    /// slots of a layer.
    ///
    /// Shapes: qkv [T, W], rotated
    /// Errors: panics if the tokens do not fit the block
    pub fn store(&mut self, isa: Isa, layer: usize, qkv: &[f32], pos: usize, dims: HeadDims) {
        assert!(
            qkv.len().is_multiple_of(dims.qkv_width()),
            "rows are [T, W]"
        );
        assert_eq!(self.layer_len, layer_len(dims), "one model, one layout");
        let (at, len) = (layer * self.layer_len, self.layer_len);
        let lines = self.lines.as_deref_mut().expect(THERE);
        let words: &mut [u32] = bytemuck::cast_slice_mut(lines);
        store_rows(isa, &mut words[at..at + len], qkv, pos % BLOCK, dims);
    }

    fn lines(&self) -> &[Line] {
        self.lines.as_deref().expect(THERE)
    }

    fn layer(&self, layer: usize) -> &[u32] {
        let words: &[u32] = bytemuck::cast_slice(self.lines());
        &words[layer * self.layer_len..][..self.layer_len]
    }
}

for_each_isa! {
    /// [`KvBlock::store`] into the words of one layer, from `slot` on.
    fn store_rows(layer: &mut [u32], qkv: &[f32], slot: usize, dims: HeadDims) {
        let (dh, dv, w) = (dims.head_dim, value_width(dims), dims.qkv_width());
        let width = dims.n_kv_heads * dh;
        let (keys, values) = layer.split_at_mut(width / 2 * BLOCK);
        let mut rows = qkv.chunks_exact(w).map(|row| row[dims.out_width()..].split_at(width));
        let mut slot = slot;
        while let Some((key, value)) = rows.next() {
            store_key(keys, key, slot);
            let pair = &mut values[slot / 2 * dv..];
            // Heads lie a block apart.
            let heads = |pair: usize| pair * BLOCK / 2 * dv;
            if slot % 2 == 1 {
                for (head, value) in value.chunks_exact(dh).enumerate() {
                    for (word, &x) in pair[heads(head)..].iter_mut().zip(value) {
                        *word = *word & 0xffff | round_bits(x) << 16;
                    }
                }
            } else if let Some((next_key, next)) = rows.next() {
                slot += 1;
                store_key(keys, next_key, slot);
                let both = value.chunks_exact(dh).zip(next.chunks_exact(dh));
                for (head, (value, next)) in both.enumerate() {
                    let words = pair[heads(head)..].iter_mut();
                    for ((word, &x), &y) in words.zip(value).zip(next) {
                        *word = round_bits(x) | round_bits(y) << 16;
                    }
                }
            } else {
                // A pair is read as soon as its first half is there: the second must be a number.
                for (head, value) in value.chunks_exact(dh).enumerate() {
                    for (word, &x) in pair[heads(head)..].iter_mut().zip(value) {
                        *word = round_bits(x);
                    }
                }
            }
            slot += 1;
        }
    }
}

#[inline(always)]
fn store_key(keys: &mut [u32], key: &[f32], slot: usize) {
    // Rounded in vectors, then scattered.
    let mut words = [0; LANES];
    let (lines, parts) = (keys.chunks_mut(LANES * BLOCK), key.chunks(2 * LANES));
    for (keys, part) in lines.zip(parts) {
        for (word, x) in words.iter_mut().zip(part.chunks_exact(2)) {
            *word = round_bits(x[0]) | round_bits(x[1]) << 16;
        }
        for (keys, &word) in keys.chunks_exact_mut(BLOCK).zip(&words) {
            keys[slot] = word;
        }
    }
}

/// Columns of a value, padded to whole vectors.
fn value_width(dims: HeadDims) -> usize {
    dims.head_dim.next_multiple_of(16)
}

/// Words of one layer of a block: whole lines.
fn layer_len(dims: HeadDims) -> usize {
    dims.n_kv_heads * BLOCK / 2 * (dims.head_dim + value_width(dims))
}

/// The new rows of one sequence and the blocks that hold its keys and values, the new ones
/// included.
#[derive(Debug)]
pub struct KvSpan<'a> {
    /// Rows of `qkv` and `out`.
    pub rows: Range<usize>,
    /// Position of the first of these rows in the sequence.
    pub first_pos: usize,
    /// From position 0 on.
    pub blocks: &'a [Arc<KvBlock>],
}

/// Attention of new rows over the cached keys and values of one layer.
///
/// Shapes: out [T, H Dh]; qkv [T, W], rotated
/// Errors: panics if a length disagrees or a span has fewer blocks than positions
pub fn attend(
    compute: &Compute,
    out: &mut [f32],
    qkv: &[f32],
    layer: usize,
    spans: &[KvSpan<'_>],
    dims: HeadDims,
) {
    let n_rows = out.len() / dims.out_width();
    assert!(dims.n_kv_heads > 0 && dims.n_heads.is_multiple_of(dims.n_kv_heads));
    assert_eq!(qkv.len(), n_rows * dims.qkv_width(), "qkv is [T, W]");
    assert_eq!(out.len(), n_rows * dims.out_width(), "out is [T, H Dh]");
    let mut seen = 0;
    for span in spans {
        let rows = &span.rows;
        assert!(
            seen <= rows.start && rows.start <= rows.end && rows.end <= n_rows,
            "spans are in order"
        );
        seen = rows.end;
    }
    let heads = dims.n_kv_heads;
    let mut n_tasks = 0;
    let mut positions = 0;
    for span in spans {
        let end = span.first_pos + span.rows.len();
        assert!(span.blocks.len() * BLOCK >= end, "every position is cached");
        assert!(
            span.blocks.iter().all(|b| b.layer_len == layer_len(dims)),
            "one model, one layout"
        );
        n_tasks += span.rows.len().div_ceil(TOKENS) * heads;
        positions += end;
    }
    let out = Parts::new(out);
    let run = |task: usize| {
        let (mut left, mut span_idx) = (task, 0);
        let (span, chunk) = loop {
            let span = &spans[span_idx];
            let n = span.rows.len().div_ceil(TOKENS) * heads;
            if left < n {
                // The last rows see the most: begin with them, end with crumbs.
                break (span, n / heads - 1 - left / heads);
            }
            left -= n;
            span_idx += 1;
        };
        let tokens = chunk * TOKENS..((chunk + 1) * TOKENS).min(span.rows.len());
        let task = Task {
            qkv,
            span,
            tokens,
            kv_head: left % heads,
            layer,
            dims,
        };
        SCRATCH.with_borrow_mut(|scratch| task.run(compute.isa(), &out, scratch));
    };
    // A few hundred keys of one token are read faster than another thread is told about them.
    if n_rows == 1 && positions * heads <= 128 {
        (0..n_tasks).for_each(run);
    } else {
        compute.pool().run(n_tasks, run);
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Buffers of a thread: grown, never cleared.
#[derive(Default)]
struct Scratch {
    /// Pairs of bf16 of one query `[Dh / 2]`.
    row: Vec<u32>,
    /// The same of all `[Dh / 2, TILE]`: the rows side by side, as the product takes them.
    query: Vec<u32>,
    /// `[TILE, positions]`
    scores: Vec<f32>,
    /// Pairs of bf16 `[TILE, positions / 2]`.
    probs: Vec<u32>,
}

/// Some tokens of a span in the query heads of one key-value head.
struct Task<'a> {
    qkv: &'a [f32],
    span: &'a KvSpan<'a>,
    tokens: Range<usize>,
    kv_head: usize,
    layer: usize,
    dims: HeadDims,
}

impl Task<'_> {
    fn run(&self, isa: Isa, out: &Parts<f32>, scratch: &mut Scratch) {
        let dims = self.dims;
        let (dh, w, ow) = (dims.head_dim, dims.qkv_width(), dims.out_width());
        let group = dims.n_heads / dims.n_kv_heads;
        let first_head = self.kv_head * group;
        let n_rows = self.tokens.len() * group;
        // Row `r` of the task is head `first_head + r % group` of token `r / group`.
        let token = |r: usize| self.tokens.start + r / group;
        for start in (0..n_rows).step_by(TILE) {
            let m = TILE.min(n_rows - start);
            let n_positions = self.span.first_pos + token(start + m - 1) + 1;
            let n_blocks = n_positions.div_ceil(BLOCK);
            // Not a power of two apart: rows would fall into the same sets of the cache.
            let stride = n_blocks * BLOCK + 16;
            grow(&mut scratch.row, dh / 2);
            grow(&mut scratch.query, TILE * dh / 2);
            grow(&mut scratch.scores, TILE * stride);
            grow(&mut scratch.probs, TILE * stride / 2);
            for i in 0..m {
                let row = (self.span.rows.start + token(start + i)) * w;
                let query = &self.qkv[row + (first_head + (start + i) % group) * dh..][..dh];
                round_to_bf16_pairs(isa, &mut scratch.row[..dh / 2], query);
                let side_by_side = scratch.query.chunks_exact_mut(TILE);
                for (pair, &word) in side_by_side.zip(&scratch.row[..dh / 2]) {
                    pair[i] = word;
                }
            }
            let head = Head {
                blocks: &self.span.blocks[..n_blocks],
                n_pairs: n_positions.div_ceil(2),
                layer: self.layer,
                keys: self.kv_head * dh / 2 * BLOCK,
                values: (dims.n_kv_heads * dh + self.kv_head * value_width(dims)) * POS_PAIRS,
                dims,
            };
            head.scores(isa, &mut scratch.scores, stride, &scratch.query, m);
            let mut norms = [0.0; TILE];
            for i in 0..m {
                let own = self.span.first_pos + token(start + i) + 1;
                let probs = &mut scratch.probs[i * stride / 2..][..n_blocks * POS_PAIRS];
                let scores = &scratch.scores[i * stride..][..n_blocks * BLOCK];
                norms[i] = probabilities(isa, probs, scores, own, scale(dims));
            }
            let mut rows = [std::ptr::null_mut(); TILE];
            for i in 0..m {
                let row = self.span.rows.start + token(start + i);
                // A task writes the columns of its heads in rows of its tokens, which no
                // other task does.
                rows[i] = out.at(row * ow + (first_head + (start + i) % group) * dh);
            }
            // SAFETY: each pointer is to `Dh` numbers of `out [T, H Dh]` (checked by
            // `attend`) that this task alone writes.
            unsafe { head.mix(isa, &rows[..m], &norms, &scratch.probs, stride / 2) };
        }
    }
}

fn scale(dims: HeadDims) -> f32 {
    1.0 / (dims.head_dim as f32).sqrt()
}

fn grow<T: Copy + Default>(buffer: &mut Vec<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::default());
    }
}

for_each_isa! {
    /// Unnormalised probabilities of one row in pairs of bf16, zero from `own` on; returns one
    /// over their sum.
    ///
    /// Shapes: probs [n / 2]; scores [n], n a multiple of 16; own >= 1
    fn probabilities(probs: &mut [u32], scores: &[f32], own: usize, scale: f32) -> f32 {
        let whole = own / LANES * LANES;
        let mut last = [f32::MIN; LANES];
        last[..own - whole].copy_from_slice(&scores[whole..own]);
        let max = max_body(&scores[..whole]).max(max_body(&last));
        // In powers of two: exp(x) = 2^(x log2 e).
        let scale = scale * std::f32::consts::LOG2_E;
        let shift = max * scale;
        let mut sums = [0.0f32; LANES];
        let mut out = probs.chunks_exact_mut(LANES / 2);
        for (out, scores) in out.by_ref().zip(scores[..whole].chunks_exact(LANES)) {
            let mut p = [0.0f32; LANES];
            for i in 0..LANES {
                p[i] = exp2(scores[i].mul_add(scale, -shift));
                sums[i] += p[i];
            }
            round_pairs(out, &p);
        }
        if whole < own {
            let mut p = [0.0f32; LANES];
            for i in 0..LANES {
                p[i] = exp2(last[i].mul_add(scale, -shift));
                p[i] = if i < own - whole { p[i] } else { 0.0 };
                sums[i] += p[i];
            }
            round_pairs(&mut probs[whole / 2..][..LANES / 2], &p);
        }
        probs[own.next_multiple_of(LANES) / 2..].fill(0);
        1.0 / tree(sums, |a, b| a + b)
    }
}

/// Two to the power of `x <= 0`, within 1e-7 (relative); at least 2^-126, NaN of NaN.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    // Adding 1.5 * 2^23 leaves the nearest integer in the low mantissa bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -126.0 { -126.0 } else { x };
    let shifted = x + ROUND;
    let f = x - (shifted - ROUND);
    let p = 1.326_472_7e-3;
    let p = f32::mul_add(p, f, 9.671_513e-3);
    let p = f32::mul_add(p, f, 5.550_733_6e-2);
    let p = f32::mul_add(p, f, 2.402_224_2e-1);
    // Not the logarithm of 2 itself: the polynomial is the best of its degree.
    #[allow(clippy::approx_constant)]
    let p = f32::mul_add(p, f, 6.931_47e-1);
    let p = f32::mul_add(p, f, 1.0);
    let scale = shifted
        .to_bits()
        .wrapping_sub(ROUND.to_bits())
        .wrapping_add(127)
        << 23;
    p * f32::from_bits(scale)
}

/// Rounds non-negative numbers to bf16, to nearest, ties to even.
#[inline(always)]
fn round_pairs(out: &mut [u32], p: &[f32; LANES]) {
    let round = |x: f32| {
        let bits = x.to_bits();
        bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16
    };
    for i in 0..LANES / 2 {
        out[i] = round(p[2 * i]) | round(p[2 * i + 1]) << 16;
    }
}

/// The cached keys and values that a tile reads: one key-value head of one layer.
struct Head<'a> {
    blocks: &'a [Arc<KvBlock>],
    /// Pairs of positions that the last row sees; what a block holds beyond is not read.
    n_pairs: usize,
    layer: usize,
    /// Where the head's keys start in a layer of a block, and its values.
    keys: usize,
    values: usize,
    dims: HeadDims,
}

impl Head<'_> {
    fn keys(&self, block: usize) -> &[u32] {
        let len = self.dims.head_dim / 2 * BLOCK;
        &self.blocks[block].layer(self.layer)[self.keys..][..len]
    }

    fn values(&self, block: usize) -> &[u32] {
        let len = value_width(self.dims) * POS_PAIRS;
        &self.blocks[block].layer(self.layer)[self.values..][..len]
    }

    /// `scores [m, positions] = query K^T`, rows `stride` apart.
    fn scores(&self, isa: Isa, scores: &mut [f32], stride: usize, query: &[u32], m: usize) {
        assert!(m <= TILE && query.len() >= TILE * self.dims.head_dim / 2);
        assert!(stride >= self.blocks.len() * BLOCK && scores.len() >= m * stride);
        match isa.0 {
            // SAFETY: the level was detected, the lengths are checked above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 | Level::Amx => unsafe {
                x86::scores(self, scores, stride, query, m)
            },
            _ => scores_widened(isa, self, scores, stride, query, m),
        }
    }

    /// `rows[i] [Dh] = norms[i] probs[i] V`
    ///
    /// # Safety
    /// `rows` point to `Dh` numbers each that nobody else touches meanwhile.
    unsafe fn mix(&self, isa: Isa, rows: &[*mut f32], norms: &[f32], probs: &[u32], stride: usize) {
        let m = rows.len();
        assert!(m <= TILE && norms.len() >= m);
        assert!(stride >= self.blocks.len() * POS_PAIRS && probs.len() >= m * stride);
        match isa.0 {
            // SAFETY: the level was detected, the lengths are checked above, the caller vouches
            // for the rows.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Bf16 | Level::Amx => unsafe { x86::mix(self, rows, norms, probs, stride) },
            _ => {
                let dh = self.dims.head_dim;
                for (i, &row) in rows.iter().enumerate() {
                    // SAFETY: the caller vouches for the rows.
                    let row = unsafe { std::slice::from_raw_parts_mut(row, dh) };
                    mix_widened(isa, self, row, norms[i], &probs[i * stride..]);
                }
            }
        }
    }
}

#[inline(always)]
fn low(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

#[inline(always)]
fn high(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}

for_each_isa! {
    /// The oracle of the widening levels, to the bit; `vdpbf16ps` rounds differently.
    fn scores_widened(head: &Head<'_>, scores: &mut [f32], stride: usize, query: &[u32], m: usize) {
        for block in 0..head.blocks.len() {
            let keys = head.keys(block);
            for i in 0..m {
                let mut sums = [0.0f32; BLOCK];
                for (p, keys) in keys.chunks_exact(BLOCK).enumerate() {
                    let q = query[p * TILE + i];
                    for j in 0..BLOCK {
                        sums[j] = high(q).mul_add(high(keys[j]), sums[j]);
                        sums[j] = low(q).mul_add(low(keys[j]), sums[j]);
                    }
                }
                scores[i * stride + block * BLOCK..][..BLOCK].copy_from_slice(&sums);
            }
        }
    }
}

for_each_isa! {
    /// As [`scores_widened`], for one row of [`Head::mix`].
    fn mix_widened(head: &Head<'_>, row: &mut [f32], norm: f32, probs: &[u32]) {
        let dv = value_width(head.dims);
        for (v, out) in row.chunks_mut(LANES).enumerate() {
            let mut sums = [0.0f32; LANES];
            for block in 0..head.blocks.len() {
                let probs = &probs[block * POS_PAIRS..head.n_pairs.min((block + 1) * POS_PAIRS)];
                for (values, &p) in head.values(block).chunks_exact(dv).zip(probs) {
                    let values = &values[LANES * v..][..LANES];
                    for d in 0..LANES {
                        sums[d] = high(p).mul_add(high(values[d]), sums[d]);
                        sums[d] = low(p).mul_add(low(values[d]), sums[d]);
                    }
                }
            }
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * norm);
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;
