//! The Llama family behind [`LanguageModel`]: weights that may be shared, one adapter, one workspace.

use std::sync::Arc;

use bantam_kernels::Compute;
use bantam_model::{InferWorkspace, KvCache, Lora, Model};

use crate::{LanguageModel, ModelError, Span, Wants};

/// A model ready to generate.
pub struct Llama {
    model: Arc<Model<f32>>,
    lora: Option<Arc<Lora<f32>>>,
    work: InferWorkspace,
    compute: Compute,
}

impl Llama {
    /// A model, with the adapter that its answers are to be given with.
    pub fn new(model: Arc<Model<f32>>, lora: Option<Arc<Lora<f32>>>, compute: Compute) -> Self {
        Self {
            model,
            lora,
            work: InferWorkspace::default(),
            compute,
        }
    }
}

impl LanguageModel for Llama {
    type Cache = KvCache;

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

    fn cache_bytes(&self, cache: &KvCache) -> usize {
        cache.bytes()
    }

    fn fork(&self, cache: &KvCache, len: usize) -> KvCache {
        cache.fork(len)
    }

    fn truncate(&self, cache: &mut KvCache, len: usize) {
        cache.truncate(len);
    }

    fn forward(
        &mut self,
        spans: &mut [Span<'_, KvCache>],
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError> {
        let mut spans: Vec<bantam_model::Span<'_>> = spans
            .iter_mut()
            .map(|span| bantam_model::Span {
                cache: &mut *span.cache,
                tokens: span.tokens,
                logits: match span.wants {
                    Wants::None => bantam_model::Wants::None,
                    Wants::Last => bantam_model::Wants::Last,
                },
                lora: self.lora.as_deref(),
            })
            .collect();
        self.model
            .forward(&mut spans, logits, &mut self.work, &self.compute);
        Ok(())
    }
}
