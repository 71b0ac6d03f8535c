//! Activations in eight bits: what a quantised product reads beside the weights.

use super::layout::STEP;
use crate::isa::for_each_isa;
use crate::{Compute, Isa, ops};
use bytemuck::{Pod, Zeroable};

/// Rows that a product takes together; their records interleave.
pub(super) const TILE: usize = 6;

/// 32 activations of one row.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Record {
    pub(super) codes: [i8; STEP],
    pub(super) scale: f32,
    /// `scale` times the sum of the codes: what a minimum of the weights is multiplied by.
    pub(super) scaled_sum: f32,
    /// -128 times the sum of the codes: where a dot product with codes of zero point 128 starts.
    pub(super) neg_sum: i32,
    /// The same of the first 16 codes.
    pub(super) neg_sum_low: i32,
}

/// Activations `X [m, k]` quantised to eight bits; the buffer is kept between calls.
///
/// Math:     per 32 of a row: scale = max|x| / 127;  code = round(x * (127 / max|x|))
/// Numerics: to nearest, ties to even; a row's codes depend on that row alone. A block with a
///           NaN has a NaN scale, a block below 1e-30 is zero
#[derive(Clone, Debug, Default)]
pub struct QuantRows {
    /// Tiles of [`TILE`] rows, in each `[step][row of the tile]`; the last tile may have less.
    records: Vec<Record>,
    m: usize,
    k: usize,
}

impl QuantRows {
    /// No rows yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Rows held.
    pub fn m(&self) -> usize {
        self.m
    }

    /// Columns held.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Quantises `x [m, k]`.
    ///
    /// Panics if `x` has another length.
    pub fn quantise(&mut self, compute: &Compute, x: &[f32], m: usize, k: usize) {
        assert_eq!(x.len(), m * k, "X is [m, k]");
        self.fill(compute, m, k, |isa, i, out, stride| {
            quantise_row(isa, out, stride, &x[i * k..][..k]);
        });
    }

    /// Quantises the root-mean-square norm of `x [m, w.len()]`: the bits of [`ops::rms_norm`]
    /// followed by [`QuantRows::quantise`].
    pub fn quantise_norm(&mut self, compute: &Compute, x: &[f32], m: usize, w: &[f32], eps: f32) {
        let k = w.len();
        assert_eq!(x.len(), m * k, "X is [m, k]");
        self.fill(compute, m, k, |isa, i, out, stride| {
            let x = &x[i * k..][..k];
            let mean = ops::dot(isa, x, x) / k as f32;
            let rstd = 1.0 / (mean + eps).sqrt();
            quantise_norm_row(isa, out, stride, x, w, rstd);
        });
    }

    /// Quantises the gated activation of `gate_up [m, 2 f]`: the bits of [`ops::swiglu`]
    /// followed by [`QuantRows::quantise`].
    pub fn quantise_swiglu(&mut self, compute: &Compute, gate_up: &[f32], m: usize, f: usize) {
        assert_eq!(gate_up.len(), 2 * m * f, "the gate and up are [m, 2 f]");
        self.fill(compute, m, f, |isa, i, out, stride| {
            let (gate, up) = gate_up[2 * i * f..][..2 * f].split_at(f);
            quantise_swiglu_row(isa, out, stride, gate, up);
        });
    }

    /// Runs `row(isa, i, out, stride)` for each row: its record of step `s` is `out[s * stride]`.
    fn fill(
        &mut self,
        compute: &Compute,
        m: usize,
        k: usize,
        row: impl Fn(Isa, usize, &mut [Record], usize) + Sync,
    ) {
        let n_steps = k.div_ceil(STEP);
        (self.m, self.k) = (m, k);
        let len = m * n_steps;
        // Only grown: every record of the new rows is written below.
        if self.records.len() < len {
            self.records.resize(len, Record::zeroed());
        }
        let records = &mut self.records[..len];
        if records.is_empty() {
            return;
        }
        let tile_len = TILE * n_steps;
        let one_tile = |t: usize, tile: &mut [Record]| {
            let n_rows = TILE.min(m - t * TILE);
            for r in 0..n_rows {
                row(compute.isa(), t * TILE + r, &mut tile[r..], n_rows);
            }
        };
        // A few thousand activations take less time than waking a thread.
        if m * k <= 4096 {
            let tiles = records.chunks_mut(tile_len).enumerate();
            tiles.for_each(|(t, tile)| one_tile(t, tile));
        } else {
            compute.pool().chunks_mut(records, tile_len, one_tile);
        }
    }

    #[cfg(test)]
    pub(super) fn all(&self) -> &[Record] {
        &self.records[..self.m * self.k.div_ceil(STEP)]
    }

    /// How many tiles, and the records and rows of tile `t`.
    pub(super) fn n_tiles(&self) -> usize {
        self.m.div_ceil(TILE)
    }

    pub(super) fn tile(&self, t: usize) -> (&[Record], usize) {
        let n_steps = self.k.div_ceil(STEP);
        let n_rows = TILE.min(self.m - t * TILE);
        (
            &self.records[t * TILE * n_steps..][..n_rows * n_steps],
            n_rows,
        )
    }
}

for_each_isa! {
    /// Quantises one row; see [`QuantRows`].
    #[allow(unreachable_pub)]
    pub fn quantise_row(out: &mut [Record], stride: usize, x: &[f32]) {
        let (steps, rest) = x.as_chunks::<STEP>();
        for (s, x) in steps.iter().enumerate() {
            out[s * stride] = record(x);
        }
        if !rest.is_empty() {
            let mut last = [0.0; STEP];
            last[..rest.len()].copy_from_slice(rest);
            out[steps.len() * stride] = record(&last);
        }
    }
}

for_each_isa! {
    #[allow(unreachable_pub)]
    pub fn quantise_norm_row(out: &mut [Record], stride: usize, x: &[f32], w: &[f32], rstd: f32) {
        for (s, (x, w)) in x.chunks(STEP).zip(w.chunks(STEP)).enumerate() {
            let mut values = [0.0; STEP];
            for ((out, &x), &w) in values.iter_mut().zip(x).zip(w) {
                *out = w * (x * rstd);
            }
            out[s * stride] = record(&values);
        }
    }
}

for_each_isa! {
    #[allow(unreachable_pub)]
    pub fn quantise_swiglu_row(out: &mut [Record], stride: usize, gate: &[f32], up: &[f32]) {
        use crate::Real;
        for (s, (gate, up)) in gate.chunks(STEP).zip(up.chunks(STEP)).enumerate() {
            let mut values = [0.0; STEP];
            for ((out, &g), &u) in values.iter_mut().zip(gate).zip(up) {
                *out = g / (1.0 + Real::exp(-g)) * u;
            }
            out[s * stride] = record(&values);
        }
    }
}

/// Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
const ROUND: f32 = 12_582_912.0;

#[inline(always)]
fn record(x: &[f32; STEP]) -> Record {
    // Magnitudes order as their bits do, and NaN above all of them.
    let mut lanes = [0u32; 16];
    for i in 0..16 {
        let (a, b) = (
            x[i].to_bits() & 0x7fff_ffff,
            x[i + 16].to_bits() & 0x7fff_ffff,
        );
        lanes[i] = a.max(b);
    }
    let max = f32::from_bits(lanes.into_iter().fold(0, u32::max));
    let (scale, inverse) = if max < 1e-30 {
        (0.0, 0.0)
    } else {
        (max / 127.0, 127.0 / max)
    };
    let mut codes = [0i8; STEP];
    let (mut low, mut high) = (0i32, 0i32);
    for i in 0..16 {
        codes[i] = (x[i] * inverse + ROUND).to_bits() as i8;
        codes[i + 16] = (x[i + 16] * inverse + ROUND).to_bits() as i8;
        low += i32::from(codes[i]);
        high += i32::from(codes[i + 16]);
    }
    let sum = low + high;
    Record {
        codes,
        scale,
        scaled_sum: scale * sum as f32,
        neg_sum: -128 * sum,
        neg_sum_low: -128 * low,
    }
}
