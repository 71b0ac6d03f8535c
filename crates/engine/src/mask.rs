//! The tokens that a constraint allows next.

/// A mask over the vocabulary. One that allows few tokens also lists them: then the model is
/// asked for their logits alone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Mask {
    words: Vec<u32>,
    n_allowed: usize,
    ids: Vec<u32>,
}

/// A mask is narrow if it allows at most one token in so many.
const NARROW: usize = 8;

impl Mask {
    /// The mask of `words`, one bit a token; tokens from `n_tokens` on are not allowed.
    #[cfg(test)]
    pub(crate) fn new(words: &[u32], n_tokens: usize) -> Self {
        let mut mask = Self::default();
        mask.set(words, n_tokens);
        mask
    }

    /// As [`Self::new`], in place.
    pub(crate) fn set(&mut self, words: &[u32], n_tokens: usize) {
        let n_words = words.len().min(n_tokens.div_ceil(32));
        self.words.clear();
        self.words.extend_from_slice(&words[..n_words]);
        if let Some(last) = self.words.get_mut(n_tokens / 32) {
            *last &= (1 << (n_tokens % 32)) - 1;
        }
        self.n_allowed = self.words.iter().map(|w| w.count_ones() as usize).sum();
        self.ids.clear();
        if self.n_allowed <= n_tokens.div_ceil(NARROW) {
            for (word_idx, &word) in self.words.iter().enumerate() {
                let mut bits = word;
                while bits != 0 {
                    self.ids
                        .push((word_idx * 32) as u32 + bits.trailing_zeros());
                    bits &= bits - 1;
                }
            }
        }
    }

    /// One bit a token, lowest id in the lowest bit of the first word; may be shorter than the vocabulary.
    pub(crate) fn words(&self) -> &[u32] {
        &self.words
    }

    /// How many tokens are allowed.
    pub(crate) fn n_allowed(&self) -> usize {
        self.n_allowed
    }

    /// The allowed ids, ascending, if they are few.
    pub(crate) fn ids(&self) -> Option<&[u32]> {
        (self.ids.len() == self.n_allowed).then_some(&self.ids)
    }

    /// The token that is allowed, if it is exactly one.
    pub(crate) fn only(&self) -> Option<u32> {
        match self.ids[..] {
            [only] if self.n_allowed == 1 => Some(only),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_of_one_bit_is_seen() {
        let only = |words: &[u32], n| Mask::new(words, n).only();
        assert_eq!(only(&[0, 0b100], 64), Some(34));
        assert_eq!(only(&[1, 1], 64), None);
        assert_eq!(only(&[3], 64), None);
        assert_eq!(only(&[0], 64), None);
        assert_eq!(only(&[0, 0b100], 34), None);
        assert_eq!(only(&[0, 0, 1], 64), None);
    }

    #[test]
    fn few_are_listed_and_many_are_not() {
        let narrow = Mask::new(&[0b101, 0, 1 << 31], 320);
        assert_eq!(
            (narrow.ids(), narrow.n_allowed()),
            (Some(&[0, 2, 95][..]), 3)
        );
        let wide = Mask::new(&[u32::MAX; 10], 319);
        assert_eq!((wide.ids(), wide.n_allowed()), (None, 319));
        let none = Mask::new(&[0; 10], 320);
        assert_eq!((none.ids(), none.only()), (Some(&[][..]), None));
    }
}
