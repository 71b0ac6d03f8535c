//! What the engine asks of a model: caches it can fork and cut, and one batched forward.

use crate::ModelError;

/// Which logits a span wants back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants<'a> {
    /// None: the span only fills its cache.
    None,
    /// One row, after the span's last token.
    Last,
    /// After the span's last token, the logits of these tokens alone, in this order; the same
    /// bits as in the whole row.
    LastOf(&'a [u32]),
    /// One row after each of the last so many tokens of the span.
    Tail(usize),
}

impl Wants<'_> {
    /// How many logits that is.
    pub fn n_logits(&self, vocab: usize) -> usize {
        match self {
            Wants::None => 0,
            Wants::Last => vocab,
            Wants::LastOf(ids) => ids.len(),
            Wants::Tail(n) => n * vocab,
        }
    }
}

/// Some tokens of one sequence, to be appended to its cache.
pub struct Span<'a, M: LanguageModel + ?Sized> {
    /// The sequence's cache; [`LanguageModel::forward`] extends it by `tokens.len()`.
    pub cache: &'a mut M::Cache,
    /// The tokens to read, never empty.
    pub tokens: &'a [u32],
    /// The logits wanted.
    pub wants: Wants<'a>,
    /// What to read them with; the bare model, if there is none.
    pub adapter: Option<&'a M::Adapter>,
}

/// The unit in which caches take and share memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheBlock {
    /// Tokens in a block.
    pub tokens: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

/// A model that reads tokens and says what may come next.
///
/// The engine relies on a row's logits depending only on the adapter and the tokens of its
/// sequence: not on the other spans of the batch, nor on how the sequence was cut into spans.
pub trait LanguageModel {
    /// The state of one sequence.
    type Cache;

    /// What a sequence may be read with, besides the model's own weights.
    type Adapter: ?Sized;

    /// The length of a row of logits.
    fn vocab(&self) -> usize;

    /// The longest sequence, prompt and answer together.
    fn max_context(&self) -> usize;

    /// The cache of an empty sequence.
    fn new_cache(&self) -> Self::Cache;

    /// The number of tokens in `cache`.
    fn cache_len(&self, cache: &Self::Cache) -> usize;

    /// How caches take memory: in whole blocks, which forks share until one writes.
    fn cache_block(&self) -> CacheBlock;

    /// A new cache with the first `len` tokens of `cache`; `len <= cache_len(cache)`.
    fn fork(&self, cache: &Self::Cache, len: usize) -> Self::Cache;

    /// Forgets all but the first `len` tokens; `len <= cache_len(cache)`.
    fn truncate(&self, cache: &mut Self::Cache, len: usize);

    /// Appends every span to its cache. `logits` becomes what the spans want, one after the
    /// other; what it held before is overwritten.
    ///
    /// A failure may leave the caches longer than they were, never shorter or changed
    /// below their old length: the engine truncates them and tries the spans one by one.
    fn forward(
        &mut self,
        spans: &mut [Span<'_, Self>],
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError>;

    /// Runs `task(0)`, ..., `task(n_tasks - 1)`, each once, in any order, on any of the model's
    /// threads: the engine's own work between two passes.
    fn run(&self, n_tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        (0..n_tasks).for_each(task);
    }
}
