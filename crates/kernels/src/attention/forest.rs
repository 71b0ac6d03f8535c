//! Causal attention over a forest of token segments, with its backward.
//!
//! A segment's rows follow those of its parent, so rows that begin alike share them: a shared
//! prefix is one segment, computed once, and each branch looks back along its own path to the
//! root. Sequences that share nothing are segments without a parent.
//!
//! Every row has the bits that it has in a sequence of its own. In the backward, a key collects
//! from its queries head by head, own segment first, then the segments below it in order: the
//! bits depend on the forest alone, not on the threads.

use super::HeadDims;
use crate::gemm::{Call, Dims, View, Write};
use crate::ops::{softmax, softmax_again, softmax_backward};
use crate::par::Parts;
use crate::{Compute, Real};
use std::iter;
use std::ops::Range;

/// Rows of a block: queries that are worked on together, keys that are laid out together.
pub(super) const ROWS: usize = 48;

/// Segments of rows in topological order, laid end to end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forest {
    pub(super) segments: Vec<Node>,
    pub(super) blocks: Vec<Block>,
    n_rows: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) rows: Range<usize>,
    pub(super) blocks: Range<usize>,
    /// Position of the first row: the length of the path above.
    first_pos: usize,
    /// Segments above, the root first.
    pub(super) above: Vec<usize>,
    /// Segments below, in order.
    below: Vec<usize>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    pub(super) segment: usize,
    pub(super) rows: Range<usize>,
}

impl Forest {
    /// Lays segments of `(parent, length)` end to end.
    ///
    /// Panics unless every parent comes before its children.
    pub fn new(segments: impl IntoIterator<Item = (Option<usize>, usize)>) -> Self {
        let mut forest = Self::default();
        for (segment, (parent, len)) in segments.into_iter().enumerate() {
            let rows = forest.n_rows..forest.n_rows + len;
            forest.n_rows = rows.end;
            let (mut above, mut first_pos) = (Vec::new(), 0);
            if let Some(parent) = parent {
                assert!(parent < segment, "a parent comes before its children");
                let node = &forest.segments[parent];
                first_pos = node.first_pos + node.rows.len();
                above.extend_from_slice(&node.above);
                above.push(parent);
            }
            for &ancestor in &above {
                forest.segments[ancestor].below.push(segment);
            }
            let first_block = forest.blocks.len();
            let starts = rows.clone().step_by(ROWS);
            forest.blocks.extend(starts.map(|start| Block {
                segment,
                rows: start..(start + ROWS).min(rows.end),
            }));
            forest.segments.push(Node {
                rows,
                blocks: first_block..forest.blocks.len(),
                first_pos,
                above,
                below: Vec::new(),
            });
        }
        forest
    }

    /// Rows of all segments.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Position of every row on the path from its root.
    pub fn positions(&self) -> Vec<usize> {
        let of = |node: &Node| node.first_pos..node.first_pos + node.rows.len();
        self.segments.iter().flat_map(of).collect()
    }

    /// The key blocks that a block of queries sees, with the column of each one's first key.
    fn keys_of(&self, block: usize) -> impl Iterator<Item = (usize, usize)> {
        let node = &self.segments[self.blocks[block].segment];
        let above = node.above.iter().map(|&s| self.segments[s].blocks.clone());
        let mut col = 0;
        above
            .chain(iter::once(node.blocks.start..block + 1))
            .flatten()
            .map(move |key_block| {
                let at = col;
                col += self.blocks[key_block].rows.len();
                (key_block, at)
            })
    }

    /// The runs of rows that a block of queries sees, with the column of each one's first key.
    fn runs_of(&self, block: usize) -> impl Iterator<Item = (Range<usize>, usize)> {
        let Block { segment, rows } = &self.blocks[block];
        let node = &self.segments[*segment];
        let above = node.above.iter().map(|&s| self.segments[s].rows.clone());
        let own = iter::once(node.rows.start..rows.end);
        let mut col = 0;
        above
            .chain(own)
            .filter(|run| !run.is_empty())
            .map(move |run| {
                let at = col;
                col += run.len();
                (run, at)
            })
    }

    /// The blocks of queries that see a key block.
    pub(super) fn queries_of(&self, block: usize) -> impl Iterator<Item = usize> {
        let node = &self.segments[self.blocks[block].segment];
        let below = node.below.iter().map(|&s| self.segments[s].blocks.clone());
        iter::once(block..node.blocks.end).chain(below).flatten()
    }

    /// Keys that the first row of a block sees, itself included.
    fn first_seen(&self, block: usize) -> usize {
        let Block { segment, rows } = &self.blocks[block];
        let node = &self.segments[*segment];
        node.first_pos + rows.start - node.rows.start + 1
    }
}

/// Buffers of [`forward`] and [`backward`], kept between calls.
#[derive(Clone, Debug, Default)]
pub struct Buffers<R> {
    /// Per key-value head and block: keys `[Dh, ROWS]`, padded with zeros.
    keys: Vec<R>,
    /// The same of the values.
    values: Vec<R>,
    /// Per row and head: shift and norm of the softmax, mean of its gradient.
    stats: Vec<[R; 3]>,
}

/// Attention of each row to its path up to itself.
///
/// Shapes: out [T, H Dh]; qkv [T, W], rotated
/// Math:   out_t = sum_{j on the path to t} softmax_j(q_t k_j / sqrt(Dh)) v_j
/// Errors: panics if a length disagrees with `dims`
pub fn forward<R: Real>(
    compute: &Compute,
    out: &mut [R],
    qkv: &[R],
    forest: &Forest,
    dims: HeadDims,
    buffers: &mut Buffers<R>,
) {
    let (w, ow, dh) = (dims.qkv_width(), dims.out_width(), dims.head_dim);
    check(qkv.len(), out.len(), forest, dims);
    lay_out(compute, &mut buffers.keys, qkv, forest, dims, 0);
    let (isa, keys) = (compute.isa(), &buffers.keys);
    let out = Parts::new(out);
    let n_blocks = forest.blocks.len();
    compute.pool().run(n_blocks * dims.n_kv_heads, |task| {
        // The longest blocks of a segment first would balance better; the last ones are small.
        let (block, kv_head) = (task / dims.n_kv_heads, task % dims.n_kv_heads);
        let (rows, seen) = (&forest.blocks[block].rows, forest.first_seen(block));
        let (m, n) = (rows.len(), seen + rows.len() - 1);
        let mut probs = vec![R::ZERO; m * n];
        let values = &qkv[dims.key_start(kv_head) + dims.value_shift()..];
        for head in kv_head * dims.group()..(kv_head + 1) * dims.group() {
            let query = View::rows(&qkv[rows.start * w + head * dh..], w);
            scores(
                compute,
                &mut probs,
                query,
                keys,
                (block, kv_head),
                forest,
                dims,
            );
            for (i, row) in probs.chunks_exact_mut(n).enumerate() {
                softmax(isa, row, seen + i, dims.scale());
            }
            for (run, col) in forest.runs_of(block) {
                let (k, write) = (run.len(), set_or_continue(col));
                let probs = View::rows(&probs[col..], n);
                let value = (&values[run.start * w..], w);
                let call = Call::new(probs, value, ow, Dims { m, n: dh, k }, write);
                // SAFETY: a task writes the rows of its block and the columns of its heads only;
                // `out` holds [T, H Dh] by `check`.
                unsafe { R::gemm_serial(isa, &call, out.at(rows.start * ow + head * dh)) };
            }
        }
    });
}

/// Backward of [`forward`]: overwrites `d_qkv`.
///
/// Shapes: d_qkv, qkv [T, W]; d_out [T, H Dh]
/// Math:   out = P V, P = softmax(Q K^T / sqrt(Dh))
///         =>  dV = P^T dOut;  dS = softmax'(dOut V^T);  dQ = dS K;  dK = dS^T Q
///
/// Queries first, a block at a time; then keys, a block at a time, from the numbers that the
/// queries left: no buffer grows with the square of the length.
pub fn backward<R: Real>(
    compute: &Compute,
    d_qkv: &mut [R],
    d_out: &[R],
    qkv: &[R],
    forest: &Forest,
    dims: HeadDims,
    buffers: &mut Buffers<R>,
) {
    check(d_qkv.len(), d_out.len(), forest, dims);
    check(qkv.len(), d_out.len(), forest, dims);
    lay_out(compute, &mut buffers.keys, qkv, forest, dims, 0);
    lay_out(
        compute,
        &mut buffers.values,
        qkv,
        forest,
        dims,
        dims.value_shift(),
    );
    buffers
        .stats
        .resize(forest.n_rows * dims.n_heads, [R::ZERO; 3]);
    let d_qkv = Parts::new(d_qkv);
    d_queries(compute, &d_qkv, d_out, qkv, forest, dims, buffers);
    d_keys_and_values(compute, &d_qkv, d_out, qkv, forest, dims, buffers);
}

/// Writes the queries' columns of `d_qkv` and the statistics of every row and head.
fn d_queries<R: Real>(
    compute: &Compute,
    d_qkv: &Parts<R>,
    d_out: &[R],
    qkv: &[R],
    forest: &Forest,
    dims: HeadDims,
    buffers: &mut Buffers<R>,
) {
    let (w, ow, dh) = (dims.qkv_width(), dims.out_width(), dims.head_dim);
    let Buffers {
        keys,
        values,
        stats,
    } = buffers;
    let (isa, stats) = (compute.isa(), Parts::new(stats));
    let n_blocks = forest.blocks.len();
    compute.pool().run(n_blocks * dims.n_kv_heads, |task| {
        let (block, kv_head) = (task / dims.n_kv_heads, task % dims.n_kv_heads);
        let (rows, seen) = (&forest.blocks[block].rows, forest.first_seen(block));
        let (m, n) = (rows.len(), seen + rows.len() - 1);
        let (mut probs, mut d_scores) = (vec![R::ZERO; m * n], vec![R::ZERO; m * n]);
        for head in kv_head * dims.group()..(kv_head + 1) * dims.group() {
            let at = rows.start * w + head * dh;
            let of = (block, kv_head);
            scores(
                compute,
                &mut probs,
                View::rows(&qkv[at..], w),
                keys,
                of,
                forest,
                dims,
            );
            let d_rows = View::rows(&d_out[rows.start * ow + head * dh..], ow);
            scores(compute, &mut d_scores, d_rows, values, of, forest, dims);
            // SAFETY: a task writes the statistics of its own rows and heads, each run of a head
            // lies within [H, T].
            let stats = unsafe {
                let start = head * forest.n_rows + rows.start;
                stats.slice(start..start + m)
            };
            let both = probs.chunks_exact_mut(n).zip(d_scores.chunks_exact_mut(n));
            for (i, ((probs, d), stats)) in both.zip(stats).enumerate() {
                let (shift, norm) = softmax(isa, probs, seen + i, dims.scale());
                *stats = [shift, norm, softmax_backward(isa, d, probs, dims.scale())];
            }
            for (run, col) in forest.runs_of(block) {
                let (k, write) = (run.len(), set_or_continue(col));
                let key = (&qkv[run.start * w + dims.key_start(kv_head)..], w);
                let d_scores = View::rows(&d_scores[col..], n);
                let call = Call::new(d_scores, key, w, Dims { m, n: dh, k }, write);
                // SAFETY: a task writes the rows of its block and the columns of its query heads
                // only; `d_qkv` holds [T, W] by `check`.
                unsafe { R::gemm_serial(isa, &call, d_qkv.at(at)) };
            }
        }
    });
}

/// Writes the keys' and values' columns of `d_qkv`, from the statistics of [`d_queries`].
fn d_keys_and_values<R: Real>(
    compute: &Compute,
    d_qkv: &Parts<R>,
    d_out: &[R],
    qkv: &[R],
    forest: &Forest,
    dims: HeadDims,
    buffers: &Buffers<R>,
) {
    let (w, ow, dh) = (dims.qkv_width(), dims.out_width(), dims.head_dim);
    let isa = compute.isa();
    let n_blocks = forest.blocks.len();
    compute.pool().run(n_blocks * dims.n_kv_heads, |task| {
        let (key_block, kv_head) = (task / dims.n_kv_heads, task % dims.n_kv_heads);
        let keys = &forest.blocks[key_block].rows;
        let n = keys.len();
        let laid_out = (kv_head * n_blocks + key_block) * dh * ROWS..;
        let (keys_t, values_t) = (&buffers.keys[laid_out.clone()], &buffers.values[laid_out]);
        let key = keys.start * w + dims.key_start(kv_head);
        let mut first = true;
        let (mut probs, mut d_scores) = ([R::ZERO; ROWS * ROWS], [R::ZERO; ROWS * ROWS]);
        for head in kv_head * dims.group()..(kv_head + 1) * dims.group() {
            for block in forest.queries_of(key_block) {
                let rows = &forest.blocks[block].rows;
                let m = rows.len();
                let query = &qkv[rows.start * w + head * dh..];
                let d_rows = &d_out[rows.start * ow + head * dh..];
                let part = Dims { m, n, k: dh };
                Call::new(View::rows(query, w), (keys_t, ROWS), n, part, Write::Set)
                    .run(isa, &mut probs);
                Call::new(
                    View::rows(d_rows, ow),
                    (values_t, ROWS),
                    n,
                    part,
                    Write::Set,
                )
                .run(isa, &mut d_scores);
                let stats = &buffers.stats[head * forest.n_rows + rows.start..][..m];
                let both = probs.chunks_exact_mut(n).zip(d_scores.chunks_exact_mut(n));
                for (i, ((probs, d), &stats)) in both.zip(stats).enumerate() {
                    // Of its own block a row sees the keys up to itself.
                    let own = if block == key_block { i + 1 } else { n };
                    softmax_again(isa, probs, d, own, dims.scale(), stats);
                }
                let over_rows = Dims { m: n, n: dh, k: m };
                let write = if first { Write::Set } else { Write::Continue };
                first = false;
                let d_key = Call::new(
                    View::transposed(&d_scores, n),
                    (query, w),
                    w,
                    over_rows,
                    write,
                );
                let d_value = Call::new(
                    View::transposed(&probs, n),
                    (d_rows, ow),
                    w,
                    over_rows,
                    write,
                );
                // SAFETY: a task writes the rows of its key block and the columns of its
                // key-value head only; `d_qkv` holds [T, W] by `check`.
                unsafe {
                    R::gemm_serial(isa, &d_key, d_qkv.at(key));
                    R::gemm_serial(isa, &d_value, d_qkv.at(key + dims.value_shift()));
                }
            }
        }
    });
}

/// Products of a block of rows with every key (or value) that it sees: `out [m, n]`.
fn scores<R: Real>(
    compute: &Compute,
    out: &mut [R],
    rows: View<'_, R>,
    laid_out: &[R],
    (block, kv_head): (usize, usize),
    forest: &Forest,
    dims: HeadDims,
) {
    let m = forest.blocks[block].rows.len();
    let (n, len) = (out.len() / m, dims.head_dim * ROWS);
    for (key_block, col) in forest.keys_of(block) {
        let keys = &laid_out[(kv_head * forest.blocks.len() + key_block) * len..][..len];
        let part = Dims {
            m,
            n: forest.blocks[key_block].rows.len(),
            k: dims.head_dim,
        };
        Call::new(rows, (keys, ROWS), n, part, Write::Set).run(compute.isa(), &mut out[col..]);
    }
}

fn set_or_continue<R>(col: usize) -> Write<R> {
    if col == 0 {
        Write::Set
    } else {
        Write::Continue
    }
}

/// Lays the keys (values with `shift`) of every block out as `[Dh, ROWS]`.
fn lay_out<R: Real>(
    compute: &Compute,
    out: &mut Vec<R>,
    qkv: &[R],
    forest: &Forest,
    dims: HeadDims,
    shift: usize,
) {
    let (w, dh, n_blocks) = (dims.qkv_width(), dims.head_dim, forest.blocks.len());
    out.resize(dims.n_kv_heads * n_blocks * dh * ROWS, R::ZERO);
    compute.pool().chunks_mut(out, dh * ROWS, |i, out| {
        let (kv_head, rows) = (i / n_blocks, &forest.blocks[i % n_blocks].rows);
        for (r, t) in rows.clone().enumerate() {
            let key = &qkv[t * w + dims.key_start(kv_head) + shift..][..dh];
            for (d, &x) in key.iter().enumerate() {
                out[d * ROWS + r] = x;
            }
        }
    });
}

fn check(qkv_len: usize, out_len: usize, forest: &Forest, dims: HeadDims) {
    assert!(dims.n_kv_heads > 0 && dims.n_heads.is_multiple_of(dims.n_kv_heads));
    assert_eq!(qkv_len, forest.n_rows * dims.qkv_width(), "qkv is [T, W]");
    assert_eq!(
        out_len,
        forest.n_rows * dims.out_width(),
        "out is [T, H Dh]"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::noise::wide;

    const DIMS: HeadDims = HeadDims {
        n_heads: 6,
        n_kv_heads: 2,
        head_dim: 16,
    };

    fn numbers(n: usize, seed: u32) -> Vec<f64> {
        wide(n, seed).into_iter().map(f64::from).collect()
    }

    /// Two trees, ragged blocks, an empty segment, a long path.
    fn forest() -> Forest {
        let none = None;
        Forest::new([
            (none, 37),
            (Some(0), 3),
            (Some(0), 33),
            (Some(1), 20),
            (none, 0),
            (Some(4), 5),
            (Some(1), 1),
            (Some(2), 40),
        ])
    }

    /// Rows that row `t` sees, in order of their positions.
    fn seen(forest: &Forest, t: usize) -> Vec<usize> {
        let own = forest
            .segments
            .iter()
            .position(|node| node.rows.contains(&t))
            .unwrap();
        let node = &forest.segments[own];
        let above = node
            .above
            .iter()
            .flat_map(|&s| forest.segments[s].rows.clone());
        above.chain(node.rows.start..t + 1).collect()
    }

    /// The definition, a row and a head at a time.
    fn naive(qkv: &[f64], forest: &Forest) -> Vec<f64> {
        let (w, ow, dh) = (DIMS.qkv_width(), DIMS.out_width(), DIMS.head_dim);
        let mut out = vec![0.0; forest.n_rows * ow];
        for t in 0..forest.n_rows {
            for head in 0..DIMS.n_heads {
                let key = DIMS.key_start(head / DIMS.group());
                let score = |j: usize| -> f64 {
                    (0..dh)
                        .map(|d| qkv[t * w + head * dh + d] * qkv[j * w + key + d])
                        .sum::<f64>()
                        / (dh as f64).sqrt()
                };
                let seen = seen(forest, t);
                let weights: Vec<f64> = seen.iter().map(|&j| score(j).exp()).collect();
                let sum: f64 = weights.iter().sum();
                for d in 0..dh {
                    let value = |j: usize| qkv[j * w + key + DIMS.value_shift() + d];
                    out[t * ow + head * dh + d] = weights
                        .iter()
                        .zip(&seen)
                        .map(|(p, &j)| p / sum * value(j))
                        .sum();
                }
            }
        }
        out
    }

    #[test]
    fn a_forest_is_the_definition_and_its_backward_the_gradient() {
        let forest = forest();
        let n = forest.n_rows();
        assert_eq!(forest.positions()[n - 40..], (70..110).collect::<Vec<_>>());
        let qkv = numbers(n * DIMS.qkv_width(), 1);
        let compute = Compute::with_isa(2, Isa::SCALAR);
        let (mut out, mut buffers) = (vec![0.0; n * DIMS.out_width()], Buffers::default());
        forward(&compute, &mut out, &qkv, &forest, DIMS, &mut buffers);
        for (got, want) in out.iter().zip(naive(&qkv, &forest)) {
            assert!((got - want).abs() < 1e-12);
        }
        let d_out = numbers(out.len(), 2);
        let mut d_qkv = vec![f64::NAN; qkv.len()];
        backward(
            &compute,
            &mut d_qkv,
            &d_out,
            &qkv,
            &forest,
            DIMS,
            &mut buffers,
        );
        let objective = |qkv: &[f64]| -> f64 {
            naive(qkv, &forest)
                .iter()
                .zip(&d_out)
                .map(|(a, b)| a * b)
                .sum()
        };
        for i in (0..qkv.len()).step_by(223) {
            let mut moved = qkv.clone();
            moved[i] += 1e-5;
            let up = objective(&moved);
            moved[i] -= 2e-5;
            let slope = (up - objective(&moved)) / 2e-5;
            assert!(
                (slope - d_qkv[i]).abs() < 1e-6,
                "at {i}: {slope} and {}",
                d_qkv[i]
            );
        }
    }

    #[test]
    fn a_row_has_the_bits_of_a_sequence_of_its_own_on_any_threads() {
        let forest = forest();
        let (w, ow) = (DIMS.qkv_width(), DIMS.out_width());
        let f32s = |x: Vec<f64>| x.into_iter().map(|x| x as f32).collect::<Vec<_>>();
        let qkv = f32s(numbers(forest.n_rows() * w, 3));
        let d_out = f32s(numbers(forest.n_rows() * ow, 4));
        for isa in Isa::available() {
            let run = |threads: usize| {
                let compute = Compute::with_isa(threads, isa);
                let mut buffers = Buffers::default();
                let mut out = vec![0.0f32; forest.n_rows() * ow];
                let mut d_qkv = vec![0.0f32; qkv.len()];
                forward(&compute, &mut out, &qkv, &forest, DIMS, &mut buffers);
                backward(
                    &compute,
                    &mut d_qkv,
                    &d_out,
                    &qkv,
                    &forest,
                    DIMS,
                    &mut buffers,
                );
                (out, d_qkv)
            };
            let want = run(1);
            assert!(run(3) == want, "{}", isa.name());
            let compute = Compute::with_isa(2, isa);
            for node in forest.segments.iter().filter(|node| !node.rows.is_empty()) {
                let path = seen(&forest, node.rows.end - 1);
                let alone: Vec<f32> = path
                    .iter()
                    .flat_map(|&t| &qkv[t * w..][..w])
                    .copied()
                    .collect();
                let mut out = vec![0.0; path.len() * ow];
                let plain = Forest::new([(None, path.len())]);
                forward(
                    &compute,
                    &mut out,
                    &alone,
                    &plain,
                    DIMS,
                    &mut Buffers::default(),
                );
                for (i, &t) in path.iter().enumerate() {
                    assert_eq!(
                        out[i * ow..][..ow],
                        want.0[t * ow..][..ow],
                        "{}",
                        isa.name()
                    );
                }
            }
        }
    }
}
