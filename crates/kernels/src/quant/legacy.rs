//! ggml's first family: 32 weights to a block, one half-precision scale, perhaps one minimum.
//!
//! Four-bit codes lie two to a byte: weight `j` in the low half of byte `j`, weight `j + 16` in the high half.
//! The fifth bit of a five-bit code is bit `j` of a little-endian word.

use super::half_at;
use half::f16;

/// Weights in a block.
pub(super) const LEN: usize = 32;
const HALF: usize = LEN / 2;

/// Scale, 16 bytes of codes.
pub(super) const Q4_0_BYTES: usize = 2 + HALF;
/// Scale, minimum, 16 bytes of codes.
pub(super) const Q4_1_BYTES: usize = 4 + HALF;
/// Scale, fifth bits, 16 bytes of codes.
pub(super) const Q5_0_BYTES: usize = 2 + 4 + HALF;
/// Scale, minimum, fifth bits, 16 bytes of codes.
pub(super) const Q5_1_BYTES: usize = 4 + 4 + HALF;
/// Scale, 32 signed codes.
pub(super) const Q8_0_BYTES: usize = 2 + LEN;

pub(super) fn q4_0_values(out: &mut [f32; LEN], bytes: &[u8; Q4_0_BYTES]) {
    let d = half_at(bytes, 0);
    for (j, &pair) in bytes[2..].iter().enumerate() {
        out[j] = d * (i32::from(pair & 15) - 8) as f32;
        out[j + HALF] = d * (i32::from(pair >> 4) - 8) as f32;
    }
}

pub(super) fn q4_1_values(out: &mut [f32; LEN], bytes: &[u8; Q4_1_BYTES]) {
    let (d, m) = (half_at(bytes, 0), half_at(bytes, 2));
    for (j, &pair) in bytes[4..].iter().enumerate() {
        out[j] = d * f32::from(pair & 15) + m;
        out[j + HALF] = d * f32::from(pair >> 4) + m;
    }
}

pub(super) fn q5_0_values(out: &mut [f32; LEN], bytes: &[u8; Q5_0_BYTES]) {
    let d = half_at(bytes, 0);
    for j in 0..HALF {
        let (low, high) = five_bits(&bytes[2..], j);
        out[j] = d * (i32::from(low) - 16) as f32;
        out[j + HALF] = d * (i32::from(high) - 16) as f32;
    }
}

pub(super) fn q5_1_values(out: &mut [f32; LEN], bytes: &[u8; Q5_1_BYTES]) {
    let (d, m) = (half_at(bytes, 0), half_at(bytes, 2));
    for j in 0..HALF {
        let (low, high) = five_bits(&bytes[4..], j);
        out[j] = d * f32::from(low) + m;
        out[j + HALF] = d * f32::from(high) + m;
    }
}

pub(super) fn q8_0_values(out: &mut [f32; LEN], bytes: &[u8; Q8_0_BYTES]) {
    let d = half_at(bytes, 0);
    for (out, &q) in out.iter_mut().zip(&bytes[2..]) {
        *out = d * f32::from(q.cast_signed());
    }
}

/// Codes of weights `j` and `j + 16`, from the fifth bits followed by the nibbles.
fn five_bits(bytes: &[u8], j: usize) -> (u8, u8) {
    let fifth = |i: usize| ((bytes[i / 8] >> (i % 8)) & 1) << 4;
    let pair = bytes[4 + j];
    ((pair & 15) | fifth(j), (pair >> 4) | fifth(j + HALF))
}

pub(super) fn q8_0_bytes(values: &[f32; LEN]) -> [u8; Q8_0_BYTES] {
    let max = values.iter().fold(0.0f32, |max, v| max.max(v.abs()));
    let d = max / 127.0;
    let inverse = inverse_of(d);
    let mut bytes = [0; Q8_0_BYTES];
    bytes[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (code, v) in bytes[2..].iter_mut().zip(values) {
        // `round` takes ties away from zero, as C's roundf; the cast saturates and maps NaN to 0.
        *code = ((v * inverse).round() as i8).cast_unsigned();
    }
    bytes
}

pub(super) fn q4_0_bytes(values: &[f32; LEN]) -> [u8; Q4_0_BYTES] {
    // The weight of largest magnitude, sign kept (the first of equals), becomes code 0, that is -8.
    let peak = values.iter().fold(
        0.0f32,
        |peak, &v| if v.abs() > peak.abs() { v } else { peak },
    );
    let d = peak / -8.0;
    let inverse = inverse_of(d);
    // The product is exact in f64, which gives what a fused multiply-add gives: ggml's builds have one.
    let code = |v: f32| ((f64::from(v) * f64::from(inverse) + 8.5) as f32 as u8).min(15);
    let mut bytes = [0; Q4_0_BYTES];
    bytes[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    for (j, pair) in bytes[2..].iter_mut().enumerate() {
        *pair = code(values[j]) | (code(values[j + HALF]) << 4);
    }
    bytes
}

pub(super) fn q4_1_bytes(values: &[f32; LEN]) -> [u8; Q4_1_BYTES] {
    let min = values.iter().fold(f32::MAX, |min, &v| min.min(v));
    let max = values.iter().fold(f32::MIN, |max, &v| max.max(v));
    let d = (max - min) / 15.0;
    let inverse = inverse_of(d);
    let code = |v: f32| (((v - min) * inverse + 0.5) as u8).min(15);
    let mut bytes = [0; Q4_1_BYTES];
    bytes[..2].copy_from_slice(&f16::from_f32(d).to_le_bytes());
    bytes[2..4].copy_from_slice(&f16::from_f32(min).to_le_bytes());
    for (j, pair) in bytes[4..].iter_mut().enumerate() {
        *pair = code(values[j]) | (code(values[j + HALF]) << 4);
    }
    bytes
}

/// `1 / d`, or 0 for a block of zeros.
fn inverse_of(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}
