//! The gradient of every weight: against PyTorch, against slopes, and to the bit.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use bantam_formats::open_model;
use bantam_kernels::{Compute, Real};
use bantam_model::{
    Lora, LoraConfig, Model, PackedBatch, Proj, Recompute, Segment, Target, TrainWorkspace, Weights,
};
use bantam_testkit::close::assert_close;
use bantam_testkit::golden::{self, Golden};

fn model<R: Real>(golden: &Golden, weights: Weights) -> Model<R> {
    Model::load(&open_model(golden.model_dir()).unwrap(), weights, true).unwrap()
}

fn batch(golden: &Golden) -> PackedBatch {
    let targets = golden.targets().into_iter().map(|(pos, token)| Target {
        pos,
        token,
        weight: 1.0,
    });
    PackedBatch::rows(golden.tokens(), golden.seq_lens(), targets.collect())
}

/// The golden's rows with a prefix of their own in common.
fn tree(golden: &Golden) -> PackedBatch {
    let mut batch = batch(golden);
    let at = batch.tokens.len();
    batch.tokens.extend([5, 6, 7, 5, 9, 11]);
    let segment = |parent, len| Segment { parent, len };
    batch
        .segments
        .extend([segment(None, 3), segment(Some(2), 2), segment(Some(2), 1)]);
    let target = |pos: usize, token| Target {
        pos: pos as u32,
        token,
        weight: 0.5,
    };
    batch
        .targets
        .extend([target(at + 2, 5), target(at + 2, 11), target(at + 4, 1)]);
    batch
}

fn grads<R: Real>(
    model: &Model<R>,
    batch: &PackedBatch,
    recompute: Recompute,
    threads: usize,
) -> (f64, Vec<R>) {
    let layout = model.full_layout();
    let (mut grads, compute) = (vec![R::ZERO; layout.n_params()], Compute::new(threads));
    let scale = 1.0 / batch.targets.len() as f64;
    let mut work = TrainWorkspace::new(recompute);
    let report = model.full_loss_and_grads(&layout, batch, scale, &mut grads, &mut work, &compute);
    (report.mean(), grads)
}

fn equal_pytorch<R: Real>(weights: Weights, nmse: f64) {
    let golden = Golden::load(golden::TIED);
    let model = model::<R>(&golden, weights);
    let (loss, grads) = grads(&model, &batch(&golden), Recompute::None, 2);
    assert!((loss - golden.scalar("loss")).abs() < 2e-2);
    let layout = model.full_layout();
    assert_eq!(layout.n_params(), model.config().n_params());
    for tensor in layout.tensors() {
        let name = format!("base_grad.{}", tensor.name);
        let got: Vec<f64> = grads[tensor.range.clone()]
            .iter()
            .map(|x| x.to_f64())
            .collect();
        assert_close(&name, &got, &golden.f64(&name), nmse);
    }
}

#[test]
fn every_gradient_equals_pytorch() {
    equal_pytorch::<f64>(Weights::F32, 1e-12);
    equal_pytorch::<f32>(Weights::F32, 1e-10);
    equal_pytorch::<f32>(Weights::Bf16, 1e-2);
}

#[test]
fn gradients_are_the_slopes_of_the_loss_and_weights_can_be_set() {
    for name in golden::ALL {
        let golden = Golden::load(name);
        let (mut model, batch) = (model::<f64>(&golden, Weights::F32), tree(&golden));
        let (_, grads) = grads(&model, &batch, Recompute::EveryLayer, 2);
        let (layout, compute) = (model.full_layout(), Compute::new(2));
        let (mut weights, mut work) = (model.full_weights(&layout), TrainWorkspace::default());
        for tensor in layout.tensors() {
            for i in tensor.range.clone().step_by(tensor.range.len().div_ceil(2)) {
                let (h, at) = (1e-5, weights[i]);
                let mut loss = |x: f64| {
                    weights[i] = x;
                    model.set_weights(&layout, &weights, &compute);
                    model.loss(None, &batch, &mut work, &compute).loss_sum
                };
                let n = batch.targets.len() as f64;
                let slope = (loss(at + h) - loss(at - h)) / (2.0 * h) / n;
                loss(at);
                let error = (slope - grads[i]).abs();
                let place = format!("{name} {} at {i}", tensor.name);
                assert!(
                    error < 1e-6 * slope.abs().max(1.0),
                    "{place}: {slope}, {}",
                    grads[i]
                );
            }
        }
    }
}

#[test]
fn a_gradient_has_the_same_bits_on_any_threads_and_however_activations_are_kept() {
    for name in golden::ALL {
        let golden = Golden::load(name);
        for weights in [Weights::Bf16, Weights::F32] {
            let (model, batch) = (model::<f32>(&golden, weights), tree(&golden));
            let config = LoraConfig {
                rank: 4,
                alpha: 6.0,
                targets: vec![Proj::Q, Proj::V, Proj::Up],
            };
            let mut lora = Lora::new(config, model.config());
            for (i, x) in lora.params.iter_mut().enumerate() {
                *x = (i % 17) as f32 * 0.01 - 0.08;
            }
            lora.refresh();
            let run = |recompute, threads| {
                let (loss, all) = grads(&model, &batch, recompute, threads);
                let (mut d_lora, mut work) =
                    (vec![0.0; lora.params.len()], TrainWorkspace::new(recompute));
                let compute = Compute::new(threads);
                model.loss_and_grads(&lora, &batch, 0.1, &mut d_lora, &mut work, &compute);
                let bits = all.iter().chain(&d_lora).map(|x| x.to_bits());
                (loss.to_bits(), bits.collect::<Vec<_>>())
            };
            let want = run(Recompute::None, 1);
            for (recompute, threads) in [
                (Recompute::None, 3),
                (Recompute::First(1), 2),
                (Recompute::First(2), 2),
                (Recompute::EveryLayer, 1),
                (Recompute::EveryLayer, 4),
            ] {
                assert!(
                    run(recompute, threads) == want,
                    "{name} {weights:?} {recompute:?}"
                );
            }
        }
    }
}
