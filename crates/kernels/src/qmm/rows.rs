//! Activations in eight bits: what a quantised product reads beside the weights.

use super::layout::STEP;
use crate::isa::{Level, for_each_isa};
use crate::par::Parts;
use crate::{Compute, Isa, ops};
use bytemuck::{Pod, Zeroable};

/// Rows that a product takes together; their records interleave.
pub(super) const TILE: usize = 6;

/// Columns of a row that are worked out before they are quantised: they stay in L1.
const PIECE: usize = 16 * STEP;

/// 32 activations of one row.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Record {
    pub(super) codes: [i8; STEP],
    pub(super) scale: f32,
    /// `scale` times the sum of the codes, and the spike: what a minimum of the weights is
    /// multiplied by.
    pub(super) scaled_sum: f32,
    /// -128 times the sum of the codes: where a dot product with codes of zero point 128 starts.
    pub(super) neg_sum: i32,
    /// The same of the first 16 codes.
    pub(super) neg_sum_low: i32,
    /// An activation that towers over the others, kept whole; 0 where none does.
    pub(super) spike: f32,
    /// Its column; the code there is 0.
    pub(super) spike_at: u16,
    /// In the record of a tile's first row: whether any row of the tile has a spike in this step.
    pub(super) tile_spikes: u16,
}

impl Record {
    /// The spike, if it lies in `half` of the step; without `sixteens` there is but one half.
    #[inline(always)]
    pub(super) fn spike_in(&self, sixteens: bool, half: usize) -> f32 {
        if sixteens && usize::from(self.spike_at) / 16 != half {
            0.0
        } else {
            self.spike
        }
    }
}

/// How many times the second largest magnitude of a block the largest must exceed to be a spike.
///
/// A few channels of a residual stream tower over all others ("massive activations", Sun et al.
/// 2024); in one scale with them, their neighbours would lose most of their eight bits.
pub(super) const SPIKE: f32 = 4.0;

/// Activations `X [m, k]` quantised to eight bits; the buffer is kept between calls.
///
/// Math:     per 32 of a row: scale = max|x| / 127;  code = round(x * (127 / max|x|));
///           an x above 4 times all others in magnitude stays as it is, with code 0, and the
///           others are quantised without it
/// Numerics: to nearest, ties to even; a row's codes depend on that row alone. A block with a
///           NaN has a NaN scale, a block below 1e-30 is zero
#[derive(Clone, Debug, Default)]
pub struct QuantRows {
    /// Tiles of [`TILE`] rows, in each `[step][row of the tile]`; the last tile may have less.
    records: Vec<Record>,
    m: usize,
    k: usize,
    /// Of the rows that are normalised.
    rstd: Vec<f32>,
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
        self.fill(compute, m, k, |_, i, col, out| {
            out.copy_from_slice(&x[i * k + col..][..out.len()]);
        });
    }

    /// Quantises the root-mean-square norm of `x [m, w.len()]`: the bits of [`ops::rms_norm`]
    /// followed by [`QuantRows::quantise`].
    pub fn quantise_norm(&mut self, compute: &Compute, x: &[f32], m: usize, w: &[f32], eps: f32) {
        let k = w.len();
        assert_eq!(x.len(), m * k, "X is [m, k]");
        let mut rstd = std::mem::take(&mut self.rstd);
        rstd.resize(m, 0.0);
        ops::rms_norm_rstd(compute.isa(), &mut rstd, x, eps);
        self.fill(compute, m, k, |isa, i, col, out| {
            let (x, w) = (&x[i * k + col..][..out.len()], &w[col..][..out.len()]);
            ops::scaled(isa, out, x, w, rstd[i]);
        });
        self.rstd = rstd;
    }

    /// Quantises the gated activation of `gate_up [m, 2 f]`: the bits of [`ops::swiglu`]
    /// followed by [`QuantRows::quantise`].
    pub fn quantise_swiglu(&mut self, compute: &Compute, gate_up: &[f32], m: usize, f: usize) {
        assert_eq!(gate_up.len(), 2 * m * f, "the gate and up are [m, 2 f]");
        self.fill(compute, m, f, |isa, i, col, out| {
            let (gate, up) = gate_up[2 * i * f..][..2 * f].split_at(f);
            ops::gated(isa, out, &gate[col..], &up[col..]);
        });
    }

    /// Quantises what `values(isa, i, col, out)` writes: columns `col..` of row `i` into `out`.
    fn fill(
        &mut self,
        compute: &Compute,
        m: usize,
        k: usize,
        values: impl Fn(Isa, usize, usize, &mut [f32]) + Sync,
    ) {
        let n_steps = k.div_ceil(STEP);
        (self.m, self.k) = (m, k);
        let len = m * n_steps;
        // Only grown: every record of the new rows is written below.
        if self.records.len() < len {
            self.records.resize(len, Record::zeroed());
        }
        let n_pieces = k.div_ceil(PIECE);
        let records = Parts::new(&mut self.records[..len]);
        // Pieces of a tile, not whole rows: sixteen rows are three tiles, but two threads.
        let task = |task: usize| {
            let (t, piece) = (task / n_pieces, task % n_pieces);
            let (col, end) = (piece * PIECE, ((piece + 1) * PIECE).min(k));
            let n_rows = TILE.min(m - t * TILE);
            let steps = col / STEP..end.div_ceil(STEP);
            let first = t * TILE * n_steps;
            // SAFETY: the steps of a piece of a tile lie together, and no other task has them.
            let out =
                unsafe { records.slice(first + steps.start * n_rows..first + steps.end * n_rows) };
            let mut buffer = [0.0; PIECE];
            for r in 0..n_rows {
                let buffer = &mut buffer[..end - col];
                values(compute.isa(), t * TILE + r, col, buffer);
                quantise_row(compute.isa(), &mut out[r..], n_rows, buffer);
            }
            for step in out.chunks_exact_mut(n_rows) {
                step[0].tile_spikes = u16::from(step.iter().any(|record| record.spike != 0.0));
            }
        };
        let n_tasks = m.div_ceil(TILE) * n_pieces;
        // A few thousand activations take less time than waking a thread.
        if m * k <= 4096 {
            (0..n_tasks).for_each(task);
        } else {
            compute.pool().run(n_tasks, task);
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

/// Quantises some columns of one row: the record of step `s` is `out[s * stride]`.
fn quantise_row(isa: Isa, out: &mut [Record], stride: usize, x: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    if isa.0 >= Level::Avx512 {
        // SAFETY: the level was detected.
        return unsafe { avx512::quantise_row(out, stride, x) };
    }
    portable_row(isa, out, stride, x);
}

for_each_isa! {
    #[allow(unreachable_pub)]
    pub fn portable_row(out: &mut [Record], stride: usize, x: &[f32]) {
        each_step(out, stride, x, record);
    }
}

/// Quantises `x` by `record`; where it ends within a step, zeros follow.
#[inline(always)]
fn each_step(
    out: &mut [Record],
    stride: usize,
    x: &[f32],
    record: impl Fn(&[f32; STEP]) -> Record,
) {
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

/// The scale of a block whose largest magnitude is `max`, and its inverse.
#[inline(always)]
fn scale_of(max: f32) -> (f32, f32) {
    if max < 1e-30 {
        (0.0, 0.0)
    } else {
        (max / 127.0, 127.0 / max)
    }
}

/// Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits.
const ROUND: f32 = 12_582_912.0;

/// The records of a block of which all but the spike have been made codes.
#[inline(always)]
fn whole(
    codes: [i8; STEP],
    (low, sum): (i32, i32),
    scale: f32,
    spike: Option<(f32, u16)>,
) -> Record {
    let (spike, spike_at) = spike.unwrap_or_default();
    Record {
        codes,
        scale,
        scaled_sum: scale * sum as f32 + spike,
        neg_sum: -128 * sum,
        neg_sum_low: -128 * low,
        spike,
        spike_at,
        tile_spikes: 0,
    }
}

#[inline(always)]
fn record(x: &[f32; STEP]) -> Record {
    // Magnitudes order as their bits do, and NaN above all of them.
    let largest = |x: &[f32; STEP]| {
        let mut lanes = [0u32; 16];
        for i in 0..16 {
            let (a, b) = (
                x[i].to_bits() & 0x7fff_ffff,
                x[i + 16].to_bits() & 0x7fff_ffff,
            );
            lanes[i] = a.max(b);
        }
        f32::from_bits(lanes.into_iter().fold(0, u32::max))
    };
    let mut x = *x;
    let mut max = largest(&x);
    let bound = max * (1.0 / SPIKE);
    let high = x.iter().filter(|x| x.abs() >= bound).count();
    let mut spike = None;
    if high == 1 {
        let at = x.iter().position(|x| x.abs() >= bound).unwrap_or_default();
        let rest = {
            let mut x = x;
            x[at] = 0.0;
            x
        };
        let second = largest(&rest);
        // Alone, it is one code exactly.
        if second > 0.0 {
            spike = Some((x[at], at as u16));
            (x, max) = (rest, second);
        }
    }
    let (scale, inverse) = scale_of(max);
    let mut codes = [0i8; STEP];
    let (mut low, mut high) = (0i32, 0i32);
    for i in 0..16 {
        codes[i] = (x[i] * inverse + ROUND).to_bits() as i8;
        codes[i + 16] = (x[i + 16] * inverse + ROUND).to_bits() as i8;
        low += i32::from(codes[i]);
        high += i32::from(codes[i + 16]);
    }
    whole(codes, (low, low + high), scale, spike)
}

/// [`record`] in vectors: left to the compiler, its sums over lanes take most of the time.
#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{ROUND, Record, SPIKE, STEP, each_step, scale_of, whole};
    use std::arch::x86_64::*;

    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(super) fn quantise_row(out: &mut [Record], stride: usize, x: &[f32]) {
        each_step(out, stride, x, |x| record(x));
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
    fn record(x: &[f32; STEP]) -> Record {
        // SAFETY: both halves lie within `x`.
        let mut lanes = unsafe {
            [
                _mm512_loadu_ps(x.as_ptr()),
                _mm512_loadu_ps(x.as_ptr().add(16)),
            ]
        };
        let magnitude = |x| _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MAX));
        let largest = |x: [__m512; 2]| {
            let max = _mm512_max_epu32(magnitude(x[0]), magnitude(x[1]));
            f32::from_bits(_mm512_reduce_max_epu32(max))
        };
        let mut max = largest(lanes);
        let bound = _mm512_set1_ps(max * (1.0 / SPIKE));
        let [low, high] = lanes.map(|x| {
            let magnitude = _mm512_castsi512_ps(magnitude(x));
            u32::from(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(magnitude, bound))
        });
        let high = low | high << 16;
        let mut spike = None;
        if high.is_power_of_two() {
            let rest = [
                _mm512_mask_mov_ps(lanes[0], high as u16, _mm512_setzero_ps()),
                _mm512_mask_mov_ps(lanes[1], (high >> 16) as u16, _mm512_setzero_ps()),
            ];
            let second = largest(rest);
            if second > 0.0 {
                let at = high.trailing_zeros();
                spike = Some((x[at as usize], at as u16));
                (lanes, max) = (rest, second);
            }
        }
        let (scale, inverse) = scale_of(max);
        let codes = lanes.map(|x| {
            let rounded = _mm512_add_ps(
                _mm512_mul_ps(x, _mm512_set1_ps(inverse)),
                _mm512_set1_ps(ROUND),
            );
            _mm512_cvtepi32_epi8(_mm512_castps_si512(rounded))
        });
        let codes = _mm256_set_m128i(codes[1], codes[0]);
        // Pairs, then fours, then the four fours of either half.
        let pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), codes);
        let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        let sums = _mm256_add_epi32(fours, _mm256_shuffle_epi32::<0x4e>(fours));
        let sums = _mm256_add_epi32(sums, _mm256_shuffle_epi32::<0xb1>(sums));
        let low = _mm256_extract_epi32::<0>(sums);
        let sum = low + _mm256_extract_epi32::<4>(sums);
        let mut out = whole([0; STEP], (low, sum), scale, spike);
        // SAFETY: 32 codes are 32 bytes.
        unsafe { _mm256_storeu_si256(out.codes.as_mut_ptr().cast(), codes) };
        out
    }
}
