//! A model, whatever holds it.

use crate::{FormatError, Gguf, HfFolder, TensorInfo, TensorRef};
use std::path::Path;

/// The files of a model.
#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "there are one or two of these in a process"
)]
pub enum ModelFiles {
    /// One GGUF file.
    Gguf(Gguf),
    /// A folder as Hugging Face lays it out.
    Hf(HfFolder),
}

/// Opens a `.gguf` file or a Hugging Face folder; which one it is, is read from the file system and not the name.
pub fn open_model(path: &Path) -> Result<ModelFiles, FormatError> {
    let meta = std::fs::metadata(path).map_err(|e| FormatError::io("open", path, e))?;
    if meta.is_dir() {
        return HfFolder::open(path).map(ModelFiles::Hf);
    }
    if path.extension().is_some_and(|e| e == "safetensors") {
        return Err(FormatError::NotAModel {
            path: path.to_owned(),
            reason: "safetensors hold weights alone; name the folder that also has `config.json`",
        });
    }
    Gguf::open(path).map(ModelFiles::Gguf)
}

impl ModelFiles {
    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        match self {
            ModelFiles::Gguf(gguf) => gguf.tensor(name),
            ModelFiles::Hf(folder) => folder.tensor(name),
        }
    }

    /// Lets go of the memory that reading a tensor took (its mapped pages); it can still be read.
    pub fn forget(&self, name: &str) {
        match self {
            ModelFiles::Gguf(gguf) => gguf.forget(name),
            ModelFiles::Hf(folder) => folder.forget(name),
        }
    }

    /// What the files say of each tensor.
    pub fn tensors(&self) -> &[TensorInfo] {
        match self {
            ModelFiles::Gguf(gguf) => gguf.tensors(),
            ModelFiles::Hf(folder) => folder.tensors(),
        }
    }

    /// Where the model is.
    pub fn path(&self) -> &Path {
        match self {
            ModelFiles::Gguf(gguf) => gguf.path(),
            ModelFiles::Hf(folder) => folder.path(),
        }
    }
}
