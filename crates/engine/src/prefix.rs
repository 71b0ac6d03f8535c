//! Caches of what was read lately, so that a prompt's known beginning is not read again.
//!
//! A radix tree for each adapter: a node holds some tokens and the cache of all tokens from the
//! root to its end. Neighbours in the tree share the blocks of their common beginning, so a node
//! costs the blocks that are its own. Reuse saves time and changes nothing else: the cached state
//! is that which reading the same tokens gives.

use std::collections::{HashMap, HashSet};

use crate::{AdapterId, CacheBlock};

/// Names a node for as long as the tree lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct NodeId(u64);

/// The tree. Leaves that were not used for the longest time are dropped first.
pub(crate) struct PrefixTree<C> {
    nodes: HashMap<NodeId, Node<C>>,
    /// The first nodes of each adapter, by their first token.
    roots: HashMap<Option<AdapterId>, HashMap<u32, NodeId>>,
    block: CacheBlock,
    bytes: usize,
    /// Counts uses and names nodes.
    clock: u64,
}

struct Node<C> {
    adapter: Option<AdapterId>,
    parent: Option<NodeId>,
    children: HashMap<u32, NodeId>,
    /// The tokens of this node, the first of them at position `start`.
    tokens: Vec<u32>,
    start: usize,
    /// Of `start + tokens.len()` tokens.
    cache: C,
    bytes: usize,
    used: u64,
    /// Running requests that read on from this node: dropping it would free nothing.
    pins: usize,
}

/// A beginning that the tree knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Match {
    node: NodeId,
    /// How many tokens it is.
    pub(crate) len: usize,
}

impl<C> PrefixTree<C> {
    pub(crate) fn new(block: CacheBlock) -> Self {
        Self {
            nodes: HashMap::new(),
            roots: HashMap::new(),
            block,
            bytes: 0,
            clock: 0,
        }
    }

    /// The longest beginning of `tokens` that is known under `adapter`.
    pub(crate) fn longest(&self, adapter: Option<AdapterId>, tokens: &[u32]) -> Option<Match> {
        let mut found = None;
        let mut children = self.roots.get(&adapter)?;
        let mut len = 0;
        while let Some(&id) = tokens.get(len).and_then(|token| children.get(token)) {
            let node = self.nodes.get(&id)?;
            let shared = common_prefix(&node.tokens, &tokens[len..]);
            len += shared;
            found = Some(Match { node: id, len });
            if shared < node.tokens.len() {
                break;
            }
            children = &node.children;
        }
        found
    }

    /// A node that ends where the match ends, pinned until [`Self::unpin`]; a node that goes on is
    /// cut in two.
    pub(crate) fn pin(&mut self, found: Match, fork: impl Fn(&C, usize) -> C) -> (NodeId, &C) {
        let id = self.cut(found, fork);
        self.touch(id);
        let node = self.nodes.get_mut(&id).expect("`cut` gives a node");
        node.pins += 1;
        (id, &node.cache)
    }

    /// Takes back a [`Self::pin`]. A node whose adapter was unloaded is gone already.
    pub(crate) fn unpin(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            node.pins -= 1;
        }
    }

    /// Keeps `cache`, which holds exactly `tokens`.
    pub(crate) fn insert(
        &mut self,
        adapter: Option<AdapterId>,
        tokens: &[u32],
        cache: C,
        fork: impl Fn(&C, usize) -> C,
    ) {
        if tokens.is_empty() {
            return;
        }
        let found = self.longest(adapter, tokens);
        let (parent, start) = match found {
            Some(found) if found.len == tokens.len() => {
                self.touch(found.node);
                return;
            }
            Some(found) => (Some(self.cut(found, fork)), found.len),
            None => (None, 0),
        };
        let id = self.fresh();
        let node = Node {
            adapter,
            parent,
            children: HashMap::new(),
            tokens: tokens[start..].to_vec(),
            start,
            cache,
            bytes: 0,
            used: 0,
            pins: 0,
        };
        self.nodes.insert(id, node);
        self.siblings(adapter, parent).insert(tokens[start], id);
        self.touch(id);
        self.weigh(id);
        if let Some(parent) = parent {
            self.weigh(parent);
        }
    }

    /// Drops leaves until at most `bytes` are held, or nothing more can be dropped.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        while self.bytes > bytes {
            let leaves = self.nodes.iter();
            let leaves = leaves.filter(|(_, n)| n.children.is_empty() && n.pins == 0);
            let Some(oldest) = leaves.min_by_key(|(id, n)| (n.used, **id)).map(|l| *l.0) else {
                return;
            };
            self.remove(oldest);
        }
    }

    /// Forgets everything that was read with an adapter.
    pub(crate) fn forget(&mut self, adapter: AdapterId) {
        self.roots.remove(&Some(adapter));
        self.nodes.retain(|_, node| node.adapter != Some(adapter));
        self.bytes = self.nodes.values().map(|n| n.bytes).sum();
    }

    /// The memory held.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The part of the memory that is in use by running requests, and cannot be freed.
    pub(crate) fn pinned_bytes(&self) -> usize {
        let mut seen = HashSet::new();
        let mut bytes = 0;
        for (&id, _) in self.nodes.iter().filter(|(_, n)| n.pins > 0) {
            let mut next = Some(id);
            while let Some((id, node)) = next.and_then(|id| Some((id, self.nodes.get(&id)?))) {
                if !seen.insert(id) {
                    break;
                }
                bytes += node.bytes;
                next = node.parent;
            }
        }
        bytes
    }

    /// The number of nodes.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The node that ends where the match ends.
    fn cut(&mut self, found: Match, fork: impl Fn(&C, usize) -> C) -> NodeId {
        let id = found.node;
        let upper_id = self.fresh();
        let node = self.nodes.get_mut(&id).expect("matches are used at once");
        let upper_len = found.len - node.start;
        if upper_len == node.tokens.len() {
            return id;
        }
        // The lower part keeps the name: those who pinned it need all of it.
        let lower_tokens = node.tokens.split_off(upper_len);
        let upper_tokens = std::mem::replace(&mut node.tokens, lower_tokens);
        let upper = Node {
            adapter: node.adapter,
            parent: node.parent,
            children: HashMap::from([(node.tokens[0], id)]),
            start: node.start,
            cache: fork(&node.cache, found.len),
            bytes: 0,
            used: node.used,
            pins: 0,
            tokens: upper_tokens,
        };
        (node.parent, node.start) = (Some(upper_id), found.len);
        let (adapter, parent, first) = (upper.adapter, upper.parent, upper.tokens[0]);
        self.nodes.insert(upper_id, upper);
        self.siblings(adapter, parent).insert(first, upper_id);
        self.weigh(id);
        self.weigh(upper_id);
        upper_id
    }

    fn remove(&mut self, id: NodeId) {
        let Some(node) = self.nodes.remove(&id) else {
            return;
        };
        self.bytes -= node.bytes;
        self.siblings(node.adapter, node.parent)
            .remove(&node.tokens[0]);
        if let Some(parent) = node.parent {
            self.weigh(parent);
        }
    }

    /// Where the children of `parent` are listed.
    fn siblings(
        &mut self,
        adapter: Option<AdapterId>,
        parent: Option<NodeId>,
    ) -> &mut HashMap<u32, NodeId> {
        match parent {
            Some(parent) => {
                let parent = self.nodes.get_mut(&parent);
                &mut parent.expect("a parent outlives its children").children
            }
            None => self.roots.entry(adapter).or_default(),
        }
    }

    fn fresh(&mut self) -> NodeId {
        self.clock += 1;
        NodeId(self.clock)
    }

    /// Marks the way to a node as used now.
    fn touch(&mut self, id: NodeId) {
        self.clock += 1;
        let mut next = Some(id);
        while let Some(node) = next.and_then(|id| self.nodes.get_mut(&id)) {
            node.used = self.clock;
            next = node.parent;
        }
    }

    /// Counts a node's own blocks anew. A block that lies in two nodes belongs to the lower.
    fn weigh(&mut self, id: NodeId) {
        let block = self.block;
        let Some(node) = self.nodes.get_mut(&id) else {
            return;
        };
        let end = node.start + node.tokens.len();
        let last = if node.children.is_empty() {
            end.div_ceil(block.tokens)
        } else {
            end / block.tokens
        };
        let bytes = (last - node.start / block.tokens) * block.bytes;
        self.bytes = self.bytes - node.bytes + bytes;
        node.bytes = bytes;
    }
}

/// How many tokens `a` and `b` begin with alike.
pub(crate) fn common_prefix(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Tree = PrefixTree<Vec<u32>>;

    const BLOCK: CacheBlock = CacheBlock {
        tokens: 4,
        bytes: 10,
    };

    #[allow(clippy::ptr_arg, reason = "the cache is a vector")]
    fn fork(cache: &Vec<u32>, len: usize) -> Vec<u32> {
        cache[..len].to_vec()
    }

    fn insert(tree: &mut Tree, tokens: &[u32]) {
        tree.insert(None, tokens, tokens.to_vec(), fork);
    }

    fn len(tree: &Tree, tokens: &[u32]) -> usize {
        tree.longest(None, tokens).map_or(0, |m| m.len)
    }

    /// What must hold of any tree.
    fn check(tree: &Tree) {
        for (id, node) in &tree.nodes {
            assert!(!node.tokens.is_empty());
            assert_eq!(node.cache.len(), node.start + node.tokens.len());
            assert!(node.cache.ends_with(&node.tokens));
            for (first, child) in &node.children {
                let child = &tree.nodes[child];
                assert_eq!((child.parent, child.tokens[0]), (Some(*id), *first));
                assert_eq!(child.start, node.cache.len());
                assert!(child.cache.starts_with(&node.cache));
            }
        }
        let bytes: usize = tree.nodes.values().map(|n| n.bytes).sum();
        assert_eq!(tree.bytes(), bytes);
    }

    #[test]
    fn the_longest_beginning_is_found_within_nodes_too() {
        let mut tree = Tree::new(BLOCK);
        insert(&mut tree, &[1, 2, 3, 4, 5]);
        insert(&mut tree, &[1, 2, 9, 9]);
        check(&tree);
        assert_eq!(tree.len(), 3, "the common beginning became a node");
        assert_eq!(len(&tree, &[1, 2, 3, 4, 7]), 4);
        assert_eq!(len(&tree, &[1, 2, 9, 9, 9]), 4);
        assert_eq!(len(&tree, &[1, 7]), 1);
        assert_eq!(len(&tree, &[7]), 0);
        insert(&mut tree, &[1, 2, 3]);
        assert_eq!(tree.len(), 3, "known already");
        assert_eq!(tree.longest(Some(AdapterId(0)), &[1, 2]), None);
        let found = tree.longest(None, &[1, 2, 3, 8]).unwrap();
        assert_eq!(tree.pin(found, fork).1, &[1, 2, 3]);
        check(&tree);
    }

    #[test]
    fn shared_blocks_are_counted_once() {
        let mut tree = Tree::new(BLOCK);
        insert(&mut tree, &(0..10).collect::<Vec<_>>());
        assert_eq!(tree.bytes(), 30);
        let mut other: Vec<u32> = (0..9).collect();
        other.extend([77; 4]);
        insert(&mut tree, &other);
        // Two blocks are shared; the third differs, and the second sequence has a fourth.
        assert_eq!(tree.bytes(), 20 + 10 + 20);
        check(&tree);
    }

    #[test]
    fn the_oldest_leaves_go_first_and_pinned_ones_stay() {
        let mut tree = Tree::new(BLOCK);
        insert(&mut tree, &[1, 2, 3, 4]);
        insert(&mut tree, &[5, 6, 7, 8]);
        insert(&mut tree, &[9, 10, 11, 12]);
        let found = tree.longest(None, &[1, 2, 3, 4]).unwrap();
        let (pinned, _) = tree.pin(found, fork);
        let found = tree.longest(None, &[5, 6, 7, 8]).unwrap();
        let (brief, _) = tree.pin(found, fork);
        assert_eq!(tree.pinned_bytes(), 20);
        tree.unpin(brief);
        assert_eq!((tree.pinned_bytes(), tree.bytes()), (10, 30));
        tree.shrink(20);
        assert_eq!(len(&tree, &[9]), 0, "used the longest ago");
        tree.shrink(0);
        assert_eq!((tree.len(), len(&tree, &[1, 2, 3, 4])), (1, 4));
        tree.unpin(pinned);
        tree.shrink(0);
        assert_eq!((tree.len(), tree.bytes()), (0, 0));
    }

    #[test]
    fn adapters_are_apart_and_can_be_forgotten() {
        let mut tree = Tree::new(BLOCK);
        let a = AdapterId(1);
        tree.insert(Some(a), &[1, 2], vec![1, 2], fork);
        insert(&mut tree, &[1, 2, 3]);
        assert_eq!(tree.longest(Some(a), &[1, 2, 3]).unwrap().len, 2);
        let found = tree.longest(Some(a), &[1]).unwrap();
        let (pinned, _) = tree.pin(found, fork);
        tree.forget(a);
        tree.unpin(pinned);
        assert_eq!(tree.longest(Some(a), &[1, 2, 3]), None);
        assert_eq!(len(&tree, &[1, 2, 3]), 3);
        check(&tree);
    }

    proptest! {
        #[test]
        fn any_history_leaves_a_true_tree(
            ops in prop::collection::vec((prop::collection::vec(0u32..3, 1..9), 0usize..4), 1..60)
        ) {
            let mut tree = Tree::new(BLOCK);
            let mut pins = Vec::new();
            for (tokens, op) in ops {
                match op {
                    0 => tree.shrink(60),
                    1 => {
                        if let Some(found) = tree.longest(None, &tokens) {
                            let (id, cache) = tree.pin(found, fork);
                            prop_assert_eq!(cache.as_slice(), &tokens[..found.len]);
                            pins.push((id, cache.clone()));
                        }
                    }
                    2 if !pins.is_empty() => tree.unpin(pins.remove(0).0),
                    _ => {
                        insert(&mut tree, &tokens);
                        prop_assert_eq!(len(&tree, &tokens), tokens.len());
                    }
                }
                check(&tree);
                for (_, cache) in &pins {
                    prop_assert_eq!(len(&tree, cache), cache.len());
                }
            }
        }
    }
}
