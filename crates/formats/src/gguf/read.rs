//! Reading a GGUF header.

use super::{Array, MAGIC, Metadata, Value, alignment};
use crate::{DType, Problem, TensorInfo, limits};

/// Everything before the tensor data, checked against the data's length.
pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
    /// Where each tensor begins, from `data_start`.
    pub(super) offsets: Vec<usize>,
    pub(super) data_start: usize,
}

impl Header {
    pub(super) fn parse(bytes: &[u8]) -> Result<Header, Problem> {
        let mut cursor = Cursor { bytes, at: 0 };
        if bytes.get(..4) != Some(MAGIC) {
            return Err(Problem::Magic { format: "GGUF" });
        }
        cursor.at = 4;
        let version = cursor.u32("the version")?;
        if version != 2 && version != 3 {
            return Err(Problem::Version { found: version });
        }
        let n_tensors = cursor.count("the number of tensors", limits::TENSORS, MIN_TENSOR_BYTES)?;
        let n_pairs = cursor.count(
            "the number of metadata pairs",
            limits::GGUF_PAIRS,
            MIN_PAIR_BYTES,
        )?;

        let mut metadata = Metadata::new();
        for _ in 0..n_pairs {
            let key = cursor.string("a metadata key", limits::GGUF_KEY_BYTES)?;
            let code = cursor.u32("a metadata type")?;
            let value = cursor.value(&key, code)?;
            if metadata.get(&key).is_some() {
                return Err(Problem::Duplicate {
                    what: "metadata key",
                    name: key,
                });
            }
            metadata.insert(key, value);
        }
        let alignment = alignment(&metadata)?;

        let mut tensors = Vec::with_capacity(n_tensors);
        let mut offsets = Vec::with_capacity(n_tensors);
        for _ in 0..n_tensors {
            let (info, offset) = cursor.tensor()?;
            if !offset.is_multiple_of(alignment) {
                return Err(Problem::Unaligned {
                    tensor: info.name,
                    offset,
                    alignment,
                });
            }
            tensors.push(info);
            offsets.push(offset);
        }

        // The padding may be absent when there are no tensors.
        let data_start = (cursor.at as u64).next_multiple_of(alignment) as usize;
        let available = bytes.len().saturating_sub(data_start) as u64;
        let offsets = place(&tensors, &offsets, available)?;
        Ok(Header {
            version,
            metadata,
            tensors,
            offsets,
            data_start,
        })
    }
}

/// Checks that every tensor lies inside the data and that no two share a byte.
fn place(tensors: &[TensorInfo], offsets: &[u64], available: u64) -> Result<Vec<usize>, Problem> {
    for (tensor, &start) in tensors.iter().zip(offsets) {
        let end = start.saturating_add(tensor.n_bytes as u64);
        if end > available {
            return Err(Problem::OutOfBounds {
                tensor: tensor.name.clone(),
                start,
                end,
                available,
            });
        }
    }
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&i| offsets[i]);
    for pair in order.windows(2) {
        let (first, second) = (&tensors[pair[0]], &tensors[pair[1]]);
        if offsets[pair[0]] + first.n_bytes as u64 > offsets[pair[1]] {
            return Err(Problem::NotAdjacent {
                first: first.name.clone(),
                second: second.name.clone(),
            });
        }
    }
    // In bounds of a slice, so they fit `usize`.
    Ok(offsets.iter().map(|&offset| offset as usize).collect())
}

/// Name length, dimension count (of none, for a scalar), type, offset.
const MIN_TENSOR_BYTES: usize = 8 + 4 + 4 + 8;
/// Key length, type, the smallest value.
const MIN_PAIR_BYTES: usize = 8 + 4 + 1;

/// A place in the header.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, what: &'static str, n: usize) -> Result<&'a [u8], Problem> {
        let end = self.at.saturating_add(n);
        Problem::capped("the header's length", end as u64, limits::GGUF_HEADER_BYTES)?;
        let taken = self.bytes.get(self.at..end).ok_or(Problem::Truncated {
            what,
            offset: self.at as u64,
        })?;
        self.at = end;
        Ok(taken)
    }

    fn fixed<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Problem> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(what, N)?);
        Ok(out)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, Problem> {
        self.fixed(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, Problem> {
        self.fixed(what).map(u64::from_le_bytes)
    }

    /// A stated count of things that each take at least `min_bytes`: it has to fit the cap and the rest of the file,
    /// so that memory may be taken for that many.
    fn count(
        &mut self,
        what: &'static str,
        cap: usize,
        min_bytes: usize,
    ) -> Result<usize, Problem> {
        let offset = self.at as u64;
        let n = Problem::capped(what, self.u64(what)?, cap)?;
        if n.saturating_mul(min_bytes) > self.bytes.len() - self.at {
            return Err(Problem::Truncated { what, offset });
        }
        Ok(n)
    }

    fn string(&mut self, what: &'static str, cap: usize) -> Result<String, Problem> {
        let offset = self.at as u64;
        let n = self.count(what, cap, 1)?;
        match std::str::from_utf8(self.take(what, n)?) {
            Ok(s) => Ok(s.to_owned()),
            Err(_) => Err(Problem::NotUtf8 { what, offset }),
        }
    }

    fn bool(&mut self) -> Result<bool, Problem> {
        // Anything but 0 is taken for true, as ggml does.
        Ok(self.fixed::<1>("a metadata value")?[0] != 0)
    }

    fn value(&mut self, key: &str, code: u32) -> Result<Value, Problem> {
        const WHAT: &str = "a metadata value";
        Ok(match code {
            0 => Value::U8(self.fixed::<1>(WHAT)?[0]),
            1 => Value::I8(i8::from_le_bytes(self.fixed(WHAT)?)),
            2 => Value::U16(u16::from_le_bytes(self.fixed(WHAT)?)),
            3 => Value::I16(i16::from_le_bytes(self.fixed(WHAT)?)),
            4 => Value::U32(u32::from_le_bytes(self.fixed(WHAT)?)),
            5 => Value::I32(i32::from_le_bytes(self.fixed(WHAT)?)),
            6 => Value::F32(f32::from_le_bytes(self.fixed(WHAT)?)),
            7 => Value::Bool(self.bool()?),
            8 => Value::Str(self.string(WHAT, limits::GGUF_STRING_BYTES)?),
            9 => Value::Array(self.array(key, 1)?),
            10 => Value::U64(u64::from_le_bytes(self.fixed(WHAT)?)),
            11 => Value::I64(i64::from_le_bytes(self.fixed(WHAT)?)),
            12 => Value::F64(f64::from_le_bytes(self.fixed(WHAT)?)),
            code => {
                return Err(Problem::TypeCode {
                    what: format!("metadata `{key}`"),
                    code,
                });
            }
        })
    }

    fn array(&mut self, key: &str, depth: usize) -> Result<Array, Problem> {
        Problem::capped(
            "the depth of a metadata array",
            depth as u64,
            limits::GGUF_ARRAY_DEPTH,
        )?;
        let code = self.u32("a metadata array's type")?;
        Ok(match code {
            0 => Array::U8(self.elements(u8::from_le_bytes)?),
            1 => Array::I8(self.elements(i8::from_le_bytes)?),
            2 => Array::U16(self.elements(u16::from_le_bytes)?),
            3 => Array::I16(self.elements(i16::from_le_bytes)?),
            4 => Array::U32(self.elements(u32::from_le_bytes)?),
            5 => Array::I32(self.elements(i32::from_le_bytes)?),
            6 => Array::F32(self.elements(f32::from_le_bytes)?),
            7 => Array::Bool(self.elements(|[b]: [u8; 1]| b != 0)?),
            8 => Array::Str(self.each(8, |cursor| {
                cursor.string("a string of a metadata array", limits::GGUF_STRING_BYTES)
            })?),
            9 => Array::Array(self.each(12, |cursor| cursor.array(key, depth + 1))?),
            10 => Array::U64(self.elements(u64::from_le_bytes)?),
            11 => Array::I64(self.elements(i64::from_le_bytes)?),
            12 => Array::F64(self.elements(f64::from_le_bytes)?),
            code => {
                return Err(Problem::TypeCode {
                    what: format!("the array `{key}`"),
                    code,
                });
            }
        })
    }

    /// A count, then that many numbers.
    fn elements<const N: usize, T>(&mut self, from: fn([u8; N]) -> T) -> Result<Vec<T>, Problem> {
        const WHAT: &str = "a metadata array";
        let n = self.count(WHAT, limits::GGUF_ARRAY_LEN, N)?;
        let (chunks, _) = self.take(WHAT, n * N)?.as_chunks::<N>();
        Ok(chunks.iter().map(|&chunk| from(chunk)).collect())
    }

    /// A count, then that many things of at least `min_bytes`.
    fn each<T>(
        &mut self,
        min_bytes: usize,
        mut one: impl FnMut(&mut Self) -> Result<T, Problem>,
    ) -> Result<Vec<T>, Problem> {
        let n = self.count("a metadata array", limits::GGUF_ARRAY_LEN, min_bytes)?;
        let mut out = Vec::with_capacity(n);
        for _ in 0..n {
            out.push(one(self)?);
        }
        Ok(out)
    }

    fn tensor(&mut self) -> Result<(TensorInfo, u64), Problem> {
        let name = self.string("a tensor's name", limits::TENSOR_NAME_BYTES)?;
        let n_dims = self.u32("a tensor's number of dimensions")?;
        let n_dims = Problem::capped(
            "the number of dimensions",
            n_dims.into(),
            limits::TENSOR_DIMS,
        )?;
        let mut stated = [0u64; limits::TENSOR_DIMS];
        for dim in &mut stated[..n_dims] {
            *dim = self.u64("a tensor's dimension")?;
        }
        let stated = &stated[..n_dims];
        let code = self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's offset")?;
        let dtype = DType::from_gguf_code(code).ok_or_else(|| {
            match OTHER_TYPES.binary_search_by_key(&code, |t| t.0) {
                Ok(i) => Problem::DType {
                    tensor: name.clone(),
                    dtype: OTHER_TYPES[i].1.into(),
                },
                Err(_) => Problem::TypeCode {
                    what: format!("tensor `{name}`"),
                    code,
                },
            }
        })?;
        // GGUF begins with the dimension that runs fastest; the rest of Bantam ends with it.
        let shape: Option<Vec<usize>> = stated
            .iter()
            .rev()
            .map(|&d| usize::try_from(d).ok().filter(|&d| d > 0))
            .collect();
        let sized = shape.and_then(|shape| dtype.bytes_of(&shape).map(|n| (shape, n)));
        let Some((shape, n_bytes)) = sized else {
            return Err(Problem::Shape {
                tensor: name,
                shape: stated.to_vec(),
                dtype: dtype.name(),
            });
        };
        let info = TensorInfo {
            name,
            dtype,
            shape,
            n_bytes,
        };
        Ok((info, offset))
    }
}

/// ggml's types that are not read here, so that an error can name them.
const OTHER_TYPES: [(u32, &str); 19] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];
