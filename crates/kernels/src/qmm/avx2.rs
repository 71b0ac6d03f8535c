//! The product on AVX2: `vpmaddubsw` multiplies codes of at most four bits by activations and
//! adds neighbours in 16 bits.
//!
//! Such a sum stays within 2 * 15 * 127, so the eight groups of a step add up to at most 30480 before
//! they have to be widened. Wider codes are cut into nibbles, whose high sums count sixteenfold.

use super::Tile;
use super::layout::{Codes, Line, PANEL, SUPER, Scales};
use super::rows::{Record, TILE};
use super::vnni::{
    Kind, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, scaled_sum_of,
};
use crate::quant::Format;
use std::arch::x86_64::*;

/// Vectors of eight outputs in a panel.
const VECTORS: usize = PANEL / 8;

/// Sums of a tile: `[row of X][vector]`.
type Sums = [[__m256; VECTORS]; TILE];

/// Codes of a step in nibbles: `[group][vector]`.
struct Nibbles {
    low: [[__m256i; VECTORS]; 8],
    /// Where codes are wider than four bits.
    high: [[__m256i; VECTORS]; 8],
}

/// Writes the product of a tile to `y`, rows `y_stride` apart.
///
/// # Safety
/// The CPU has AVX2, FMA and F16C; the tile's slices hold what its sizes say; `y` points to
/// `n_rows` rows of `n_cols` that nobody else touches meanwhile.
pub(super) unsafe fn product(format: Format, tile: &Tile<'_>, y: *mut f32) {
    // SAFETY: the caller vouches for all of it.
    unsafe {
        match format {
            Format::Q4_0 => rows::<Q4_0>(tile, y),
            Format::Q4_1 => rows::<Q4_1>(tile, y),
            Format::Q5_0 => rows::<Q5_0>(tile, y),
            Format::Q5_1 => rows::<Q5_1>(tile, y),
            Format::Q8_0 => rows::<Q8_0>(tile, y),
            Format::Q2_K => rows::<Q2_K>(tile, y),
            Format::Q3_K => rows::<Q3_K>(tile, y),
            Format::Q4_K => rows::<Q4_K>(tile, y),
            Format::Q5_K => rows::<Q5_K>(tile, y),
            Format::Q6_K => rows::<Q6_K>(tile, y),
            Format::F32 | Format::F16 | Format::BF16 => {
                unreachable!("a plain format is never packed")
            }
        }
    }
}

/// # Safety
/// As [`product`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows<K: Kind>(tile: &Tile<'_>, y: *mut f32) {
    let layout = K::LAYOUT;
    let mut sums: Sums = [[_mm256_setzero_ps(); VECTORS]; TILE];
    let mut nibbles = Nibbles {
        low: [[_mm256_setzero_si256(); VECTORS]; 8],
        high: [[_mm256_setzero_si256(); VECTORS]; 8],
    };
    let halves = if layout.sixteens() { 2 } else { 1 };
    // Unknown to the compiler: unrolled, it takes the products of all groups ahead of the sums
    // and spills them.
    let n_groups = std::hint::black_box(8 / halves);
    let mut w = tile.panel.as_ptr();
    let mut header = w;
    let mut x = tile.x.as_ptr();
    // SAFETY: the panel holds the lines of n_steps steps and X holds n_rows records for each.
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
            let rows = std::slice::from_raw_parts(x, tile.n_rows);
            let spikes = rows[0].tile_spikes != 0;
            let single = rows.len() == 1;
            if !single {
                for g in 0..8 {
                    for v in 0..VECTORS {
                        (nibbles.low[g][v], nibbles.high[g][v]) = group::<K>(w, g, v);
                    }
                }
            }
            for half in 0..halves {
                let groups = half * n_groups..(half + 1) * n_groups;
                let (scale, min) = scales_of::<K>(header, scales, half);
                let mut pairs = rows.chunks_exact(2);
                let mut r = 0;
                for pair in &mut pairs {
                    let dots = dots::<K, 2>([&pair[0], &pair[1]], groups.clone(), |g, v| {
                        (nibbles.low[g][v], nibbles.high[g][v])
                    });
                    for (x, dots) in pair.iter().zip(dots) {
                        let dots = (dots, spikes);
                        scaled::<K>(&mut sums[r], x, dots, (w, half), (scale, min));
                        r += 1;
                    }
                }
                for x in pairs.remainder() {
                    let [dots] = if single {
                        dots::<K, 1>([x], groups.clone(), |g, v| group::<K>(w, g, v))
                    } else {
                        dots::<K, 1>([x], groups.clone(), |g, v| {
                            (nibbles.low[g][v], nibbles.high[g][v])
                        })
                    };
                    let dots = (dots, spikes);
                    scaled::<K>(&mut sums[r], x, dots, (w, half), (scale, min));
                    r += 1;
                }
            }
            w = w.add(layout.step_lines());
            x = x.add(tile.n_rows);
        }
        for (r, sums) in sums[..tile.n_rows].iter().enumerate() {
            let y = y.add(r * tile.y_stride);
            std::ptr::copy_nonoverlapping(sums.as_ptr().cast::<f32>(), y, tile.n_cols);
        }
    }
}

/// Dot products of `R` rows with the 32 of a panel over some groups of a step:
/// `codes(g, v)` are the low and high nibbles of a group.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots<K: Kind, const R: usize>(
    rows: [&Record; R],
    groups: std::ops::Range<usize>,
    codes: impl Fn(usize, usize) -> (__m256i, __m256i),
) -> [[__m256i; VECTORS]; R] {
    let zero = _mm256_setzero_si256();
    let (mut low, mut high) = ([[zero; VECTORS]; R], [[zero; VECTORS]; R]);
    for g in groups {
        let words = rows.map(|x| {
            let word = &x.codes[4 * g..4 * g + 4];
            _mm256_set1_epi32(i32::from_le_bytes([
                word[0] as u8,
                word[1] as u8,
                word[2] as u8,
                word[3] as u8,
            ]))
        });
        for v in 0..VECTORS {
            let (l, h) = codes(g, v);
            for r in 0..R {
                low[r][v] = _mm256_add_epi16(low[r][v], _mm256_maddubs_epi16(l, words[r]));
                if wide::<K>() {
                    high[r][v] = _mm256_add_epi16(high[r][v], _mm256_maddubs_epi16(h, words[r]));
                }
            }
        }
    }
    let ones = _mm256_set1_epi16(1);
    for r in 0..R {
        for v in 0..VECTORS {
            low[r][v] = _mm256_madd_epi16(low[r][v], ones);
            if wide::<K>() {
                let high = _mm256_slli_epi32::<4>(_mm256_madd_epi16(high[r][v], ones));
                low[r][v] = _mm256_add_epi32(low[r][v], high);
            }
        }
    }
    low
}

/// Whether codes have more than four bits.
const fn wide<K: Kind>() -> bool {
    !matches!(K::LAYOUT.codes, Codes::Nibbles)
}

/// Adds to a row's sums what `half` of a step comes to: `dots` as integers, and whether the tile
/// has spikes there.
///
/// # Safety
/// `w` points to the lines of the step.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn scaled<K: Kind>(
    sums: &mut [__m256; VECTORS],
    x: &Record,
    (dots, spikes): ([__m256i; VECTORS], bool),
    (w, half): (*const Line, usize),
    (scale, min): ([__m256; VECTORS], [__m256; VECTORS]),
) {
    let layout = K::LAYOUT;
    let zero = layout.zero as i32;
    let neg_sum = match (layout.sixteens(), half) {
        (false, _) => x.neg_sum,
        (true, 0) => x.neg_sum_low,
        (true, _) => x.neg_sum - x.neg_sum_low,
    };
    // -128 sum is a multiple of 128.
    let start = _mm256_set1_epi32((neg_sum >> 7) * zero);
    let x_scale = _mm256_set1_ps(x.scale);
    for v in 0..VECTORS {
        let dot = _mm256_cvtepi32_ps(_mm256_add_epi32(dots[v], start));
        sums[v] = _mm256_fmadd_ps(dot, _mm256_mul_ps(scale[v], x_scale), sums[v]);
    }
    if spikes {
        let spike = x.spike_in(layout.sixteens(), half);
        if spike != 0.0 {
            let at = usize::from(x.spike_at);
            let one = _mm256_set1_epi32(1 << (8 * (at % 4)));
            let ones = _mm256_set1_epi16(1);
            for v in 0..VECTORS {
                // SAFETY: the caller vouches for the step.
                let (low, high) = unsafe { group::<K>(w, at / 4, v) };
                let of = |codes| _mm256_madd_epi16(_mm256_maddubs_epi16(codes, one), ones);
                let mut code = _mm256_sub_epi32(of(low), _mm256_set1_epi32(zero));
                if wide::<K>() {
                    code = _mm256_add_epi32(code, _mm256_slli_epi32::<4>(of(high)));
                }
                let by = _mm256_mul_ps(scale[v], _mm256_set1_ps(spike));
                sums[v] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(code), by, sums[v]);
            }
        }
    }
    if layout.has_min() {
        let x_sum = _mm256_set1_ps(scaled_sum_of(x, layout, half));
        for v in 0..VECTORS {
            sums[v] = _mm256_fmadd_ps(min[v], x_sum, sums[v]);
        }
    }
}

/// The low and high nibbles of the codes of group `g` for vector `v` of the panel.
///
/// # Safety
/// `step` points to the lines of a step.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn group<K: Kind>(step: *const Line, g: usize, v: usize) -> (__m256i, __m256i) {
    let load = |line: usize| {
        // SAFETY: a line is two vectors; lines 2j+h and 8+2i+h exist where codes are of that kind.
        unsafe { _mm256_load_si256(step.add(line + v / 2).cast::<__m256i>().add(v % 2)) }
    };
    let nibble = _mm256_set1_epi8(15);
    let above = |codes| _mm256_and_si256(_mm256_srli_epi16::<4>(codes), nibble);
    match K::LAYOUT.codes {
        Codes::Bytes => {
            let codes = load(2 * g);
            (_mm256_and_si256(codes, nibble), above(codes))
        }
        Codes::Nibbles | Codes::Pairs => {
            let both = load(2 * (g / 2));
            let low = if g.is_multiple_of(2) {
                _mm256_and_si256(both, nibble)
            } else {
                above(both)
            };
            if !wide::<K>() {
                return (low, _mm256_setzero_si256());
            }
            let pairs = load(8 + 2 * (g / 4));
            let pairs = match g % 4 {
                0 => pairs,
                1 => _mm256_srli_epi16::<2>(pairs),
                2 => _mm256_srli_epi16::<4>(pairs),
                _ => _mm256_srli_epi16::<6>(pairs),
            };
            (low, _mm256_and_si256(pairs, _mm256_set1_epi8(3)))
        }
    }
}

/// The scales and minima of a step, or of one half of it.
///
/// # Safety
/// `header` and `scales` point to those lines of a step.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn scales_of<K: Kind>(
    header: *const Line,
    scales: *const Line,
    half: usize,
) -> ([__m256; VECTORS], [__m256; VECTORS]) {
    let vectors = [0, 1, 2, 3];
    let none = [_mm256_setzero_ps(); VECTORS];
    let halves = |line: *const Line| {
        vectors.map(|v| {
            // SAFETY: a line is 32 halves.
            _mm256_cvtph_ps(unsafe { _mm_load_si128(line.cast::<__m128i>().add(v)) })
        })
    };
    // Eight bytes of the scales' lines, from the `at`-th 16 on.
    let eight = |at: usize, v: usize| {
        // SAFETY: the caller's lines have those bytes.
        unsafe { _mm_loadl_epi64(scales.cast::<u8>().add(16 * at + 8 * v).cast()) }
    };
    let unsigned = |at| vectors.map(|v| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(at, v))));
    let signed = |at| vectors.map(|v| _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(at, v))));
    let times =
        |a: [__m256; VECTORS], b: [__m256; VECTORS]| vectors.map(|v| _mm256_mul_ps(a[v], b[v]));
    let minus = |a: [__m256; VECTORS]| a.map(|a| _mm256_xor_ps(a, _mm256_set1_ps(-0.0)));
    // SAFETY: the second line of a header or of scales is there where the layout has it.
    let next = |line: *const Line| unsafe { line.add(1) };
    match K::LAYOUT.scales {
        Scales::Half => (halves(scales), none),
        Scales::HalfMin => (halves(scales), halves(next(scales))),
        Scales::Super32Min => (
            times(halves(header), unsigned(0)),
            minus(times(halves(next(header)), unsigned(2))),
        ),
        Scales::Super16 => (times(halves(header), signed(2 * half)), none),
        Scales::Super16Min => (
            times(halves(header), unsigned(2 * half)),
            minus(times(halves(next(header)), unsigned(4 + 2 * half))),
        ),
    }
}
