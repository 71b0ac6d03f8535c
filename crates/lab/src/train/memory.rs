//! How much memory a run takes, told from its sizes alone, so that the same settings always come to the same choices.

use bantam_model::{LoraConfig, LoraLayout, ModelConfig, Recompute, train_bytes};

use super::TrainError;

/// The program, its tokenizer, its rows, and what allocation rounds up.
const BESIDES: u64 = 64 << 20;
/// Fewest tokens of a micro-batch that are worth a pass.
const LEAST_TOKENS: usize = 64;
/// Most tokens of a micro-batch that a budget asks for: beyond this nothing gets faster.
pub(super) const MOST_TOKENS: usize = 4096;
/// What a pass costs beside its tokens, in tokens: weights are turned and adapters packed once a pass.
const PASS_TOKENS: f64 = 48.0;
/// What computing every layer twice adds to a step.
const TWICE: f64 = 0.3;

/// The sizes that a run's memory comes from.
#[derive(Debug, Clone, PartialEq)]
pub struct Memory {
    model: ModelConfig,
    lora: Option<LoraConfig>,
    validates: bool,
}

/// How a budget is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fit {
    /// Most tokens of a micro-batch.
    pub(super) tokens: usize,
    /// Layers, from the first on, whose activations are computed twice instead of being kept.
    pub(super) twice: usize,
}

impl Fit {
    pub(super) fn recompute(self) -> Recompute {
        match self.twice {
            0 => Recompute::None,
            n => Recompute::First(n),
        }
    }
}

impl Memory {
    /// Of an adapter on a bf16 model, or of all its weights.
    pub fn new(model: &ModelConfig, lora: Option<LoraConfig>, validates: bool) -> Self {
        let model = model.clone();
        Self {
            model,
            lora,
            validates,
        }
    }

    /// Numbers being trained.
    fn n_params(&self) -> u64 {
        let n = match &self.lora {
            Some(lora) => LoraLayout::new(lora, &self.model).n_params(),
            None => self.model.n_params(),
        };
        n as u64
    }

    /// Bytes of a run whose largest micro-batch has so many tokens.
    pub fn bytes(&self, tokens: usize, recompute: Recompute) -> u64 {
        // Parameters, gradient, two moments, the best; an adapter's files pass through memory when they are saved.
        let copies = 4 + u64::from(self.validates) + u64::from(self.lora.is_some());
        let step = train_bytes(&self.model, self.lora.as_ref(), tokens, recompute);
        step.total() + copies * 4 * self.n_params() + BESIDES
    }

    /// The fastest way to stay within `budget_mb`: passes of at most `wanted` tokens, where rows have up to `longest` and
    /// all begin with the same `shared`, which every pass computes anew.
    pub(super) fn fit(
        &self,
        budget_mb: u64,
        (wanted, longest, shared): (usize, usize, usize),
    ) -> Result<Fit, TrainError> {
        let (budget, n_layers) = (budget_mb << 20, self.model.n_layers);
        let least = LEAST_TOKENS.max(longest);
        let mut sizes = vec![wanted.max(least)];
        while let Some(&last) = sizes.last()
            && last > least
        {
            sizes.push((last * 7 / 8).max(least));
        }
        let fits = |&Fit { tokens, twice }: &Fit| {
            let recompute = Fit { tokens, twice }.recompute();
            self.bytes(tokens, recompute) <= budget
        };
        let first_fit = |tokens: usize| {
            let mut all = (0..=n_layers).map(|twice| Fit { tokens, twice });
            all.find(fits)
        };
        let cost = |fit: &Fit| {
            let own = (fit.tokens - shared.min(fit.tokens - 1)) as f64;
            let pass = 1.0 + (PASS_TOKENS + shared as f64) / own;
            pass * (1.0 + TWICE * fit.twice as f64 / n_layers as f64)
        };
        let best = sizes.into_iter().filter_map(first_fit);
        best.min_by(|a, b| cost(a).total_cmp(&cost(b)))
            .ok_or_else(|| {
                let needed = self.bytes(least, Recompute::EveryLayer).div_ceil(1 << 20);
                TrainError::Setting {
                    field: "memory_mb",
                    reason: format!(
                        "is {budget_mb}, but this run needs about {needed}: its longest row has {longest} tokens"
                    ),
                }
            })
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

    fn lora() -> LoraConfig {
        LoraConfig {
            rank: 16,
            alpha: 32.0,
            targets: Proj::ALL.to_vec(),
        }
    }

    #[test]
    fn a_budget_is_kept_and_more_of_it_is_never_slower() {
        let memory = Memory::new(&smollm2(), Some(lora()), true);
        let refused = memory.fit(300, (768, 60, 20)).unwrap_err().to_string();
        assert!(refused.contains("is 300, but this run needs about "));
        let mut last: Option<Fit> = None;
        for budget in [580, 600, 650, 700, 800, 1000, 1500, 3000] {
            let fit = memory.fit(budget, (768, 60, 20)).unwrap();
            assert!(memory.bytes(fit.tokens, fit.recompute()) <= budget << 20);
            if let Some(last) = last {
                assert!(fit.tokens >= last.tokens || fit.twice < last.twice);
            }
            last = Some(fit);
        }
        let plenty = Fit {
            tokens: 768,
            twice: 0,
        };
        assert_eq!(last, Some(plenty));
    }

    #[test]
    fn a_long_beginning_that_all_rows_share_is_worth_computing_layers_twice() {
        let memory = Memory::new(&smollm2(), Some(lora()), false);
        let alone = memory.fit(700, (1000, 600, 0)).unwrap();
        let shared = memory.fit(700, (1000, 600, 540)).unwrap();
        assert!(
            shared.twice > alone.twice && shared.tokens > alone.tokens,
            "{alone:?} {shared:?}"
        );
    }

    #[test]
    fn every_weight_takes_four_numbers_more() {
        let full = Memory::new(&smollm2(), None, false).bytes(768, Recompute::None);
        assert!((2_500..4_000).contains(&(full >> 20)), "{}", full >> 20);
    }
}
