//! Writing a safetensors file.

use super::METADATA_KEY;
use crate::atomic::AtomicFile;
use crate::tensor::Pending;
use crate::{FormatError, Problem, TensorRef, TensorSpec};
use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

/// Writes a safetensors file, one tensor at a time; the file appears under its name when
/// [`SafetensorsWriter::finish`] succeeds. The same tensors and metadata give the same bytes.
#[derive(Debug)]
pub struct SafetensorsWriter {
    file: AtomicFile,
    path: PathBuf,
    expected: Pending,
}

impl SafetensorsWriter {
    /// Begins a file: the description of every tensor, in the order in which they will come, and free-form metadata.
    ///
    /// Readers like wide types first, so that all data are aligned; [`write_safetensors`] sees to that.
    pub fn create(
        path: &Path,
        specs: &[TensorSpec],
        metadata: &BTreeMap<String, String>,
    ) -> Result<SafetensorsWriter, FormatError> {
        let (header, expected) = header(specs, metadata).map_err(|problem| problem.at(path))?;
        let mut file = AtomicFile::create(path)?;
        file.write_bytes(&(header.len() as u64).to_le_bytes())?;
        file.write_bytes(&header)?;
        Ok(SafetensorsWriter {
            file,
            path: path.to_owned(),
            expected,
        })
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
        self.file.write_bytes(bytes)
    }

    /// Puts the file in its place. Every tensor has to have come.
    pub fn finish(self) -> Result<(), FormatError> {
        match self.expected.last() {
            Some((name, _)) => Err(Problem::Writer {
                expected: format!("tensor `{name}`"),
                found: "the end".into(),
            }
            .at(&self.path)),
            None => self.file.commit(),
        }
    }
}

/// Writes a whole safetensors file in one step, in the reference implementation's order: wide types first, then by
/// name.
pub fn write_safetensors(
    path: &Path,
    tensors: &[TensorRef<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<(), FormatError> {
    let mut order: Vec<&TensorRef<'_>> = tensors.iter().collect();
    order.sort_by_key(|tensor| (std::cmp::Reverse(tensor.dtype.block_bytes()), tensor.name));
    let specs: Vec<TensorSpec> = order.iter().map(|&tensor| tensor.into()).collect();
    let mut writer = SafetensorsWriter::create(path, &specs, metadata)?;
    for tensor in order {
        writer.tensor(tensor.name, tensor.bytes)?;
    }
    writer.finish()
}

/// The header's JSON, padded to a multiple of 8, and what has to follow it.
fn header(
    specs: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, Pending), Problem> {
    let mut map = serde_json::Map::new();
    if !metadata.is_empty() {
        map.insert(METADATA_KEY.into(), serde_json::json!(metadata));
    }
    let mut names = HashSet::from([METADATA_KEY]);
    let mut expected = Vec::with_capacity(specs.len());
    let mut start = 0usize;
    for spec in specs {
        if !names.insert(&spec.name) {
            return Err(Problem::Duplicate {
                what: "tensor",
                name: spec.name.clone(),
            });
        }
        if !spec.dtype.is_plain() {
            return Err(Problem::Writer {
                expected: "plain floats (safetensors has no quantised types)".into(),
                found: format!("tensor `{}` of type {}", spec.name, spec.dtype),
            });
        }
        let n_bytes = spec.n_bytes()?;
        let end = start.saturating_add(n_bytes);
        let entry = serde_json::json!({
            "dtype": spec.dtype.name(),
            "shape": spec.shape,
            "data_offsets": [start, end],
        });
        map.insert(spec.name.clone(), entry);
        expected.push((spec.name.clone(), n_bytes));
        start = end;
    }
    expected.reverse();
    let mut json = serde_json::Value::Object(map).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok((json, expected))
}
