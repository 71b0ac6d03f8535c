//! Writing GGUF version 3.

use super::{Array, MAGIC, Metadata, Value, alignment};
use crate::atomic::AtomicFile;
use crate::tensor::Pending;
use crate::{FormatError, Problem, TensorSpec, limits};
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// Writes a GGUF file, one tensor at a time; the file appears under its name when [`GgufWriter::finish`] succeeds.
///
/// ```no_run
/// # use bantam_formats::{DType, GgufWriter, Metadata, TensorSpec};
/// # fn main() -> Result<(), bantam_formats::FormatError> {
/// let mut metadata = Metadata::new();
/// metadata.insert("general.architecture", "llama");
/// let specs = [TensorSpec::new("output_norm.weight", DType::F32, [2])];
/// let mut writer = GgufWriter::create("out.gguf".as_ref(), &metadata, &specs)?;
/// writer.tensor("output_norm.weight", &[0; 8])?;
/// writer.finish()?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct GgufWriter {
    file: AtomicFile,
    path: PathBuf,
    alignment: u64,
    expected: Pending,
}

impl GgufWriter {
    /// Begins a file: all metadata and the description of every tensor, in the order in which they will come.
    ///
    /// Tensor data are aligned to `general.alignment` if the metadata have it, to 32 bytes if not.
    pub fn create(
        path: &Path,
        metadata: &Metadata,
        specs: &[TensorSpec],
    ) -> Result<GgufWriter, FormatError> {
        let (header, alignment) = header(metadata, specs).map_err(|problem| problem.at(path))?;
        let mut expected = Vec::with_capacity(specs.len());
        for spec in specs.iter().rev() {
            let n_bytes = spec.n_bytes().map_err(|problem| problem.at(path))?;
            expected.push((spec.name.clone(), n_bytes));
        }
        let mut writer = GgufWriter {
            file: AtomicFile::create(path)?,
            path: path.to_owned(),
            alignment,
            expected,
        };
        writer.file.write_bytes(&header)?;
        writer.pad()?;
        Ok(writer)
    }

    /// Writes the next tensor's data.
    pub fn tensor(&mut self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let found = (name, bytes.len());
        match self.expected.pop() {
            Some((name, n_bytes)) if (name.as_str(), n_bytes) == found => {}
            other => {
                return Err(Problem::unexpected(other, name, bytes.len()).at(&self.path));
            }
        }
        self.file.write_bytes(bytes)?;
        self.pad()
    }

    /// Puts the file in its place. Every tensor has to have come.
    pub fn finish(self) -> Result<(), FormatError> {
        if let Some((name, _)) = self.expected.last() {
            return Err(Problem::Writer {
                expected: format!("tensor `{name}`"),
                found: "the end".into(),
            }
            .at(&self.path));
        }
        self.file.commit()
    }

    fn pad(&mut self) -> Result<(), FormatError> {
        let at = self.file.written();
        let n = (at.next_multiple_of(self.alignment) - at) as usize;
        self.file.write_bytes(&vec![0; n])
    }
}

/// What ggml can read: its names have room for 64 bytes with the final zero, its tensors have four dimensions.
const NAME_BYTES: usize = 63;
const DIMS: usize = 4;

/// Everything before the padding before the data, and the alignment.
fn header(metadata: &Metadata, specs: &[TensorSpec]) -> Result<(Vec<u8>, u64), Problem> {
    let alignment = alignment(metadata)?;
    let mut out = Vec::new();
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&3u32.to_le_bytes());
    out.extend_from_slice(&(specs.len() as u64).to_le_bytes());
    out.extend_from_slice(&(metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata.iter() {
        Problem::capped("a metadata key", key.len() as u64, limits::GGUF_KEY_BYTES)?;
        string(&mut out, key);
        pair_value(&mut out, value);
    }
    let mut offset = 0u64;
    let mut names = HashSet::new();
    for spec in specs {
        if !names.insert(&spec.name) {
            return Err(Problem::Duplicate {
                what: "tensor",
                name: spec.name.clone(),
            });
        }
        let n_bytes = spec.n_bytes()?;
        Problem::capped(
            "a GGUF tensor name's length",
            spec.name.len() as u64,
            NAME_BYTES,
        )?;
        Problem::capped(
            "a GGUF tensor's number of dimensions",
            spec.shape.len() as u64,
            DIMS,
        )?;
        if n_bytes == 0 {
            return Err(Problem::Shape {
                tensor: spec.name.clone(),
                shape: spec.shape.iter().map(|&d| d as u64).collect(),
                dtype: spec.dtype.name(),
            });
        }
        string(&mut out, &spec.name);
        out.extend_from_slice(&(spec.shape.len() as u32).to_le_bytes());
        for &dim in spec.shape.iter().rev() {
            out.extend_from_slice(&(dim as u64).to_le_bytes());
        }
        out.extend_from_slice(&spec.dtype.gguf_code().to_le_bytes());
        out.extend_from_slice(&offset.to_le_bytes());
        offset = (offset + n_bytes as u64).next_multiple_of(alignment);
    }
    Ok((out, alignment))
}

fn string(out: &mut Vec<u8>, s: &str) {
    out.extend_from_slice(&(s.len() as u64).to_le_bytes());
    out.extend_from_slice(s.as_bytes());
}

fn pair_value(out: &mut Vec<u8>, value: &Value) {
    /// A type code, then the number.
    fn put<const N: usize>(out: &mut Vec<u8>, code: u32, bytes: [u8; N]) {
        out.extend_from_slice(&code.to_le_bytes());
        out.extend_from_slice(&bytes);
    }
    match value {
        Value::U8(n) => put(out, 0, n.to_le_bytes()),
        Value::I8(n) => put(out, 1, n.to_le_bytes()),
        Value::U16(n) => put(out, 2, n.to_le_bytes()),
        Value::I16(n) => put(out, 3, n.to_le_bytes()),
        Value::U32(n) => put(out, 4, n.to_le_bytes()),
        Value::I32(n) => put(out, 5, n.to_le_bytes()),
        Value::F32(x) => put(out, 6, x.to_le_bytes()),
        Value::Bool(b) => put(out, 7, [u8::from(*b)]),
        Value::Str(s) => {
            out.extend_from_slice(&8u32.to_le_bytes());
            string(out, s);
        }
        Value::Array(array) => {
            out.extend_from_slice(&9u32.to_le_bytes());
            elements(out, array);
        }
        Value::U64(n) => put(out, 10, n.to_le_bytes()),
        Value::I64(n) => put(out, 11, n.to_le_bytes()),
        Value::F64(x) => put(out, 12, x.to_le_bytes()),
    }
}

fn elements(out: &mut Vec<u8>, array: &Array) {
    fn begin(out: &mut Vec<u8>, code: u32, n: usize) {
        out.extend_from_slice(&code.to_le_bytes());
        out.extend_from_slice(&(n as u64).to_le_bytes());
    }
    fn put<T: Copy, const N: usize>(out: &mut Vec<u8>, code: u32, v: &[T], to: fn(T) -> [u8; N]) {
        begin(out, code, v.len());
        out.extend(v.iter().flat_map(|&x| to(x)));
    }
    match array {
        Array::U8(v) => put(out, 0, v, u8::to_le_bytes),
        Array::I8(v) => put(out, 1, v, i8::to_le_bytes),
        Array::U16(v) => put(out, 2, v, u16::to_le_bytes),
        Array::I16(v) => put(out, 3, v, i16::to_le_bytes),
        Array::U32(v) => put(out, 4, v, u32::to_le_bytes),
        Array::I32(v) => put(out, 5, v, i32::to_le_bytes),
        Array::F32(v) => put(out, 6, v, f32::to_le_bytes),
        Array::Bool(v) => put(out, 7, v, |b| [u8::from(b)]),
        Array::Str(v) => {
            begin(out, 8, v.len());
            v.iter().for_each(|s| string(out, s));
        }
        Array::Array(v) => {
            begin(out, 9, v.len());
            v.iter().for_each(|inner| elements(out, inner));
        }
        Array::U64(v) => put(out, 10, v, u64::to_le_bytes),
        Array::I64(v) => put(out, 11, v, i64::to_le_bytes),
        Array::F64(v) => put(out, 12, v, f64::to_le_bytes),
    }
}
