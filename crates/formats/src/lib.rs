//! Files from outside: GGUF, safetensors, Hugging Face folders, JSONL.
//!
//! Every input byte is hostile here. Nothing panics on a bad file, every length that a file states is capped
//! ([`limits`] gives each cap and its source) and checked against the bytes that are there before memory is taken for
//! it, and an error names the file and the place. Writers are atomic: a file is either whole and new, or as it was.
//!
//! ```no_run
//! # fn main() -> Result<(), bantam_formats::FormatError> {
//! let model = bantam_formats::open_model("SmolLM2-135M-Instruct.Q4_1.gguf".as_ref())?;
//! for tensor in model.tensors() {
//!     println!("{} {} {:?}", tensor.name, tensor.dtype, tensor.shape);
//! }
//! # Ok(())
//! # }
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod atomic;
mod bytes;
mod error;
pub mod gguf;
pub mod hf;
pub mod jsonl;
pub mod limits;
mod open;
pub mod safetensors;
mod tensor;

pub use error::{FormatError, Problem};
pub use gguf::{Array, Gguf, GgufWriter, Metadata, Value};
pub use hf::{HfConfig, HfFolder};
pub use jsonl::JsonlReader;
pub use open::{ModelFiles, open_model};
pub use safetensors::{SafetensorsFile, SafetensorsWriter, write_safetensors};
pub use tensor::{DType, TensorInfo, TensorRef, TensorSpec};
