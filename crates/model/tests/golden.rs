//! The model against PyTorch: logits, loss, every adapter gradient, ten training steps.
//!
//! In f64 the comparison is limited by the stored f32 values; in f32 and bf16 the bounds are
//! those of the arithmetic.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use bantam_formats::open_model;
use bantam_kernels::{Compute, Isa, Real};
use bantam_model::{
    InferWorkspace, KvCache, Lora, LoraConfig, LoraPart, Model, ModelConfig, PackedBatch, Proj,
    Span, Target, TrainWorkspace, Wants, Weights,
};
use bantam_testkit::close::assert_close;
use bantam_testkit::golden::{ALL, Golden};

fn load<R: Real>(golden: &Golden, precision: Weights) -> Model<R> {
    Model::load(&open_model(golden.model_dir()).unwrap(), precision, true).unwrap()
}

fn batch(golden: &Golden) -> PackedBatch {
    let targets = golden.targets().into_iter().map(|(pos, token)| Target {
        pos,
        token,
        weight: 1.0,
    });
    PackedBatch::rows(golden.tokens(), golden.seq_lens(), targets.collect())
}

fn peft_name(prefix: &str, layer: usize, proj: Proj, part: LoraPart) -> String {
    let part = if part == LoraPart::A { "A" } else { "B" };
    format!(
        "{prefix}.base_model.model.model.layers.{layer}.{}.lora_{part}.weight",
        proj.path()
    )
}

fn lora<R: Real>(golden: &Golden, config: &ModelConfig) -> Lora<R> {
    let mut lora = Lora::new(
        LoraConfig {
            rank: 4,
            alpha: 8.0,
            targets: Proj::ALL.to_vec(),
        },
        config,
    );
    for tensor in lora.layout().tensors().to_vec() {
        let values = golden.f64(&peft_name("lora", tensor.layer, tensor.proj, tensor.part));
        for (param, value) in lora.params[tensor.range].iter_mut().zip(values) {
            *param = R::from_f64(value);
        }
    }
    lora.refresh();
    lora
}

fn to_f64<R: Real>(x: &[R]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

/// Logits of both sequences, the second cut in two passes.
fn logits(
    model: &Model<f32>,
    golden: &Golden,
    lora: Option<&Lora<f32>>,
    compute: &Compute,
) -> Vec<f32> {
    let (tokens, lens) = (golden.tokens(), golden.seq_lens());
    let (first, second) = tokens.split_at(lens[0]);
    let mut caches = [KvCache::new(model.config()), KvCache::new(model.config())];
    let [a, b] = &mut caches;
    let mut work = InferWorkspace::default();
    let (mut all, mut rest) = (Vec::new(), Vec::new());
    let mut spans = [
        Span {
            cache: a,
            tokens: first,
            logits: Wants::All,
            lora,
        },
        Span {
            cache: b,
            tokens: &second[..3],
            logits: Wants::All,
            lora,
        },
    ];
    model.forward(&mut spans, &mut all, &mut work, compute);
    let mut spans = [Span {
        cache: b,
        tokens: &second[3..],
        logits: Wants::All,
        lora,
    }];
    model.forward(&mut spans, &mut rest, &mut work, compute);
    all.extend(rest);
    all
}

#[test]
fn logits_equal_pytorch() {
    for name in ALL {
        let golden = Golden::load(name);
        for isa in Isa::available() {
            let compute = Compute::with_isa(2, isa);
            let (full, half) = (load(&golden, Weights::F32), load(&golden, Weights::Bf16));
            let adapter = lora(&golden, full.config());
            assert_close(
                "logits",
                &logits(&full, &golden, None, &compute),
                &golden.f32("logits"),
                1e-11,
            );
            let got = logits(&full, &golden, Some(&adapter), &compute);
            assert_close("lora logits", &got, &golden.f32("lora_logits"), 1e-11);
            assert_close(
                "bf16 logits",
                &logits(&half, &golden, None, &compute),
                &golden.f32("logits"),
                2e-4,
            );
        }
    }
}

fn loss_and_every_gradient<R: Real>(precision: Weights, loss_tolerance: f64, nmse: f64) {
    for name in ALL {
        let golden = Golden::load(name);
        let model: Model<R> = load(&golden, precision);
        let (batch, adapter) = (batch(&golden), lora::<R>(&golden, model.config()));
        let compute = Compute::new(2);
        let mut work = TrainWorkspace::default();
        let plain = model.loss(None, &batch, &mut work, &compute).mean();
        assert!(
            (plain - golden.scalar("loss")).abs() < loss_tolerance,
            "{name}: loss {plain}"
        );
        let mut grads = vec![R::ZERO; adapter.params.len()];
        let scale = 1.0 / batch.targets.len() as f64;
        let report = model.loss_and_grads(&adapter, &batch, scale, &mut grads, &mut work, &compute);
        assert!(
            (report.mean() - golden.scalar("lora_loss")).abs() < loss_tolerance,
            "{name}: adapter loss"
        );
        assert_eq!(report.n_targets as usize, batch.targets.len());
        for tensor in adapter.layout().tensors() {
            let grad_name = peft_name("lora_grad", tensor.layer, tensor.proj, tensor.part);
            assert_close(
                &grad_name,
                &to_f64(&grads[tensor.range.clone()]),
                &golden.f64(&grad_name),
                nmse,
            );
        }
    }
}

#[test]
fn loss_and_every_gradient_equal_pytorch_in_f64() {
    loss_and_every_gradient::<f64>(Weights::F32, 1e-7, 1e-12);
}

#[test]
fn loss_and_every_gradient_equal_pytorch_in_f32() {
    loss_and_every_gradient::<f32>(Weights::F32, 1e-5, 1e-10);
}

#[test]
fn loss_and_every_gradient_are_near_pytorch_in_bf16() {
    loss_and_every_gradient::<f32>(Weights::Bf16, 2e-2, 1e-2);
}

#[test]
fn ten_steps_of_adamw_equal_pytorch() {
    for name in ALL {
        let golden = Golden::load(name);
        let model: Model<f64> = load(&golden, Weights::F32);
        let (batch, mut adapter) = (batch(&golden), lora::<f64>(&golden, model.config()));
        let (compute, mut work) = (Compute::new(2), TrainWorkspace::default());
        let hyper = |name: &str| golden.scalar(&format!("train.{name}"));
        let (lr, clip, decay) = (hyper("lr"), hyper("clip"), hyper("weight_decay"));
        let (beta1, beta2, eps) = (hyper("beta1"), hyper("beta2"), hyper("eps"));
        let n = adapter.params.len();
        let (mut m, mut v) = (vec![0.0; n], vec![0.0; n]);
        let losses = golden.f64("train.loss");
        for (step, want) in losses.iter().enumerate() {
            let mut grads = vec![0.0; n];
            let scale = 1.0 / batch.targets.len() as f64;
            let report =
                model.loss_and_grads(&adapter, &batch, scale, &mut grads, &mut work, &compute);
            assert!(
                (report.mean() - want).abs() < 1e-5,
                "{name}, step {step}: {} and {want}",
                report.mean()
            );
            let norm = grads.iter().map(|g| g * g).sum::<f64>().sqrt();
            let shrink = (clip / (norm + 1e-6)).min(1.0);
            let t = step as i32 + 1;
            for i in 0..n {
                let g = grads[i] * shrink;
                m[i] = beta1 * m[i] + (1.0 - beta1) * g;
                v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
                let (m_hat, v_hat) = (m[i] / (1.0 - beta1.powi(t)), v[i] / (1.0 - beta2.powi(t)));
                adapter.params[i] -=
                    lr * decay * adapter.params[i] + lr * m_hat / (v_hat.sqrt() + eps);
            }
            adapter.refresh();
        }
        for tensor in adapter.layout().tensors() {
            let final_name = peft_name("lora_final", tensor.layer, tensor.proj, tensor.part);
            assert_close(
                &final_name,
                &adapter.params[tensor.range.clone()],
                &golden.f64(&final_name),
                1e-7,
            );
        }
    }
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    for name in ALL {
        let golden = Golden::load(name);
        let model: Model<f64> = load(&golden, Weights::F32);
        let (batch, mut adapter) = (batch(&golden), lora::<f64>(&golden, model.config()));
        let (compute, mut work) = (Compute::new(2), TrainWorkspace::default());
        let mut grads = vec![0.0; adapter.params.len()];
        model.loss_and_grads(&adapter, &batch, 1.0, &mut grads, &mut work, &compute);
        for tensor in adapter.layout().tensors().to_vec() {
            // Central differences at a few places of every tensor: their error is about h^2.
            for i in tensor.range.clone().step_by(tensor.range.len() / 3) {
                let h = 1e-5;
                let at = adapter.params[i];
                let mut loss = |x: f64| {
                    adapter.params[i] = x;
                    adapter.refresh();
                    model
                        .loss(Some(&adapter), &batch, &mut work, &compute)
                        .loss_sum
                };
                let slope = (loss(at + h) - loss(at - h)) / (2.0 * h);
                loss(at);
                let error = (slope - grads[i]).abs();
                assert!(
                    error < 1e-6 * slope.abs().max(1.0),
                    "{name} {tensor:?} at {i}: {slope} and {}",
                    grads[i]
                );
            }
        }
    }
}
