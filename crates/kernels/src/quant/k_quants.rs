//! ggml's second family: 256 weights to a block, whose sub-blocks have small integer scales under one float scale.

use super::half_at;

/// Weights in a block.
pub(super) const LEN: usize = 256;

/// 16 scale-and-minimum bytes, 64 of codes, scale, minimum.
pub(super) const Q2_K_BYTES: usize = 16 + 64 + 4;
/// 32 bytes of third bits, 64 of codes, 12 of scales, scale.
pub(super) const Q3_K_BYTES: usize = 32 + 64 + 12 + 2;
/// Scale, minimum, 12 bytes of scales and minima, 128 of codes.
pub(super) const Q4_K_BYTES: usize = 4 + 12 + 128;
/// As `Q4_K`, with 32 bytes of fifth bits before the codes.
pub(super) const Q5_K_BYTES: usize = 4 + 12 + 32 + 128;
/// 128 bytes of low nibbles, 64 of high pairs, 16 signed scales, scale.
pub(super) const Q6_K_BYTES: usize = 128 + 64 + 16 + 2;

pub(super) fn q2_k_values(out: &mut [f32; LEN], bytes: &[u8; Q2_K_BYTES]) {
    let (scales, codes) = (&bytes[..16], &bytes[16..80]);
    let (d, d_min) = (half_at(bytes, 80), half_at(bytes, 82));
    // Each half of the block has 32 code bytes; bit pair `s` of byte `l` is weight `32 s + l` of the half.
    for (i, out) in out.iter_mut().enumerate() {
        let (half, s, l) = (i / 128, i % 128 / 32, i % 32);
        let scale = scales[i / 16];
        let q = (codes[32 * half + l] >> (2 * s)) & 3;
        *out = d * f32::from(scale & 15) * f32::from(q) - d_min * f32::from(scale >> 4);
    }
}

pub(super) fn q3_k_values(out: &mut [f32; LEN], bytes: &[u8; Q3_K_BYTES]) {
    let (third_bits, codes, scales) = (&bytes[..32], &bytes[32..96], &bytes[96..108]);
    let d = half_at(bytes, 108);
    // A 6-bit scale: its low nibble in the first 8 bytes (low halves first), its high pair in the last 4.
    let scale = |j: usize| {
        let low = (scales[j % 8] >> (4 * (j / 8))) & 15;
        let high = (scales[8 + j % 4] >> (2 * (j / 4))) & 3;
        d * (i32::from(low | (high << 4)) - 32) as f32
    };
    for (i, out) in out.iter_mut().enumerate() {
        let (half, s, l) = (i / 128, i % 128 / 32, i % 32);
        let q = (codes[32 * half + l] >> (2 * s)) & 3;
        let third = (third_bits[l] >> (4 * half + s)) & 1;
        *out = scale(i / 16) * (i32::from(q | (third << 2)) - 4) as f32;
    }
}

pub(super) fn q4_k_values(out: &mut [f32; LEN], bytes: &[u8; Q4_K_BYTES]) {
    let (d, d_min) = (half_at(bytes, 0), half_at(bytes, 2));
    let (scales, codes) = (&bytes[4..16], &bytes[16..]);
    for (s, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = six_bit_pair(scales, s);
        let (scale, min) = (d * f32::from(scale), d_min * f32::from(min));
        // Two sub-blocks share 32 bytes: the even one has the low nibbles, the odd one the high.
        for (l, out) in out.iter_mut().enumerate() {
            let q = (codes[s / 2 * 32 + l] >> (4 * (s % 2))) & 15;
            *out = scale * f32::from(q) - min;
        }
    }
}

pub(super) fn q5_k_values(out: &mut [f32; LEN], bytes: &[u8; Q5_K_BYTES]) {
    let (d, d_min) = (half_at(bytes, 0), half_at(bytes, 2));
    let (scales, fifth_bits, codes) = (&bytes[4..16], &bytes[16..48], &bytes[48..]);
    for (s, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, min) = six_bit_pair(scales, s);
        let (scale, min) = (d * f32::from(scale), d_min * f32::from(min));
        for (l, out) in out.iter_mut().enumerate() {
            let q = (codes[s / 2 * 32 + l] >> (4 * (s % 2))) & 15;
            let fifth = (fifth_bits[l] >> s) & 1;
            *out = scale * f32::from(q | (fifth << 4)) - min;
        }
    }
}

pub(super) fn q6_k_values(out: &mut [f32; LEN], bytes: &[u8; Q6_K_BYTES]) {
    let (lows, highs, scales) = (&bytes[..128], &bytes[128..192], &bytes[192..208]);
    let d = half_at(bytes, 208);
    // In each half of the block, quarter `s`: nibbles from 64 bytes (low halves, then high), pairs from 32.
    for (i, out) in out.iter_mut().enumerate() {
        let (half, s, l) = (i / 128, i % 128 / 32, i % 32);
        let low = (lows[64 * half + 32 * (s % 2) + l] >> (4 * (s / 2))) & 15;
        let high = (highs[32 * half + l] >> (2 * s)) & 3;
        let q = i32::from(low | (high << 4)) - 32;
        *out = d * f32::from(scales[i / 16].cast_signed()) * q as f32;
    }
}

/// The 6-bit scale and minimum of sub-block `s` of a `Q4_K` or `Q5_K` block.
///
/// The first four pairs lie in the low 6 bits of bytes 0-3 (scales) and 4-7 (minima); the last four have their low
/// nibbles in bytes 8-11 and their high bits in the spare top bits of bytes 0-7.
pub(super) fn six_bit_pair(bytes: &[u8], s: usize) -> (u8, u8) {
    if s < 4 {
        (bytes[s] & 63, bytes[s + 4] & 63)
    } else {
        (
            (bytes[s + 4] & 15) | ((bytes[s - 4] >> 6) << 4),
            (bytes[s + 4] >> 4) | ((bytes[s] >> 6) << 4),
        )
    }
}
