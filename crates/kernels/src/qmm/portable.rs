//! The product in plain Rust, the oracle of the vector ones, and its AVX2 twin.
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
                scale(
                    layout,
                    &mut sums[r],
                    &dots,
                    &wide,
                    half,
                    x.scale,
                    scaled_sum,
                );
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
    (neg_sum * zero, x.scale * -neg_sum as f32)
}

#[inline(always)]
fn scale(
    layout: Layout,
    sums: &mut [f32; PANEL],
    dots: &[i32; PANEL],
    wide: &Wide,
    half: usize,
    x_scale: f32,
    x_scaled_sum: f32,
) {
    for ((sum, &dot), &w_scale) in sums.iter_mut().zip(dots).zip(&wide.scales[half]) {
        *sum = (dot as f32).mul_add(w_scale * x_scale, *sum);
    }
    if layout.has_min() {
        for (sum, &min) in sums.iter_mut().zip(&wide.mins[half]) {
            *sum = min.mul_add(x_scaled_sum, *sum);
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2 {
    use super::*;
    use crate::qmm::layout::Codes;
    use std::arch::x86_64::*;

    /// `vpmaddubsw` saturates at 16 bits, so it gets codes of at most 4 bits: a sum over the
    /// eight groups of a step stays within 8 * 2 * 15 * 127 = 30480. Wider codes are cut into
    /// nibbles, and the sums of the high ones count sixteenfold.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(in crate::qmm) fn product(layout: Layout, tile: &Tile<'_>, sums: &mut Sums) {
        let mut wide = Wide::EMPTY;
        let nibble = _mm256_set1_epi8(15);
        let ones = _mm256_set1_epi16(1);
        for s in 0..tile.n_steps {
            wide.read(layout, tile.panel, s);
            for r in 0..tile.n_rows {
                let x = &tile.x[s * tile.n_rows + r];
                let words: &[i32] = bytemuck::cast_slice(&x.codes);
                let halves = if layout.sixteens() { 2 } else { 1 };
                for half in 0..halves {
                    let (start, scaled_sum) = sums_of(x, layout, half);
                    let start = _mm256_set1_epi32(start);
                    let mut dots = [0i32; PANEL];
                    for (v, dots) in dots.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                        let mut low = _mm256_setzero_si256();
                        let mut high = _mm256_setzero_si256();
                        for g in half * 4..half * 4 + 8 / halves {
                            let x = _mm256_set1_epi32(words[g]);
                            // SAFETY: 32 bytes from 32 v, of the 128 that a group has.
                            let w = unsafe {
                                _mm256_loadu_si256(wide.codes[g][32 * v..][..32].as_ptr().cast())
                            };
                            if layout.codes == Codes::Nibbles {
                                low = _mm256_add_epi16(low, _mm256_maddubs_epi16(w, x));
                            } else {
                                let above = _mm256_and_si256(_mm256_srli_epi16::<4>(w), nibble);
                                let w = _mm256_and_si256(w, nibble);
                                low = _mm256_add_epi16(low, _mm256_maddubs_epi16(w, x));
                                high = _mm256_add_epi16(high, _mm256_maddubs_epi16(above, x));
                            }
                        }
                        let high = _mm256_slli_epi32::<4>(_mm256_madd_epi16(high, ones));
                        let low = _mm256_add_epi32(_mm256_madd_epi16(low, ones), start);
                        // SAFETY: `dots` is eight words.
                        unsafe {
                            _mm256_storeu_si256(
                                dots.as_mut_ptr().cast(),
                                _mm256_add_epi32(low, high),
                            );
                        }
                    }
                    scale(
                        layout,
                        &mut sums[r],
                        &dots,
                        &wide,
                        half,
                        x.scale,
                        scaled_sum,
                    );
                }
            }
        }
    }
}
