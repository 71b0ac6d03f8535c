//! The Llama family: configuration, weights, forward and hand-derived backward, LoRA and the
//! key-value cache; and [`encoder`], sentence encoders of the BERT family.
//!
//! Pure: no clock, no files but the ones handed in, no threads of its own, no randomness.
//!
//! Letters in shapes: `T` tokens, `D` width, `F` ffn width, `H` query heads, `K` key-value
//! heads, `Dh` head width, `V` vocabulary, `L` layers, `R` LoRA rank.
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod block;
mod cache;
mod config;
pub mod encoder;
mod infer;
mod linear;
mod load;
mod lora;
mod pool;
mod rope;
mod train;
mod weights;

pub use cache::KvCache;
pub use config::{ConfigError, ModelConfig, RopeScaling};
pub use infer::{InferWorkspace, Span, Wants};
pub use linear::Weights;
pub use load::{FileSource, LoadError, block_format, read as read_tensor};
pub use lora::{Lora, LoraConfig, LoraLayout, LoraPart, LoraTensor, Proj};
pub use train::{
    FullLayout, FullTensor, LossReport, PackedBatch, Recompute, Segment, Target, TrainBytes,
    TrainWorkspace, Weigh, train_bytes,
};
pub use weights::{Blocks, Layer, Model, TensorSource};
