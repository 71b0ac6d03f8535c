//! Caches of what was read lately, so that a prompt's known beginning is not read again.
//!
//! A finished request leaves its cache here. A new one starts from a fork of the entry, or
//! of the running request, that shares the longest run of tokens with its prompt. Reuse
//! saves time and changes nothing else: the cached state is that which reading the same
//! tokens gives.

/// Recent caches, the least recently used dropped first.
pub(crate) struct PrefixCache<C> {
    entries: Vec<Entry<C>>,
    max_entries: usize,
    max_bytes: usize,
    /// Counts uses; the entry with the lowest stamp is the oldest.
    clock: u64,
}

struct Entry<C> {
    tokens: Vec<u32>,
    cache: C,
    bytes: usize,
    used: u64,
}

impl<C> PrefixCache<C> {
    pub(crate) fn new(max_entries: usize, max_bytes: usize) -> Self {
        Self {
            entries: Vec::new(),
            max_entries,
            max_bytes,
            clock: 0,
        }
    }

    /// The cache that shares the most tokens with `prompt`, and how many they are.
    pub(crate) fn longest(&self, prompt: &[u32]) -> Option<(usize, usize)> {
        let shared = self
            .entries
            .iter()
            .map(|e| common_prefix(&e.tokens, prompt));
        // The first of equals, so that the choice does not depend on anything unseen.
        shared
            .enumerate()
            .rev()
            .max_by_key(|&(_, len)| len)
            .filter(|&(_, len)| len > 0)
    }

    /// The cache at an index that [`Self::longest`] gave; counts as a use.
    pub(crate) fn get(&mut self, idx: usize) -> &C {
        self.clock += 1;
        self.entries[idx].used = self.clock;
        &self.entries[idx].cache
    }

    /// Keeps `cache`, which holds exactly `tokens`.
    pub(crate) fn insert(&mut self, tokens: Vec<u32>, cache: C, bytes: usize) {
        if self.max_entries == 0 || bytes > self.max_bytes || tokens.is_empty() {
            return;
        }
        self.clock += 1;
        if let Some(known) = self
            .entries
            .iter_mut()
            .find(|e| e.tokens.starts_with(&tokens))
        {
            known.used = self.clock;
            return;
        }
        self.entries.retain(|e| !tokens.starts_with(&e.tokens));
        self.entries.push(Entry {
            tokens,
            cache,
            bytes,
            used: self.clock,
        });
        while self.entries.len() > self.max_entries || self.bytes() > self.max_bytes {
            let oldest = self.entries.iter().enumerate().min_by_key(|(_, e)| e.used);
            match oldest.map(|(idx, _)| idx) {
                Some(idx) => self.entries.remove(idx),
                None => break,
            };
        }
    }

    /// The memory held.
    pub(crate) fn bytes(&self) -> usize {
        self.entries.iter().map(|e| e.bytes).sum()
    }

    /// The number of caches held.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

/// How many tokens `a` and `b` begin with alike.
pub(crate) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_match_wins_and_the_oldest_goes() {
        let mut cache = PrefixCache::new(2, 100);
        cache.insert(vec![1, 2, 3], 'a', 10);
        cache.insert(vec![1, 2, 4, 5], 'b', 10);
        assert_eq!(cache.longest(&[1, 2, 4, 9]), Some((1, 3)));
        assert_eq!(
            cache.longest(&[1, 2, 9]),
            Some((0, 2)),
            "the first of equals"
        );
        assert_eq!(cache.longest(&[9]), None);
        assert_eq!(*cache.get(0), 'a');
        cache.insert(vec![7], 'c', 10);
        assert_eq!(
            cache.longest(&[1, 2, 4, 5]),
            Some((0, 2)),
            "`b` was used the longest ago"
        );
    }

    #[test]
    fn an_entry_that_another_contains_is_dropped() {
        let mut cache = PrefixCache::new(4, 100);
        cache.insert(vec![1, 2], 'a', 10);
        cache.insert(vec![1, 2, 3], 'b', 10);
        assert_eq!((cache.len(), cache.longest(&[1, 2, 3])), (1, Some((0, 3))));
        cache.insert(vec![1], 'c', 10);
        assert_eq!((cache.len(), cache.bytes()), (1, 10));
    }

    #[test]
    fn the_byte_budget_holds() {
        let mut cache = PrefixCache::new(9, 25);
        for token in 0..5 {
            cache.insert(vec![token], token, 10);
            assert!(cache.bytes() <= 25);
        }
        assert_eq!(cache.len(), 2);
        cache.insert(vec![77], 77, 26);
        assert_eq!(cache.len(), 2, "what can never fit evicts nothing");
        let mut off = PrefixCache::new(0, 100);
        off.insert(vec![1], 'a', 1);
        assert_eq!(off.len(), 0);
    }
}
