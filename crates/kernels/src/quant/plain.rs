//! The formats without blocks: singles, halves and brain floats, little-endian.

use half::{bf16, f16};

pub(super) fn f32_values(out: &mut [f32; 1], bytes: &[u8; 4]) {
    *out = [f32::from_le_bytes(*bytes)];
}

pub(super) fn f32_bytes(values: &[f32; 1]) -> [u8; 4] {
    values[0].to_le_bytes()
}

pub(super) fn f16_values(out: &mut [f32; 1], bytes: &[u8; 2]) {
    *out = [f16::from_le_bytes(*bytes).to_f32()];
}

pub(super) fn f16_bytes(values: &[f32; 1]) -> [u8; 2] {
    f16::from_f32(values[0]).to_le_bytes()
}

pub(super) fn bf16_values(out: &mut [f32; 1], bytes: &[u8; 2]) {
    *out = [bf16::from_le_bytes(*bytes).to_f32()];
}

pub(super) fn bf16_bytes(values: &[f32; 1]) -> [u8; 2] {
    bf16::from_f32(values[0]).to_le_bytes()
}
