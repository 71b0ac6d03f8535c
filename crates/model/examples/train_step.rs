//! Times training steps of a model with the sizes of SmolLM2-135M and random weights:
//! `cargo run --release -p bantam-model --example train_step -- [rows] [tokens a row] [shared tokens] [steps]`
#![allow(clippy::unwrap_used, reason = "a measuring tool may panic")]

use bantam_kernels::Compute;
use bantam_model::{
    LoadError, Lora, LoraConfig, Model, ModelConfig, PackedBatch, Proj, RopeScaling, Segment,
    Target, TensorSource, TrainWorkspace, Weights,
};
use std::time::Instant;

/// Uniform numbers of the usual size.
struct Noise(u32);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) as f32 / (1 << 23) as f32 - 1.0
    }
}

impl TensorSource<'_> for Noise {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>, LoadError> {
        let n = shape.iter().product();
        Ok(match name {
            _ if name.ends_with("bias") => None,
            _ if name.contains("norm") => Some(vec![1.0; n]),
            _ => Some((0..n).map(|_| self.next() * 0.06).collect()),
        })
    }
}

fn main() {
    let args: Vec<usize> = std::env::args()
        .skip(1)
        .map(|x| x.parse().unwrap())
        .collect();
    let arg = |i: usize, default: usize| args.get(i).copied().unwrap_or(default);
    let (rows, len, shared, steps) = (arg(0, 16), arg(1, 44), arg(2, 0), arg(3, 6));
    let config = ModelConfig {
        vocab: 49_152,
        d_model: 576,
        n_layers: 30,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        d_ffn: 1536,
        rms_norm_eps: 1e-5,
        rope_theta: 1e5,
        rope_scaling: RopeScaling::None,
        tied_head: true,
        max_context: 8192,
    };
    let mut noise = Noise(1);
    let model: Model<f32> =
        Model::from_source(&Compute::detect(), config, &mut noise, Weights::Bf16, true).unwrap();
    let lora_config = LoraConfig {
        rank: 16,
        alpha: 32.0,
        targets: Proj::ALL.to_vec(),
    };
    let mut lora = Lora::new(lora_config, model.config());
    lora.params
        .iter_mut()
        .for_each(|x| *x = noise.next() * 0.02);
    lora.refresh();
    let mut batch = PackedBatch::default();
    let parent = (shared > 0).then_some(0);
    if shared > 0 {
        batch.segments.push(Segment {
            parent: None,
            len: shared,
        });
    }
    batch
        .segments
        .extend((0..rows).map(|_| Segment { parent, len }));
    let n = shared + rows * len;
    batch.tokens = (0..n as u32)
        .map(|i| i.wrapping_mul(7919) % 49_000)
        .collect();
    batch.targets = (0..rows)
        .flat_map(|row| (len - 7..len).map(move |i| (shared + row * len + i) as u32))
        .map(|pos| Target {
            pos,
            token: pos % 49_000,
            weight: 1.0,
        })
        .collect();
    let (compute, mut work) = (Compute::detect(), TrainWorkspace::default());
    let mut grads = vec![0.0; lora.params.len()];
    let mut best = f64::MAX;
    for step in 0..steps {
        let start = Instant::now();
        let scale = 1.0 / batch.targets.len() as f64;
        grads.fill(0.0);
        let report = model.loss_and_grads(&lora, &batch, scale, &mut grads, &mut work, &compute);
        let s = start.elapsed().as_secs_f64();
        best = best.min(s);
        println!(
            "step {step}: {:.1} ms, {:.0} tokens/s, loss {:.4}",
            s * 1e3,
            n as f64 / s,
            report.mean()
        );
    }
    let rows_s = rows as f64 / best;
    println!(
        "best: {:.1} ms, {:.0} tokens/s, {rows_s:.1} rows/s on {} threads",
        best * 1e3,
        n as f64 / best,
        compute.threads()
    );
}
