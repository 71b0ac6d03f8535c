//! GGUF, ggml's file of metadata and tensors: versions 2 and 3, little-endian.
//!
//! Layout: magic, version, counts; metadata pairs; tensor descriptions; padding; tensor data, each tensor at a
//! multiple of `general.alignment` from the start of the data.

mod metadata;
mod read;
mod write;

pub use metadata::{Array, Metadata, Value};
pub use write::GgufWriter;

use crate::bytes::FileBytes;
use crate::{FormatError, Problem, TensorInfo, TensorRef};
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The first four bytes.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
/// The metadata key that sets the alignment of tensor data.
const ALIGNMENT_KEY: &str = "general.alignment";
/// The alignment if that key is absent.
const DEFAULT_ALIGNMENT: u64 = 32;

/// An open GGUF file, checked: every tensor lies inside it, aligned, apart from the others.
pub struct Gguf {
    bytes: FileBytes,
    path: PathBuf,
    header: read::Header,
    by_name: HashMap<String, usize>,
}

impl Gguf {
    /// Maps and checks a file.
    pub fn open(path: &Path) -> Result<Gguf, FormatError> {
        Gguf::check(FileBytes::open(path)?, path).map_err(|problem| problem.at(path))
    }

    /// Checks a file that is in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Gguf, FormatError> {
        let path = Path::new("(memory)");
        Gguf::check(FileBytes::Owned(bytes), path).map_err(|problem| problem.at(path))
    }

    fn check(bytes: FileBytes, path: &Path) -> Result<Gguf, Problem> {
        let header = read::Header::parse(&bytes)?;
        let mut by_name = HashMap::with_capacity(header.tensors.len());
        for (i, tensor) in header.tensors.iter().enumerate() {
            if by_name.insert(tensor.name.clone(), i).is_some() {
                return Err(Problem::Duplicate {
                    what: "tensor",
                    name: tensor.name.clone(),
                });
            }
        }
        Ok(Gguf {
            bytes,
            path: path.to_owned(),
            header,
            by_name,
        })
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The GGUF version, 2 or 3.
    pub fn version(&self) -> u32 {
        self.header.version
    }

    /// The metadata pairs.
    pub fn metadata(&self) -> &Metadata {
        &self.header.metadata
    }

    /// What the file says of each tensor, in its order.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.header.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        let i = *self.by_name.get(name)?;
        let info = &self.header.tensors[i];
        Some(TensorRef {
            name: &info.name,
            dtype: info.dtype,
            shape: info.shape.clone(),
            bytes: &self.bytes[self.range(i)],
        })
    }

    /// Lets go of the memory that reading a tensor took; it can still be read.
    pub fn forget(&self, name: &str) {
        if let Some(&i) = self.by_name.get(name) {
            self.bytes.forget(self.range(i));
        }
    }

    /// Bytes of the whole file.
    pub fn n_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Where in the file the data of tensor `i` lie; in bounds since `Header::parse`.
    fn range(&self, i: usize) -> Range<usize> {
        let start = self.header.data_start + self.header.offsets[i];
        start..start + self.header.tensors[i].n_bytes
    }
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gguf")
            .field("path", &self.path)
            .field("pairs", &self.header.metadata.len())
            .field("tensors", &self.header.tensors.len())
            .finish_non_exhaustive()
    }
}

/// The alignment of tensor data that the metadata ask for.
fn alignment(metadata: &Metadata) -> Result<u64, Problem> {
    let Some(value) = metadata.get(ALIGNMENT_KEY) else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match value.to_u64() {
        Some(n) if n >= 8 && n.is_power_of_two() && n <= crate::limits::GGUF_ALIGNMENT => Ok(n),
        _ => Err(Problem::Field {
            field: ALIGNMENT_KEY.into(),
            found: value.brief(),
            expected: format!(
                "it has to be a power of two from 8 to {}",
                crate::limits::GGUF_ALIGNMENT
            ),
        }),
    }
}
