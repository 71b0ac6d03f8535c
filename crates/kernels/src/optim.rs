//! The arithmetic of an optimiser's step: elementwise, so that no instruction set and no thread count can change a bit.

use crate::Compute;
use crate::isa::for_each_isa;

/// Elements that a thread takes at a time: the four arrays of a piece fit a core's cache.
const PIECE: usize = 1 << 15;
/// Length of the pieces that a norm is summed in.
const NORM_PIECE: usize = 4096;
/// Chains of a sum.
const LANES: usize = 16;

/// The constants of one AdamW step, each rounded to f32 once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// Multiplies the gradient first: the clipping.
    pub grad_scale: f32,
    /// 1 - lr wd
    pub keep: f32,
    /// 1 - b1
    pub one_minus_beta1: f32,
    /// b2
    pub beta2: f32,
    /// 1 - b2
    pub one_minus_beta2: f32,
    /// lr / (1 - b1^t)
    pub step_size: f32,
    /// sqrt(1 - b2^t)
    pub bias2_sqrt: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
}

for_each_isa! {
    /// One step on one piece; gives 0 if all parameters are finite afterwards.
    ///
    /// Math:     g = s g;  p = keep p;  m += (1-b1)(g-m);  v = b2 v + (1-b2) g g;
    ///           p -= step m / (sqrt(v) / bias2 + eps)
    pub fn adamw_piece(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], c: &AdamWStep) -> u32 {
        const EXPONENT: u32 = 0x7f80_0000;
        let mut lost = 0;
        for (((p, &g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * c.grad_scale;
            *p *= c.keep;
            *m += c.one_minus_beta1 * (g - *m);
            *v = *v * c.beta2 + c.one_minus_beta2 * g * g;
            let denom = v.sqrt() / c.bias2_sqrt + c.eps;
            *p -= c.step_size * *m / denom;
            lost |= u32::from(p.to_bits() & EXPONENT == EXPONENT);
        }
        lost
    }
}

for_each_isa! {
    /// Sum of squares of one piece.
    ///
    /// Numerics: sixteen f64 chains and one tree, whatever the vector width
    pub fn square_sum_piece(xs: &[f32]) -> f64 {
        let mut sums = [0f64; LANES];
        for xs in xs.chunks(LANES) {
            for (sum, &x) in sums.iter_mut().zip(xs) {
                let x = f64::from(x);
                *sum += x * x;
            }
        }
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                sums[i] += sums[i + width];
            }
            width /= 2;
        }
        sums[0]
    }
}

/// One AdamW step on all threads. Says whether all parameters are finite afterwards.
///
/// Panics if the lengths disagree.
pub fn adamw(
    compute: &Compute,
    params: &mut [f32],
    grads: &[f32],
    (m, v): (&mut [f32], &mut [f32]),
    step: &AdamWStep,
) -> bool {
    let n = params.len();
    assert!(grads.len() == n && m.len() == n && v.len() == n);
    let pieces = params
        .chunks_mut(PIECE)
        .zip(grads.chunks(PIECE))
        .zip(m.chunks_mut(PIECE))
        .zip(v.chunks_mut(PIECE));
    let mut pieces: Vec<_> = pieces.map(|(((p, g), m), v)| (p, g, m, v, 0u32)).collect();
    compute.pool().chunks_mut(&mut pieces, 1, |_, piece| {
        let (p, g, m, v, lost) = &mut piece[0];
        *lost = adamw_piece(compute.isa(), p, g, m, v, step);
    });
    pieces.iter().all(|piece| piece.4 == 0)
}

/// Euclidean norm of `xs`, on all threads.
///
/// Numerics: f64 sums over pieces of 4096, then over the pieces in their order
pub fn norm(compute: &Compute, xs: &[f32]) -> f64 {
    let mut sums = vec![0f64; xs.len().div_ceil(NORM_PIECE)];
    compute.pool().chunks_mut(&mut sums, 16, |i, sums| {
        let xs = xs[i * 16 * NORM_PIECE..].chunks(NORM_PIECE);
        for (sum, xs) in sums.iter_mut().zip(xs) {
            *sum = square_sum_piece(compute.isa(), xs);
        }
    });
    sums.iter().sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Isa;

    const STEP: AdamWStep = AdamWStep {
        grad_scale: 0.7,
        keep: 0.999,
        one_minus_beta1: 0.1,
        beta2: 0.999,
        one_minus_beta2: 0.001,
        step_size: 3e-3,
        bias2_sqrt: 0.2,
        eps: 1e-8,
    };

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (f64::from(state) / f64::from(u32::MAX) * 2.0 - 1.0) as f32
        };
        (0..n).map(|_| next()).collect()
    }

    #[test]
    fn every_isa_and_thread_count_gives_the_same_bits() {
        let n = 3 * PIECE + 1234;
        let grads = noise(n, 1);
        let run = |threads, isa| {
            let compute = Compute::with_isa(threads, isa);
            let (mut p, mut m, mut v) = (noise(n, 2), noise(n, 3), vec![0.5; n]);
            for _ in 0..3 {
                assert!(adamw(&compute, &mut p, &grads, (&mut m, &mut v), &STEP));
            }
            let bits: Vec<u32> = p.iter().chain(&m).chain(&v).map(|x| x.to_bits()).collect();
            (bits, norm(&compute, &p).to_bits())
        };
        let expected = run(1, Isa::SCALAR);
        for isa in Isa::available() {
            for threads in [1, 2, 4] {
                assert!(run(threads, isa) == expected, "{isa:?} {threads}");
            }
        }
    }

    #[test]
    fn the_norm_is_the_norm() {
        let compute = Compute::new(2);
        for n in [0, 1, 15, 4096, 100_001] {
            let xs = noise(n, 7);
            let exact: f64 = xs.iter().map(|x| f64::from(*x).powi(2)).sum();
            assert!((norm(&compute, &xs) - exact.sqrt()).abs() < 1e-9);
        }
    }

    #[test]
    fn a_parameter_that_is_no_number_is_told() {
        let compute = Compute::new(2);
        for (at, bad) in [
            (0, f32::NAN),
            (PIECE, f32::INFINITY),
            (2 * PIECE - 1, f32::NAN),
        ] {
            let (mut p, mut m, mut v) = (
                noise(2 * PIECE, 1),
                noise(2 * PIECE, 2),
                vec![0.5; 2 * PIECE],
            );
            let mut grads = noise(2 * PIECE, 3);
            grads[at] = bad;
            assert!(!adamw(&compute, &mut p, &grads, (&mut m, &mut v), &STEP));
        }
    }
}
