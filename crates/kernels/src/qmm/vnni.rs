//! The product on AVX-512 VNNI: `vpdpbusd` multiplies four codes of sixteen rows of `W` by four
//! activations of a row of `X`.
//!
//! A tile is up to six rows of `X` by the two vectors of a panel: twelve integer and twelve
//! float sums leave registers for the weights, which are unpacked there.

use super::Tile;
use super::layout::{Codes, Layout, Line, SUPER, Scales};
use super::rows::Record;
use crate::quant::Format;
use std::arch::x86_64::*;

/// A format at compile time.
pub(super) trait Kind {
    /// Where its codes and scales lie.
    const LAYOUT: Layout;
}

macro_rules! kinds {
    ($($name:ident)*) => {
        $(
            #[allow(non_camel_case_types, reason = "the names are ggml's")]
            pub(super) struct $name;
            impl Kind for $name {
                const LAYOUT: Layout = Layout::of(Format::$name);
            }
        )*
        /// Writes the product of a tile to `y`, rows `y_stride` apart.
        ///
        /// # Safety
        /// The CPU has AVX-512 with VNNI; the tile's slices hold what its sizes say; `y` points
        /// to `n_rows` rows of `n_cols` that nobody else touches meanwhile.
        pub(super) unsafe fn product(format: Format, tile: &Tile<'_>, y: *mut f32) {
            match format {
                // SAFETY: the caller vouches for all of it.
                $(Format::$name => unsafe { rows::<$name>(tile, y) },)*
                Format::F32 | Format::F16 | Format::BF16 => {
                    unreachable!("a plain format is never packed")
                }
            }
        }
    };
}
kinds!(Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K);

/// # Safety
/// As [`product`].
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store<const R: usize>(tile: &Tile<'_>, acc: &[[__m512; 2]; R], y: *mut f32) {
    for v in 0..2 {
        let lanes = tile.n_cols.saturating_sub(16 * v).min(16);
        let mask = ((1u32 << lanes) - 1) as __mmask16;
        for r in 0..R {
            let y = y.wrapping_add(r * tile.y_stride + 16 * v);
            // SAFETY: masked lanes are not touched, the others are the tile's.
            unsafe { _mm512_mask_storeu_ps(y, mask, acc[r][v]) };
        }
    }
}

/// # Safety
/// As [`product`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn rows<K: Kind>(tile: &Tile<'_>, y: *mut f32) {
    // SAFETY: the caller vouches for all of it.
    unsafe {
        match tile.n_rows {
            1 => block::<K, 1>(tile, y),
            2 => block::<K, 2>(tile, y),
            3 => block::<K, 3>(tile, y),
            4 => block::<K, 4>(tile, y),
            5 => block::<K, 5>(tile, y),
            _ => block::<K, 6>(tile, y),
        }
    }
}

/// # Safety
/// As [`product`], and the tile has `R` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn block<K: Kind, const R: usize>(tile: &Tile<'_>, y: *mut f32) {
    let layout = K::LAYOUT;
    let mut acc = [[_mm512_setzero_ps(); 2]; R];
    let mut x = tile.x.as_ptr();
    let mut w = tile.panel.as_ptr();
    let mut header = w;
    // SAFETY: the panel holds the lines of n_steps steps and X holds R records for each.
    unsafe {
        for s in 0..tile.n_steps {
            if layout.header_lines() > 0 && s % SUPER == 0 {
                header = w;
                w = w.add(layout.header_lines());
            }
            if s < tile.ahead_steps {
                for line in 0..tile.ahead_lines {
                    _mm_prefetch::<_MM_HINT_T0>(w.wrapping_add(tile.ahead + line).cast());
                }
            }
            let scales = w.add(layout.code_lines());
            let spikes = (*x).tile_spikes != 0;
            let halves = if layout.sixteens() { 2 } else { 1 };
            for half in 0..halves {
                let mut dots = [[_mm512_setzero_si512(); 2]; R];
                if layout.zero > 0 {
                    for r in 0..R {
                        let start = _mm512_set1_epi32(start_of(&*x.add(r), layout, half));
                        // From -128 sum to -zero sum.
                        dots[r] = [match layout.zero {
                            128 => start,
                            32 => _mm512_srai_epi32::<2>(start),
                            16 => _mm512_srai_epi32::<3>(start),
                            8 => _mm512_srai_epi32::<4>(start),
                            _ => _mm512_srai_epi32::<5>(start),
                        }; 2];
                    }
                }
                for g in half * 4..half * 4 + 8 / halves {
                    let codes = [group::<K>(w, g, 0), group::<K>(w, g, 1)];
                    for r in 0..R {
                        let word = (*x.add(r)).codes.as_ptr().add(4 * g).cast::<i32>();
                        let word = _mm512_set1_epi32(word.read());
                        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], codes[0], word);
                        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], codes[1], word);
                    }
                }
                let (scale, min) = scales_of::<K>(header, scales, half);
                for r in 0..R {
                    let x = &*x.add(r);
                    let x_scale = _mm512_set1_ps(x.scale);
                    for v in 0..2 {
                        let dot = _mm512_cvtepi32_ps(dots[r][v]);
                        let by = _mm512_mul_ps(scale[v], x_scale);
                        acc[r][v] = _mm512_fmadd_ps(dot, by, acc[r][v]);
                    }
                    if spikes {
                        let codes = |g, v| group::<K>(w, g, v);
                        add_spike(&mut acc[r], x, (layout, layout.zero), half, scale, codes);
                    }
                    if layout.has_min() {
                        let x_sum = _mm512_set1_ps(scaled_sum_of(x, layout, half));
                        for v in 0..2 {
                            acc[r][v] = _mm512_fmadd_ps(min[v], x_sum, acc[r][v]);
                        }
                    }
                }
            }
            w = w.add(layout.step_lines());
            x = x.add(R);
        }
        store::<R>(tile, &acc, y);
    }
}

/// Adds what the spike of a row is multiplied by, if there is one in `half` of the step:
/// `codes(g, v)` are those of a group, `zero` means zero.
///
/// # Safety
/// The CPU has AVX-512 with VNNI.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn add_spike(
    acc: &mut [__m512; 2],
    x: &Record,
    (layout, zero): (Layout, u32),
    half: usize,
    scale: [__m512; 2],
    codes: impl Fn(usize, usize) -> __m512i,
) {
    let spike = x.spike_in(layout.sixteens(), half);
    if spike == 0.0 {
        return;
    }
    let at = usize::from(x.spike_at);
    let one = _mm512_set1_epi32(1 << (8 * (at % 4)));
    let start = _mm512_set1_epi32(-(zero as i32));
    for v in 0..2 {
        let code = _mm512_dpbusd_epi32(start, codes(at / 4, v), one);
        let by = _mm512_mul_ps(scale[v], _mm512_set1_ps(spike));
        acc[v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), by, acc[v]);
    }
}

/// Where the dot products of `half` of a step start when the zero point is 128.
#[inline(always)]
pub(super) fn start_of(x: &Record, layout: Layout, half: usize) -> i32 {
    match (layout.sixteens(), half) {
        (false, _) => x.neg_sum,
        (true, 0) => x.neg_sum_low,
        (true, _) => x.neg_sum - x.neg_sum_low,
    }
}

/// What a minimum of `half` of a step is multiplied by.
#[inline(always)]
pub(super) fn scaled_sum_of(x: &Record, layout: Layout, half: usize) -> f32 {
    match (layout.sixteens(), half) {
        (false, _) => x.scaled_sum,
        (true, 0) => x.scale * (x.neg_sum_low / -128) as f32 + x.spike_in(true, 0),
        (true, _) => x.scale * ((x.neg_sum_low - x.neg_sum) / 128) as f32 + x.spike_in(true, 1),
    }
}

/// The codes of group `g` for vector `v` of the panel, as bytes.
///
/// # Safety
/// `step` points to the lines of a step; the CPU has AVX-512 BW.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn group<K: Kind>(step: *const Line, g: usize, v: usize) -> __m512i {
    // SAFETY: lines 2j+v and 8+2h+v exist where the codes are of that kind.
    let line = |i: usize| unsafe { _mm512_load_si512(step.add(i).cast()) };
    let nibble = _mm512_set1_epi8(15);
    if K::LAYOUT.codes as u8 == Codes::Bytes as u8 {
        return line(2 * g + v);
    }
    let both = line(2 * (g / 2) + v);
    let low = if g.is_multiple_of(2) {
        _mm512_and_si512(both, nibble)
    } else {
        _mm512_and_si512(_mm512_srli_epi16::<4>(both), nibble)
    };
    if K::LAYOUT.codes as u8 == Codes::Nibbles as u8 {
        return low;
    }
    let pairs = line(8 + 2 * (g / 4) + v);
    let high = match g % 4 {
        0 => _mm512_slli_epi16::<4>(pairs),
        1 => _mm512_slli_epi16::<2>(pairs),
        2 => pairs,
        _ => _mm512_srli_epi16::<2>(pairs),
    };
    // low | (high & 0x30)
    _mm512_ternarylogic_epi32::<0xf8>(low, high, _mm512_set1_epi8(0x30))
}

/// The scales and minima of a step, or of one half of it.
///
/// # Safety
/// `header` and `scales` point to those lines of a step; the CPU has AVX-512.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn scales_of<K: Kind>(
    header: *const Line,
    scales: *const Line,
    half: usize,
) -> ([__m512; 2], [__m512; 2]) {
    let zero = [_mm512_setzero_ps(); 2];
    // SAFETY: each reads within the lines that the layout has.
    unsafe {
        let halves = |line: *const Line| {
            let at = line.cast::<__m256i>();
            [
                _mm512_cvtph_ps(_mm256_load_si256(at)),
                _mm512_cvtph_ps(_mm256_load_si256(at.add(1))),
            ]
        };
        let bytes = |at: usize| _mm_load_si128(scales.cast::<__m128i>().add(at));
        let unsigned = |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes(at)));
        let signed = |at: usize| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(at)));
        let times =
            |a: [__m512; 2], b: [__m512; 2]| [_mm512_mul_ps(a[0], b[0]), _mm512_mul_ps(a[1], b[1])];
        let minus = |a: [__m512; 2]| {
            [
                _mm512_xor_ps(a[0], _mm512_set1_ps(-0.0)),
                _mm512_xor_ps(a[1], _mm512_set1_ps(-0.0)),
            ]
        };
        match K::LAYOUT.scales {
            Scales::Half => (halves(scales), zero),
            Scales::HalfMin => (halves(scales), halves(scales.add(1))),
            Scales::Super32Min => (
                times(halves(header), [unsigned(0), unsigned(1)]),
                minus(times(halves(header.add(1)), [unsigned(2), unsigned(3)])),
            ),
            Scales::Super16 => (
                times(halves(header), [signed(2 * half), signed(2 * half + 1)]),
                zero,
            ),
            Scales::Super16Min => (
                times(halves(header), [unsigned(2 * half), unsigned(2 * half + 1)]),
                minus(times(
                    halves(header.add(1)),
                    [unsigned(4 + 2 * half), unsigned(5 + 2 * half)],
                )),
            ),
        }
    }
}
