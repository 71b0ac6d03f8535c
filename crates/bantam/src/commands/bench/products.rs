//! The matrix products of a model alone: what they reach, one after another as in a pass over the layers.

use std::time::Instant;

use bantam_kernels::Compute;
use bantam_kernels::bf16::PackedBf16;
use bantam_model::ModelConfig;
use serde::Serialize;

use super::samples::Samples;

/// Rows of activations: one answer, many answers, a prompt.
const ROWS: [usize; 3] = [1, 16, 512];

/// What one product reached.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Product {
    /// Which maps of the model.
    pub(crate) what: &'static str,
    /// How the weights are held.
    pub(crate) weights: &'static str,
    /// Rows of activations.
    pub(crate) m: usize,
    /// Outputs.
    pub(crate) n: usize,
    /// Inputs.
    pub(crate) k: usize,
    /// Microseconds, the median.
    pub(crate) us: f64,
    /// Gigabytes of weights read a second.
    pub(crate) gb_s: f64,
    /// Multiplications and additions a second, in thousands of millions.
    pub(crate) gop_s: f64,
}

/// The maps of a layer, and the head: what, outputs, inputs, how many a pass.
fn shapes(config: &ModelConfig) -> [(&'static str, usize, usize, usize); 5] {
    let (d, f, layers) = (config.d_model, config.d_ffn, config.n_layers);
    let q = config.n_heads * config.head_dim;
    let kv = config.n_kv_heads * config.head_dim;
    [
        ("q, k, v", q + 2 * kv, d, layers),
        ("o", d, q, layers),
        ("gate, up", 2 * f, d, layers),
        ("down", d, f, layers),
        ("head", config.vocab, d, 1),
    ]
}

/// Times every product of the model with bf16 weights.
pub(crate) fn measure(config: &ModelConfig, compute: &Compute, rounds: usize) -> Vec<Product> {
    let mut found = Vec::new();
    for (what, n, k, copies) in shapes(config) {
        // As many matrices as the model has, so that a pass reads from where a pass of the model reads.
        let weights: Vec<PackedBf16> = (0..copies)
            .map(|copy| PackedBf16::pack_rows(n, k, |i, row| noise(row, copy * n + i)))
            .collect();
        for m in ROWS {
            let mut x = vec![0.0; m * k];
            noise(&mut x, usize::MAX / 2);
            let (mut y, mut scratch) = (vec![0.0; m * n], Vec::new());
            let mut samples = Samples::default();
            // A prompt's products depend on arithmetic alone; a few of them will do.
            let used = if m > 64 {
                &weights[..copies.min(4)]
            } else {
                &weights
            };
            for round in 0..=rounds {
                let began = Instant::now();
                for w in used {
                    w.matmul(compute, &mut y, &x, m, &mut scratch);
                }
                if round > 0 {
                    samples.push(began.elapsed().as_secs_f64() / used.len() as f64);
                }
            }
            let seconds = samples.spread().map_or(f64::NAN, |s| s.median);
            found.push(Product {
                what,
                weights: "bf16",
                m,
                n,
                k,
                us: seconds * 1e6,
                gb_s: weights[0].bytes() as f64 / seconds / 1e9,
                gop_s: 2.0 * (m * n * k) as f64 / seconds / 1e9,
            });
        }
    }
    found
}

/// Values between -1 and 1 that differ from row to row.
fn noise(row: &mut [f32], seed: usize) {
    let mut state = (seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for x in row {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *x = (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0;
    }
}
