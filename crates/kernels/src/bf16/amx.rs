//! A block on tile registers: sixteen pairs of sixteen rows of `X` by sixteen columns of the panel at
//! once.
//!
//! `tdpbf16ps` sums the sixteen pairs of a product before it adds them, so a sum is one chain over
//! groups of sixteen pairs, in ascending order from the block's first, whatever the batch.

use super::Block;
use crate::amx::{self, SUMS, TILE};
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::ops::Range;

/// Groups of pairs whose right operands are kept at hand: 54 KB of three vectors of columns.
const DEPTH: usize = 18;
/// Rows from which on it pays to lay the right operands out first.
const MANY_ROWS: usize = 4 * TILE;
/// Vectors of columns of a block, at most.
const VECTORS: usize = 4;

/// A tile's words.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Words([u32; TILE * TILE]);

impl Words {
    const ZERO: Words = Words([0; TILE * TILE]);
}

/// What a block works in.
struct Scratch {
    /// Right operands, `[vector][group]`.
    right: [Words; VECTORS * DEPTH],
    /// Left operands of one tile of rows, `[group]`.
    left: [Words; DEPTH],
}

thread_local! {
    static SCRATCH: RefCell<Box<Scratch>> = RefCell::new(Box::new(Scratch {
        right: [Words::ZERO; VECTORS * DEPTH],
        left: [Words::ZERO; DEPTH],
    }));
}

/// # Safety
/// Tiles are available, and the CPU has AVX-512; as [`Block::run`].
pub(super) unsafe fn run(block: &Block<'_>, y: *mut f32) {
    let groups = block.n_pairs / TILE;
    let pieces = groups.div_ceil(DEPTH).max(1);
    let depth = groups.div_ceil(pieces);
    SCRATCH.with_borrow_mut(|scratch| {
        let mut go_on = block.go_on;
        let mut first = 0;
        // Without any pair the sums are still to be set to zero.
        while first < groups || (block.n_pairs == 0 && !go_on) {
            let last = groups.min(first + depth);
            // SAFETY: passed on to the caller.
            unsafe { piece(block, y, first * TILE..last * TILE, TILE, go_on, scratch) };
            (first, go_on) = (last, true);
        }
        let rest = block.n_pairs % TILE;
        if rest > 0 {
            let pairs = block.n_pairs - rest..block.n_pairs;
            // SAFETY: as above.
            unsafe { piece(block, y, pairs, rest, go_on, scratch) };
        }
    });
}

/// The block over at most [`DEPTH`] groups of `words` pairs.
///
/// # Safety
/// As [`run`].
#[target_feature(enable = "avx512f")]
unsafe fn piece(
    block: &Block<'_>,
    y: *mut f32,
    pairs: Range<usize>,
    words: usize,
    go_on: bool,
    scratch: &mut Scratch,
) {
    let whole = block.n_rows / TILE * TILE;
    let groups = pairs.len() / words;
    let vectors = block.n_cols.div_ceil(TILE);
    // SAFETY: the panel holds whole vectors of each pair, the scratch has room for all groups; the
    // rest is passed on to the caller.
    unsafe {
        let mut w = block
            .panel
            .as_ptr()
            .wrapping_add(pairs.start * block.w_stride);
        let mut w_steps = [TILE, words * block.w_stride, 4 * block.w_stride];
        if block.n_rows >= MANY_ROWS && words == TILE {
            for v in 0..vectors {
                for g in 0..groups {
                    let from = w.add(g * TILE * block.w_stride + v * TILE);
                    lay_out(&mut scratch.right[v * DEPTH + g], from, block.w_stride);
                }
            }
            w = scratch.right.as_ptr().cast();
            w_steps = [DEPTH * TILE * TILE, TILE * TILE, 4 * TILE];
        }
        for (rows, height) in [
            (0..whole, TILE),
            (whole..block.n_rows, block.n_rows - whole),
        ] {
            if rows.is_empty() {
                continue;
            }
            amx::shape(height, words);
            for i in rows.step_by(height) {
                let x = block
                    .x
                    .as_ptr()
                    .wrapping_add(i * block.x_stride + pairs.start * block.x_step);
                let (mut x, mut x_steps) = (x, [words, 4 * block.x_stride]);
                if block.x_step != 1 {
                    for (g, out) in scratch.left[..groups].iter_mut().enumerate() {
                        let from = x.wrapping_add(g * words * block.x_step);
                        turn(block, out, from, height, words);
                    }
                    x = scratch.left.as_ptr().cast();
                    x_steps = [TILE * TILE, 4 * TILE];
                }
                let pass = Pass {
                    x,
                    x_steps,
                    w,
                    w_steps,
                    groups,
                    height,
                    y: y.add(i * block.y_stride),
                    y_stride: block.y_stride,
                    n_cols: block.n_cols,
                    go_on,
                };
                match vectors {
                    1 => pass.tiles::<1>(0),
                    2 => pass.tiles::<2>(0),
                    3 => pass.tiles::<3>(0),
                    _ => {
                        pass.tiles::<2>(0);
                        pass.tiles::<2>(2);
                    }
                }
            }
        }
    }
}

/// One tile of rows over the groups of a piece.
struct Pass {
    x: *const u32,
    /// Words from a group to the next, bytes from a row to the next.
    x_steps: [usize; 2],
    w: *const u32,
    /// Words from a vector to the next and from a group to the next, bytes from a pair to the next.
    w_steps: [usize; 3],
    groups: usize,
    height: usize,
    y: *mut f32,
    y_stride: usize,
    n_cols: usize,
    go_on: bool,
}

impl Pass {
    /// `V` vectors of columns from vector `first` on.
    ///
    /// # Safety
    /// As [`run`], with the shapes of the pass; the operands hold what the steps say.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn tiles<const V: usize>(&self, first: usize) {
        const { assert!(V <= SUMS) };
        let mut edge = Words::ZERO;
        let edge: *mut f32 = edge.0.as_mut_ptr().cast();
        let stride = 4 * self.y_stride;
        let lanes = |v: usize| (self.n_cols - TILE * (first + v)).min(TILE);
        // SAFETY: columns beyond the block are neither read nor written, they go by way of `edge`;
        // the caller vouches for the rest.
        unsafe {
            let y = |v: usize| self.y.add(TILE * (first + v));
            for v in 0..V {
                if !self.go_on {
                    amx::zero(v);
                } else if lanes(v) == TILE {
                    amx::load(v, y(v), stride);
                } else {
                    for row in 0..self.height {
                        let from = y(v).add(row * self.y_stride);
                        std::ptr::copy_nonoverlapping(from, edge.add(row * TILE), lanes(v));
                    }
                    amx::load(v, edge, 4 * TILE);
                }
            }
            let [of_vector, of_group, of_pair] = self.w_steps;
            let (mut x, mut w) = (self.x, self.w.wrapping_add(first * of_vector));
            for _ in 0..self.groups {
                amx::left(x, self.x_steps[1]);
                for v in 0..V {
                    amx::right(v, w.wrapping_add(v * of_vector), of_pair);
                    amx::add_bf16(v);
                }
                x = x.wrapping_add(self.x_steps[0]);
                w = w.wrapping_add(of_group);
            }
            for v in 0..V {
                if lanes(v) == TILE {
                    amx::store(v, y(v), stride);
                } else {
                    amx::store(v, edge, 4 * TILE);
                    for row in 0..self.height {
                        let to = y(v).add(row * self.y_stride);
                        std::ptr::copy_nonoverlapping(edge.add(row * TILE), to, lanes(v));
                    }
                }
            }
        }
    }
}

/// Sixteen lines of sixteen words, `stride` words apart, side by side.
///
/// # Safety
/// The lines can be read; the CPU has AVX-512.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn lay_out(out: &mut Words, from: *const u32, stride: usize) {
    let out = out.0.as_mut_ptr();
    for i in 0..TILE {
        // Whole lines: a tile that is loaded right after waits for stores of less.
        // SAFETY: the caller vouches for the line; the array has sixteen.
        unsafe {
            let line = _mm512_loadu_si512(from.add(i * stride).cast());
            _mm512_store_si512(out.add(i * TILE).cast(), line);
        }
    }
}

/// A left operand from rows that lie side by side: `out [height, words]`, rows a tile's width apart.
///
/// # Safety
/// Rows and pairs exist; the CPU has AVX-512.
unsafe fn turn(block: &Block<'_>, out: &mut Words, x: *const u32, height: usize, words: usize) {
    if height == TILE && words == TILE && block.x_stride == 1 {
        // SAFETY: sixteen pairs of sixteen neighbouring rows exist.
        return unsafe { turn_tile(out, x, block.x_step) };
    }
    for row in 0..height {
        for word in 0..words {
            // SAFETY: the row and the pair exist.
            out.0[row * TILE + word] =
                unsafe { *x.add(row * block.x_stride + word * block.x_step) };
        }
    }
}

/// Transposes sixteen lines of sixteen words, `stride` words apart.
///
/// # Safety
/// The lines can be read; the CPU has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn turn_tile(out: &mut Words, x: *const u32, stride: usize) {
    let mut a = [_mm512_setzero_si512(); TILE];
    for (i, a) in a.iter_mut().enumerate() {
        // SAFETY: the caller vouches for the lines.
        *a = unsafe { _mm512_loadu_si512(x.add(i * stride).cast()) };
    }
    let mut b = a;
    for i in 0..8 {
        b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for i in 0..4 {
        for h in 0..2 {
            let (low, high) = (b[4 * i + h], b[4 * i + 2 + h]);
            a[4 * i + 2 * h] = _mm512_unpacklo_epi64(low, high);
            a[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(low, high);
        }
    }
    // a[4 i + c]: lines 4 i to 4 i + 3 of columns c, 4 + c, 8 + c and 12 + c.
    for c in 0..4 {
        let low = _mm512_shuffle_i32x4::<0x88>(a[c], a[4 + c]);
        let low_odd = _mm512_shuffle_i32x4::<0xdd>(a[c], a[4 + c]);
        let high = _mm512_shuffle_i32x4::<0x88>(a[8 + c], a[12 + c]);
        let high_odd = _mm512_shuffle_i32x4::<0xdd>(a[8 + c], a[12 + c]);
        let done = [
            (c, _mm512_shuffle_i32x4::<0x88>(low, high)),
            (8 + c, _mm512_shuffle_i32x4::<0xdd>(low, high)),
            (4 + c, _mm512_shuffle_i32x4::<0x88>(low_odd, high_odd)),
            (12 + c, _mm512_shuffle_i32x4::<0xdd>(low_odd, high_odd)),
        ];
        for (row, words) in done {
            // SAFETY: a tile has sixteen lines.
            unsafe { _mm512_store_si512(out.0.as_mut_ptr().add(row * TILE).cast(), words) };
        }
    }
}
