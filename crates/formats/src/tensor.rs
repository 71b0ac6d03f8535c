//! Tensors as files describe them: a name, a type, a shape, bytes.

use crate::{Problem, limits};
use std::fmt;

/// The type of a tensor's weights: plain floats, or ggml's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, reason = "the names are ggml's")]
#[allow(
    missing_docs,
    reason = "the name is all this crate knows; `kernels::quant` knows the layouts"
)]
pub enum DType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// One row a type: itself, its name, its GGUF code, weights in a block, bytes in a block.
const TABLE: [(DType, &str, u32, usize, usize); 13] = [
    (DType::F32, "F32", 0, 1, 4),
    (DType::F16, "F16", 1, 1, 2),
    (DType::BF16, "BF16", 30, 1, 2),
    (DType::Q4_0, "Q4_0", 2, 32, 18),
    (DType::Q4_1, "Q4_1", 3, 32, 20),
    (DType::Q5_0, "Q5_0", 6, 32, 22),
    (DType::Q5_1, "Q5_1", 7, 32, 24),
    (DType::Q8_0, "Q8_0", 8, 32, 34),
    (DType::Q2_K, "Q2_K", 10, 256, 84),
    (DType::Q3_K, "Q3_K", 11, 256, 110),
    (DType::Q4_K, "Q4_K", 12, 256, 144),
    (DType::Q5_K, "Q5_K", 13, 256, 176),
    (DType::Q6_K, "Q6_K", 14, 256, 210),
];

// The table is indexed by discriminant: its rows stand in the order of the enum.
const _: () = {
    let mut i = 0;
    while i < TABLE.len() {
        assert!(TABLE[i].0 as usize == i);
        i += 1;
    }
};

impl DType {
    /// Every type, plain ones first.
    pub fn all() -> impl Iterator<Item = DType> {
        TABLE.iter().map(|row| row.0)
    }

    /// The name as ggml and GGUF tools print it.
    pub const fn name(self) -> &'static str {
        TABLE[self as usize].1
    }

    /// Weights in one block; 1 for plain floats.
    pub const fn block_len(self) -> usize {
        TABLE[self as usize].3
    }

    /// Bytes in one block.
    pub const fn block_bytes(self) -> usize {
        TABLE[self as usize].4
    }

    /// Whether each weight stands alone.
    pub const fn is_plain(self) -> bool {
        self.block_len() == 1
    }

    /// The type's code in GGUF.
    pub const fn gguf_code(self) -> u32 {
        TABLE[self as usize].2
    }

    /// The type with this code in GGUF.
    pub fn from_gguf_code(code: u32) -> Option<DType> {
        TABLE.iter().find(|row| row.2 == code).map(|row| row.0)
    }

    /// The type with this name.
    pub fn from_name(name: &str) -> Option<DType> {
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// Bytes of a tensor of this type and row-major shape, or `None` if its rows are not whole blocks or the product
    /// overflows.
    pub fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        let row = shape.last().copied().unwrap_or(1);
        if row % self.block_len() != 0 {
            return None;
        }
        shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))?
            .checked_div(self.block_len())?
            .checked_mul(self.block_bytes())
    }

    pub(crate) fn names() -> String {
        TABLE.map(|row| row.1).join(", ")
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What a file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, as the file has it.
    pub name: String,
    /// Its type.
    pub dtype: DType,
    /// Row-major: `[out, in]` for a linear layer. (GGUF stores dimensions the other way round.)
    pub shape: Vec<usize>,
    /// Bytes of data.
    pub n_bytes: usize,
}

impl TensorInfo {
    /// Weights in the tensor.
    pub fn n_weights(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A tensor with its bytes, which lie in the mapped file.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorRef<'a> {
    /// Its name, as the file has it.
    pub name: &'a str,
    /// Its type.
    pub dtype: DType,
    /// Row-major: `[out, in]` for a linear layer.
    pub shape: Vec<usize>,
    /// Its data; the length agrees with type and shape. Aligned to nothing.
    pub bytes: &'a [u8],
}

/// A tensor about to be written: a writer needs all of these before the first byte of data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// Its type.
    pub dtype: DType,
    /// Row-major: `[out, in]` for a linear layer.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A spec from its parts.
    pub fn new(name: impl Into<String>, dtype: DType, shape: impl Into<Vec<usize>>) -> TensorSpec {
        TensorSpec {
            name: name.into(),
            dtype,
            shape: shape.into(),
        }
    }

    /// Bytes of data, or the reason why no file can have this tensor.
    pub(crate) fn n_bytes(&self) -> Result<usize, Problem> {
        Problem::capped(
            "a tensor name's length",
            self.name.len() as u64,
            limits::TENSOR_NAME_BYTES,
        )?;
        Problem::capped(
            "the number of dimensions",
            self.shape.len() as u64,
            limits::TENSOR_DIMS,
        )?;
        self.dtype
            .bytes_of(&self.shape)
            .ok_or_else(|| Problem::Shape {
                tensor: self.name.clone(),
                shape: self.shape.iter().map(|&d| d as u64).collect(),
                dtype: self.dtype.name(),
            })
    }
}

impl From<&TensorRef<'_>> for TensorSpec {
    fn from(tensor: &TensorRef<'_>) -> TensorSpec {
        TensorSpec::new(tensor.name, tensor.dtype, tensor.shape.clone())
    }
}

/// Names and lengths of the tensors that a writer still expects, the next one last.
pub(crate) type Pending = Vec<(String, usize)>;
