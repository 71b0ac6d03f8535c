//! The row operations of a transformer, forward and backward side by side.
//!
//! Rows are independent, so callers cut them over the pool as they like. Letters in shapes:
//! `T` rows (tokens), `D` width, `F` ffn width, `Dh` head width, `V` vocabulary.

use crate::Real;
use crate::isa::for_each_isa;

/// Interleaved chains of a reduction. Fixed: results must not depend on the vector width.
pub(crate) const LANES: usize = 16;

/// Sums sixteen lanes in a fixed tree.
#[inline(always)]
pub(crate) fn tree<R: Real>(mut lanes: [R; LANES], join: impl Fn(R, R) -> R) -> R {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn dot_body<R: Real>(a: &[R], b: &[R]) -> R {
    assert_eq!(a.len(), b.len());
    let mut sums = [R::ZERO; LANES];
    let (mut a16, mut b16) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    for (a, b) in a16.by_ref().zip(b16.by_ref()) {
        for i in 0..LANES {
            sums[i] = a[i].mul_add(b[i], sums[i]);
        }
    }
    for (i, (&a, &b)) in a16.remainder().iter().zip(b16.remainder()).enumerate() {
        sums[i] = a.mul_add(b, sums[i]);
    }
    tree(sums, |a, b| a + b)
}

#[inline(always)]
pub(crate) fn max_body<R: Real>(x: &[R]) -> R {
    let mut lanes = [R::LOWEST; LANES];
    let mut x16 = x.chunks_exact(LANES);
    for x in x16.by_ref() {
        for i in 0..LANES {
            lanes[i] = lanes[i].max(x[i]);
        }
    }
    for (i, &x) in x16.remainder().iter().enumerate() {
        lanes[i] = lanes[i].max(x);
    }
    tree(lanes, R::max)
}

/// Replaces `x` by `exp(x * scale - shift)` and returns the sum.
#[inline(always)]
fn exp_sum_body<R: Real>(x: &mut [R], scale: R, shift: R) -> R {
    let mut sums = [R::ZERO; LANES];
    let mut x16 = x.chunks_exact_mut(LANES);
    for x in x16.by_ref() {
        for i in 0..LANES {
            x[i] = x[i].mul_add(scale, -shift).exp();
            sums[i] += x[i];
        }
    }
    for (i, x) in x16.into_remainder().iter_mut().enumerate() {
        *x = x.mul_add(scale, -shift).exp();
        sums[i] += *x;
    }
    tree(sums, |a, b| a + b)
}

for_each_isa! {
    /// `sum_i a_i b_i` in sixteen interleaved chains and one fixed tree.
    ///
    /// Panics if the lengths differ.
    pub fn dot<R: Real>(a: &[R], b: &[R]) -> R {
        dot_body(a, b)
    }
}

for_each_isa! {
    /// `out += x`. Panics if the lengths differ.
    pub fn add_assign<R: Real>(out: &mut [R], x: &[R]) {
        assert_eq!(out.len(), x.len());
        for (out, &x) in out.iter_mut().zip(x) {
            *out += x;
        }
    }
}

for_each_isa! {
    /// Adds a bias to every row: `out [T, D] += bias [D]`.
    pub fn add_bias<R: Real>(out: &mut [R], bias: &[R]) {
        for row in out.chunks_exact_mut(bias.len()) {
            for (out, &b) in row.iter_mut().zip(bias) {
                *out += b;
            }
        }
    }
}

for_each_isa! {
    /// Root-mean-square norm over the last axis, with a learned gain.
    ///
    /// Shapes:   out, x [T, D]; rstd [T] (saved for backward); w [D]
    /// Math:     rstd = (mean_i x_i^2 + eps)^-1/2;  out_i = w_i x_i rstd
    /// Numerics: accumulates in R
    /// Errors:   panics if a length disagrees
    /// Source:   Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4
    pub fn rms_norm<R: Real>(out: &mut [R], rstd: &mut [R], x: &[R], w: &[R], eps: R) {
        let d = w.len();
        assert!(out.len() == x.len() && x.len() == rstd.len() * d);
        for ((out, x), rstd) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(rstd) {
            let mean = dot_body(x, x) / R::from_f64(d as f64);
            *rstd = R::ONE / (mean + eps).sqrt();
            scale_row(out, x, w, *rstd);
        }
    }
}

for_each_isa! {
    /// [`rms_norm`] of some columns of one row whose `rstd` is known.
    pub(crate) fn scaled(out: &mut [f32], x: &[f32], w: &[f32], rstd: f32) {
        scale_row(out, x, w, rstd);
    }
}

#[inline(always)]
fn scale_row<R: Real>(out: &mut [R], x: &[R], w: &[R], rstd: R) {
    for ((out, &x), &w) in out.iter_mut().zip(x).zip(w) {
        *out = w * (x * rstd);
    }
}

for_each_isa! {
    /// The `rstd` of [`rms_norm`] alone.
    ///
    /// Shapes: rstd [T]; x [T, D]
    pub fn rms_norm_rstd<R: Real>(rstd: &mut [R], x: &[R], eps: R) {
        if rstd.is_empty() {
            return;
        }
        let d = x.len() / rstd.len();
        assert_eq!(x.len(), rstd.len() * d);
        for (rstd, x) in rstd.iter_mut().zip(x.chunks_exact(d)) {
            let mean = dot_body(x, x) / R::from_f64(d as f64);
            *rstd = R::ONE / (mean + eps).sqrt();
        }
    }
}

for_each_isa! {
    /// Backward of [`rms_norm`] with respect to `x`; the gain is frozen.
    ///
    /// Shapes: dx (added to), dy, x [T, D]; rstd [T]; w [D]
    /// Math:   out_i = w_i x_i rstd  =>  dx_i += rstd (g_i - x_i rstd^2 mean_j(g_j x_j)), g = w dy
    pub fn rms_norm_backward<R: Real>(dx: &mut [R], dy: &[R], x: &[R], rstd: &[R], w: &[R]) {
        let d = w.len();
        assert!(dx.len() == x.len() && dy.len() == x.len() && x.len() == rstd.len() * d);
        let rows = dx.chunks_exact_mut(d).zip(dy.chunks_exact(d)).zip(x.chunks_exact(d)).zip(rstd);
        for (((dx, dy), x), &rstd) in rows {
            let mut sums = [R::ZERO; LANES];
            for ((dy, x), w) in dy.chunks(LANES).zip(x.chunks(LANES)).zip(w.chunks(LANES)) {
                for (i, ((&dy, &x), &w)) in dy.iter().zip(x).zip(w).enumerate() {
                    sums[i] = (dy * w).mul_add(x, sums[i]);
                }
            }
            let shrink = tree(sums, |a, b| a + b) / R::from_f64(d as f64) * rstd * rstd * rstd;
            for (((dx, &dy), &x), &w) in dx.iter_mut().zip(dy).zip(x).zip(w) {
                *dx += (dy * w).mul_add(rstd, -(x * shrink));
            }
        }
    }
}

for_each_isa! {
    /// The gated activation of a Llama MLP.
    ///
    /// Shapes: out [T, F]; gate_up [T, 2F], the gate first
    /// Math:   out = silu(gate) up,  silu(g) = g / (1 + e^-g)
    /// Source: Shazeer 2020, arXiv:2002.05202, eq. 6
    pub fn swiglu<R: Real>(out: &mut [R], gate_up: &[R], f: usize) {
        assert_eq!(out.len() * 2, gate_up.len());
        for (out, gate_up) in out.chunks_exact_mut(f).zip(gate_up.chunks_exact(2 * f)) {
            let (gate, up) = gate_up.split_at(f);
            gate_row(out, gate, up);
        }
    }
}

for_each_isa! {
    /// [`swiglu`] of some columns of one row, whose gate and up lie apart and may go on.
    pub(crate) fn gated(out: &mut [f32], gate: &[f32], up: &[f32]) {
        gate_row(out, gate, up);
    }
}

#[inline(always)]
fn gate_row<R: Real>(out: &mut [R], gate: &[R], up: &[R]) {
    for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
        *out = g / (R::ONE + (-g).exp()) * u;
    }
}

for_each_isa! {
    /// Backward of [`swiglu`]: overwrites `gate_up` with its gradient.
    ///
    /// Shapes: gate_up [T, 2F]; d_out [T, F]
    /// Math:   out = silu(g) u, s = 1 / (1 + e^-g)
    ///         =>  d_u = d_out g s;  d_g = d_out u s (1 + g (1 - s))
    pub fn swiglu_backward<R: Real>(gate_up: &mut [R], d_out: &[R], f: usize) {
        assert_eq!(d_out.len() * 2, gate_up.len());
        for (d_out, gate_up) in d_out.chunks_exact(f).zip(gate_up.chunks_exact_mut(2 * f)) {
            let (gate, up) = gate_up.split_at_mut(f);
            // Through local lanes: the compiler cannot tell that the two halves do not overlap.
            let lanes = d_out.chunks(LANES).zip(gate.chunks_mut(LANES)).zip(up.chunks_mut(LANES));
            for ((d_out, gate), up) in lanes {
                let n = d_out.len();
                let (mut d, mut g, mut u) = ([R::ZERO; LANES], [R::ZERO; LANES], [R::ZERO; LANES]);
                if n == LANES {
                    d.copy_from_slice(d_out);
                    g.copy_from_slice(gate);
                    u.copy_from_slice(up);
                } else {
                    d[..n].copy_from_slice(d_out);
                    g[..n].copy_from_slice(gate);
                    u[..n].copy_from_slice(up);
                }
                for i in 0..LANES {
                    let s = R::ONE / (R::ONE + (-g[i]).exp());
                    let d_gate = d[i] * u[i] * s * (R::ONE + g[i] * (R::ONE - s));
                    u[i] = d[i] * (g[i] * s);
                    g[i] = d_gate;
                }
                if n == LANES {
                    gate.copy_from_slice(&g);
                    up.copy_from_slice(&u);
                } else {
                    gate.copy_from_slice(&g[..n]);
                    up.copy_from_slice(&u[..n]);
                }
            }
        }
    }
}

for_each_isa! {
    /// Rotary position embedding of the heads of one token, in place.
    ///
    /// Shapes: heads [H * Dh]; cos, sin [Dh / 2] of the token's position
    /// Math:   (a_i, b_i) = (x_i, x_{i + Dh/2});  a' = a cos - b sin;  b' = b cos + a sin
    ///         (the "half" pairing of Hugging Face). The backward is the rotation by -sin.
    /// Source: Su et al. 2021, arXiv:2104.09864, eq. 34
    pub fn rope<R: Real>(heads: &mut [R], cos: &[R], sin: &[R], sign: R) {
        let half = cos.len();
        assert!(sin.len() == half && heads.len().is_multiple_of(2 * half));
        for head in heads.chunks_exact_mut(2 * half) {
            let (a, b) = head.split_at_mut(half);
            for (((a, b), &cos), &sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                let sin = sin * sign;
                let (x, y) = (*a, *b);
                *a = x * cos - y * sin;
                *b = y * cos + x * sin;
            }
        }
    }
}

for_each_isa! {
    /// Softmax of one row of scores, in place; the row's part beyond `n` becomes zero.
    ///
    /// Shapes: scores [>= n]
    /// Math:   p_j = exp(scale s_j - m) / sum_j exp(scale s_j - m),  m = max_j scale s_j
    ///
    /// Returns `m` and one over the sum.
    pub fn softmax<R: Real>(scores: &mut [R], n: usize, scale: R) -> (R, R) {
        let (row, rest) = scores.split_at_mut(n);
        rest.fill(R::ZERO);
        let shift = max_body(row) * scale;
        let norm = R::ONE / exp_sum_body(row, scale, shift);
        for p in row {
            *p *= norm;
        }
        (shift, norm)
    }
}

for_each_isa! {
    /// Backward of [`softmax`] on one row: overwrites `d_probs` with the gradient of the scores.
    ///
    /// Math: d_s_j = scale p_j (d_p_j - sum_k p_k d_p_k)
    ///
    /// Returns the sum.
    pub fn softmax_backward<R: Real>(d_probs: &mut [R], probs: &[R], scale: R) -> R {
        let mean = dot_body(probs, d_probs);
        for (d, &p) in d_probs.iter_mut().zip(probs) {
            *d = scale * p * (*d - mean);
        }
        mean
    }
}

for_each_isa! {
    /// [`softmax`] and [`softmax_backward`] again on some columns of a row, with the bits that
    /// they gave the whole row; the part beyond `n` becomes zero.
    ///
    /// `stats` are what the two returned: shift and norm, and the mean of the gradient.
    pub fn softmax_again<R: Real>(scores: &mut [R], d_probs: &mut [R], n: usize, scale: R, stats: [R; 3]) {
        let [shift, norm, mean] = stats;
        let (probs, probs_rest) = scores.split_at_mut(n);
        let (d, d_rest) = d_probs.split_at_mut(n);
        probs_rest.fill(R::ZERO);
        d_rest.fill(R::ZERO);
        for (p, d) in probs.iter_mut().zip(d) {
            *p = p.mul_add(scale, -shift).exp() * norm;
            *d = scale * *p * (*d - mean);
        }
    }
}

for_each_isa! {
    /// Cross entropy of one row of logits against `target`.
    ///
    /// Returns (loss, whether the target has the highest logit) and overwrites the logits with
    /// `d_scale` times the gradient.
    ///
    /// Math: loss = log sum_j e^{z_j} - z_t;  d_z_j = d_scale (softmax(z)_j - [j = t])
    pub fn cross_entropy<R: Real>(logits: &mut [R], target: usize, d_scale: R) -> (f64, bool) {
        let max = max_body(logits);
        let at_target = logits[target];
        let sum = exp_sum_body(logits, R::ONE, max);
        let norm = d_scale / sum;
        for z in logits.iter_mut() {
            *z *= norm;
        }
        logits[target] = logits[target] - d_scale;
        // The logarithm of one number a row: the standard library's, in f64.
        (sum.to_f64().ln() + max.to_f64() - at_target.to_f64(), at_target == max)
    }
}

for_each_isa! {
    /// The index of the greatest number, the lowest among equals; `None` where nothing is
    /// above negative infinity. A NaN is never the greatest.
    ///
    /// Shapes: x [V]
    pub fn argmax(x: &[f32]) -> Option<usize> {
        // Wide enough that comparing one part does not wait for the one before.
        const WIDE: usize = 4 * LANES;
        let (mut best, mut at) = ([f32::NEG_INFINITY; WIDE], [0u32; WIDE]);
        let parts = x.chunks_exact(WIDE);
        let rest = parts.remainder();
        let mut part_idx = 0u32;
        for part in parts {
            for i in 0..WIDE {
                let greater = part[i] > best[i];
                best[i] = if greater { part[i] } else { best[i] };
                at[i] = if greater { part_idx } else { at[i] };
            }
            part_idx += 1;
        }
        for (i, &x) in rest.iter().enumerate() {
            if x > best[i] {
                (best[i], at[i]) = (x, part_idx);
            }
        }
        let mut found: Option<(f32, usize)> = None;
        for (i, (&value, &part)) in best.iter().zip(&at).enumerate() {
            let idx = part as usize * WIDE + i;
            let wins = found.is_none_or(|(best, at)| value > best || value == best && idx < at);
            if value > f32::NEG_INFINITY && wins {
                found = Some((value, idx));
            }
        }
        found.map(|(_, idx)| idx)
    }
}

for_each_isa! {
    /// Whether every number is finite.
    ///
    /// Shapes: x [any]
    pub fn all_finite(x: &[f32]) -> bool {
        // Stops early only between parts, so that a part is a plain loop.
        x.chunks(64 * LANES).all(|part| {
            let worst = part.iter().fold(0, |worst: u32, x| worst.max(x.to_bits() & 0x7fff_ffff));
            worst < 0x7f80_0000
        })
    }
}

for_each_isa! {
    /// Rounds a row to bf16 (to nearest, ties to even) and packs neighbours in one word, the
    /// even one in the low half; an odd last one gets a zero beside it.
    ///
    /// Shapes: out [ceil(D / 2)]; x [D]
    pub fn round_to_bf16_pairs(out: &mut [u32], x: &[f32]) {
        assert_eq!(out.len(), x.len().div_ceil(2));
        let pairs = x.chunks_exact(2);
        if let (Some(last), &[x]) = (out.last_mut(), pairs.remainder()) {
            *last = round_bits(x);
        }
        for (out, pair) in out.iter_mut().zip(pairs) {
            *out = round_bits(pair[0]) | round_bits(pair[1]) << 16;
        }
    }
}

#[inline(always)]
pub(crate) fn round_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    // A NaN with all mantissa bits set would wrap around to a number.
    if x.is_nan() { 0x7fc0 } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;
    use crate::noise::wide as numbers;

    /// Runs `op` at every level and demands the bits of the scalar one.
    fn parity(name: &str, op: impl Fn(Isa) -> Vec<f32>) {
        let want = op(Isa::SCALAR);
        for isa in Isa::available() {
            let got = op(isa);
            let same = got
                .iter()
                .zip(&want)
                .all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{name} differs on {}", isa.name());
        }
    }

    #[test]
    fn every_level_gives_the_bits_of_the_scalar_one() {
        for d in [1, 2, 15, 16, 17, 31, 64, 576, 1000] {
            let (x, y, w) = (numbers(3 * d, 1), numbers(3 * d, 2), numbers(d, 3));
            parity("dot", |isa| vec![dot(isa, &x, &y)]);
            parity("add_assign", |isa| {
                let mut out = y.clone();
                add_assign(isa, &mut out, &x);
                out
            });
            parity("rms_norm", |isa| {
                let (mut out, mut rstd) = (vec![0.0; 3 * d], vec![0.0; 3]);
                rms_norm(isa, &mut out, &mut rstd, &x, &w, 1e-5);
                let mut again = vec![0.0; 3];
                rms_norm_rstd(isa, &mut again, &x, 1e-5);
                assert_eq!(again, rstd);
                let mut dx = vec![0.5; 3 * d];
                rms_norm_backward(isa, &mut dx, &y, &x, &rstd, &w);
                [out, rstd, dx].concat()
            });
            parity("swiglu", |isa| {
                let mut gate_up = numbers(6 * d, 4);
                let mut out = vec![0.0; 3 * d];
                swiglu(isa, &mut out, &gate_up, d);
                swiglu_backward(isa, &mut gate_up, &y, d);
                [out, gate_up].concat()
            });
            parity("rope", |isa| {
                let mut heads = numbers(4 * d, 5);
                rope(isa, &mut heads, &x[..d], &y[..d], -1.0);
                heads
            });
            parity("softmax", |isa| {
                let mut probs = x.clone();
                softmax(isa, &mut probs, 2 * d, 0.125);
                let mut d_probs = y.clone();
                let mean = softmax_backward(isa, &mut d_probs, &probs, 0.125);
                let (mut again, mut d_again) = (x.clone(), y.clone());
                let (shift, norm) = softmax(isa, &mut x.clone(), 2 * d, 0.125);
                softmax_again(
                    isa,
                    &mut again,
                    &mut d_again,
                    2 * d,
                    0.125,
                    [shift, norm, mean],
                );
                assert_eq!((&again, &d_again), (&probs, &d_probs));
                [probs, d_probs].concat()
            });
            parity("cross_entropy", |isa| {
                let mut logits = x.clone();
                let (loss, hit) = cross_entropy(isa, &mut logits, d, 0.25);
                logits.extend([loss as f32, f32::from(u8::from(hit))]);
                logits
            });
            parity("round_to_bf16_pairs", |isa| {
                let mut words = vec![0; x.len().div_ceil(2)];
                round_to_bf16_pairs(isa, &mut words, &x);
                words.into_iter().map(f32::from_bits).collect()
            });
        }
    }

    #[test]
    fn argmax_is_the_first_of_the_greatest_and_finite_means_every_one() {
        let plain = |x: &[f32]| {
            let mut best = None;
            for (i, &v) in x.iter().enumerate() {
                if v > best.map_or(f32::NEG_INFINITY, |b: usize| x[b]) {
                    best = Some(i);
                }
            }
            best
        };
        for isa in Isa::available() {
            for n in [0, 1, 2, 15, 63, 64, 65, 200, 1000] {
                // Few different values, so that equals are everywhere.
                for seed in 0..20 {
                    let mut x = numbers(n, seed);
                    x.iter_mut().for_each(|x| *x = x.round());
                    assert_eq!(argmax(isa, &x), plain(&x), "{} of {n}", isa.name());
                    assert!(all_finite(isa, &x));
                    for bad in [f32::NAN, f32::NEG_INFINITY, f32::INFINITY] {
                        if n > 0 {
                            let at = seed as usize * 37 % n;
                            let kept = std::mem::replace(&mut x[at], bad);
                            assert_eq!(argmax(isa, &x), plain(&x), "{} of {n}", isa.name());
                            assert!(!all_finite(isa, &x), "{} {bad} at {at}", isa.name());
                            x[at] = kept;
                        }
                    }
                }
            }
            assert_eq!(argmax(isa, &[f32::NEG_INFINITY; 70]), None);
            assert_eq!(argmax(isa, &[f32::NAN; 3]), None);
        }
    }

    #[test]
    fn rounding_to_bf16_is_the_standard_one() {
        for x in [
            0.0,
            -0.0,
            1.0,
            1.003_906_3,
            1.011_718_8,
            f32::MAX,
            f32::INFINITY,
            f32::MIN_POSITIVE,
            -3.3e-39,
        ] {
            assert_eq!(
                round_bits(x),
                u32::from(half::bf16::from_f32(x).to_bits()),
                "{x}"
            );
        }
        assert!(half::bf16::from_bits(round_bits(f32::from_bits(0x7fff_ffff)) as u16).is_nan());
    }

    #[test]
    fn softmax_and_cross_entropy_agree_with_their_definitions() {
        let mut row = vec![1.0f64, 2.0, 4.0, 9.9];
        softmax(Isa::SCALAR, &mut row, 3, 0.5);
        let sum = 0.5f64.exp() + 1f64.exp() + 2f64.exp();
        assert!((row[1] - 1f64.exp() / sum).abs() < 1e-12);
        assert_eq!(row[3], 0.0);
        let mut logits = vec![1.0f64, 2.0, 4.0];
        let (loss, hit) = cross_entropy(Isa::SCALAR, &mut logits, 2, 1.0);
        let sum = 1f64.exp() + 2f64.exp() + 4f64.exp();
        assert!((loss - (sum.ln() - 4.0)).abs() < 1e-12 && hit);
        assert!((logits[0] - 1f64.exp() / sum).abs() < 1e-12);
        assert!((logits[2] - (4f64.exp() / sum - 1.0)).abs() < 1e-12);
    }
}
