//! What leaves the lab: an adapter in PEFT's format, or base and adapter merged into one model.
//!
//! - [`adapter_files`] / [`read_adapter`]: `adapter_config.json` and `adapter_model.safetensors`, which PEFT loads;
//!   beside them `bantam.json` says which base they belong to and the chat template they were trained with.
//! - [`merge`]: `W + (alpha / r) B A`, as a Hugging Face folder or a GGUF file; without an adapter, `W` as it is.
//! - [`write_model`]: weights all of which were trained, as a Hugging Face folder.

mod folder_to_gguf;
mod merge;
mod peft;
#[cfg(test)]
mod tests;
mod tokenizer;

pub use merge::{MergeFormat, merge, write_model};
pub use peft::{Adapter, AdapterIdentity, adapter_files, peft_name, read_adapter, read_identity};
