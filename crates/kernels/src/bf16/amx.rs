//! A block on tile registers: sixteen pairs of sixteen rows of `X` by sixteen columns of the panel at
//! once.
//!
//! `tdpbf16ps` sums the sixteen pairs of a product before it adds them, so a sum is one chain over
//! groups of sixteen pairs, in ascending order from the block's first, whatever the batch.

use super::Block;
use crate::amx::{self, Shapes, TILE};
use std::arch::x86_64::*;

/// Words of a row of a block's columns beyond whole tiles.
type Edge = [[f32; TILE]; TILE];

/// # Safety
/// Tiles are available, and the CPU has AVX-512; as [`Block::run`].
pub(super) unsafe fn run(block: &Block<'_>, y: *mut f32) {
    let whole = block.n_pairs / TILE * TILE;
    // SAFETY: passed on to the caller.
    unsafe {
        if whole > 0 || block.n_pairs == 0 {
            columns(block, y, 0..whole, TILE, block.go_on);
        }
        if whole < block.n_pairs {
            let go_on = block.go_on || whole > 0;
            columns(block, y, whole..block.n_pairs, block.n_pairs - whole, go_on);
        }
    }
}

/// The block over `pairs`, `words` at a time.
///
/// # Safety
/// As [`run`].
unsafe fn columns(
    block: &Block<'_>,
    y: *mut f32,
    pairs: std::ops::Range<usize>,
    words: usize,
    go_on: bool,
) {
    let whole = block.n_rows / TILE * TILE;
    // SAFETY: passed on to the caller; tiles are available.
    unsafe {
        for (rows, height) in [
            (0..whole, TILE),
            (whole..block.n_rows, block.n_rows - whole),
        ] {
            if rows.is_empty() {
                continue;
            }
            let _shapes = Shapes::new(height, words);
            let pass = Pass {
                block,
                pairs: pairs.clone(),
                words,
                height,
                go_on,
            };
            let mut i = rows.start;
            while i < rows.end {
                let both = i + 2 * height <= rows.end;
                match (block.n_cols.div_ceil(TILE), both) {
                    (1, true) => pass.tiles::<2, 1>(y, i),
                    (2, true) => pass.tiles::<2, 2>(y, i),
                    (3, true) => pass.tiles::<2, 3>(y, i),
                    (1, false) => pass.tiles::<1, 1>(y, i),
                    (2, false) => pass.tiles::<1, 2>(y, i),
                    (3, false) => pass.tiles::<1, 3>(y, i),
                    _ => pass.tiles::<1, 4>(y, i),
                }
                let wide = block.n_cols > 3 * TILE;
                i += if both && !wide { 2 * height } else { height };
            }
        }
    }
}

struct Pass<'a> {
    block: &'a Block<'a>,
    pairs: std::ops::Range<usize>,
    /// Pairs of a step.
    words: usize,
    /// Rows of a tile.
    height: usize,
    go_on: bool,
}

impl Pass<'_> {
    /// `R` tiles of rows from row `i` on by `V` of columns.
    ///
    /// # Safety
    /// Those rows exist; as [`run`], with the shapes of the pass.
    #[inline(always)]
    unsafe fn tiles<const R: usize, const V: usize>(&self, y: *mut f32, i: usize) {
        let block = self.block;
        let mut edge: Edge = [[0.0; TILE]; TILE];
        let mut turned = [0u32; 2 * TILE * TILE];
        let stride = 4 * block.y_stride;
        let lanes = block.n_cols - TILE * (V - 1);
        // SAFETY: the rows and columns are the block's; columns beyond it are neither read nor
        // written, they go by way of `edge`. X and the panel hold what the sizes say.
        unsafe {
            let y = |r: usize, v: usize| y.add((i + r * self.height) * block.y_stride + TILE * v);
            for r in 0..R {
                for v in 0..V {
                    if !self.go_on {
                        amx::zero(r * V + v);
                    } else if v + 1 < V || lanes == TILE {
                        amx::load(r * V + v, y(r, v), stride);
                    } else {
                        for (row, edge) in edge.iter_mut().enumerate().take(self.height) {
                            let from = y(r, v).add(row * block.y_stride);
                            std::ptr::copy_nonoverlapping(from, edge.as_mut_ptr(), lanes);
                        }
                        amx::load(r * V + v, edge.as_ptr().cast(), 4 * TILE);
                    }
                }
            }
            for p in self.pairs.clone().step_by(self.words) {
                let x = |r: usize| {
                    let row = (i + r * self.height) * block.x_stride;
                    block.x.as_ptr().wrapping_add(row + p * block.x_step)
                };
                let (x_at, x_stride) = if block.x_step == 1 {
                    ([x(0), x(R - 1)], 4 * block.x_stride)
                } else {
                    for r in 0..R {
                        self.turn(&mut turned[r * TILE * TILE..], x(r));
                    }
                    let at = turned.as_ptr();
                    ([at, at.add((R - 1) * TILE * TILE)], 4 * TILE)
                };
                let w = block.panel.as_ptr().add(p * block.w_stride);
                for r in 0..R {
                    amx::left(x_at[r], x_stride);
                    for v in 0..V {
                        amx::right(w.add(TILE * v), 4 * block.w_stride);
                        amx::add_bf16(r * V + v);
                    }
                }
            }
            for r in 0..R {
                for v in 0..V {
                    if v + 1 < V || lanes == TILE {
                        amx::store(r * V + v, y(r, v), stride);
                    } else {
                        amx::store(r * V + v, edge.as_mut_ptr().cast::<f32>(), 4 * TILE);
                        for (row, edge) in edge.iter().enumerate().take(self.height) {
                            let to = y(r, v).add(row * block.y_stride);
                            std::ptr::copy_nonoverlapping(edge.as_ptr(), to, lanes);
                        }
                    }
                }
            }
        }
    }

    /// Rows of a step from where they lie side by side: `out [height, words]`, rows a tile apart.
    ///
    /// # Safety
    /// As [`Pass::tiles`]; rows are neighbours.
    #[inline(always)]
    unsafe fn turn(&self, out: &mut [u32], x: *const u32) {
        let block = self.block;
        if self.height == TILE && self.words == TILE && block.x_stride == 1 {
            let out = (&mut out[..TILE * TILE]).try_into().expect("a tile");
            // SAFETY: sixteen pairs of sixteen rows exist; the CPU has AVX-512.
            return unsafe { turn_tile(out, x, block.x_step) };
        }
        for row in 0..self.height {
            for word in 0..self.words {
                // SAFETY: the row and the pair exist.
                out[row * TILE + word] =
                    unsafe { *x.add(row * block.x_stride + word * block.x_step) };
            }
        }
    }
}

/// Transposes sixteen lines of sixteen words, `stride` words apart.
///
/// # Safety
/// The lines can be read; the CPU has AVX-512.
#[target_feature(enable = "avx512f")]
unsafe fn turn_tile(out: &mut [u32; TILE * TILE], x: *const u32, stride: usize) {
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
            let out: &mut [u32; TILE] = (&mut out[row * TILE..][..TILE])
                .try_into()
                .expect("sixteen words");
            // SAFETY: the array is 64 bytes.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), words) };
        }
    }
}
