//! The Llama family behind [`LanguageModel`]: weights that may be shared, adapters, one workspace.

use std::sync::Arc;

use bantam_kernels::Compute;
use bantam_kernels::attention::BLOCK;
use bantam_model::{InferWorkspace, KvCache, Lora, Model};

use crate::{CacheBlock, LanguageModel, ModelError, Span, Wants};

/// A model ready to generate.
pub struct Llama {
    model: Arc<Model<f32>>,
    lora: Option<Arc<Lora<f32>>>,
    work: InferWorkspace,
    compute: Compute,
    block_bytes: usize,
}

impl Llama {
    /// A model, with the adapter for requests that name none.
    pub fn new(model: Arc<Model<f32>>, lora: Option<Arc<Lora<f32>>>, compute: Compute) -> Self {
        let block_bytes = KvCache::new(model.config()).block_bytes();
        Self {
            model,
            lora,
            block_bytes,
            work: InferWorkspace::default(),
            compute,
        }
    }
}

impl LanguageModel for Llama {
    type Cache = KvCache;
    type Adapter = Lora<f32>;

    fn vocab(&self) -> usize {
        self.model.config().vocab
    }

    fn max_context(&self) -> usize {
        self.model.config().max_context
    }

    fn new_cache(&self) -> KvCache {
        KvCache::new(self.model.config())
    }

    fn cache_len(&self, cache: &KvCache) -> usize {
        cache.len()
    }

    fn cache_block(&self) -> CacheBlock {
        CacheBlock {
            tokens: BLOCK,
            bytes: self.block_bytes,
        }
    }

    fn fork(&self, cache: &KvCache, len: usize) -> KvCache {
        cache.fork(len)
    }

    fn truncate(&self, cache: &mut KvCache, len: usize) {
        cache.truncate(len);
    }

    fn forward(
        &mut self,
        spans: &mut [Span<'_, Self>],
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let wants: Vec<(Wants<'_>, usize)> =
            spans.iter().map(|s| (s.wants, s.tokens.len())).collect();
        let mut spans: Vec<bantam_model::Span<'_>> = spans
            .iter_mut()
            .map(|span| bantam_model::Span {
                cache: &mut *span.cache,
                tokens: span.tokens,
                logits: match span.wants {
                    Wants::None => bantam_model::Wants::None,
                    Wants::Last | Wants::LastOf(_) => bantam_model::Wants::Last,
                    Wants::Tail(1) => bantam_model::Wants::Last,
                    Wants::Tail(_) => bantam_model::Wants::All,
                },
                lora: span.adapter.or(self.lora.as_deref()),
            })
            .collect();
        self.model
            .forward(&mut spans, logits, &mut self.work, &self.compute);
        compact(logits, &wants, self.model.config().vocab);
        Ok(())
    }

    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.compute.pool().run(n_tasks, task);
    }
}

/// Leaves of the rows that the model gave what was wanted of them.
fn compact(logits: &mut Vec<f32>, wants: &[(Wants<'_>, usize)], vocab: usize) {
    let (mut from, mut to) = (0, 0);
    for &(wants, n_tokens) in wants {
        match wants {
            Wants::None => {}
            Wants::LastOf(ids) => {
                for (i, &id) in ids.iter().enumerate() {
                    // Ids ascend, so a row shrinks towards its own beginning or an earlier place.
                    logits[to + i] = logits[from + id as usize];
                }
                from += vocab;
            }
            Wants::Last | Wants::Tail(1) => {
                logits.copy_within(from..from + vocab, to);
                from += vocab;
            }
            Wants::Tail(n) => {
                let all = n_tokens * vocab;
                logits.copy_within(from + all - n * vocab..from + all, to);
                from += all;
            }
        }
        to += wants.n_logits(vocab);
    }
    logits.truncate(to);
}
