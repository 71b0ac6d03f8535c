//! Scores and mixes on AVX-512 with BF16.

use super::{BLOCK, Head, MIX_TILE, POS_PAIRS, TILE, value_width};
use crate::bf16::as_bf16;
use std::arch::x86_64::*;

/// Up to so many rows, memory is slower than arithmetic.
const FEW: usize = 4;

/// # Safety
/// The CPU has AVX-512 with BF16; lengths as `Head::scores` checks them.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn scores(
    head: &Head<'_>,
    scores: &mut [f32],
    stride: usize,
    query: &[u32],
    m: usize,
) {
    // SAFETY: passed on.
    unsafe {
        match m {
            1 => tile_scores::<1>(head, scores, stride, query),
            2 => tile_scores::<2>(head, scores, stride, query),
            3 => tile_scores::<3>(head, scores, stride, query),
            4 => tile_scores::<4>(head, scores, stride, query),
            5 => tile_scores::<5>(head, scores, stride, query),
            6 => tile_scores::<6>(head, scores, stride, query),
            7 => tile_scores::<7>(head, scores, stride, query),
            8 => tile_scores::<8>(head, scores, stride, query),
            9 => tile_scores::<9>(head, scores, stride, query),
            10 => tile_scores::<10>(head, scores, stride, query),
            11 => tile_scores::<11>(head, scores, stride, query),
            _ => tile_scores::<12>(head, scores, stride, query),
        }
    }
}

/// # Safety
/// As [`scores`], for `M` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile_scores<const M: usize>(
    head: &Head<'_>,
    scores: &mut [f32],
    stride: usize,
    query: &[u32],
) {
    let pairs = head.dims.head_dim / 2;
    for block in 0..head.blocks.len() {
        let mut keys = head.keys(block).as_ptr().cast::<i32>();
        // Blocks lie apart, and few rows do not wait for sums but for memory: ask for the
        // next block while this one is read, after the last for the first values.
        let next = if block + 1 < head.blocks.len() {
            head.keys(block + 1)
        } else {
            head.values(0)
        };
        let mut next = next.as_ptr().cast::<i32>();
        // SAFETY: the block's keys are [pairs, BLOCK] words, the queries [pairs, TILE], and
        // each row of scores has room for every block.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); 2]; M];
            for p in 0..pairs {
                if M <= FEW {
                    _mm_prefetch::<_MM_HINT_T0>(next.cast());
                    _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(16).cast());
                    next = next.wrapping_add(BLOCK);
                }
                let k0 = as_bf16(_mm512_loadu_epi32(keys));
                let k1 = as_bf16(_mm512_loadu_epi32(keys.add(16)));
                for i in 0..M {
                    let q = _mm512_set1_epi32(*query.as_ptr().add(p * TILE + i) as i32);
                    sums[i][0] = _mm512_dpbf16_ps(sums[i][0], as_bf16(q), k0);
                    sums[i][1] = _mm512_dpbf16_ps(sums[i][1], as_bf16(q), k1);
                }
                keys = keys.add(BLOCK);
            }
            let out = scores.as_mut_ptr().add(block * BLOCK);
            for i in 0..M {
                _mm512_storeu_ps(out.add(i * stride), sums[i][0]);
                _mm512_storeu_ps(out.add(i * stride + 16), sums[i][1]);
            }
        }
    }
}

/// # Safety
/// The CPU has AVX-512 with BF16; lengths as `Head::mix` checks them; `rows` point to `Dh`
/// numbers each.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn mix(
    head: &Head<'_>,
    rows: &[*mut f32],
    norms: &[f32],
    probs: &[u32],
    stride: usize,
) {
    let (dh, mut at) = (head.dims.head_dim, 0);
    while at < dh {
        let n_vectors = (dh - at).div_ceil(16).min(4);
        for (i, rows) in rows.chunks(MIX_TILE).enumerate() {
            let first = i * MIX_TILE;
            let (norms, probs) = (&norms[first..], &probs[first * stride..]);
            // SAFETY: passed on.
            unsafe {
                match n_vectors {
                    1 => columns::<1>(head, rows, norms, probs, stride, at),
                    2 => columns::<2>(head, rows, norms, probs, stride, at),
                    3 => columns::<3>(head, rows, norms, probs, stride, at),
                    _ => columns::<4>(head, rows, norms, probs, stride, at),
                }
            }
        }
        at += 16 * n_vectors;
    }
}

/// # Safety
/// As [`mix`], for `NV` vectors from column `at` on and up to six rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn columns<const NV: usize>(
    head: &Head<'_>,
    rows: &[*mut f32],
    norms: &[f32],
    probs: &[u32],
    stride: usize,
    at: usize,
) {
    // SAFETY: passed on.
    unsafe {
        match rows.len() {
            1 => tile_mix::<1, NV>(head, rows, norms, probs, stride, at),
            2 => tile_mix::<2, NV>(head, rows, norms, probs, stride, at),
            3 => tile_mix::<3, NV>(head, rows, norms, probs, stride, at),
            4 => tile_mix::<4, NV>(head, rows, norms, probs, stride, at),
            5 => tile_mix::<5, NV>(head, rows, norms, probs, stride, at),
            _ => tile_mix::<6, NV>(head, rows, norms, probs, stride, at),
        }
    }
}

/// # Safety
/// As [`columns`], for `M` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn tile_mix<const M: usize, const NV: usize>(
    head: &Head<'_>,
    rows: &[*mut f32],
    norms: &[f32],
    probs: &[u32],
    stride: usize,
    at: usize,
) {
    let (dh, dv, n_pairs) = (head.dims.head_dim, value_width(head.dims), head.n_pairs);
    // SAFETY: the block's values are [POS_PAIRS, dv] words, at + 16 NV <= dv, the probs are
    // [M, stride] with room for every block, and masked lanes of a row are never touched.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); NV]; M];
        for block in 0..head.blocks.len() {
            let mut values = head.values(block).as_ptr().cast::<i32>().add(at);
            // As for the keys; the last block asks for itself again, which is for free.
            let next = head.values((block + 1).min(head.blocks.len() - 1));
            let mut next = next.as_ptr().cast::<i32>().add(at);
            let probs = probs.as_ptr().add(block * POS_PAIRS);
            for j in 0..POS_PAIRS.min(n_pairs - block * POS_PAIRS) {
                if M <= FEW {
                    for n in 0..NV {
                        _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(16 * n).cast());
                    }
                    next = next.wrapping_add(dv);
                }
                let mut v = [as_bf16(_mm512_setzero_si512()); NV];
                for n in 0..NV {
                    v[n] = as_bf16(_mm512_loadu_epi32(values.add(16 * n)));
                }
                for i in 0..M {
                    let p = as_bf16(_mm512_set1_epi32(*probs.add(i * stride + j) as i32));
                    for n in 0..NV {
                        sums[i][n] = _mm512_dpbf16_ps(sums[i][n], p, v[n]);
                    }
                }
                values = values.add(dv);
            }
        }
        for i in 0..M {
            let norm = _mm512_set1_ps(norms[i]);
            for n in 0..NV {
                let left = dh - (at + 16 * n).min(dh);
                let mask = if left >= 16 { !0 } else { (1u16 << left) - 1 };
                let out = rows[i].add(at + 16 * n);
                _mm512_mask_storeu_ps(out, mask, _mm512_mul_ps(sums[i][n], norm));
            }
        }
    }
}
