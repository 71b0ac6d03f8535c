//! What an encoder of the BERT family does besides products: LayerNorm, GELU, attention both ways.
//!
//! Rows of a sequence see their own sequence only, and every sum runs over ascending positions, so that a
//! sequence has the same bits alone and among others. Letters: `T` tokens, `D` width, `H` heads, `Dh` head width.

use crate::gemm::{Call, Dims, View, Write};
use crate::isa::for_each_isa;
use crate::ops::{dot, softmax};
use crate::par::Parts;
use crate::{Compute, Isa, Real};
use std::ops::Range;

/// Query rows that are worked on together.
const ROWS: usize = 32;

/// Attention within packed sequences, each row seeing the whole of its own sequence.
///
/// Shapes: out [T, H Dh]; qkv [T, 3 H Dh], queries, keys and values side by side; `seqs` are disjoint row ranges
/// Math:   out_t = sum_j softmax_j(q_t k_j / sqrt(Dh)) v_j
/// Errors: panics if a length disagrees
/// Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1
pub fn attention(
    compute: &Compute,
    out: &mut [f32],
    qkv: &[f32],
    seqs: &[Range<usize>],
    n_heads: usize,
    head_dim: usize,
) {
    let (ow, dh) = (n_heads * head_dim, head_dim);
    let w = 3 * ow;
    let n_rows = out.len() / ow;
    assert!(
        out.len() == n_rows * ow && qkv.len() == n_rows * w,
        "qkv is [T, 3 H Dh], out is [T, H Dh]"
    );
    let mut end = 0;
    for seq in seqs {
        assert!(
            seq.start >= end && seq.end >= seq.start && seq.end <= n_rows,
            "sequences are in order"
        );
        end = seq.end;
    }
    let isa = compute.isa();
    let scale = 1.0 / (dh as f32).sqrt();
    let out = Parts::new(out);
    compute.pool().run(seqs.len() * n_heads, |task| {
        let (seq, head) = (&seqs[task / n_heads], task % n_heads);
        let n = seq.len();
        let at = |part: usize, row: usize| (seq.start + row) * w + part * ow + head * dh;
        let mut keys = vec![0.0; dh * n];
        for t in 0..n {
            for (d, &x) in qkv[at(1, t)..][..dh].iter().enumerate() {
                keys[d * n + t] = x;
            }
        }
        let mut probs = vec![0.0; ROWS.min(n) * n];
        for first in (0..n).step_by(ROWS) {
            let m = ROWS.min(n - first);
            let query = View::rows(&qkv[at(0, first)..], w);
            let scores = Dims { m, n, k: dh };
            Call::new(query, (&keys, n), n, scores, Write::Set).run(isa, &mut probs);
            for row in probs.chunks_exact_mut(n).take(m) {
                softmax(isa, row, n, scale);
            }
            let mix = Dims { m, n: dh, k: n };
            let values = (&qkv[at(2, 0)..], w);
            let call = Call::new(View::rows(&probs, n), values, ow, mix, Write::Set);
            // SAFETY: a task writes the rows of its sequence and the columns of its head only; `out`
            // holds [T, H Dh] (checked above).
            unsafe { f32::gemm_serial(isa, &call, out.at((seq.start + first) * ow + head * dh)) };
        }
    });
}

/// `x = LayerNorm(x + delta + bias)` by rows, in place: the end of both halves of a post-norm layer.
///
/// Shapes:   x, delta [T, D]; bias, gain, shift [D]
/// Math:     y = (x - mean) / sqrt(mean((x - mean)^2) + eps) gain + shift
/// Errors:   panics if a length disagrees
/// Source:   Ba et al. 2016, arXiv:1607.06450, eq. 4
pub fn add_and_norm(
    isa: Isa,
    x: &mut [f32],
    delta: &[f32],
    bias: &[f32],
    (gain, shift): (&[f32], &[f32]),
    eps: f32,
) {
    let d = bias.len();
    assert!(x.len() == delta.len() && gain.len() == d && shift.len() == d);
    let ones = vec![1.0; d];
    for (x, delta) in x.chunks_exact_mut(d).zip(delta.chunks_exact(d)) {
        for ((x, &delta), &bias) in x.iter_mut().zip(delta).zip(bias) {
            *x += delta + bias;
        }
        let mean = dot(isa, x, &ones) / d as f32;
        x.iter_mut().for_each(|x| *x -= mean);
        let rstd = 1.0 / (dot(isa, x, x) / d as f32 + eps).sqrt();
        for ((x, &gain), &shift) in x.iter_mut().zip(gain).zip(shift) {
            *x = (*x * rstd).mul_add(gain, shift);
        }
    }
}

for_each_isa! {
    /// `x = gelu(x + bias)` by rows, in place, with the exact function and not the one by tanh.
    ///
    /// Shapes:   x [T, D]; bias [D]
    /// Math:     gelu(x) = x P(N < x), N normal;  P = 1 - erfc(|x| / sqrt 2) / 2, mirrored below zero
    /// Numerics: within 4e-7 of the true value for |x| < 4 (tested): erfc by a polynomial in
    ///           t = 1 / (1 + p z) times exp(-z^2), whose error is at most 1.5e-7
    /// Source:   Hendrycks & Gimpel 2016, arXiv:1606.08415, eq. 1; erfc: Abramowitz & Stegun 1964, 7.1.26
    pub fn bias_gelu(x: &mut [f32], bias: &[f32]) {
        const P: f32 = 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2;
        const A: [f32; 5] = [1.061_405_4, -1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
        for row in x.chunks_exact_mut(bias.len()) {
            for (x, &bias) in row.iter_mut().zip(bias) {
                let v = *x + bias;
                let t = 1.0 / v.abs().mul_add(P, 1.0);
                let mut poly = A[0];
                for a in &A[1..] {
                    poly = f32::mul_add(poly, t, *a);
                }
                let tail = 0.5 * poly * t * Real::exp(-0.5 * v * v);
                *x = v * if v < 0.0 { tail } else { 1.0 - tail };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::noise::wide as numbers;

    const H: usize = 3;
    const DH: usize = 8;

    /// The definition, in f64.
    fn naive(qkv: &[f32], seqs: &[Range<usize>]) -> Vec<f64> {
        let (w, ow) = (3 * H * DH, H * DH);
        let x = |row: usize, part: usize, head: usize, d: usize| {
            f64::from(qkv[row * w + part * ow + head * DH + d])
        };
        let mut out = vec![0.0; qkv.len() / 3];
        for seq in seqs {
            for (t, head) in seq.clone().flat_map(|t| (0..H).map(move |h| (t, h))) {
                let score = |j| -> f64 {
                    let dot: f64 = (0..DH).map(|d| x(t, 0, head, d) * x(j, 1, head, d)).sum();
                    (dot / (DH as f64).sqrt()).exp()
                };
                let sum: f64 = seq.clone().map(score).sum();
                for d in 0..DH {
                    out[t * ow + head * DH + d] =
                        seq.clone().map(|j| score(j) / sum * x(j, 2, head, d)).sum();
                }
            }
        }
        out
    }

    #[test]
    fn attention_is_its_definition_and_a_sequence_does_not_see_its_neighbours() {
        let seqs = [0..3, 3..4, 4..4, 4..71];
        let (w, ow) = (3 * H * DH, H * DH);
        let qkv = numbers(71 * w, 1);
        for isa in Isa::available() {
            let run = |qkv: &[f32], seqs: &[Range<usize>], threads| {
                let mut out = vec![0.0; qkv.len() / 3];
                attention(&Compute::with_isa(threads, isa), &mut out, qkv, seqs, H, DH);
                out
            };
            let all = run(&qkv, &seqs, 2);
            for (got, want) in all.iter().zip(naive(&qkv, &seqs)) {
                assert!((f64::from(*got) - want).abs() < 2e-6, "{got} {want}");
            }
            for seq in &seqs {
                let alone = 0..seq.len();
                let own = &qkv[seq.start * w..seq.end * w];
                let one = run(own, std::slice::from_ref(&alone), 1);
                assert_eq!(one, all[seq.start * ow..seq.end * ow], "{}", isa.name());
            }
        }
    }

    #[test]
    fn norm_is_its_definition_on_every_level() {
        for d in [1, 7, 32, 384] {
            let (x, delta, bias) = (numbers(3 * d, 2), numbers(3 * d, 3), numbers(d, 4));
            let (gain, shift) = (numbers(d, 5), numbers(d, 6));
            let run = |isa| {
                let mut x = x.clone();
                add_and_norm(isa, &mut x, &delta, &bias, (&gain, &shift), 1e-12);
                x
            };
            let want = run(Isa::SCALAR);
            for isa in Isa::available() {
                assert_eq!(run(isa), want, "{}", isa.name());
            }
            if d == 1 {
                assert_eq!(want, [shift[0]; 3], "nothing is left of one number");
                continue;
            }
            for row in 0..3 {
                let sum = |i: usize| {
                    f64::from(x[row * d + i]) + f64::from(delta[row * d + i]) + f64::from(bias[i])
                };
                let mean = (0..d).map(sum).sum::<f64>() / d as f64;
                let var = (0..d).map(|i| (sum(i) - mean).powi(2)).sum::<f64>() / d as f64;
                for i in 0..d {
                    let y = (sum(i) - mean) / var.sqrt() * f64::from(gain[i]) + f64::from(shift[i]);
                    let got = f64::from(want[row * d + i]);
                    assert!((got - y).abs() < 5e-6, "{got} {y}");
                }
            }
        }
    }

    /// `erfc(z)` for `z >= 0` by its series and its continued fraction, to about 1e-14.
    fn erfc(z: f64) -> f64 {
        let pi = std::f64::consts::PI;
        if z < 2.5 {
            let (mut term, mut sum) = (z, z);
            for n in 1..200 {
                term *= -z * z / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            return 1.0 - 2.0 / pi.sqrt() * sum;
        }
        let fraction = (1..120).rev().fold(z, |f, n| z + f64::from(n) / 2.0 / f);
        (-z * z).exp() / pi.sqrt() / fraction
    }

    #[test]
    fn gelu_is_close_to_the_exact_function_on_every_level() {
        let x: Vec<f32> = (-4000..4000).map(|i| i as f32 * 2.5e-3).collect();
        let run = |isa| {
            let mut x = x.clone();
            bias_gelu(isa, &mut x, &[0.0, 0.0, 0.0, 0.0, 0.0]);
            x
        };
        let want = run(Isa::SCALAR);
        for isa in Isa::available() {
            assert_eq!(run(isa), want, "{}", isa.name());
        }
        for (&x, &got) in x.iter().zip(&want) {
            let tail = erfc(f64::from(x).abs() / 2f64.sqrt()) / 2.0;
            let exact = f64::from(x) * if x < 0.0 { tail } else { 1.0 - tail };
            let error = (f64::from(got) - exact).abs();
            let bound = if x.abs() < 4.0 { 4e-7 } else { 1e-6 };
            assert!(error < bound, "gelu({x}) is {exact}, got {got}");
        }
        let mut odd = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN];
        bias_gelu(Isa::detect(), &mut odd, &[1.0, 1.0, 1.0]);
        assert!(odd[0] == f32::INFINITY && odd[2].is_nan());
    }
}
