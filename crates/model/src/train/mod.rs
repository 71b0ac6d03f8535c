//! Loss and gradients over a forest of token segments: of an adapter, or of every weight.
//!
//! Only what the loss needs is computed: no gradient of frozen weights, none below the first
//! adapted layer, logits only where a token is trained and a few rows at a time, the last layer
//! beyond its attention only for those rows, no padding.

mod batch;
mod full;
mod head;
mod layer;
mod map;
mod memory;

pub use batch::{LossReport, PackedBatch, Segment, Target};
pub use full::{FullLayout, FullTensor};
pub use memory::{Recompute, TrainBytes, train_bytes};

use crate::block::size;
use crate::lora::{Fused, Lora};
use crate::rope::RopeTable;
use crate::weights::Model;
use bantam_kernels::{Compute, Real};
use layer::{Goal, Pass, Saved, Scratch, Until};
use map::PackedGroup;

/// Buffers of a training step, kept between steps.
#[derive(Clone, Debug, Default)]
pub struct TrainWorkspace<R> {
    recompute: Recompute,
    /// The input of each layer, and the output of the last.
    xs: Vec<Vec<R>>,
    saved: Vec<Saved<R>>,
    scratch: Scratch<R>,
    rope: RopeTable<R>,
    adapters: Vec<[PackedGroup; 4]>,
    d_x: Vec<R>,
    head: head::Buffers<R>,
}

/// From what each target token's log-probability was to the weight of its loss.
pub type Weigh<'a> = dyn FnMut(&[f64]) -> Vec<f32> + 'a;

impl<R: Real> TrainWorkspace<R> {
    /// Buffers of steps that keep activations as `recompute` says. The bits of a step do not
    /// depend on it.
    pub fn new(recompute: Recompute) -> Self {
        Self {
            recompute,
            ..Self::default()
        }
    }

    /// The loss of every target of the last batch, in nats and without its weight, in the order of
    /// [`PackedBatch::targets`]: minus the log-probability of its token.
    pub fn target_losses(&self) -> &[f64] {
        &self.head.of_target
    }
}

/// The rows that the loss reads.
struct Read {
    /// Ascending, each once.
    rows: Vec<usize>,
    /// Of every target, the place of its row in `rows`.
    of_target: Vec<usize>,
}

impl Read {
    fn new(batch: &PackedBatch) -> Self {
        let mut rows: Vec<usize> = Vec::new();
        let mut of_target = Vec::with_capacity(batch.targets.len());
        for target in &batch.targets {
            if rows.last() != Some(&(target.pos as usize)) {
                rows.push(target.pos as usize);
            }
            of_target.push(rows.len() - 1);
        }
        Self { rows, of_target }
    }
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
        self.run(lora.map(Trained::Adapter), batch, None, work, compute)
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
        self.adapter_grads(lora, batch, (scale, d_lora), None, work, compute)
    }

    /// As [`Model::loss_and_grads`] where the weights of the targets depend on their losses: `weigh` is told each target's
    /// unweighted loss and gives each its weight, between the forward pass and the way back. The weights in `batch` are not
    /// read.
    pub fn weighed_loss_and_grads(
        &self,
        lora: &Lora<R>,
        batch: &PackedBatch,
        scale: f64,
        weigh: &mut Weigh<'_>,
        d_lora: &mut [R],
        work: &mut TrainWorkspace<R>,
        compute: &Compute,
    ) -> LossReport {
        self.adapter_grads(lora, batch, (scale, d_lora), Some(weigh), work, compute)
    }

    fn adapter_grads(
        &self,
        lora: &Lora<R>,
        batch: &PackedBatch,
        (scale, d_lora): (f64, &mut [R]),
        weigh: Option<&mut Weigh<'_>>,
        work: &mut TrainWorkspace<R>,
        compute: &Compute,
    ) -> LossReport {
        assert!(self.trainable, "the model was loaded for training");
        assert_eq!(
            d_lora.len(),
            lora.params.len(),
            "one gradient per parameter"
        );
        let trained = Some(Trained::Adapter(lora));
        self.run_weighed(trained, batch, Some((scale, d_lora)), weigh, work, compute)
    }

    /// As [`Model::loss_and_grads`] for every weight of the model: the gradient is added to
    /// `d_weights`, flat in the order of `layout`, which is [`Model::full_layout`].
    pub fn full_loss_and_grads(
        &self,
        layout: &FullLayout,
        batch: &PackedBatch,
        scale: f64,
        d_weights: &mut [R],
        work: &mut TrainWorkspace<R>,
        compute: &Compute,
    ) -> LossReport {
        assert!(self.trainable, "the model was loaded for training");
        assert_eq!(
            d_weights.len(),
            layout.n_params(),
            "one gradient per weight"
        );
        let trained = Some(Trained::Weights(layout));
        self.run(trained, batch, Some((scale, d_weights)), work, compute)
    }

    fn run(
        &self,
        trained: Option<Trained<'_, R>>,
        batch: &PackedBatch,
        grads: Option<(f64, &mut [R])>,
        work: &mut TrainWorkspace<R>,
        compute: &Compute,
    ) -> LossReport {
        self.run_weighed(trained, batch, grads, None, work, compute)
    }

    fn run_weighed(
        &self,
        trained: Option<Trained<'_, R>>,
        batch: &PackedBatch,
        mut grads: Option<(f64, &mut [R])>,
        weigh: Option<&mut Weigh<'_>>,
        work: &mut TrainWorkspace<R>,
        compute: &Compute,
    ) -> LossReport {
        let forest = batch.forest(self.config.vocab);
        if batch.targets.is_empty() {
            work.head.of_target.clear();
            return LossReport::default();
        }
        let TrainWorkspace {
            recompute,
            xs,
            saved,
            scratch,
            rope,
            adapters,
            d_x,
            head,
        } = work;
        let n_layers = self.config.n_layers;
        let rounded = self.rounds(&trained);
        let goal = match trained {
            None => Goal::Nothing,
            Some(Trained::Weights(layout)) => Goal::Weights(layout),
            Some(Trained::Adapter(lora)) => {
                let layers = if rounded { n_layers } else { 0 };
                map::pack_adapters(compute, adapters, lora, layers);
                Goal::Adapter(lora, adapters)
            }
        };
        let positions = forest.positions();
        rope.grow(
            positions.iter().max().map_or(0, |pos| pos + 1),
            &self.config,
        );
        let pass = Pass {
            compute,
            forest: &forest,
            positions: &positions,
            rope,
            goal,
            rounded,
        };
        // The loss alone needs two inputs at a time and nothing that was saved.
        let (n_xs, again) = match grads {
            Some(_) => (n_layers + 1, recompute.layers(n_layers)),
            None => (2, n_layers),
        };
        let slot = |layer: usize| layer.saturating_sub(again.saturating_sub(1));
        let n_saved = slot(n_layers - 1) + 1;
        xs.resize_with(n_xs, Vec::new);
        saved.resize_with(n_saved, Saved::default);
        let read = Read::new(batch);
        let rows_of = |layer: usize| (layer + 1 == n_layers).then_some(&read.rows[..]);

        self.embed_rows(compute, &mut xs[0], batch.tokens.iter());
        for layer in 0..n_layers {
            let mut out = std::mem::take(&mut xs[(layer + 1) % n_xs]);
            let (x, saved, until) = (
                &xs[layer % n_xs],
                &mut saved[slot(layer)],
                Until::Output(&mut out),
            );
            self.layer_forward(&pass, layer, x, rows_of(layer), saved, scratch, until);
            xs[(layer + 1) % n_xs] = out;
        }
        let top = &xs[n_layers % n_xs];
        let mut weighed = None;
        if let Some(weigh) = weigh {
            // The head runs twice: rows of logits are too many to keep.
            self.run_head(&pass, batch, &read, top, &mut None, d_x, head);
            let weighed = weighed.insert(batch.clone());
            let weights = weigh(&head.of_target);
            assert_eq!(weights.len(), weighed.targets.len(), "one weight a target");
            let targets = weighed.targets.iter_mut().zip(weights);
            targets.for_each(|(target, weight)| target.weight = weight);
        }
        let batch = weighed.as_ref().unwrap_or(batch);
        let report = self.run_head(&pass, batch, &read, top, &mut grads, d_x, head);
        let Some((_, d_params)) = grads else {
            return report;
        };
        for layer in (0..n_layers).rev() {
            let (x, saved, rows) = (&xs[layer], &mut saved[slot(layer)], rows_of(layer));
            // The slot that layers share still holds the last of them.
            if layer + 1 < again {
                self.layer_forward(&pass, layer, x, rows, saved, scratch, Until::Saved);
            }
            self.layer_backward(&pass, layer, x, rows, d_params, d_x, saved, scratch);
        }
        if let Goal::Weights(layout) = &pass.goal {
            layout.add_embeddings(compute, d_params, d_x, &batch.tokens);
        }
        report
    }

    /// Whether products run on rounded rows: all weights are bf16 and rows pair up.
    fn rounds(&self, trained: &Option<Trained<'_, R>>) -> bool {
        let ranks_pair_up = match trained {
            Some(Trained::Adapter(lora)) => lora.config().rank.is_multiple_of(2),
            _ => true,
        };
        let bf16 = |layer: &crate::Layer<R>| {
            let fits = |fused| {
                let linear = layer.fused(fused);
                linear.bf16().is_some() && (linear.n_in | linear.n_out).is_multiple_of(2)
            };
            Fused::ALL.into_iter().all(fits)
        };
        R::as_f32(&[]).is_some()
            && ranks_pair_up
            && self.config.d_ffn.is_multiple_of(2)
            && self.config.head_dim.is_multiple_of(2)
            && self.layers.iter().all(bf16)
    }
}

/// What a caller trains.
enum Trained<'a, R> {
    Adapter(&'a Lora<R>),
    Weights(&'a FullLayout),
}

/// Sets the length and clears.
fn zeros<R: Real>(buffer: &mut Vec<R>, len: usize) {
    buffer.clear();
    size(buffer, len);
}
