//! The product in plain Rust, the oracle of the vector ones.
//!
//! Each step is widened once and then serves all rows of the tile. On aarch64 the plain body
//! compiles to NEON.

use super::Tile;
use super::layout::{Layout, PANEL, Wide};
use super::rows::{Record, TILE};

/// Sums of a tile: `[row of X][row of W]`.
pub(super) type Sums = [[f32; PANEL]; TILE];

/// The oracle.
pub(super) fn scalar(layout: Layout, tile: &Tile<'_>, sums: &mut Sums) {
    let mut wide = Wide::EMPTY;
    for s in 0..tile.n_steps {
        wide.read(layout, tile.panel, s);
        for r in 0..tile.n_rows {
            let x = &tile.x[s * tile.n_rows + r];
            let halves = if layout.sixteens() { 2 } else { 1 };
            for half in 0..halves {
                let (start, scaled_sum) = sums_of(x, layout, half);
                let mut dots = [start; PANEL];
                for g in half * 4..half * 4 + 8 / halves {
                    for (dot, w) in dots.iter_mut().zip(wide.codes[g].as_chunks::<4>().0) {
                        for (w, &x) in w.iter().zip(&x.codes[4 * g..4 * g + 4]) {
                            *dot += i32::from(*w) * i32::from(x);
                        }
                    }
                }
                scale(layout, &mut sums[r], &dots, &wide, half, (x, scaled_sum));
            }
        }
    }
}

/// Where the dot products of `half` of a step start, and what a minimum is multiplied by.
#[inline(always)]
fn sums_of(x: &Record, layout: Layout, half: usize) -> (i32, f32) {
    let zero = layout.zero as i32;
    if !layout.sixteens() {
        return (x.neg_sum / 128 * zero, x.scaled_sum);
    }
    let neg_sum = if half == 0 {
        x.neg_sum_low
    } else {
        x.neg_sum - x.neg_sum_low
    } / 128;
    (
        neg_sum * zero,
        x.scale * -neg_sum as f32 + x.spike_in(true, half),
    )
}

#[inline(always)]
fn scale(
    layout: Layout,
    sums: &mut [f32; PANEL],
    dots: &[i32; PANEL],
    wide: &Wide,
    half: usize,
    (x, x_scaled_sum): (&Record, f32),
) {
    for ((sum, &dot), &w_scale) in sums.iter_mut().zip(dots).zip(&wide.scales[half]) {
        *sum = (dot as f32).mul_add(w_scale * x.scale, *sum);
    }
    let spike = x.spike_in(layout.sixteens(), half);
    if spike != 0.0 {
        let at = usize::from(x.spike_at);
        let codes = wide.codes[at / 4].as_chunks::<4>().0;
        for ((sum, code), &w_scale) in sums.iter_mut().zip(codes).zip(&wide.scales[half]) {
            let code = i32::from(code[at % 4]) - layout.zero as i32;
            *sum = (code as f32).mul_add(w_scale * spike, *sum);
        }
    }
    if layout.has_min() {
        for (sum, &min) in sums.iter_mut().zip(&wide.mins[half]) {
            *sum = min.mul_add(x_scaled_sum, *sum);
        }
    }
}
