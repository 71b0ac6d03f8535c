//! The caps on what a file may claim, each with its source.
//!
//! A cap is a second fence: the first is that a length must fit the bytes that are really there. It bounds memory and
//! time for files that are large and hostile at once.

/// Bytes of a GGUF file before its tensor data. Large vocabularies (262,144 tokens with merges) take about 10 MB.
pub const GGUF_HEADER_BYTES: usize = 256 << 20;

/// Bytes in a metadata key: the GGUF specification says at most 2^16 - 1.
pub const GGUF_KEY_BYTES: usize = (1 << 16) - 1;

/// Bytes in a metadata string. Templates take about 20 kB; a whole embedded `tokenizer.json` about 30 MB.
pub const GGUF_STRING_BYTES: usize = 64 << 20;

/// Metadata pairs: files in the wild have about 50.
pub const GGUF_PAIRS: usize = 1 << 16;

/// Elements of one metadata array: the largest, BPE merges, have about 500,000.
pub const GGUF_ARRAY_LEN: usize = 1 << 23;

/// How deep metadata arrays nest: the specification allows it, nobody does it.
pub const GGUF_ARRAY_DEPTH: usize = 4;

/// Tensor data alignment: the specification says a multiple of 8 and defaults to 32; more than a page has no use.
pub const GGUF_ALIGNMENT: u64 = 1 << 16;

/// Tensors in one model: 61-layer models with 384 experts, stored singly, have about 70,000.
pub const TENSORS: usize = 1 << 18;

/// Bytes in a tensor's name: GGUF says 64, safetensors nothing; the longest seen on the hub are about 120.
pub const TENSOR_NAME_BYTES: usize = 512;

/// Dimensions of a tensor: ggml has 4, video models in safetensors 5.
pub const TENSOR_DIMS: usize = 8;

/// Bytes of a safetensors header: the reference implementation stops at 100 MB; real ones stay under 10 MB.
pub const SAFETENSORS_HEADER_BYTES: usize = 25 << 20;

/// Files that a sharded model may have: the largest on the hub have about 200.
pub const SHARDS: usize = 1 << 12;

/// Bytes of the shard index: about 100 bytes a tensor.
pub const INDEX_BYTES: u64 = 32 << 20;

/// Bytes of `config.json` and `generation_config.json`: real ones have a few kB.
pub const CONFIG_BYTES: u64 = 4 << 20;

/// Bytes of `tokenizer_config.json` (Llama 3's, with 256 added tokens, has 50 kB) and of a chat template.
pub const TOKENIZER_CONFIG_BYTES: u64 = 16 << 20;

/// Bytes of `tokenizer.json`: Gemma's has 33 MB.
pub const TOKENIZER_BYTES: u64 = 128 << 20;

/// Bytes of one JSONL line, unless the caller says otherwise.
pub const JSONL_LINE_BYTES: usize = 16 << 20;

/// Bytes of one JSONL file, unless the caller says otherwise: rows are held in memory.
pub const JSONL_FILE_BYTES: u64 = 8 << 30;

/// Vocabulary: the largest in use has 262,208 tokens.
pub const VOCAB: usize = 1 << 22;

/// Model width: the largest in use has 18,432.
pub const WIDTH: usize = 1 << 16;

/// Feed-forward width: the largest in use has 73,728.
pub const FFN_WIDTH: usize = 1 << 20;

/// Layers: the largest in use has 126.
pub const LAYERS: usize = 1 << 10;

/// Attention heads: the largest in use has 128.
pub const HEADS: usize = 1 << 10;

/// Width of an attention head: the largest in use has 512.
pub const HEAD_WIDTH: usize = 1 << 12;

/// Context: the longest claimed is 10,485,760 tokens.
pub const CONTEXT: usize = 1 << 27;
