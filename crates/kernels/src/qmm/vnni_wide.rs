//! The product of many rows on AVX-512 VNNI: each panel is first unpacked to bytes, then every
//! tile multiplies those.
//!
//! Integer operations beside the dot products would take their execution units; unpacked once,
//! a panel costs a tile loads alone.

use super::Tile;
use super::layout::{Layout, Line, SUPER, Scales};
use super::vnni::{
    Kind, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, add_spike, group,
    scaled_sum_of, scales_of, start_of, store,
};
use crate::quant::Format;
use std::arch::x86_64::*;

/// Writes a panel with its codes as bytes of zero point 128 (or none).
///
/// Per step: 16 lines of codes as in `Q8_0`, then the scales: as they are where they are f16,
/// else in f32, 2 lines for each half of a step that has its own and 2 for its minima.
///
/// # Safety
/// The CPU has AVX-512 BW; the panel holds the lines of `n_steps` steps.
pub(super) unsafe fn widen(format: Format, panel: &[Line], n_steps: usize, out: &mut Vec<Line>) {
    // SAFETY: the caller vouches for all of it.
    unsafe {
        match format {
            Format::Q4_0 => widen_as::<Q4_0>(panel, n_steps, out),
            Format::Q4_1 => widen_as::<Q4_1>(panel, n_steps, out),
            Format::Q5_0 => widen_as::<Q5_0>(panel, n_steps, out),
            Format::Q5_1 => widen_as::<Q5_1>(panel, n_steps, out),
            Format::Q8_0 => widen_as::<Q8_0>(panel, n_steps, out),
            Format::Q2_K => widen_as::<Q2_K>(panel, n_steps, out),
            Format::Q3_K => widen_as::<Q3_K>(panel, n_steps, out),
            Format::Q4_K => widen_as::<Q4_K>(panel, n_steps, out),
            Format::Q5_K => widen_as::<Q5_K>(panel, n_steps, out),
            Format::Q6_K => widen_as::<Q6_K>(panel, n_steps, out),
            Format::F32 | Format::F16 | Format::BF16 => {
                unreachable!("a plain format is never packed")
            }
        }
    }
}

const fn wide_lines(layout: Layout) -> usize {
    16 + match layout.scales {
        Scales::Half => 1,
        Scales::HalfMin => 2,
        Scales::Super32Min | Scales::Super16 => 4,
        Scales::Super16Min => 8,
    }
}

/// # Safety
/// As [`widen`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn widen_as<K: Kind>(panel: &[Line], n_steps: usize, out: &mut Vec<Line>) {
    let layout = K::LAYOUT;
    let lines = n_steps * wide_lines(layout);
    if out.len() < lines {
        out.resize(lines, Line([0; 64]));
    }
    let mut to = out.as_mut_ptr();
    let mut w = panel.as_ptr();
    let mut header = w;
    // SAFETY: the panel holds the lines of n_steps steps, `out` those of as many wide ones.
    unsafe {
        for s in 0..n_steps {
            if layout.header_lines() > 0 && s % SUPER == 0 {
                header = w;
                w = w.add(layout.header_lines());
            }
            let shift = _mm512_set1_epi8(128u8.wrapping_sub(layout.zero as u8).cast_signed());
            for g in 0..8 {
                for v in 0..2 {
                    let mut codes = group::<K>(w, g, v);
                    if layout.zero > 0 {
                        codes = _mm512_add_epi8(codes, shift);
                    }
                    _mm512_store_si512(to.cast(), codes);
                    to = to.add(1);
                }
            }
            let mut scales = w.add(layout.code_lines());
            if layout.header_lines() == 0 {
                while scales < w.add(layout.step_lines()) {
                    _mm512_store_si512(to.cast(), _mm512_load_si512(scales.cast()));
                    (to, scales) = (to.add(1), scales.add(1));
                }
            } else {
                let halves = if layout.sixteens() { 2 } else { 1 };
                for half in 0..halves {
                    let (scale, min) = scales_of::<K>(header, scales, half);
                    for v in 0..2 {
                        _mm512_store_ps(to.add(v).cast(), scale[v]);
                        if layout.has_min() {
                            _mm512_store_ps(to.add(2 + v).cast(), min[v]);
                        }
                    }
                    to = to.add(if layout.has_min() { 4 } else { 2 });
                }
            }
            w = w.add(layout.step_lines());
        }
    }
}

/// As [`product`], of a panel that [`widen`] wrote.
///
/// # Safety
/// As [`product`]; `panel` has been written from the tile's.
pub(super) unsafe fn product(format: Format, tile: &Tile<'_>, panel: &[Line], y: *mut f32) {
    let layout = Layout::of(format);
    // SAFETY: the caller vouches for all of it.
    unsafe {
        // A format stands for all whose wide panels look the same.
        match layout.scales {
            Scales::Half => rows::<Q8_0>(tile, panel, y),
            Scales::HalfMin => rows::<Q4_1>(tile, panel, y),
            Scales::Super32Min => rows::<Q4_K>(tile, panel, y),
            Scales::Super16 => rows::<Q6_K>(tile, panel, y),
            Scales::Super16Min => rows::<Q2_K>(tile, panel, y),
        }
    }
}

/// # Safety
/// As [`product`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows<K: Kind>(tile: &Tile<'_>, panel: &[Line], y: *mut f32) {
    // SAFETY: the caller vouches for all of it.
    unsafe {
        match tile.n_rows {
            1 => block::<K, 1>(tile, panel, y),
            2 => block::<K, 2>(tile, panel, y),
            3 => block::<K, 3>(tile, panel, y),
            4 => block::<K, 4>(tile, panel, y),
            5 => block::<K, 5>(tile, panel, y),
            _ => block::<K, 6>(tile, panel, y),
        }
    }
}

/// # Safety
/// As [`product`], and the tile has `R` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn block<K: Kind, const R: usize>(tile: &Tile<'_>, panel: &[Line], y: *mut f32) {
    let layout = K::LAYOUT;
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    let mut x = tile.x.as_ptr();
    let mut w = panel.as_ptr();
    let mut packed = tile.panel.as_ptr();
    // SAFETY: the panel holds the lines of n_steps wide steps, X holds R records for each.
    unsafe {
        for s in 0..tile.n_steps {
            if s < tile.ahead_steps {
                for line in 0..tile.ahead_lines {
                    // To L2: the wide panel has L1.
                    _mm_prefetch::<_MM_HINT_T1>(packed.wrapping_add(tile.ahead + line).cast());
                }
                packed = packed.wrapping_add(tile.panel.len() / tile.n_steps);
            }
            let spikes = (*x).tile_spikes != 0;
            let halves = if layout.sixteens() { 2 } else { 1 };
            for half in 0..halves {
                let mut dots = [[_mm512_setzero_si512(); 2]; R];
                if !layout.has_min() {
                    for r in 0..R {
                        let start = start_of(&*x.add(r), layout, half);
                        dots[r] = [_mm512_set1_epi32(start); 2];
                    }
                }
                for g in half * 4..half * 4 + 8 / halves {
                    let codes = [0, 1].map(|v| _mm512_load_si512(w.add(2 * g + v).cast()));
                    for r in 0..R {
                        let word = (*x.add(r)).codes.as_ptr().add(4 * g).cast::<i32>();
                        let word = _mm512_set1_epi32(word.read());
                        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], codes[0], word);
                        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], codes[1], word);
                    }
                }
                let (scale, min) = wide_scales::<K>(w.add(16), half);
                for r in 0..R {
                    let x_scale = _mm512_set1_ps((*x.add(r)).scale);
                    for v in 0..2 {
                        let dot = _mm512_cvtepi32_ps(dots[r][v]);
                        let by = _mm512_mul_ps(scale[v], x_scale);
                        acc[r][v] = _mm512_fmadd_ps(dot, by, acc[r][v]);
                    }
                }
                if spikes {
                    let zero = if layout.has_min() { 0 } else { 128 };
                    let codes = |g: usize, v: usize| _mm512_load_si512(w.add(2 * g + v).cast());
                    for r in 0..R {
                        add_spike(&mut acc[r], &*x.add(r), (layout, zero), half, scale, codes);
                    }
                }
                if layout.has_min() {
                    for r in 0..R {
                        let x_sum = _mm512_set1_ps(scaled_sum_of(&*x.add(r), layout, half));
                        for v in 0..2 {
                            acc[r][v] = _mm512_fmadd_ps(min[v], x_sum, acc[r][v]);
                        }
                    }
                }
            }
            w = w.add(wide_lines(layout));
            x = x.add(R);
        }
        store::<R>(tile, &acc, y);
    }
}

/// The scales and minima of `half` of a wide step.
///
/// # Safety
/// `scales` points to those lines; the CPU has AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn wide_scales<K: Kind>(scales: *const Line, half: usize) -> ([__m512; 2], [__m512; 2]) {
    // SAFETY: each reads within the lines that `widen` writes.
    unsafe {
        if K::LAYOUT.header_lines() == 0 {
            return scales_of::<K>(scales, scales, half);
        }
        let read = |i: usize| {
            let at = scales.add(i);
            [_mm512_load_ps(at.cast()), _mm512_load_ps(at.add(1).cast())]
        };
        if K::LAYOUT.has_min() {
            (read(4 * half), read(4 * half + 2))
        } else {
            (read(2 * half), [_mm512_setzero_ps(); 2])
        }
    }
}
