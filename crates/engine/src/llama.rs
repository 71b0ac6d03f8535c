//! The Llama family behind [`LanguageModel`]: weights that may be shared, adapters, one workspace.

use std::sync::Arc;

use bantam_kernels::Compute;
use bantam_kernels::attention::BLOCK;
use bantam_model::{InferWorkspace, KvCache, Lora, Model};
use bantam_text::Tokenizer;

use crate::{CacheBlock, DecoderEmbedder, LanguageModel, ModelError, Span, Wants};

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
        let block_bytes = model.cache_block_bytes();
        Self {
            model,
            lora,
            block_bytes,
            work: InferWorkspace::default(),
            compute,
        }
    }

    /// The same weights and adapter, for vectors instead of answers.
    pub fn embedder(&self, tokenizer: Arc<Tokenizer>) -> DecoderEmbedder {
        let (model, lora) = (self.model.clone(), self.lora.clone());
        DecoderEmbedder::new(model, lora, tokenizer, self.compute.clone())
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
        let mut spans: Vec<bantam_model::Span<'_>> = spans
            .iter_mut()
            .map(|span| bantam_model::Span {
                cache: &mut *span.cache,
                tokens: span.tokens,
                logits: match span.wants {
                    Wants::None => bantam_model::Wants::None,
                    Wants::Last => bantam_model::Wants::Last,
                    Wants::LastOf(ids) => bantam_model::Wants::LastOf(ids),
                    Wants::Tail(n) => bantam_model::Wants::Tail(n),
                },
                lora: span.adapter.or(self.lora.as_deref()),
            })
            .collect();
        self.model
            .forward(&mut spans, logits, &mut self.work, &self.compute);
        Ok(())
    }

    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.compute.pool().run(n_tasks, task);
    }
}
