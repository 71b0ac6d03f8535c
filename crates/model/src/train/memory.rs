//! What a training step holds in memory, and what it computes twice to hold less.

use super::head::HEAD_ROWS;
use crate::ModelConfig;
use crate::lora::{Fused, LoraConfig, LoraLayout, Proj};

/// Of which layers the activations are computed again on the way back instead of being kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Recompute {
    /// Of none.
    #[default]
    None,
    /// Of the first so many. (The last need not be: the way back begins with them.)
    First(usize),
    /// Of every layer: only each layer's input is kept, and all of a forward pass but the last
    /// products of the MLPs is done twice.
    EveryLayer,
}

impl Recompute {
    pub(super) fn layers(self, n_layers: usize) -> usize {
        match self {
            Recompute::None => 0,
            Recompute::First(n) => n.min(n_layers),
            Recompute::EveryLayer => n_layers,
        }
    }
}

/// The bytes of a step with bf16 weights, by part. Gradients and the optimiser's state are the
/// caller's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrainBytes {
    /// The model.
    pub weights: u64,
    /// The adapter and its packed copies.
    pub adapter: u64,
    /// What layers keep for the way back.
    pub activations: u64,
    /// Buffers that layers share, and the logits.
    pub scratch: u64,
}

impl TrainBytes {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.weights + self.adapter + self.activations + self.scratch
    }
}

/// Predicts the memory of a step of `tokens` tokens with an adapter, or with all weights trained.
pub fn train_bytes(
    config: &ModelConfig,
    lora: Option<&LoraConfig>,
    tokens: usize,
    recompute: Recompute,
) -> TrainBytes {
    let heads = config.heads();
    let (d, f, w, ow) = (
        config.d_model,
        config.d_ffn,
        heads.qkv_width(),
        heads.out_width(),
    );
    let (n_layers, rank) = (config.n_layers, lora.map_or(0, |lora| lora.rank));
    let n_adapted = lora.map_or(0, |lora| lora.targets.len());
    // bf16 in panels of 48 rows.
    let panels = |n: usize, k: usize| 2 * n.next_multiple_of(48) * k.next_multiple_of(2);
    let fused = |fused: Fused| -> usize {
        let n = fused
            .projs()
            .iter()
            .map(|&proj| Proj::dims(proj, config).1)
            .sum();
        panels(n, Proj::dims(fused.projs()[0], config).0)
    };
    let layer: usize = Fused::ALL.into_iter().map(fused).sum::<usize>() + 8 * d;
    let tables = if config.tied_head { 1 } else { 2 };
    let weights = n_layers * layer + tables * panels(config.vocab, d) + 4 * d;
    // f32 and transposed f32; packed: two with as many numbers, two padded to panels.
    let padding = 48usize.div_ceil(rank.clamp(1, 48));
    let adapter = lora.map_or(0, |lora| {
        LoraLayout::new(lora, config).n_params() * (4 + 4 + 2 * 2 + 2 * padding)
    });
    // Per token: what is kept is qkv and attn (rounded), x_mid, gate and up, hidden rows.
    let saved = 2 * w + 2 * ow + 4 * d + 8 * f + 2 * n_adapted * rank;
    let kept = n_layers
        - recompute
            .layers(n_layers)
            .saturating_sub(1)
            .min(n_layers - 1);
    let activations = tokens * (kept * saved + (n_layers + 1) * 4 * d);
    let shared = 2 * d + 2 * f + 4 * ow + 8 * d + 4 * f + 8 * w + 4 * f;
    // Keys and values laid out, queries and gradients stacked, statistics.
    let attention = 4 * config.n_kv_heads * config.head_dim + 4 * ow + 12 * config.n_heads;
    let head = HEAD_ROWS * (config.vocab * 6 + 14 * d);
    let stacked = if lora.is_some() { 8 * rank * 3 } else { 8 * f };
    let scratch = tokens * (shared + attention + stacked) + head;
    TrainBytes {
        weights: weights as u64,
        adapter: adapter as u64,
        activations: activations as u64,
        scratch: scratch as u64,
    }
}
