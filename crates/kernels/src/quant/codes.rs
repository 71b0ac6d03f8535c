//! Blocks taken apart into unsigned codes and scales, for products that multiply integers.
//!
//! Four consecutive weights make a little-endian word, so that bits are moved four weights at a time.

use super::{Format, k_quants};

const LOW: u32 = 0x0f0f_0f0f;
const PAIR: u32 = 0x0303_0303;
const BIT: u32 = 0x0101_0101;

/// One block of a quantised format.
///
/// Its weights are `scale (code - zero) + min` with the format's zero point, where scale and minimum are the
/// half-precision `d` and `min` themselves, or `d scales[i]` and `-min mins[i]` for sub-block `i`.
pub(crate) struct Parts {
    /// The codes as bytes, four to a word, in the order of the weights.
    pub(crate) words: [u32; 64],
    /// Bits of the block's scale.
    pub(crate) d: u16,
    /// Bits of the block's minimum, or of the factor of its minima.
    pub(crate) min: u16,
    /// Integer scales of the sub-blocks; signed where the format's are.
    pub(crate) scales: [u8; 16],
    /// Integer minima of the sub-blocks.
    pub(crate) mins: [u8; 16],
}

impl Parts {
    pub(crate) const EMPTY: Parts = Parts {
        words: [0; 64],
        d: 0,
        min: 0,
        scales: [0; 16],
        mins: [0; 16],
    };
}

/// Takes one block apart. Panics on a plain format, which has no codes.
#[inline]
pub(crate) fn take_apart(format: Format, block: &[u8], parts: &mut Parts) {
    let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
    let word =
        |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    let out = &mut parts.words;
    match format {
        Format::Q4_0 => {
            parts.d = half(0);
            nibbles(out, |g| word(2 + 4 * g));
        }
        Format::Q4_1 => {
            (parts.d, parts.min) = (half(0), half(2));
            nibbles(out, |g| word(4 + 4 * g));
        }
        Format::Q5_0 => {
            parts.d = half(0);
            nibbles(out, |g| word(6 + 4 * g));
            fifths(out, word(2));
        }
        Format::Q5_1 => {
            (parts.d, parts.min) = (half(0), half(2));
            nibbles(out, |g| word(8 + 4 * g));
            fifths(out, word(4));
        }
        Format::Q8_0 => {
            parts.d = half(0);
            // Flipping the sign bit adds 128.
            (0..8).for_each(|g| out[g] = word(2 + 4 * g) ^ 0x8080_8080);
        }
        Format::Q2_K => {
            for (scale, (low, high)) in block[..16]
                .iter()
                .zip(parts.scales.iter_mut().zip(&mut parts.mins))
            {
                (*low, *high) = (scale & 15, scale >> 4);
            }
            (parts.d, parts.min) = (half(80), half(82));
            for (i, out) in out.iter_mut().enumerate() {
                let (half, s, l) = (i / 32, i % 32 / 8, i % 8);
                *out = (word(16 + 32 * half + 4 * l) >> (2 * s)) & PAIR;
            }
        }
        Format::Q3_K => {
            let scales = &block[96..108];
            for (j, scale) in parts.scales.iter_mut().enumerate() {
                let low = (scales[j % 8] >> (4 * (j / 8))) & 15;
                let high = (scales[8 + j % 4] >> (2 * (j / 4))) & 3;
                *scale = (low | high << 4).wrapping_sub(32);
            }
            parts.d = half(108);
            for (i, out) in out.iter_mut().enumerate() {
                let (half, s, l) = (i / 32, i % 32 / 8, i % 8);
                let pair = (word(32 + 32 * half + 4 * l) >> (2 * s)) & PAIR;
                *out = pair | ((word(4 * l) >> (4 * half + s)) & BIT) << 2;
            }
        }
        Format::Q4_K | Format::Q5_K => {
            (parts.d, parts.min) = (half(0), half(2));
            for s in 0..8 {
                (parts.scales[s], parts.mins[s]) = k_quants::six_bit_pair(&block[4..16], s);
            }
            let codes = if format == Format::Q4_K { 16 } else { 48 };
            for (i, out) in out.iter_mut().enumerate() {
                let (s, l) = (i / 8, i % 8);
                *out = (word(codes + s / 2 * 32 + 4 * l) >> (4 * (s % 2))) & LOW;
                if format == Format::Q5_K {
                    *out |= ((word(16 + 4 * l) >> s) & BIT) << 4;
                }
            }
        }
        Format::Q6_K => {
            parts.scales.copy_from_slice(&block[192..208]);
            parts.d = half(208);
            for (i, out) in out.iter_mut().enumerate() {
                let (half, s, l) = (i / 32, i % 32 / 8, i % 8);
                let low = word(64 * half + 32 * (s % 2) + 4 * l) >> (4 * (s / 2));
                let high = word(128 + 32 * half + 4 * l) >> (2 * s);
                *out = low & LOW | (high & PAIR) << 4;
            }
        }
        Format::F32 | Format::F16 | Format::BF16 => panic!("{} has no codes", format.name()),
    }
}

/// Sixteen bytes of nibbles: the low ones are the first sixteen weights.
fn nibbles(out: &mut [u32; 64], word: impl Fn(usize) -> u32) {
    for g in 0..4 {
        (out[g], out[g + 4]) = (word(g) & LOW, (word(g) >> 4) & LOW);
    }
}

/// Adds bit `i` of `bits` to weight `i` as its fifth bit.
fn fifths(out: &mut [u32; 64], bits: u32) {
    for (g, out) in out[..8].iter_mut().enumerate() {
        // Bits 0..3 land on bits 0, 8, 16 and 24.
        let spread = ((bits >> (4 * g)) & 15).wrapping_mul(0x0020_4081) & BIT;
        *out |= spread << 4;
    }
}
