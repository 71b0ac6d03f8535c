//! Causal attention: over a block cache, and over a forest of segments with its backward.
//!
//! Both give a query row the same bits: scores are chains over the head width, mixtures are
//! chains over ascending positions, and a masked position adds an exact zero.
//!
//! Letters: `T` tokens, `H` query heads, `K` key-value heads, `G = H / K`, `Dh` head width,
//! `W = (H + 2K) Dh` the width of a row of queries, keys and values side by side.
//!
//! Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; grouped heads: Ainslie et al. 2023,
//! arXiv:2305.13245.

use crate::gemm::{Call, Dims, View, Write};
use crate::ops::softmax;
use crate::par::Parts;
use crate::{Compute, Real};
use std::ops::Range;

pub mod forest;
pub mod rounded;

/// Query rows that are worked on together.
const ROWS: usize = 32;

/// Positions of one block of a key-value cache.
pub const BLOCK: usize = 32;

/// Head counts and width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadDims {
    /// Query heads, `H`.
    pub n_heads: usize,
    /// Key-value heads, `K`; divides `H`.
    pub n_kv_heads: usize,
    /// Head width, `Dh`.
    pub head_dim: usize,
}

impl HeadDims {
    /// Width of a row of queries, keys and values: `(H + 2K) Dh`.
    pub fn qkv_width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Width of a row of outputs: `H Dh`.
    pub fn out_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Query heads per key-value head, `G`.
    fn group(&self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Where the keys of `kv_head` start in a row; its values start [`HeadDims::value_shift`] later.
    fn key_start(&self, kv_head: usize) -> usize {
        (self.n_heads + kv_head) * self.head_dim
    }

    fn value_shift(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }

    fn scale<R: Real>(&self) -> R {
        R::ONE / R::from_f64(self.head_dim as f64).sqrt()
    }

    /// Numbers that one cache block of one layer holds: `K [Dh, BLOCK]` keys, then `K [BLOCK, Dh]` values.
    pub fn block_len(&self) -> usize {
        2 * self.n_kv_heads * self.head_dim * BLOCK
    }
}

/// The new rows of one sequence and the blocks that hold its keys and values, the new ones
/// included.
#[derive(Debug)]
pub struct CachedSpan<'a, R> {
    /// Rows of `qkv` and `out`.
    pub rows: Range<usize>,
    /// Position of the first of these rows in the sequence.
    pub first_pos: usize,
    /// Blocks of this layer, [`HeadDims::block_len`] numbers each, from position 0 on.
    pub blocks: Vec<&'a [R]>,
}

/// Attention of new rows over cached keys and values.
///
/// Shapes: out [T, H Dh]; qkv [T, W], rotated
/// Errors: panics if a span has fewer blocks than positions
pub fn cached<R: Real>(
    compute: &Compute,
    out: &mut [R],
    qkv: &[R],
    spans: &[CachedSpan<'_, R>],
    dims: HeadDims,
) {
    let (w, ow, dh) = (dims.qkv_width(), dims.out_width(), dims.head_dim);
    let ranges: Vec<_> = spans.iter().map(|span| span.rows.clone()).collect();
    check_rows(out.len() / ow, qkv.len(), out.len(), &ranges, dims);
    // One task: a key-value head and some rows of one span.
    let mut tasks = Vec::new();
    for span in spans {
        assert!(
            span.blocks.len() * BLOCK >= span.first_pos + span.rows.len(),
            "every position is cached"
        );
        for rows in blocks(span.rows.len()) {
            tasks.extend((0..dims.n_kv_heads).map(|kv_head| (span, rows.clone(), kv_head)));
        }
    }
    let isa = compute.isa();
    let out = Parts::new(out);
    compute.pool().run(tasks.len(), |task| {
        let (span, rows, kv_head) = &tasks[task];
        let first_row = span.rows.start + rows.start;
        let n = span.first_pos + rows.end;
        let head = kv_head * dims.group();
        let mut probs = vec![R::ZERO; rows.len().max(dims.group()) * n];
        let key_len = dh * BLOCK;
        let key_block = |b: usize| &span.blocks[b][kv_head * key_len..][..key_len];
        let value_block =
            |b: usize| &span.blocks[b][(dims.n_kv_heads + kv_head) * key_len..][..key_len];
        // The heads of one token are rows of a product just as the tokens of one head are;
        // with a single token the former fill a tile better.
        let passes: Vec<(usize, usize, usize, usize)> = if rows.len() == 1 {
            vec![(head, dims.group(), dh, dh)]
        } else {
            (head..head + dims.group())
                .map(|head| (head, rows.len(), w, ow))
                .collect()
        };
        for (head, m, q_stride, out_stride) in passes {
            let query = View::rows(&qkv[first_row * w + head * dh..], q_stride);
            for b in 0..n.div_ceil(BLOCK) {
                let part = Dims {
                    m,
                    n: BLOCK.min(n - b * BLOCK),
                    k: dh,
                };
                let call = Call::new(query, (key_block(b), BLOCK), n, part, Write::Set);
                call.run(isa, &mut probs[b * BLOCK..]);
            }
            for (i, row) in probs.chunks_exact_mut(n).take(m).enumerate() {
                let own = if rows.len() == 1 {
                    n
                } else {
                    span.first_pos + rows.start + i + 1
                };
                softmax(isa, row, own, dims.scale());
            }
            for b in 0..n.div_ceil(BLOCK) {
                let part = Dims {
                    m,
                    n: dh,
                    k: BLOCK.min(n - b * BLOCK),
                };
                let write = if b == 0 { Write::Set } else { Write::Continue };
                let probs = View::rows(&probs[b * BLOCK..], n);
                let call = Call::new(probs, (value_block(b), dh), out_stride, part, write);
                // SAFETY: a task writes its own rows and the columns of its heads only; `out`
                // holds [T, H Dh] by `check_rows`.
                unsafe { R::gemm_serial(isa, &call, out.at(first_row * ow + head * dh)) };
            }
        }
    });
}

/// Writes the key and value of one token into slot `pos % BLOCK` of its block.
pub fn store_in_block<R: Real>(block: &mut [R], qkv_row: &[R], pos: usize, dims: HeadDims) {
    let (dh, slot) = (dims.head_dim, pos % BLOCK);
    let (keys, values) = block.split_at_mut(dims.n_kv_heads * dh * BLOCK);
    let row_keys = &qkv_row[dims.key_start(0)..][..dims.value_shift()];
    let row_values = &qkv_row[dims.key_start(0) + dims.value_shift()..][..dims.value_shift()];
    for (i, &x) in row_keys.iter().enumerate() {
        keys[i * BLOCK + slot] = x;
    }
    for (kv_head, x) in row_values.chunks_exact(dh).enumerate() {
        values[(kv_head * BLOCK + slot) * dh..][..dh].copy_from_slice(x);
    }
}

fn check_rows(
    n_rows: usize,
    qkv_len: usize,
    out_len: usize,
    seqs: &[Range<usize>],
    dims: HeadDims,
) {
    assert!(dims.n_kv_heads > 0 && dims.n_heads.is_multiple_of(dims.n_kv_heads));
    assert_eq!(qkv_len, n_rows * dims.qkv_width(), "qkv is [T, W]");
    assert_eq!(out_len, n_rows * dims.out_width(), "out is [T, H Dh]");
    let mut end = 0;
    for seq in seqs {
        assert!(
            seq.start >= end && seq.end >= seq.start && seq.end <= n_rows,
            "sequences are in order"
        );
        end = seq.end;
    }
}

fn blocks(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len)
        .step_by(ROWS)
        .map(move |start| start..(start + ROWS).min(len))
}

#[cfg(test)]
mod tests {
    use super::forest::{Buffers, Forest, forward};
    use super::*;
    use crate::Isa;
    use crate::noise::wide as numbers;

    const DIMS: HeadDims = HeadDims {
        n_heads: 6,
        n_kv_heads: 2,
        head_dim: 16,
    };

    #[test]
    fn cached_rows_have_the_bits_of_a_whole_sequence_however_they_are_cut() {
        let n = 75;
        let qkv = numbers(n * DIMS.qkv_width(), 3);
        let (w, ow) = (DIMS.qkv_width(), DIMS.out_width());
        let mut storage = vec![vec![0.0f32; DIMS.block_len()]; n.div_ceil(BLOCK)];
        for pos in 0..n {
            store_in_block(&mut storage[pos / BLOCK], &qkv[pos * w..][..w], pos, DIMS);
        }
        for isa in Isa::available() {
            let compute = Compute::with_isa(2, isa);
            let mut want = vec![0.0; n * ow];
            let whole = Forest::new([(None, n)]);
            forward(
                &compute,
                &mut want,
                &qkv,
                &whole,
                DIMS,
                &mut Buffers::default(),
            );
            for cut in [1, 2, 31, 33, 75] {
                for start in (0..n).step_by(cut) {
                    let rows = start..(start + cut).min(n);
                    let mut got = vec![0.0; rows.len() * ow];
                    let span = CachedSpan {
                        rows: 0..rows.len(),
                        first_pos: start,
                        blocks: storage.iter().map(Vec::as_slice).collect(),
                    };
                    cached(
                        &compute,
                        &mut got,
                        &qkv[start * w..rows.end * w],
                        &[span],
                        DIMS,
                    );
                    assert_eq!(
                        got,
                        want[start * ow..rows.end * ow],
                        "{} cut {cut} at {start}",
                        isa.name()
                    );
                }
            }
        }
    }
}
