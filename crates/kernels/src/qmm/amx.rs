//! The product of many rows on tile registers: one instruction multiplies sixteen rows of `X` by
//! sixteen of `W` over a whole step.
//!
//! Dot products of a step are exact integers, so the bits are those of every other way. They are
//! stored and scaled there: sums of sixteen rows by one vector of the panel stay in registers.

use super::layout::{Layout, Line, Scales};
use super::rows::Record;
use super::vnni::{Kind, Q2_K, Q4_1, Q4_K, Q6_K, Q8_0, scaled_sum_of};
use super::vnni_wide::{wide_lines, wide_scales};
use super::{Tile, layout::PANEL};
use crate::amx::{self, Shapes};
use crate::quant::Format;
use std::arch::x86_64::*;

/// Rows of a full tile.
pub(super) const ROWS: usize = amx::TILE;
/// Fewer rows than this leave most of a tile empty.
pub(super) const MIN_ROWS: usize = 5;

/// Dot products of a step as they are stored.
#[repr(C, align(64))]
struct Dots([[i32; 16]; ROWS]);

/// Writes the products of tiles, each to its place, with a panel that `widen` wrote with codes of
/// zero point 0.
///
/// # Safety
/// Tiles are available and the CPU has AVX-512 with VNNI; the tiles' slices hold what their sizes
/// say; each place points to `n_rows` rows of `n_cols` that nobody else touches meanwhile.
pub(super) unsafe fn product<'a>(
    format: Format,
    tiles: impl Iterator<Item = (Tile<'a>, *mut f32)>,
    panel: &[Line],
) {
    let layout = Layout::of(format);
    // SAFETY: the caller vouches for all of it.
    unsafe {
        // A format stands for all whose wide panels look the same.
        match layout.scales {
            Scales::Half => each::<Q8_0>(tiles, panel),
            Scales::HalfMin => each::<Q4_1>(tiles, panel),
            Scales::Super32Min => each::<Q4_K>(tiles, panel),
            Scales::Super16 => each::<Q6_K>(tiles, panel),
            Scales::Super16Min => each::<Q2_K>(tiles, panel),
        }
    }
}

/// # Safety
/// As [`product`].
unsafe fn each<'a, K: Kind>(tiles: impl Iterator<Item = (Tile<'a>, *mut f32)>, panel: &[Line]) {
    let words = if K::LAYOUT.sixteens() { 4 } else { 8 };
    let mut shapes: Option<(usize, Shapes)> = None;
    for (tile, y) in tiles {
        if shapes.as_ref().is_none_or(|(rows, _)| *rows != tile.n_rows) {
            // The old ones go first: a thread has but one set.
            drop(shapes.take());
            // SAFETY: tiles are available.
            shapes = Some((tile.n_rows, unsafe { Shapes::new(tile.n_rows, words) }));
        }
        let two = tile.n_cols > 16;
        // SAFETY: the caller vouches for the tile; the shapes are those of its rows.
        unsafe {
            if tile.n_rows == ROWS {
                block::<K, ROWS, 0>(&tile, panel, y);
                if two {
                    block::<K, ROWS, 1>(&tile, panel, y);
                }
            } else {
                block::<K, 0, 0>(&tile, panel, y);
                if two {
                    block::<K, 0, 1>(&tile, panel, y);
                }
            }
        }
    }
}

/// Vector `V` of a tile of `R` rows, or of as many as it has where `R` is 0.
///
/// # Safety
/// As [`product`], with shapes of `n_rows`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn block<K: Kind, const R: usize, const V: usize>(
    tile: &Tile<'_>,
    panel: &[Line],
    y: *mut f32,
) {
    let layout = K::LAYOUT;
    let rows = if R == 0 { tile.n_rows.min(ROWS) } else { R };
    let halves = if layout.sixteens() { 2 } else { 1 };
    let mut acc = [_mm512_setzero_ps(); ROWS];
    let mut dots = Dots([[0; 16]; ROWS]);
    let mut x = tile.x.as_ptr();
    let mut w = panel.as_ptr();
    debug_assert!(tile.x_step == tile.n_rows && tile.n_cols <= PANEL);
    // SAFETY: the panel holds the lines of n_steps wide steps, X holds the rows' records for each;
    // the operands of a half are `rows` by four words and four words by sixteen, or eight.
    unsafe {
        for _ in 0..tile.n_steps {
            let spikes = (*x).tile_spikes != 0;
            for half in 0..halves {
                amx::zero(0);
                amx::left((*x).codes.as_ptr().add(16 * half), size_of::<Record>());
                amx::right(w.add(8 * half + V), 128);
                amx::add_int8(0);
                amx::store(0, dots.0.as_mut_ptr(), 64);
                let (scale, min) = wide_scales::<K>(w.add(16), half);
                for r in 0..rows {
                    let dot = _mm512_load_si512(dots.0[r].as_ptr().cast());
                    let by = _mm512_mul_ps(scale[V], _mm512_set1_ps((*x.add(r)).scale));
                    acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), by, acc[r]);
                }
                if spikes {
                    // By way of a copy: its address must not keep the sums in memory.
                    let mut sums = acc;
                    add_spikes(&mut sums[..rows], x, (layout, half), scale[V], w.add(V));
                    acc = sums;
                }
                if layout.has_min() {
                    for r in 0..rows {
                        let x_sum = _mm512_set1_ps(scaled_sum_of(&*x.add(r), layout, half));
                        acc[r] = _mm512_fmadd_ps(min[V], x_sum, acc[r]);
                    }
                }
            }
            w = w.add(wide_lines(layout));
            x = x.add(tile.x_step);
        }
        let lanes = (tile.n_cols - 16 * V).min(16);
        let mask = ((1u32 << lanes) - 1) as __mmask16;
        for r in 0..rows {
            _mm512_mask_storeu_ps(y.wrapping_add(r * tile.y_stride + 16 * V), mask, acc[r]);
        }
    }
}

/// Adds what the spikes of rows in `half` of a step are multiplied by, where there are any; `codes`
/// points to the vector's first line, each second one is its.
///
/// # Safety
/// The CPU has AVX-512; `x` points to as many records as there are sums, `codes` to a wide step.
#[cold]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn add_spikes(
    sums: &mut [__m512],
    x: *const Record,
    (layout, half): (Layout, usize),
    scale: __m512,
    codes: *const Line,
) {
    for (r, sum) in sums.iter_mut().enumerate() {
        // SAFETY: the caller vouches for the record and the line of its group.
        let (x, codes) = unsafe {
            let x = &*x.add(r);
            let line = codes.add(2 * (usize::from(x.spike_at) / 4));
            (x, _mm512_load_si512(line.cast()))
        };
        let spike = x.spike_in(layout.sixteens(), half);
        if spike == 0.0 {
            continue;
        }
        // The byte to the top of its word, and down again with its sign.
        let up = _mm_cvtsi32_si128(24 - 8 * i32::from(x.spike_at % 4));
        let code = _mm512_srai_epi32::<24>(_mm512_sll_epi32(codes, up));
        let by = _mm512_mul_ps(scale, _mm512_set1_ps(spike));
        *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), by, *sum);
    }
}
