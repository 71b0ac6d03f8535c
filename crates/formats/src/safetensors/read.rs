//! Reading a safetensors file.

use super::METADATA_KEY;
use crate::bytes::FileBytes;
use crate::{DType, FormatError, Problem, TensorInfo, TensorRef, limits};
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};

/// An open safetensors file, checked: the tensors cover the data without gap or overlap.
pub struct SafetensorsFile {
    bytes: FileBytes,
    path: PathBuf,
    metadata: BTreeMap<String, String>,
    tensors: Vec<TensorInfo>,
    /// Where each tensor begins in the file.
    starts: Vec<usize>,
    unsupported: Vec<(String, String)>,
    by_name: HashMap<String, usize>,
}

impl SafetensorsFile {
    /// Maps and checks a file.
    pub fn open(path: &Path) -> Result<SafetensorsFile, FormatError> {
        SafetensorsFile::check(FileBytes::open(path)?, path).map_err(|problem| problem.at(path))
    }

    /// Checks a file that is in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<SafetensorsFile, FormatError> {
        let path = Path::new("(memory)");
        SafetensorsFile::check(FileBytes::Owned(bytes), path).map_err(|problem| problem.at(path))
    }

    fn check(bytes: FileBytes, path: &Path) -> Result<SafetensorsFile, Problem> {
        const MAGIC: Problem = Problem::Magic {
            format: "safetensors",
        };
        let length = bytes.first_chunk::<8>().ok_or(MAGIC)?;
        let length = u64::from_le_bytes(*length);
        let length = Problem::capped(
            "the header's length",
            length,
            limits::SAFETENSORS_HEADER_BYTES,
        )?;
        let data_start = 8 + length;
        let json = bytes.get(8..data_start).ok_or(Problem::Truncated {
            what: "the header",
            offset: 8,
        })?;
        if json.first() != Some(&b'{') {
            return Err(MAGIC);
        }
        let header: RawHeader = serde_json::from_slice(json).map_err(|e| Problem::json(&e))?;

        let mut order: Vec<(String, RawTensor)> = header.tensors;
        // By the data; tensors without data come before the one that begins where they are.
        order.sort_by_key(|(_, raw)| (raw.start, raw.end));
        let available = bytes.len() - data_start;
        let mut file = SafetensorsFile {
            bytes,
            path: path.to_owned(),
            metadata: header.metadata,
            tensors: Vec::with_capacity(order.len()),
            starts: Vec::with_capacity(order.len()),
            unsupported: Vec::new(),
            by_name: HashMap::with_capacity(order.len()),
        };
        let mut previous = (String::from("the header"), 0);
        for (name, raw) in order {
            if raw.start != previous.1 {
                return Err(Problem::NotAdjacent {
                    first: previous.0,
                    second: name,
                });
            }
            if raw.end < raw.start || raw.end > available as u64 {
                return Err(Problem::OutOfBounds {
                    tensor: name,
                    start: raw.start,
                    end: raw.end,
                    available: available as u64,
                });
            }
            previous = (name.clone(), raw.end);
            // Both fit: they lie inside the file.
            let (start, n_bytes) = (
                data_start + raw.start as usize,
                (raw.end - raw.start) as usize,
            );
            let Some(dtype) = DType::from_name(&raw.dtype).filter(|d| d.is_plain()) else {
                file.unsupported.push((name, raw.dtype));
                continue;
            };
            let shape: Option<Vec<usize>> = raw.shape.iter().map(|&d| d.try_into().ok()).collect();
            let shape = shape
                .filter(|shape| dtype.bytes_of(shape) == Some(n_bytes))
                .ok_or_else(|| Problem::Shape {
                    tensor: name.clone(),
                    shape: raw.shape,
                    dtype: dtype.name(),
                })?;
            file.by_name.insert(name.clone(), file.tensors.len());
            file.starts.push(start);
            file.tensors.push(TensorInfo {
                name,
                dtype,
                shape,
                n_bytes,
            });
        }
        if previous.1 != available as u64 {
            return Err(Problem::NotAdjacent {
                first: previous.0,
                second: "the end of the file".into(),
            });
        }
        Ok(file)
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The free-form metadata of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// What the file says of each tensor, in the order of the data.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Names and types of tensors whose type is not read here (integers, 8-bit floats).
    pub fn unsupported(&self) -> &[(String, String)] {
        &self.unsupported
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        let i = *self.by_name.get(name)?;
        let info = &self.tensors[i];
        Some(TensorRef {
            name: &info.name,
            dtype: info.dtype,
            shape: info.shape.clone(),
            bytes: &self.bytes[self.starts[i]..][..info.n_bytes],
        })
    }

    /// Lets go of the memory that reading a tensor took; it can still be read.
    pub fn forget(&self, name: &str) {
        if let Some(&i) = self.by_name.get(name) {
            let start = self.starts[i];
            self.bytes.forget(start..start + self.tensors[i].n_bytes);
        }
    }
}

impl fmt::Debug for SafetensorsFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SafetensorsFile")
            .field("path", &self.path)
            .field("tensors", &self.tensors.len())
            .finish_non_exhaustive()
    }
}

/// The header as it stands, with the caps applied while it is parsed.
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    start: u64,
    end: u64,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawHeader, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a safetensors header")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader {
                    metadata: BTreeMap::new(),
                    tensors: Vec::new(),
                };
                // Kept here and not in a set of the parsed entries: JSON parsers take the last of two equal keys.
                let mut seen = std::collections::HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(A::Error::custom(format_args!(
                            "tensor `{key}` appears twice"
                        )));
                    }
                    if key == METADATA_KEY {
                        header.metadata = map.next_value()?;
                        continue;
                    }
                    if header.tensors.len() == limits::TENSORS
                        || key.len() > limits::TENSOR_NAME_BYTES
                    {
                        return Err(A::Error::custom(
                            "more tensors, or a longer name, than allowed",
                        ));
                    }
                    header.tensors.push((key, map.next_value()?));
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

impl<'de> Deserialize<'de> for RawTensor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<RawTensor, D::Error> {
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            dtype: String,
            shape: Dims,
            data_offsets: [u64; 2],
        }
        let fields = Fields::deserialize(deserializer)?;
        let [start, end] = fields.data_offsets;
        Ok(RawTensor {
            dtype: fields.dtype,
            shape: fields.shape.0,
            start,
            end,
        })
    }
}

/// A shape, refused as soon as it has too many dimensions.
struct Dims(Vec<u64>);

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Dims, D::Error> {
        struct DimsVisitor;
        impl<'de> Visitor<'de> for DimsVisitor {
            type Value = Dims;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {} dimensions", limits::TENSOR_DIMS)
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Dims, A::Error> {
                let mut dims = Vec::new();
                while dims.len() < limits::TENSOR_DIMS {
                    match seq.next_element()? {
                        Some(dim) => dims.push(dim),
                        None => return Ok(Dims(dims)),
                    }
                }
                match seq.next_element::<IgnoredAny>()? {
                    Some(_) => Err(A::Error::invalid_length(dims.len() + 1, &self)),
                    None => Ok(Dims(dims)),
                }
            }
        }
        deserializer.deserialize_seq(DimsVisitor)
    }
}
