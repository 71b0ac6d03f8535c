//! How packed weights lie in memory, and the way in and out of that layout.
//!
//! A *panel* is 32 rows of `W`, the 32 lanes of two vectors of outputs. It is a run of *steps*
//! of 32 columns of `W`; everything a step needs lies together in whole cache lines, so a
//! product reads one stream from front to back:
//!
//! ```text
//! header, before each 8th step of a K format:  32 x f16 scale [, 32 x f16 factor of the minima]
//! step: codes    nibbles  8 lines   line 2j+v: groups 2j (low) and 2j+1 (high) of vector v
//!                pairs   12 lines   the same, then line 2h+v: high pairs of groups 4h..4h+4
//!                bytes   16 lines   line 2g+v: group g
//!       scales   1 or 2 lines       32 x f16 [, 32 x f16 minima], or 64 x u8 and the like
//! ```
//!
//! A *group* is four columns: a line holds, for each of a vector's sixteen rows, the four codes
//! that one `vpdpbusd` lane multiplies. Sizes per weight are those of the file, give or take
//! the 6-bit scales of the K formats that widen to bytes.

use crate::quant::{Format, Parts, take_apart};
use bytemuck::{Pod, Zeroable};
use half::f16;

/// Rows of `W` side by side in one panel.
pub(super) const PANEL: usize = 32;
/// Columns of `W` in one step.
pub(super) const STEP: usize = 32;
/// Steps that share a header in the K formats.
pub(super) const SUPER: usize = 8;

/// One cache line.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line(pub(super) [u8; 64]);

/// How codes are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codes {
    /// Up to 4 bits.
    Nibbles,
    /// Up to 6 bits: nibbles and high pairs.
    Pairs,
    /// 8 bits.
    Bytes,
}

/// How scales are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scales {
    /// One f16 to 32 codes.
    Half,
    /// An f16 scale and an f16 minimum to 32 codes.
    HalfMin,
    /// A header of f16 factors; `u8` scale and minimum to 32 codes.
    Super32Min,
    /// A header of f16 factors; `i8` scale to 16 codes.
    Super16,
    /// A header of f16 factors; `u8` scale and minimum to 16 codes.
    Super16Min,
}

/// The layout of one format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) codes: Codes,
    pub(super) scales: Scales,
    /// The code that means zero: a power of two, or none where there is a minimum.
    pub(super) zero: u32,
}

impl Layout {
    pub(super) const fn of(format: Format) -> Layout {
        use {Codes::*, Scales::*};
        let (codes, scales, zero) = match format {
            Format::Q4_0 => (Nibbles, Half, 8),
            Format::Q4_1 => (Nibbles, HalfMin, 0),
            Format::Q5_0 => (Pairs, Half, 16),
            Format::Q5_1 => (Pairs, HalfMin, 0),
            Format::Q8_0 => (Bytes, Half, 128),
            Format::Q2_K => (Nibbles, Super16Min, 0),
            Format::Q3_K => (Nibbles, Super16, 4),
            Format::Q4_K => (Nibbles, Super32Min, 0),
            Format::Q5_K => (Pairs, Super32Min, 0),
            Format::Q6_K => (Pairs, Super16, 32),
            Format::F32 | Format::F16 | Format::BF16 => panic!("a plain format has no blocks"),
        };
        Layout {
            codes,
            scales,
            zero,
        }
    }

    pub(super) const fn code_lines(self) -> usize {
        match self.codes {
            Codes::Nibbles => 8,
            Codes::Pairs => 12,
            Codes::Bytes => 16,
        }
    }

    pub(super) const fn step_lines(self) -> usize {
        self.code_lines()
            + match self.scales {
                Scales::Half | Scales::Super32Min | Scales::Super16 => 1,
                Scales::HalfMin | Scales::Super16Min => 2,
            }
    }

    /// Lines before each eighth step.
    pub(super) const fn header_lines(self) -> usize {
        match self.scales {
            Scales::Half | Scales::HalfMin => 0,
            Scales::Super16 => 1,
            Scales::Super32Min | Scales::Super16Min => 2,
        }
    }

    pub(super) const fn has_min(self) -> bool {
        !matches!(self.scales, Scales::Half | Scales::Super16)
    }

    /// Whether a scale belongs to 16 codes, not 32.
    pub(super) const fn sixteens(self) -> bool {
        matches!(self.scales, Scales::Super16 | Scales::Super16Min)
    }

    pub(super) const fn panel_lines(self, n_steps: usize) -> usize {
        n_steps * self.step_lines() + n_steps / SUPER * self.header_lines()
    }

    /// The header and the first line of step `s`, in lines from the start of the panel.
    pub(super) const fn step_at(self, s: usize) -> (usize, usize) {
        let header = s / SUPER * (SUPER * self.step_lines() + self.header_lines());
        let first = header + self.header_lines() + s % SUPER * self.step_lines();
        if self.header_lines() == 0 {
            (0, s * self.step_lines())
        } else {
            (header, first)
        }
    }
}

/// Writes row `r` of a panel from its blocks.
pub(super) fn pack_row(format: Format, panel: &mut [Line], r: usize, row: &[u8]) {
    let layout = Layout::of(format);
    let mut parts = Parts::EMPTY;
    let steps = format.block_len() / STEP;
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(panel);
    for (b, block) in row.chunks_exact(format.block_bytes()).enumerate() {
        take_apart(format, block, &mut parts);
        for (i, words) in parts.words.chunks_exact(8).take(steps).enumerate() {
            let (header, at) = layout.step_at(b * steps + i);
            let step = &mut bytes[64 * at..][..64 * layout.step_lines()];
            pack_codes(layout.codes, step, r, words);
            let scales = &mut step[64 * layout.code_lines()..];
            let put = |out: &mut [u8], at: usize, half: u16| {
                out[2 * at..][..2].copy_from_slice(&half.to_le_bytes());
            };
            match layout.scales {
                Scales::Half => put(scales, r, parts.d),
                Scales::HalfMin => {
                    put(scales, r, parts.d);
                    put(scales, 32 + r, parts.min);
                }
                Scales::Super32Min => {
                    (scales[r], scales[32 + r]) = (parts.scales[i], parts.mins[i]);
                }
                Scales::Super16 | Scales::Super16Min => {
                    for half in 0..2 {
                        scales[32 * half + r] = parts.scales[2 * i + half];
                        if layout.has_min() {
                            scales[64 + 32 * half + r] = parts.mins[2 * i + half];
                        }
                    }
                }
            }
            if i == 0 && layout.header_lines() > 0 {
                let header = &mut bytes[64 * header..];
                put(header, r, parts.d);
                if layout.has_min() {
                    put(header, 32 + r, parts.min);
                }
            }
        }
    }
}

#[inline]
fn pack_codes(codes: Codes, step: &mut [u8], r: usize, words: &[u32]) {
    let lane = r / 16 * 64 + r % 16 * 4;
    let mut put = |line: usize, word: u32| {
        step[64 * line + lane..][..4].copy_from_slice(&word.to_le_bytes());
    };
    if codes == Codes::Bytes {
        (0..8).for_each(|g| put(2 * g, words[g]));
        return;
    }
    let low = |g: usize| words[g] & 0x0f0f_0f0f;
    (0..4).for_each(|j| put(2 * j, low(2 * j) | low(2 * j + 1) << 4));
    if codes == Codes::Pairs {
        let high = |g: usize| (words[g] >> 4 & 0x0303_0303) << (2 * (g % 4));
        (0..2).for_each(|h| put(8 + 2 * h, (4 * h..4 * h + 4).map(high).sum()));
    }
}

/// A step with its codes as bytes and its scales in f32: what the portable product reads.
#[repr(C, align(64))]
pub(super) struct Wide {
    /// `[group][row of W][column in the group]`
    pub(super) codes: [[u8; 4 * PANEL]; 8],
    /// `[half][row of W]`; one half where a scale belongs to 32 codes.
    pub(super) scales: [[f32; PANEL]; 2],
    /// As `scales`; to be added.
    pub(super) mins: [[f32; PANEL]; 2],
}

impl Wide {
    pub(super) const EMPTY: Wide = Wide {
        codes: [[0; 4 * PANEL]; 8],
        scales: [[0.0; PANEL]; 2],
        mins: [[0.0; PANEL]; 2],
    };

    /// Reads step `s` of a panel.
    #[inline(always)]
    pub(super) fn read(&mut self, layout: Layout, panel: &[Line], s: usize) {
        let (header, at) = layout.step_at(s);
        let step: &[u8] = bytemuck::cast_slice(&panel[at..at + layout.step_lines()]);
        let header: &[u8] = bytemuck::cast_slice(&panel[header..header + layout.header_lines()]);
        for (g, out) in self.codes.iter_mut().enumerate() {
            match layout.codes {
                Codes::Bytes => out.copy_from_slice(&step[128 * g..][..128]),
                Codes::Nibbles | Codes::Pairs => {
                    let shift = 4 * (g % 2);
                    for (out, &byte) in out.iter_mut().zip(&step[128 * (g / 2)..][..128]) {
                        *out = byte >> shift & 15;
                    }
                }
            }
            if layout.codes == Codes::Pairs {
                let shift = 2 * (g % 4);
                for (out, &byte) in out.iter_mut().zip(&step[512 + 128 * (g / 4)..][..128]) {
                    *out |= (byte >> shift & 3) << 4;
                }
            }
        }
        let scales = &step[64 * layout.code_lines()..];
        for r in 0..PANEL {
            match layout.scales {
                Scales::Half => self.scales[0][r] = half_at(scales, r),
                Scales::HalfMin => {
                    self.scales[0][r] = half_at(scales, r);
                    self.mins[0][r] = half_at(scales, 32 + r);
                }
                Scales::Super32Min => {
                    self.scales[0][r] = half_at(header, r) * f32::from(scales[r]);
                    self.mins[0][r] = -(half_at(header, 32 + r) * f32::from(scales[32 + r]));
                }
                Scales::Super16 => {
                    for half in 0..2 {
                        let scale = scales[32 * half + r].cast_signed();
                        self.scales[half][r] = half_at(header, r) * f32::from(scale);
                    }
                }
                Scales::Super16Min => {
                    for half in 0..2 {
                        let (scale, min) = (scales[32 * half + r], scales[64 + 32 * half + r]);
                        self.scales[half][r] = half_at(header, r) * f32::from(scale);
                        self.mins[half][r] = -(half_at(header, 32 + r) * f32::from(min));
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn half_at(bytes: &[u8], i: usize) -> f32 {
    f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32()
}
