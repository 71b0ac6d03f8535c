//! safetensors: a JSON header that names each tensor's type, shape and bytes, then the bytes.

mod read;
mod write;

pub use read::SafetensorsFile;
pub use write::{SafetensorsWriter, write_safetensors};

/// The header's entry that is not a tensor.
const METADATA_KEY: &str = "__metadata__";
