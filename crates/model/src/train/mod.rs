//! Loss and gradients of an adapter over a forest of token segments.
//!
//! Only what the loss needs is computed: no gradient of frozen weights, none below the first
//! adapted layer, logits only where a token is trained and a few rows at a time, no padding.

use crate::block::{ROW_CHUNK, Saved, Scratch, size};
use crate::lora::{Fused, Lora};
use crate::weights::Model;
use bantam_kernels::attention::forest::{self, Forest};
use bantam_kernels::{Compute, Real, ops};

mod batch;

pub use batch::{LossReport, PackedBatch, Segment, Target};

/// Rows of logits that are held at once: 64 rows of a vocabulary of 49,152 are 12 MB.
const HEAD_ROWS: usize = 64;

/// Buffers of a training step, kept between steps.
#[derive(Clone, Debug, Default)]
pub struct TrainWorkspace<R> {
    saved: Vec<Saved<R>>,
    scratch: Scratch<R>,
    attention: forest::Buffers<R>,
    x: Vec<R>,
    d_x: Vec<R>,
    d_wide: Vec<R>,
    d_attn: Vec<R>,
    d_hidden: Vec<R>,
    head: HeadBuffers<R>,
}

#[derive(Clone, Debug, Default)]
struct HeadBuffers<R> {
    x: Vec<R>,
    norm: Vec<R>,
    rstd: Vec<R>,
    logits: Vec<R>,
    d_norm: Vec<R>,
    d_x: Vec<R>,
    losses: Vec<(f64, bool)>,
}

impl<R: Real> Model<R> {
    /// The loss of a batch, without gradients.
    ///
    /// Panics if the batch is inconsistent or a token is outside the vocabulary.
    pub fn loss(
        &self,
        lora: Option<&Lora<R>>,
        batch: &PackedBatch,
        work: &mut TrainWorkspace<R>,
        compute: &Compute,
    ) -> LossReport {
        work.saved
            .resize_with(work.saved.len().max(1), Saved::default);
        self.run_forward(lora, batch, work, compute, |_| 0);
        self.run_head(batch, None, work, compute)
    }

    /// The loss of a batch and the gradient of the adapter, added to `d_lora` (flat, in the
    /// order of [`Lora::layout`]). `scale` multiplies every gradient: one over the weight of
    /// the whole optimiser batch, of which this may be a part.
    ///
    /// Panics if the batch is inconsistent, a token is outside the vocabulary, or the model
    /// was not loaded for training.
    pub fn loss_and_grads(
        &self,
        lora: &Lora<R>,
        batch: &PackedBatch,
        scale: f64,
        d_lora: &mut [R],
        work: &mut TrainWorkspace<R>,
        compute: &Compute,
    ) -> LossReport {
        assert!(self.trainable, "the model was loaded for training");
        assert_eq!(
            d_lora.len(),
            lora.params.len(),
            "one gradient per parameter"
        );
        work.saved.resize_with(self.config.n_layers, Saved::default);
        let (forest, positions) = self.run_forward(Some(lora), batch, work, compute, |layer| layer);
        size(&mut work.d_x, work.x.len());
        work.d_x.fill(R::ZERO);
        let report = self.run_head(batch, Some(scale), work, compute);
        for layer in (0..self.config.n_layers).rev() {
            self.layer_backward(layer, lora, d_lora, &forest, &positions, work, compute);
        }
        report
    }

    /// Leaves the last layer's output in `work.x`; `slot` says where a layer saves.
    fn run_forward(
        &self,
        lora: Option<&Lora<R>>,
        batch: &PackedBatch,
        work: &mut TrainWorkspace<R>,
        compute: &Compute,
        slot: impl Fn(usize) -> usize,
    ) -> (Forest, Vec<usize>) {
        let forest = batch.forest(self.config.vocab);
        let positions = forest.positions();
        let longest = positions.iter().max().map_or(0, |pos| pos + 1);
        work.scratch.rope.grow(longest, &self.config);
        self.embed_rows(compute, &mut work.x, batch.tokens.iter());
        let adapters: Vec<_> = lora
            .map(|lora| (0..batch.tokens.len(), lora))
            .into_iter()
            .collect();
        for layer in 0..self.config.n_layers {
            let (saved, attention) = (&mut work.saved[slot(layer)], &mut work.attention);
            let attend = |out: &mut [R], qkv: &[R]| {
                forest::forward(compute, out, qkv, &forest, self.config.heads(), attention)
            };
            self.layer_forward(
                compute,
                layer,
                &adapters,
                &positions,
                &mut work.x,
                saved,
                &mut work.scratch,
                attend,
            );
        }
        (forest, positions)
    }

    /// Loss at the targets; with `scale`, also the gradient of the last hidden state.
    fn run_head(
        &self,
        batch: &PackedBatch,
        scale: Option<f64>,
        work: &mut TrainWorkspace<R>,
        compute: &Compute,
    ) -> LossReport {
        let (d, vocab, buffers) = (self.config.d_model, self.config.vocab, &mut work.head);
        let mut report = LossReport::default();
        for targets in batch.targets.chunks(HEAD_ROWS) {
            buffers.x.clear();
            for target in targets {
                buffers
                    .x
                    .extend_from_slice(&work.x[target.pos as usize * d..][..d]);
            }
            size(&mut buffers.norm, targets.len() * d);
            size(&mut buffers.logits, targets.len() * vocab);
            self.norm(
                compute,
                &mut buffers.norm,
                &mut buffers.rstd,
                &buffers.x,
                &self.final_norm,
            );
            self.head().forward(
                compute,
                &mut buffers.logits,
                &buffers.norm,
                &mut work.scratch.words,
            );
            buffers.losses.resize(targets.len(), (0.0, false));
            compute.pool().chunks_mut2(
                (&mut buffers.logits, vocab),
                (&mut buffers.losses, 1),
                |i, logits, loss| {
                    let d_scale = R::from_f64(scale.unwrap_or(0.0) * f64::from(targets[i].weight));
                    loss[0] = ops::cross_entropy(
                        compute.isa(),
                        logits,
                        targets[i].token as usize,
                        d_scale,
                    );
                },
            );
            for (target, &(loss, correct)) in targets.iter().zip(&buffers.losses) {
                report.loss_sum += f64::from(target.weight) * loss;
                report.weight_sum += f64::from(target.weight);
                report.n_correct += u64::from(correct);
                report.n_targets += 1;
            }
            if scale.is_some() {
                size(&mut buffers.d_norm, targets.len() * d);
                self.head().input_grad(
                    compute,
                    &mut buffers.d_norm,
                    &buffers.logits,
                    &mut work.scratch.words,
                );
                buffers.d_x.clear();
                size(&mut buffers.d_x, targets.len() * d);
                let isa = compute.isa();
                let (x, rstd) = (&buffers.x, &buffers.rstd);
                ops::rms_norm_backward(
                    isa,
                    &mut buffers.d_x,
                    &buffers.d_norm,
                    x,
                    rstd,
                    &self.final_norm,
                );
                for (target, d_row) in targets.iter().zip(buffers.d_x.chunks_exact(d)) {
                    ops::add_assign(isa, &mut work.d_x[target.pos as usize * d..][..d], d_row);
                }
            }
        }
        report
    }

    /// Turns `work.d_x`, the gradient of the layer's output, into that of its input.
    fn layer_backward(
        &self,
        layer_idx: usize,
        lora: &Lora<R>,
        d_lora: &mut [R],
        forest: &Forest,
        positions: &[usize],
        work: &mut TrainWorkspace<R>,
        compute: &Compute,
    ) {
        let TrainWorkspace {
            saved,
            scratch,
            d_x,
            d_wide,
            d_attn,
            d_hidden,
            attention,
            ..
        } = work;
        let Scratch {
            norm,
            delta,
            ffn,
            words,
            rope,
        } = scratch;
        let (config, layer, saved) = (&self.config, &self.layers[layer_idx], &mut saved[layer_idx]);
        let (t, d, f, heads) = (
            positions.len(),
            config.d_model,
            config.d_ffn,
            config.heads(),
        );
        // The input gradient of one fused map, adapters included: `dx = dy W + s dy B A`.
        let mut map_back =
            |fused: Fused, mut d_in: Option<&mut [R]>, dy: &[R], x: &[R], hidden: &[Vec<R>; 4]| {
                let group = lora.group(layer_idx, fused);
                if let Some(d_in) = &mut d_in {
                    layer.fused(fused).input_grad(compute, d_in, dy, words);
                }

                let params = (lora.params.as_slice(), &mut *d_lora);
                group.backward(
                    compute,
                    params,
                    d_in,
                    dy,
                    (&hidden[fused as usize], d_hidden),
                    x,
                );
            };

        // x = x_mid + down(swiglu(gate_up(norm(x_mid))))
        self.activate(compute, ffn, &saved.gate_up);
        size(d_wide, t * f);
        map_back(Fused::Down, Some(d_wide), d_x, ffn, &saved.lora_hidden);
        compute
            .pool()
            .chunks_mut(&mut saved.gate_up, ROW_CHUNK * 2 * f, |i, gate_up| {
                let d_ffn = &d_wide[i * ROW_CHUNK * f..][..gate_up.len() / 2];
                ops::swiglu_backward(compute.isa(), gate_up, d_ffn, f);
            });
        self.norm(
            compute,
            norm,
            &mut saved.mlp_rstd,
            &saved.x_mid,
            &layer.mlp_norm,
        );
        map_back(
            Fused::GateUp,
            Some(delta),
            &saved.gate_up,
            norm,
            &saved.lora_hidden,
        );
        norm_back(
            compute,
            d_x,
            delta,
            &saved.x_mid,
            &saved.mlp_rstd,
            &layer.mlp_norm,
        );

        // x_mid = x + o(attention(rope(qkv(norm(x)))))
        size(d_attn, t * heads.out_width());
        map_back(Fused::O, Some(d_attn), d_x, &saved.attn, &saved.lora_hidden);
        size(d_wide, t * heads.qkv_width());
        forest::backward(
            compute, d_wide, d_attn, &saved.qkv, forest, heads, attention,
        );
        self.rotate(compute, d_wide, positions, rope, -R::ONE);
        self.norm(
            compute,
            norm,
            &mut saved.attn_rstd,
            &saved.x,
            &layer.attn_norm,
        );
        if layer_idx == 0 {
            map_back(Fused::Qkv, None, d_wide, norm, &saved.lora_hidden);
        } else {
            map_back(Fused::Qkv, Some(delta), d_wide, norm, &saved.lora_hidden);
            norm_back(
                compute,
                d_x,
                delta,
                &saved.x,
                &saved.attn_rstd,
                &layer.attn_norm,
            );
        }
        debug_assert_eq!(d_x.len(), t * d);
    }
}

/// Adds the gradient that flows through a norm, by rows.
fn norm_back<R: Real>(compute: &Compute, d_x: &mut [R], d_y: &[R], x: &[R], rstd: &[R], w: &[R]) {
    let len = ROW_CHUNK * w.len();
    compute.pool().chunks_mut(d_x, len, |i, d_x| {
        let (d_y, x) = (&d_y[i * len..][..d_x.len()], &x[i * len..][..d_x.len()]);
        let rstd = &rstd[i * ROW_CHUNK..][..d_x.len() / w.len()];
        ops::rms_norm_backward(compute.isa(), d_x, d_y, x, rstd, w);
    });
}
