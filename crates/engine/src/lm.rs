//! What the engine asks of a model: caches it can fork and cut, and one batched forward.

use crate::ModelError;

/// Which rows of logits a span wants back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// None: the span only fills its cache.
    None,
    /// One row, after the span's last token.
    Last,
}

/// Some tokens of one sequence, to be appended to its cache.
pub struct Span<'a, C> {
    /// The sequence's cache; [`LanguageModel::forward`] extends it by `tokens.len()`.
    pub cache: &'a mut C,
    /// The tokens to read, never empty.
    pub tokens: &'a [u32],
    /// The logits wanted.
    pub wants: Wants,
}

/// A model that reads tokens and says what may come next.
///
/// The engine relies on a row's logits depending only on the tokens of its sequence: not
/// on the other spans of the batch, nor on how the sequence was cut into spans.
pub trait LanguageModel {
    /// The state of one sequence.
    type Cache;

    /// The length of a row of logits.
    fn vocab(&self) -> usize;

    /// The longest sequence, prompt and answer together.
    fn max_context(&self) -> usize;

    /// The cache of an empty sequence.
    fn new_cache(&self) -> Self::Cache;

    /// The number of tokens in `cache`.
    fn cache_len(&self, cache: &Self::Cache) -> usize;

    /// The memory that `cache` holds.
    fn cache_bytes(&self, cache: &Self::Cache) -> usize;

    /// A new cache with the first `len` tokens of `cache`; `len <= cache_len(cache)`.
    fn fork(&self, cache: &Self::Cache, len: usize) -> Self::Cache;

    /// Forgets all but the first `len` tokens; `len <= cache_len(cache)`.
    fn truncate(&self, cache: &mut Self::Cache, len: usize);

    /// Appends every span to its cache. `logits` becomes `[rows, vocab]`, one row for each
    /// span that wants one, in the order of the spans.
    ///
    /// A failure may leave the caches longer than they were, never shorter or changed
    /// below their old length: the engine truncates them and tries the spans one by one.
    fn forward(
        &mut self,
        spans: &mut [Span<'_, Self::Cache>],
        logits: &mut Vec<f32>,
    ) -> Result<(), ModelError>;
}
