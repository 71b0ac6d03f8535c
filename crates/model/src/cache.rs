//! Keys and values of one sequence, in blocks of 32 positions.
//!
//! Blocks are shared between sequences with a common prefix and copied when one of them
//! writes; a full block is never written again, so a fork costs at most one copy.

use crate::ModelConfig;
use bantam_kernels::Compute;
use bantam_kernels::attention::{self, BLOCK, CachedSpan, HeadDims, store_in_block};
use bantam_kernels::kv::{self, KvBlock, KvSpan};
use std::ops::Range;
use std::sync::Arc;

/// The key-value cache of one sequence.
#[derive(Clone, Debug)]
pub struct KvCache {
    len: usize,
    heads: HeadDims,
    n_layers: usize,
    blocks: Blocks,
}

/// [`BLOCK`] positions of all layers each, in the precision that goes with the weights.
#[derive(Clone, Debug)]
enum Blocks {
    /// In bf16: half the memory, and what a fast dot product reads.
    Rounded(Vec<Arc<KvBlock>>),
    /// In f32, for weights in full precision.
    Full(Vec<Arc<Vec<f32>>>),
}

impl KvCache {
    /// An empty cache for a model of this configuration.
    pub fn new(config: &ModelConfig) -> Self {
        Self {
            len: 0,
            heads: config.heads(),
            n_layers: config.n_layers,
            blocks: Blocks::Rounded(Vec::new()),
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
        let n_blocks = match &self.blocks {
            Blocks::Rounded(blocks) => blocks.len(),
            Blocks::Full(blocks) => blocks.len(),
        };
        n_blocks * self.block_bytes()
    }

    /// Bytes of one block of positions; of an empty cache, in bf16.
    pub fn block_bytes(&self) -> usize {
        match &self.blocks {
            Blocks::Rounded(_) => KvBlock::bytes(self.heads, self.n_layers),
            Blocks::Full(_) => self.heads.block_len() * self.n_layers * size_of::<f32>(),
        }
    }

    /// Forgets the positions from `len` on. Does nothing if there are fewer.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        let n_blocks = self.len.div_ceil(BLOCK);
        match &mut self.blocks {
            Blocks::Rounded(blocks) => blocks.truncate(n_blocks),
            Blocks::Full(blocks) => blocks.truncate(n_blocks),
        }
    }

    /// A cache of the first `len` positions (or all, if there are fewer) that shares them.
    pub fn fork(&self, len: usize) -> Self {
        let mut fork = self.clone();
        fork.truncate(len);
        fork
    }

    /// Makes room for `n` more positions and makes the blocks they touch this cache's own.
    /// An empty cache takes on the precision asked for.
    ///
    /// Panics if the cache holds positions in another precision.
    pub(crate) fn reserve(&mut self, n: usize, full: bool) {
        if full != matches!(self.blocks, Blocks::Full(_)) {
            assert!(self.is_empty(), "a cache serves models of one precision");
            self.blocks = if full {
                Blocks::Full(Vec::new())
            } else {
                Blocks::Rounded(Vec::new())
            };
        }
        let n_blocks = (self.len + n).div_ceil(BLOCK);
        let (heads, n_layers) = (self.heads, self.n_layers);
        let len = heads.block_len() * n_layers;
        match &mut self.blocks {
            Blocks::Rounded(blocks) => {
                own(blocks, self.len, n_blocks, || KvBlock::new(heads, n_layers))
            }
            Blocks::Full(blocks) => own(blocks, self.len, n_blocks, || vec![0.0; len]),
        }
    }

    pub(crate) fn advance(&mut self, n: usize) {
        self.len += n;
    }

    /// Splits the rows `[n, W]` behind the held positions by the block that they go to.
    fn writes<'a>(&'a mut self, qkv: &'a [f32], out: &mut Vec<Write<'a>>) {
        let (w, len) = (self.heads.qkv_width(), self.len);
        let mut left = qkv;
        let mut take = |block_idx: usize| {
            let pos = len.max(block_idx * BLOCK);
            let n = (BLOCK - pos % BLOCK).min(left.len() / w);
            let (rows, rest) = left.split_at(n * w);
            left = rest;
            (pos, rows)
        };
        let first = len / BLOCK;
        match &mut self.blocks {
            Blocks::Rounded(blocks) => {
                for (i, block) in blocks.iter_mut().enumerate().skip(first) {
                    let (pos, rows) = take(i);
                    let block = BlockMut::Rounded(Arc::get_mut(block).expect(OWN));
                    out.push(Write { block, pos, rows });
                }
            }
            Blocks::Full(blocks) => {
                for (i, block) in blocks.iter_mut().enumerate().skip(first) {
                    let (pos, rows) = take(i);
                    let block = BlockMut::Full(Arc::get_mut(block).expect(OWN));
                    out.push(Write { block, pos, rows });
                }
            }
        }
    }
}

const OWN: &str = "`reserve` made the block this cache's own";

fn own<T: Clone>(
    blocks: &mut Vec<Arc<T>>,
    len: usize,
    n_blocks: usize,
    mut new: impl FnMut() -> T,
) {
    if let Some(block) = blocks.get_mut(len / BLOCK) {
        Arc::make_mut(block);
    }
    while blocks.len() < n_blocks {
        blocks.push(Arc::new(new()));
    }
}

/// Some rows that go to one block.
struct Write<'a> {
    block: BlockMut<'a>,
    /// Position of the first row.
    pos: usize,
    rows: &'a [f32],
}

enum BlockMut<'a> {
    Rounded(&'a mut KvBlock),
    Full(&'a mut Vec<f32>),
}

/// Writes the keys and values of one layer behind the positions that each cache holds. They
/// count as held only after [`KvCache::advance`].
///
/// Shapes: qkv [T, W], rotated; `rows` are those of each cache
pub(crate) fn store(
    compute: &Compute,
    caches: &mut [&mut KvCache],
    rows: &[Range<usize>],
    layer: usize,
    qkv: &[f32],
) {
    let Some(heads) = caches.first().map(|cache| cache.heads) else {
        return;
    };
    let (w, layer_len) = (heads.qkv_width(), heads.block_len());
    let mut writes = Vec::with_capacity(caches.len());
    for (cache, rows) in caches.iter_mut().zip(rows) {
        cache.writes(&qkv[rows.start * w..rows.end * w], &mut writes);
    }
    // A single row costs less than waking a thread.
    let chunk = if qkv.len() / w == writes.len() { 4 } else { 1 };
    compute.pool().chunks_mut(&mut writes, chunk, |_, writes| {
        for Write { block, pos, rows } in writes {
            match block {
                BlockMut::Rounded(block) => block.store(compute.isa(), layer, rows, *pos, heads),
                BlockMut::Full(block) => {
                    let block = &mut block[layer * layer_len..][..layer_len];
                    for (i, row) in rows.chunks_exact(w).enumerate() {
                        store_in_block(block, row, *pos + i, heads);
                    }
                }
            }
        }
    });
}

/// New rows of one cache, for [`attend`].
pub(crate) struct Queries<'a> {
    pub(crate) cache: &'a KvCache,
    /// Rows of `qkv` and `out`.
    pub(crate) rows: Range<usize>,
    /// Position of the first.
    pub(crate) first_pos: usize,
}

/// Attention of rows over their caches, which hold them already.
///
/// Shapes: out [T, H Dh]; qkv [T, W], rotated
pub(crate) fn attend(
    compute: &Compute,
    out: &mut [f32],
    qkv: &[f32],
    layer: usize,
    queries: &[Queries<'_>],
) {
    let Some(first) = queries.first() else {
        return;
    };
    let heads = first.cache.heads;
    let layer_len = heads.block_len();
    let (mut rounded, mut full) = (Vec::new(), Vec::new());
    for query in queries {
        let (rows, first_pos) = (query.rows.clone(), query.first_pos);
        match &query.cache.blocks {
            Blocks::Rounded(blocks) => rounded.push(KvSpan {
                rows,
                first_pos,
                blocks,
            }),
            Blocks::Full(blocks) => full.push(CachedSpan {
                rows,
                first_pos,
                blocks: blocks
                    .iter()
                    .map(|block| &block[layer * layer_len..][..layer_len])
                    .collect(),
            }),
        }
    }
    // The model that called fills all caches in its own precision.
    if full.is_empty() {
        kv::attend(compute, out, qkv, layer, &rounded, heads);
    } else {
        attention::cached(compute, out, qkv, &full, heads);
    }
}
