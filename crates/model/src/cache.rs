//! Keys and values of one sequence, in blocks of 32 positions.
//!
//! Blocks are shared between sequences with a common prefix and copied when one of them
//! writes; a full block is never written again, so a fork costs at most one copy.

use crate::ModelConfig;
use bantam_kernels::attention::{BLOCK, HeadDims, store_in_block};
use std::sync::Arc;

/// The key-value cache of one sequence.
#[derive(Clone, Debug)]
pub struct KvCache {
    len: usize,
    heads: HeadDims,
    n_layers: usize,
    /// Each holds [`BLOCK`] positions of all layers.
    blocks: Vec<Arc<Vec<f32>>>,
}

impl KvCache {
    /// An empty cache for a model of this configuration.
    pub fn new(config: &ModelConfig) -> Self {
        Self {
            len: 0,
            heads: config.heads(),
            n_layers: config.n_layers,
            blocks: Vec::new(),
        }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// No positions held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes held, shared blocks counted in full.
    pub fn bytes(&self) -> usize {
        self.blocks.len() * self.block_bytes()
    }

    /// Bytes of one block of positions.
    pub fn block_bytes(&self) -> usize {
        self.heads.block_len() * self.n_layers * size_of::<f32>()
    }

    /// Forgets the positions from `len` on. Does nothing if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.blocks.truncate(self.len.div_ceil(BLOCK));
    }

    /// A cache of the first `len` positions (or all, if there are fewer) that shares them.
    pub fn fork(&self, len: usize) -> Self {
        let mut fork = self.clone();
        fork.truncate(len);
        fork
    }

    /// Makes room for `n` more positions and makes the blocks they touch this cache's own.
    pub(crate) fn reserve(&mut self, n: usize) {
        let block_len = self.heads.block_len() * self.n_layers;
        if let Some(block) = self.blocks.get_mut(self.len / BLOCK) {
            Arc::make_mut(block);
        }
        while self.blocks.len() * BLOCK < self.len + n {
            self.blocks.push(Arc::new(vec![0.0; block_len]));
        }
    }

    /// Writes the keys and values of rows `[n, W]` of one layer behind the held positions.
    ///
    /// The positions count as held only after [`KvCache::advance`].
    pub(crate) fn store(&mut self, layer: usize, qkv: &[f32]) {
        let layer_len = self.heads.block_len();
        for (i, row) in qkv.chunks_exact(self.heads.qkv_width()).enumerate() {
            let pos = self.len + i;
            let block = Arc::get_mut(&mut self.blocks[pos / BLOCK])
                .expect("`reserve` made the block this cache's own");
            store_in_block(
                &mut block[layer * layer_len..][..layer_len],
                row,
                pos,
                self.heads,
            );
        }
    }

    pub(crate) fn advance(&mut self, n: usize) {
        self.len += n;
    }

    /// The blocks of one layer.
    pub(crate) fn layer(&self, layer: usize) -> Vec<&[f32]> {
        let layer_len = self.heads.block_len();
        self.blocks
            .iter()
            .map(|block| &block[layer * layer_len..][..layer_len])
            .collect()
    }
}
