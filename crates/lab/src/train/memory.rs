//! How much memory a run takes, told from its sizes alone, so that the same settings always come to the same choices.

use bantam_model::{LoraConfig, LoraLayout, ModelConfig};

use super::TrainError;

/// Rows of logits that the head holds at once.
const HEAD_ROWS: u64 = 64;
/// The program, its tokenizer, its rows, and what allocation rounds up.
const BESIDES: u64 = 96 << 20;
/// Fewest tokens of a micro-batch that are worth a pass.
const LEAST_TOKENS: u64 = 64;
/// Most tokens of a micro-batch that a budget asks for: beyond this nothing gets faster.
const MOST_TOKENS: u64 = 4096;

/// The sizes that a run's memory comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Bytes that are there from the start.
    pub fixed: u64,
    /// Bytes for each token of a micro-batch.
    pub per_token: u64,
}

impl Memory {
    /// Of an adapter on a bf16 model.
    pub fn of_lora(model: &ModelConfig, lora: &LoraConfig, validates: bool) -> Self {
        let (d, f) = (model.d_model as u64, model.d_ffn as u64);
        let heads = model.heads();
        let (qkv, attn) = (heads.qkv_width() as u64, heads.out_width() as u64);
        let layers = model.n_layers as u64;
        let tables = if model.tied_head { 1 } else { 2 };
        let weights = layers * (d * qkv + attn * d + 3 * d * f) + tables * model.vocab as u64 * d;
        let trained = LoraLayout::new(lora, model).n_params() as u64;
        // Parameters, their bf16 copies, gradient, two moments, the best; and all but the gradient for a checkpoint.
        let best = u64::from(validates);
        let state = trained * 4 * (2 + 1 + 2 + best + 3 + best);
        // Two layouts of every bf16 weight; logits and their gradient.
        let fixed = weights * 2 * 2 + HEAD_ROWS * model.vocab as u64 * 4 + state + BESIDES;
        let hidden = (lora.targets.len() * lora.rank) as u64;
        let saved = layers * (2 * d + qkv + attn + 2 * f + hidden + 2);
        let passing = 4 * d + 2 * f + qkv + attn + f.max(qkv) + hidden;
        Self {
            fixed,
            per_token: 4 * (saved + passing),
        }
    }

    /// Bytes of a run whose largest micro-batch has so many tokens.
    pub fn bytes(&self, tokens: usize) -> u64 {
        self.fixed + self.per_token * tokens as u64
    }

    /// Most tokens of a micro-batch in `budget_mb`, where the longest row has `longest`.
    pub(crate) fn micro_tokens(&self, budget_mb: u64, longest: usize) -> Result<usize, TrainError> {
        let room = (budget_mb << 20).saturating_sub(self.fixed) / self.per_token;
        let least = LEAST_TOKENS.max(longest as u64);
        if room < least {
            let needed = self.bytes(least as usize).div_ceil(1 << 20);
            return Err(TrainError::Setting {
                field: "memory_mb",
                reason: format!(
                    "is {budget_mb}, but this run needs about {needed}: its longest row has {longest} tokens"
                ),
            });
        }
        Ok((room.min(MOST_TOKENS) / 32 * 32).max(least) as usize)
    }
}

#[cfg(test)]
mod tests {
    use bantam_model::{Proj, RopeScaling};

    use super::*;

    fn smollm2() -> ModelConfig {
        ModelConfig {
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
        }
    }

    #[test]
    fn a_budget_becomes_micro_batches_that_keep_it() {
        let lora = LoraConfig {
            rank: 16,
            alpha: 32.0,
            targets: Proj::ALL.to_vec(),
        };
        let memory = Memory::of_lora(&smollm2(), &lora, true);
        let words = |budget, longest| {
            memory
                .micro_tokens(budget, longest)
                .unwrap_err()
                .to_string()
        };
        assert!(words(300, 60).contains("is 300, but this run needs about "));
        let mut last = 0;
        for budget in [1000, 1200, 1500, 2000, 3000] {
            let tokens = memory.micro_tokens(budget, 60).unwrap();
            assert!(tokens > last && memory.bytes(tokens) <= budget << 20);
            last = tokens;
        }
        assert_eq!(memory.micro_tokens(100_000, 60).unwrap(), 4096);
    }
}
