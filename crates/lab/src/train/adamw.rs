//! AdamW with decoupled weight decay and clipping by the global norm, in the order of operations PyTorch uses.
//!
//! The moments are f32 like the parameters. The arithmetic is [`bantam_kernels::optim`]'s, whose bits neither the
//! machine nor the number of threads can change.

use bantam_kernels::Compute;
use bantam_kernels::optim::{self, AdamWStep};

/// The constants of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// The optimizer's state: two moments a parameter and the number of updates made.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    /// First moments.
    pub m: Vec<f32>,
    /// Second moments.
    pub v: Vec<f32>,
    /// Updates made.
    pub t: u64,
}

impl AdamW {
    /// Zero moments for `n` parameters.
    pub fn new(n: usize) -> Self {
        Self {
            m: vec![0.0; n],
            v: vec![0.0; n],
            t: 0,
        }
    }

    /// One update of `params` by `grads`, each multiplied by `grad_scale` first. Says whether all parameters are
    /// finite afterwards.
    ///
    /// Math:     p -= lr wd p;  m += (1-b1)(g-m);  v = b2 v + (1-b2) g g;
    ///           p -= lr/(1-b1^t) m / (sqrt(v)/sqrt(1-b2^t) + eps)
    /// Numerics: elementwise f32, constants worked out in f64 and rounded once
    /// Errors:   panics if the lengths disagree
    /// Source:   Loshchilov & Hutter 2019, arXiv:1711.05101, as `torch.optim.AdamW`
    pub fn step(
        &mut self,
        compute: &Compute,
        params: &mut [f32],
        (grads, grad_scale): (&[f32], f32),
        lr: f64,
        config: &AdamWConfig,
    ) -> bool {
        self.t += 1;
        let step = AdamWStep {
            grad_scale,
            keep: (1.0 - lr * config.weight_decay) as f32,
            one_minus_beta1: (1.0 - config.beta1) as f32,
            beta2: config.beta2 as f32,
            one_minus_beta2: (1.0 - config.beta2) as f32,
            step_size: (lr / (1.0 - powi(config.beta1, self.t))) as f32,
            bias2_sqrt: (1.0 - powi(config.beta2, self.t)).sqrt() as f32,
            eps: config.eps as f32,
        };
        let moments = (self.m.as_mut_slice(), self.v.as_mut_slice());
        optim::adamw(compute, params, grads, moments, &step)
    }
}

/// x^n by squaring: `f64::powf` may differ between C libraries, multiplication does not.
fn powi(mut x: f64, mut n: u64) -> f64 {
    let mut out = 1.0;
    while n > 0 {
        if n & 1 == 1 {
            out *= x;
        }
        x *= x;
        n >>= 1;
    }
    out
}

/// What gradients of this norm are multiplied by so that their norm is at most `max_norm`; `max_norm` 0 leaves them
/// alone.
///
/// Math: min(1, max_norm / (norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_`
pub fn clip_scale(norm: f64, max_norm: f64) -> f32 {
    let scale = (max_norm / (norm + 1e-6)) as f32;
    if max_norm > 0.0 && scale < 1.0 {
        scale
    } else {
        1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: [f32; 6] = [0.5, -1.25, 0.0, 3.0, 1e-4, -0.75];
    const GRADS: [[f32; 6]; 4] = [
        [0.1, -0.2, 0.3, 5.0, -1e-3, 0.0],
        [0.4, 0.25, -0.3, -2.0, 1e-5, 0.5],
        [-0.05, 0.0, 0.125, 0.5, 2e-3, -0.25],
        [1.5, -2.5, 0.0, 0.75, -1e-6, 0.1],
    ];

    /// What `torch.optim.AdamW` (2.15, CPU) gives: the norm before clipping to 1, then the bits of the parameters.
    fn against_torch(weight_decay: f64, expected: [(f64, [u32; 6]); 4]) {
        let config = AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay,
        };
        let (mut params, mut opt) = (START, AdamW::new(6));
        let compute = Compute::new(2);
        for (step, (grads, (norm, bits))) in GRADS.into_iter().zip(expected).enumerate() {
            let got_norm = optim::norm(&compute, &grads);
            let grads = (&grads[..], clip_scale(got_norm, 1.0));
            assert!(
                (got_norm - norm).abs() < 1e-6 * norm,
                "step {step}: {got_norm} {norm}"
            );
            let lr = 1e-2 / (step + 1) as f64;
            assert!(opt.step(&compute, &mut params, grads, lr, &config));
            for (i, (p, bits)) in params.iter().zip(bits).enumerate() {
                // The clip factor comes from a norm that torch sums in f32: a few units in the last place.
                let ulps = i64::from(p.to_bits()).abs_diff(i64::from(bits));
                assert!(
                    ulps <= 4,
                    "step {step} parameter {i}: {p} {} ({ulps})",
                    f32::from_bits(bits)
                );
            }
        }
    }

    #[test]
    fn equals_torch_without_decay() {
        against_torch(
            0.0,
            [
                (
                    5.013980388641357,
                    [
                        0x3efae148, 0xbf9eb852, 0xbc23d708, 0x403f5c29, 0x3c25785e, 0xbf400000,
                    ],
                ),
                (
                    2.136000871658325,
                    [
                        0x3ef8cddc, 0xbf9f0854, 0xbc0141d7, 0x403f5de4, 0x3c5ae942, 0xbf40f3d7,
                    ],
                ),
                (
                    0.575003445148468,
                    [
                        0x3ef80cd5, 0xbf9f318f, 0xbc0994c4, 0x403f52be, 0x3c3aed38, 0xbf40e3d0,
                    ],
                ),
                (
                    3.012059211730957,
                    [
                        0x3ef7304e, 0xbf9f0633, 0xbc0eb1e9, 0x403f47fa, 0x3c2747e0, 0xbf40e335,
                    ],
                ),
            ],
        );
    }

    #[test]
    fn equals_torch_with_decay() {
        against_torch(
            0.1,
            [
                (
                    5.013980388641357,
                    [
                        0x3efa9fbf, 0xbf9e8f5c, 0xbc23d708, 0x403f2b02, 0x3c2577f3, 0xbf3fced9,
                    ],
                ),
                (
                    2.136000871658325,
                    [
                        0x3ef86c3e, 0xbf9ecb12, 0xbc012cde, 0x403f1445, 0x3c5ad3a9, 0xbf40aa23,
                    ],
                ),
                (
                    0.575003445148468,
                    [
                        0x3ef79605, 0xbf9ee6c0, 0xbc0974c5, 0x403ef8d1, 0x3c3ac4f3, 0xbf4089ab,
                    ],
                ),
                (
                    3.012059211730957,
                    [
                        0x3ef6a9a6, 0xbf9eb139, 0xbc0e891e, 0x403ee1d4, 0x3c2713a7, 0xbf407cbe,
                    ],
                ),
            ],
        );
    }

    #[test]
    fn clipping() {
        assert_eq!(clip_scale(50.0, 0.0), 1.0);
        assert_eq!(clip_scale(50.0, 100.0), 1.0);
        assert!((clip_scale(50.0, 5.0) - 0.1).abs() < 1e-6);
    }
}
