//! The memory of what was read: where a sequence starts, what is kept, and who gives way when it runs short.

use crate::engine::{Engine, Slot};
use crate::prefix::{NodeId, common_prefix};
use crate::{AdapterId, LanguageModel};

/// A cache to begin with.
pub(crate) struct Start<C> {
    pub(crate) cache: C,
    /// How many tokens of the sequence it holds.
    pub(crate) len: usize,
    pub(crate) pin: Option<NodeId>,
}

impl<M: LanguageModel> Engine<M> {
    /// A cache to start a sequence from, and how much of it that holds. `None` if it is better to
    /// wait: a running request is about to read a beginning that the sequence shares.
    pub(crate) fn start(
        &mut self,
        adapter: Option<AdapterId>,
        tokens: &[u32],
    ) -> Option<Start<M::Cache>> {
        let anew = |model: &M| Start {
            cache: model.new_cache(),
            len: 0,
            pin: None,
        };
        if self.config.prefix_bytes == 0 {
            return Some(anew(&self.model));
        }
        // The last token is always read anew: its logits are needed.
        let usable = |shared: usize| shared.min(tokens.len() - 1);
        let known = self.prefixes.longest(adapter, tokens);
        let known_len = known.map_or(0, |found| usable(found.len));
        let alike = |s: &&mut Slot<M>| s.adapter_id() == adapter;
        let (mut live, mut live_len, mut coming) = (None, known_len, 0);
        for slot in self.slots.iter_mut().filter(alike) {
            let shared = usable(common_prefix(&slot.answer.tokens, tokens));
            if slot.is_reading {
                coming = coming.max(shared);
            }
            if shared.min(slot.fed) > live_len {
                live_len = shared.min(slot.fed);
                live = Some(slot);
            }
        }
        if coming >= live_len + self.config.prefix_min {
            return None;
        }
        if live_len < self.config.prefix_min {
            return Some(anew(&self.model));
        }
        let fork = |cache: &M::Cache, len| self.model.fork(cache, len);
        if let Some(slot) = live {
            // What a running request has read so far goes into the tree, and both read on from it.
            let cache = fork(&slot.cache, live_len);
            self.prefixes
                .insert(adapter, &tokens[..live_len], cache, fork);
            if let Some(found) = self.prefixes.longest(adapter, &tokens[..live_len]) {
                let before = slot.pin.replace(self.prefixes.pin(found, fork).0);
                slot.n_shared = live_len;
                if let Some(before) = before {
                    self.prefixes.unpin(before);
                }
            }
        }
        let Some(found) = self.prefixes.longest(adapter, &tokens[..live_len]) else {
            return Some(anew(&self.model));
        };
        let (pin, cache) = self.prefixes.pin(found, fork);
        Some(Start {
            cache: fork(cache, found.len),
            len: found.len,
            pin: Some(pin),
        })
    }

    pub(crate) fn unpin(&mut self, pin: Option<NodeId>) {
        if let Some(pin) = pin {
            self.prefixes.unpin(pin);
        }
    }

    /// The memory of what running requests have read or are about to, without what they share with
    /// the tree.
    pub(crate) fn running_bytes(&self) -> usize {
        let block = self.model.cache_block();
        let own =
            |s: &Slot<M>| s.answer.tokens.len().div_ceil(block.tokens) - s.n_shared / block.tokens;
        self.slots.iter().map(own).sum::<usize>() * block.bytes
    }

    /// Whether one more sequence of `len` tokens can run; what is kept would make way for it. An
    /// eighth of the memory is left for the answers to grow.
    pub(crate) fn has_room(&self, len: usize) -> bool {
        let block = self.model.cache_block();
        let needed = (len.div_ceil(block.tokens) + 1) * block.bytes;
        let room = self.config.kv_bytes - self.config.kv_bytes / 8;
        let in_use = self.running_bytes() + self.prefixes.pinned_bytes();
        self.slots.is_empty() || in_use + needed <= room
    }

    /// Drops of what is kept as much as running requests need.
    pub(crate) fn trim(&mut self) {
        let left = self.config.kv_bytes.saturating_sub(self.running_bytes());
        self.prefixes.shrink(left.min(self.config.prefix_bytes));
    }

    /// Keeps within the memory: drops what is kept, then pauses the newest requests.
    pub(crate) fn make_room(&mut self) {
        loop {
            self.trim();
            if self.kv_bytes() <= self.config.kv_bytes || self.slots.len() <= 1 {
                return;
            }
            if let Some(mut slot) = self.slots.pop() {
                self.unpin(slot.pin.take());
                slot.cache = self.model.new_cache();
                (slot.fed, slot.n_shared, slot.is_reading) = (0, 0, true);
                self.paused.push(slot);
            }
        }
    }

    /// Leaves a finished request's cache to those that come after.
    pub(crate) fn keep(&mut self, slot: Slot<M>) {
        let adapter = slot.adapter_id();
        let is_loaded = adapter.is_none_or(|id| self.adapters.contains_key(&id));
        if self.config.prefix_bytes > 0 && slot.fed >= self.config.prefix_min && is_loaded {
            let fork = |cache: &M::Cache, len| self.model.fork(cache, len);
            let tokens = &slot.answer.tokens[..slot.fed];
            self.prefixes.insert(adapter, tokens, slot.cache, fork);
        }
        self.unpin(slot.pin);
        self.trim();
    }
}
