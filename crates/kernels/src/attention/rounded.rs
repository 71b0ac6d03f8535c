//! Attention over a forest with bf16 operands: every product on the matrix units, sums, softmax and
//! results in f32.
//!
//! Rounded are queries, keys and values, the probabilities, and on the way back the gradients of the
//! output and of the scores. The row of a query block has the keys of its path side by side, each
//! segment's beginning on an even column, so that neighbours pair up within a segment. The bits of
//! a row depend on its path as it is cut into segments; they do not depend on the threads.

use super::HeadDims;
use super::forest::{Block, Forest, ROWS};
use crate::bf16::{Block as Product, Pairs, stack_rows};
use crate::ops::{round_to_bf16_pairs, softmax, softmax_again, softmax_backward};
use crate::par::Parts;
use crate::{Compute, Isa};
use std::cell::RefCell;
use std::iter;
use std::ops::Range;

/// Most columns of one product.
const COLS: usize = 64;
/// Most queries whose gradients for a block of keys are summed at once, gaps between segments included.
const QUERIES: usize = 4 * ROWS;

/// Buffers of [`forward`] and [`backward`], kept between calls.
#[derive(Clone, Debug, Default)]
pub struct Buffers {
    /// Per key-value head and block: keys as `[Dh / 2, ROWS]` pairs, padded with zeros.
    keys: Vec<u32>,
    /// The same of the values.
    values: Vec<u32>,
    /// Rows in pairs on top of each other, per head: `[pairs, Dh]`.
    stacked: [Vec<u32>; 2],
    /// Per row and head: shift and norm of the softmax, mean of its gradient.
    stats: Vec<[f32; 3]>,
}

/// What a task works in.
#[derive(Default)]
struct Scratch {
    probs: Vec<f32>,
    d_scores: Vec<f32>,
    words: Vec<u32>,
    stacked: [Vec<u32>; 2],
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// A run of keys that a block of queries sees: rows of one segment.
struct Run {
    /// Blocks of these keys.
    blocks: Range<usize>,
    /// Where they begin among the stacked pairs.
    pair: usize,
    /// Keys.
    len: usize,
    /// Column of the first.
    col: usize,
}

/// Neighbouring rows that see all of a block of keys (or, if they are that block, each those up to itself).
struct Queries {
    rows: Range<usize>,
    /// Where they begin among the stacked pairs, and how many pairs they are.
    pair: usize,
    n_pairs: usize,
    /// How many rows come from each block: an odd row at its end has a pair to itself.
    lens: Vec<usize>,
}

/// What all tasks of a pass read.
struct Plan<'a> {
    forest: &'a Forest,
    dims: HeadDims,
    /// Of each segment, where its stacked pairs begin.
    pairs: Vec<usize>,
    n_pairs: usize,
}

impl<'a> Plan<'a> {
    fn new(forest: &'a Forest, dims: HeadDims) -> Self {
        assert!(dims.n_kv_heads > 0 && dims.n_heads.is_multiple_of(dims.n_kv_heads));
        assert!(dims.head_dim.is_multiple_of(2), "a head is made of pairs");
        let (mut pairs, mut n_pairs) = (Vec::with_capacity(forest.segments.len()), 0);
        for node in &forest.segments {
            pairs.push(n_pairs);
            n_pairs += node.rows.len().div_ceil(2);
        }
        Self {
            forest,
            dims,
            pairs,
            n_pairs,
        }
    }

    /// The keys that a block of queries sees, the root's first, and the length of a row of them.
    fn runs(&self, block: usize) -> (Vec<Run>, usize) {
        let forest = self.forest;
        let (segment, end) = (forest.blocks[block].segment, forest.blocks[block].rows.end);
        let node = &forest.segments[segment];
        let mut col = 0;
        let path = node.above.iter().copied().chain(iter::once(segment));
        let run = |s: usize| {
            let (rows, blocks) = (&forest.segments[s].rows, &forest.segments[s].blocks);
            let (rows, blocks) = if s == segment {
                (rows.start..end, blocks.start..block + 1)
            } else {
                (rows.clone(), blocks.clone())
            };
            let at = col;
            col += rows.len().next_multiple_of(2);
            Run {
                blocks,
                pair: self.pairs[s],
                len: rows.len(),
                col: at,
            }
        };
        let runs: Vec<Run> = path.map(run).filter(|run| run.len > 0).collect();
        (runs, col)
    }

    /// The rows that see a block of keys: the block itself, then those behind it, in order. Branches are often shorter
    /// than a tile, so neighbours are taken together.
    fn queries(&self, key_block: usize) -> Vec<Queries> {
        let of_block = |block: usize| {
            let Block { segment, rows } = &self.forest.blocks[block];
            let first = rows.start - self.forest.segments[*segment].rows.start;
            Queries {
                rows: rows.clone(),
                pair: self.pairs[*segment] + first / 2,
                n_pairs: rows.len().div_ceil(2),
                lens: vec![rows.len()],
            }
        };
        let mut blocks = self.forest.queries_of(key_block).map(of_block);
        // The block itself stays alone.
        let mut all: Vec<Queries> = blocks.next().into_iter().collect();
        for next in blocks {
            match all[1..].last_mut() {
                Some(last)
                    if last.rows.end == next.rows.start
                        && last.pair + last.n_pairs == next.pair
                        && 2 * (last.n_pairs + next.n_pairs) <= QUERIES =>
                {
                    last.rows.end = next.rows.end;
                    last.n_pairs += next.n_pairs;
                    last.lens.extend(next.lens);
                }
                _ => all.push(next),
            }
        }
        all
    }

    /// `[m, n]` products of a block's rows (from word `x` of each on) with all keys (or values) it
    /// sees; `gap` goes into columns that belong to no key.
    fn scores(
        &self,
        isa: Isa,
        out: &mut [f32],
        (x, x_stride): (&[u32], usize),
        laid_out: &[u32],
        runs: &[Run],
        (m, n, gap): (usize, usize, f32),
    ) {
        let panel_len = self.dims.head_dim / 2 * ROWS;
        assert!(out.len() == m * n && (m - 1) * x_stride + self.dims.head_dim / 2 <= x.len());
        let y = Parts::new(out);
        for run in runs {
            for (i, key_block) in run.blocks.clone().enumerate() {
                let keys = self.forest.blocks[key_block].rows.len();
                let product = Product {
                    x,
                    x_stride,
                    x_step: 1,
                    panel: &laid_out[key_block * panel_len..][..panel_len],
                    w_stride: ROWS,
                    y_stride: n,
                    n_rows: m,
                    n_cols: keys,
                    n_pairs: self.dims.head_dim / 2,
                    go_on: false,
                };
                // SAFETY: runs lie within the row of n columns; X and the panel were checked.
                unsafe { product.run(isa, y.at(run.col + i * ROWS)) };
            }
            if run.len % 2 == 1 {
                for row in 0..m {
                    // SAFETY: the column behind an odd run is within the row.
                    unsafe { *y.at(row * n + run.col + run.len) = gap };
                }
            }
        }
    }

    /// Mixes stacked rows: `y [m, Dh] = weights [m, n] rows`, rows of `y` `y_stride` apart.
    ///
    /// # Safety
    /// `y` holds that and nobody else touches it meanwhile.
    unsafe fn mix(
        &self,
        isa: Isa,
        y: *mut f32,
        y_stride: usize,
        weights: &[u32],
        stacked: &[u32],
        runs: &[Run],
        (m, n): (usize, usize),
    ) {
        let dh = self.dims.head_dim;
        for first in (0..dh).step_by(COLS) {
            for run in runs {
                let n_pairs = run.len.div_ceil(2);
                let product = Product {
                    x: &weights[run.col / 2..],
                    x_stride: n / 2,
                    x_step: 1,
                    panel: &stacked[run.pair * stride(dh) + first..],
                    w_stride: stride(dh),
                    y_stride,
                    n_rows: m,
                    n_cols: COLS.min(dh - first),
                    n_pairs,
                    go_on: run.col > 0,
                };
                // SAFETY: the caller vouches for Y; the weights hold [m, n / 2] words, the stacked
                // rows every pair of every segment, in whole vectors.
                unsafe { product.run(isa, y.add(first)) };
            }
        }
    }

    /// Lays the rows' heads out as `[head, block][Dh / 2, ROWS]`; heads begin at word `at`.
    fn lay_out(&self, compute: &Compute, out: &mut Vec<u32>, rows: Pairs<'_>, at: usize) {
        let (half, n_blocks) = (self.dims.head_dim / 2, self.forest.blocks.len());
        out.resize(self.dims.n_kv_heads * n_blocks * half * ROWS, 0);
        compute.pool().chunks_mut(out, half * ROWS, |i, out| {
            let (head, of) = (i / n_blocks, &self.forest.blocks[i % n_blocks].rows);
            for (r, t) in of.clone().enumerate() {
                let row = &rows.rows_from(t)[at + head * half..][..half];
                for (p, &word) in row.iter().enumerate() {
                    out[p * ROWS + r] = word;
                }
            }
        });
    }

    /// Stacks the rows of `n_heads` heads in pairs as `[head][pairs, Dh]`; heads begin at word `at`.
    fn stack(
        &self,
        compute: &Compute,
        out: &mut Vec<u32>,
        rows: Pairs<'_>,
        (at, n_heads): (usize, usize),
    ) {
        let (half, forest) = (self.dims.head_dim / 2, self.forest);
        let (dh, zeros) = (2 * half, vec![0; half]);
        out.resize(n_heads * self.n_pairs * stride(dh), 0);
        let out = Parts::new(out);
        let n_segments = forest.segments.len();
        compute.pool().run(n_heads * n_segments, |task| {
            let (head, segment) = (task / n_segments, task % n_segments);
            let (of, isa) = (&forest.segments[segment].rows, compute.isa());
            let word = |t: usize| &rows.rows_from(t)[at + head * half..][..half];
            for (i, t) in of.clone().step_by(2).enumerate() {
                let odd = if t + 1 < of.end { word(t + 1) } else { &zeros };
                let start = (head * self.n_pairs + self.pairs[segment] + i) * stride(dh);
                // SAFETY: tasks have their own heads and segments; all pairs fit as sized.
                let out = unsafe { out.slice(start..start + dh) };
                stack_rows(isa, out, word(t), odd);
            }
        });
    }

    /// What one head's stacked rows are of `stacked`.
    fn of_head<'b>(&self, stacked: &'b [u32], head: usize) -> &'b [u32] {
        let len = self.n_pairs * stride(self.dims.head_dim);
        &stacked[head * len..][..len]
    }

    /// What one head's laid out blocks are of `laid_out`.
    fn blocks_of<'b>(&self, laid_out: &'b [u32], head: usize) -> &'b [u32] {
        let len = self.forest.blocks.len() * self.dims.head_dim / 2 * ROWS;
        &laid_out[head * len..][..len]
    }
}

/// Words from a stacked pair to the next: whole vectors.
fn stride(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

fn round_all(isa: Isa, words: &mut Vec<u32>, rows: &[f32], n: usize) {
    words.resize(rows.len() / n * n.div_ceil(2), 0);
    let both = words
        .chunks_exact_mut(n.div_ceil(2))
        .zip(rows.chunks_exact(n));
    both.for_each(|(words, row)| round_to_bf16_pairs(isa, words, row));
}

/// As [`super::forest::forward`], with `qkv` rounded to pairs.
pub fn forward(
    compute: &Compute,
    out: &mut [f32],
    qkv: Pairs<'_>,
    forest: &Forest,
    dims: HeadDims,
    buffers: &mut Buffers,
) {
    let plan = Plan::new(forest, dims);
    let (ow, dh, isa) = (dims.out_width(), dims.head_dim, compute.isa());
    qkv.check(forest.n_rows(), dims.qkv_width() / 2);
    assert_eq!(out.len(), forest.n_rows() * ow, "out is [T, H Dh]");
    let Buffers { keys, stacked, .. } = buffers;
    plan.lay_out(compute, keys, qkv, dims.key_start(0) / 2);
    let value = (dims.key_start(0) + dims.value_shift()) / 2;
    let [values, _] = stacked;
    plan.stack(compute, values, qkv, (value, dims.n_kv_heads));
    let (keys, values, out) = (&*keys, &*values, Parts::new(out));
    compute
        .pool()
        .run(forest.blocks.len() * dims.n_kv_heads, |task| {
            let (block, kv_head) = (task / dims.n_kv_heads, task % dims.n_kv_heads);
            let rows = &forest.blocks[block].rows;
            let ((runs, n), m) = (plan.runs(block), rows.len());
            let own = runs.last().map_or(0, |run| run.col + run.len - m);
            let (keys, values) = (plan.blocks_of(keys, kv_head), plan.of_head(values, kv_head));
            SCRATCH.with_borrow_mut(|scratch| {
                let Scratch { probs, words, .. } = scratch;
                probs.resize(m * n, 0.0);
                for head in kv_head * dims.group()..(kv_head + 1) * dims.group() {
                    let query = (&qkv.rows_from(rows.start)[head * dh / 2..], qkv.stride);
                    plan.scores(isa, probs, query, keys, &runs, (m, n, f32::MIN));
                    for (i, row) in probs.chunks_exact_mut(n).enumerate() {
                        softmax(isa, row, own + i + 1, dims.scale());
                    }
                    round_all(isa, words, probs, n);
                    // SAFETY: a task writes the rows of its block and the columns of its heads only;
                    // `out` holds [T, H Dh].
                    unsafe {
                        let y = out.at(rows.start * ow + head * dh);
                        plan.mix(isa, y, ow, words, values, &runs, (m, n));
                    }
                }
            });
        });
}

/// As [`super::forest::backward`], with `qkv` and `d_out` rounded to pairs.
pub fn backward(
    compute: &Compute,
    d_qkv: &mut [f32],
    d_out: Pairs<'_>,
    qkv: Pairs<'_>,
    forest: &Forest,
    dims: HeadDims,
    buffers: &mut Buffers,
) {
    let plan = Plan::new(forest, dims);
    qkv.check(forest.n_rows(), dims.qkv_width() / 2);
    d_out.check(forest.n_rows(), dims.out_width() / 2);
    assert_eq!(
        d_qkv.len(),
        forest.n_rows() * dims.qkv_width(),
        "d_qkv is [T, W]"
    );
    let Buffers {
        keys,
        values,
        stacked,
        stats,
    } = buffers;
    let key = dims.key_start(0) / 2;
    plan.lay_out(compute, keys, qkv, key);
    plan.lay_out(compute, values, qkv, key + dims.value_shift() / 2);
    stats.resize(forest.n_rows() * dims.n_heads, [0.0; 3]);
    let d_qkv = Parts::new(d_qkv);
    let laid_out = (&keys[..], &values[..]);
    let [first, second] = stacked;
    plan.stack(compute, first, qkv, (key, dims.n_kv_heads));
    d_queries(compute, &plan, &d_qkv, (d_out, qkv), laid_out, first, stats);
    plan.stack(compute, first, qkv, (0, dims.n_heads));
    plan.stack(compute, second, d_out, (0, dims.n_heads));
    let stacked = (&first[..], &second[..]);
    d_keys_and_values(
        compute,
        &plan,
        &d_qkv,
        (d_out, qkv),
        laid_out,
        stacked,
        stats,
    );
}

/// Writes the queries' columns of `d_qkv` and the statistics of every row and head.
fn d_queries(
    compute: &Compute,
    plan: &Plan<'_>,
    d_qkv: &Parts<f32>,
    (d_out, qkv): (Pairs<'_>, Pairs<'_>),
    (keys, values): (&[u32], &[u32]),
    stacked_keys: &[u32],
    stats: &mut [[f32; 3]],
) {
    let (forest, dims, isa) = (plan.forest, plan.dims, compute.isa());
    let (w, dh) = (dims.qkv_width(), dims.head_dim);
    let stats = Parts::new(stats);
    compute
        .pool()
        .run(forest.blocks.len() * dims.n_kv_heads, |task| {
            let (block, kv_head) = (task / dims.n_kv_heads, task % dims.n_kv_heads);
            let rows = &forest.blocks[block].rows;
            let ((runs, n), m) = (plan.runs(block), rows.len());
            let own = runs.last().map_or(0, |run| run.col + run.len - m);
            let keys = plan.blocks_of(keys, kv_head);
            let values = plan.blocks_of(values, kv_head);
            let stacked = plan.of_head(stacked_keys, kv_head);
            SCRATCH.with_borrow_mut(|scratch| {
                let Scratch {
                    probs,
                    d_scores,
                    words,
                    ..
                } = scratch;
                probs.resize(m * n, 0.0);
                d_scores.resize(m * n, 0.0);
                for head in kv_head * dims.group()..(kv_head + 1) * dims.group() {
                    let of_head = |rows_of: Pairs<'_>| (head * dh / 2, rows_of.stride);
                    let (at, stride) = of_head(qkv);
                    let query = (&qkv.rows_from(rows.start)[at..], stride);
                    plan.scores(isa, probs, query, keys, &runs, (m, n, f32::MIN));
                    let (at, stride) = of_head(d_out);
                    let d_rows = (&d_out.rows_from(rows.start)[at..], stride);
                    plan.scores(isa, d_scores, d_rows, values, &runs, (m, n, 0.0));
                    // SAFETY: a task writes the statistics of its own rows and heads, each run of a
                    // head lies within [H, T].
                    let stats = unsafe {
                        let start = head * forest.n_rows() + rows.start;
                        stats.slice(start..start + m)
                    };
                    let both = probs.chunks_exact_mut(n).zip(d_scores.chunks_exact_mut(n));
                    for (i, ((probs, d), stats)) in both.zip(stats).enumerate() {
                        let (shift, norm) = softmax(isa, probs, own + i + 1, dims.scale());
                        *stats = [shift, norm, softmax_backward(isa, d, probs, dims.scale())];
                    }
                    round_all(isa, words, d_scores, n);
                    // SAFETY: a task writes the rows of its block and the columns of its query heads
                    // only; `d_qkv` holds [T, W].
                    unsafe {
                        let y = d_qkv.at(rows.start * w + head * dh);
                        plan.mix(isa, y, w, words, stacked, &runs, (m, n));
                    }
                }
            });
        });
}

/// Writes the keys' and values' columns of `d_qkv`, from the statistics of [`d_queries`].
fn d_keys_and_values(
    compute: &Compute,
    plan: &Plan<'_>,
    d_qkv: &Parts<f32>,
    (d_out, qkv): (Pairs<'_>, Pairs<'_>),
    (keys, values): (&[u32], &[u32]),
    (stacked_queries, stacked_d_out): (&[u32], &[u32]),
    stats: &[[f32; 3]],
) {
    let (forest, dims, isa) = (plan.forest, plan.dims, compute.isa());
    let (w, dh) = (dims.qkv_width(), dims.head_dim);
    compute
        .pool()
        .run(forest.blocks.len() * dims.n_kv_heads, |task| {
            let (key_block, kv_head) = (task / dims.n_kv_heads, task % dims.n_kv_heads);
            let n = forest.blocks[key_block].rows.len();
            let of_block = key_block * dh / 2 * ROWS..;
            let keys = &plan.blocks_of(keys, kv_head)[of_block.clone()];
            let values = &plan.blocks_of(values, kv_head)[of_block];
            let key = forest.blocks[key_block].rows.start * w + dims.key_start(kv_head);
            let all = plan.queries(key_block);
            let mut go_on = false;
            SCRATCH.with_borrow_mut(|scratch| {
                let Scratch {
                    probs,
                    d_scores,
                    words,
                    stacked,
                } = scratch;
                for head in kv_head * dims.group()..(kv_head + 1) * dims.group() {
                    let of_queries = plan.of_head(stacked_queries, head);
                    let of_d_out = plan.of_head(stacked_d_out, head);
                    for (batch, queries) in all.iter().enumerate() {
                        let (first, m) = (queries.rows.start, queries.rows.len());
                        let product = |x: Pairs<'_>, panel, out: &mut Vec<f32>| {
                            out.resize(m * n, 0.0);
                            let block = Product {
                                x: &x.rows_from(first)[head * dh / 2..],
                                x_stride: x.stride,
                                x_step: 1,
                                panel,
                                w_stride: ROWS,
                                y_stride: n,
                                n_rows: m,
                                n_cols: n,
                                n_pairs: dh / 2,
                                go_on: false,
                            };
                            assert!(panel.len() >= dh / 2 * ROWS);
                            // SAFETY: the output holds [m, n]; X was checked by `backward`.
                            unsafe { block.run(isa, out.as_mut_ptr()) };
                        };
                        product(qkv, keys, probs);
                        product(d_out, values, d_scores);
                        let stats = &stats[head * forest.n_rows() + first..][..m];
                        let both = probs.chunks_exact_mut(n).zip(d_scores.chunks_exact_mut(n));
                        for (i, ((probs, d), &stats)) in both.zip(stats).enumerate() {
                            // Of its own block a row sees the keys up to itself.
                            let own = if batch == 0 { i + 1 } else { n };
                            softmax_again(isa, probs, d, own, dims.scale(), stats);
                        }
                        let [up, down] = &mut *stacked;
                        for ((from, into), (rows_of, shift)) in [(&*d_scores, down), (&*probs, up)]
                            .into_iter()
                            .zip([(of_queries, 0), (of_d_out, dims.value_shift())])
                        {
                            stack_columns(isa, into, words, from, n, &queries.lens);
                            for first in (0..dh).step_by(COLS) {
                                let block = Product {
                                    x: into,
                                    x_stride: 1,
                                    x_step: n.next_multiple_of(2),
                                    panel: &rows_of[queries.pair * stride(dh) + first..],
                                    w_stride: stride(dh),
                                    y_stride: w,
                                    n_rows: n,
                                    n_cols: COLS.min(dh - first),
                                    n_pairs: queries.n_pairs,
                                    go_on,
                                };
                                // SAFETY: a task writes the rows of its key block and the columns of
                                // its key-value head only; `d_qkv` holds [T, W].
                                unsafe { block.run(isa, d_qkv.at(key + shift + first)) };
                            }
                        }
                        go_on = true;
                    }
                }
            });
        });
}

/// Rounds rows of `n` and puts neighbouring rows on top of each other: `[pairs of rows][n]`, `n` made even. Pairs are
/// made within each of the runs of rows that `lens` counts; an odd row at the end of one is over a row of zeros.
fn stack_columns(
    isa: Isa,
    out: &mut Vec<u32>,
    words: &mut Vec<u32>,
    rows: &[f32],
    n: usize,
    lens: &[usize],
) {
    round_all(isa, words, rows, n);
    let half = n.div_ceil(2);
    let zeros = [0; ROWS / 2];
    let pairs: usize = lens.iter().map(|len| len.div_ceil(2)).sum();
    out.resize(pairs * 2 * half, 0);
    let mut out = out.chunks_exact_mut(2 * half);
    let mut words = words.chunks_exact(half);
    for &len in lens {
        for row in (0..len).step_by(2) {
            let (Some(out), Some(even)) = (out.next(), words.next()) else {
                return;
            };
            let odd = (row + 1 < len).then(|| words.next()).flatten();
            stack_rows(isa, out, even, odd.unwrap_or(&zeros[..half]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::forest;
    use super::*;
    use crate::bf16::round_rows;
    use crate::noise::wide;
    use half::bf16;

    const DIMS: HeadDims = HeadDims {
        n_heads: 6,
        n_kv_heads: 2,
        head_dim: 24,
    };

    /// Two trees, ragged blocks, odd segments, an empty one, a long path.
    fn forest() -> Forest {
        let none = None;
        Forest::new([
            (none, 53),
            (Some(0), 3),
            (Some(0), 61),
            (Some(1), 20),
            (none, 0),
            (Some(4), 5),
            (Some(1), 1),
            (Some(2), 100),
        ])
    }

    /// Small numbers that bf16 holds.
    fn numbers(n: usize, seed: u32) -> Vec<f32> {
        let round = |x: f32| bf16::from_f32(x).to_f32();
        wide(n, seed).into_iter().map(round).collect()
    }

    fn run(compute: &Compute, qkv: &[f32], d_out: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (forest, mut buffers) = (forest(), Buffers::default());
        let (mut qkv_words, mut d_words) = (Vec::new(), Vec::new());
        round_rows(compute, &mut qkv_words, qkv, DIMS.qkv_width());
        round_rows(compute, &mut d_words, d_out, DIMS.out_width());
        let qkv = Pairs::new(&qkv_words, DIMS.qkv_width() / 2);
        let d_out = Pairs::new(&d_words, DIMS.out_width() / 2);
        let n = forest.n_rows();
        let (mut out, mut d_qkv) = (vec![f32::NAN; n * DIMS.out_width()], Vec::new());
        d_qkv.resize(n * DIMS.qkv_width(), f32::NAN);
        for _ in 0..2 {
            forward(compute, &mut out, qkv, &forest, DIMS, &mut buffers);
            backward(compute, &mut d_qkv, d_out, qkv, &forest, DIMS, &mut buffers);
        }
        (out, d_qkv)
    }

    fn close(got: &[f32], want: &[f32], what: &str) {
        let pairs = || {
            got.iter()
                .zip(want)
                .map(|(a, b)| (f64::from(*a), f64::from(*b)))
        };
        let error: f64 = pairs().map(|(a, b)| (a - b).powi(2)).sum();
        let size: f64 = pairs().map(|(_, b)| b * b).sum();
        assert!(error < 1e-4 * size, "{what}: {error} of {size}");
    }

    #[test]
    fn it_is_the_exact_attention_up_to_rounding_on_every_level_and_any_threads() {
        let (forest, n) = (forest(), forest().n_rows());
        let (w, ow) = (DIMS.qkv_width(), DIMS.out_width());
        let (qkv, d_out) = (numbers(n * w, 1), numbers(n * ow, 2));
        let compute = Compute::with_isa(2, Isa::SCALAR);
        let (mut out, mut d_qkv) = (vec![0.0; n * ow], vec![0.0; n * w]);
        let mut buffers = forest::Buffers::default();
        forest::forward(&compute, &mut out, &qkv, &forest, DIMS, &mut buffers);
        forest::backward(
            &compute,
            &mut d_qkv,
            &d_out,
            &qkv,
            &forest,
            DIMS,
            &mut buffers,
        );
        for isa in Isa::available() {
            let one = run(&Compute::with_isa(1, isa), &qkv, &d_out);
            close(&one.0, &out, isa.name());
            close(&one.1, &d_qkv, isa.name());
            assert!(
                run(&Compute::with_isa(3, isa), &qkv, &d_out) == one,
                "{}",
                isa.name()
            );
        }
    }
}
