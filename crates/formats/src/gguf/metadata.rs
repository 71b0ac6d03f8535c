//! GGUF metadata: typed values under dotted names.

use std::collections::HashMap;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the variants are GGUF's types")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// A metadata array: elements of one type.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the variants are GGUF's types")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    Str(Vec<String>),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

impl Value {
    /// An integer of any width that is not negative.
    pub fn to_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(n) => Some(n.into()),
            Value::U16(n) => Some(n.into()),
            Value::U32(n) => Some(n.into()),
            Value::U64(n) => Some(n),
            Value::I8(n) => n.try_into().ok(),
            Value::I16(n) => n.try_into().ok(),
            Value::I32(n) => n.try_into().ok(),
            Value::I64(n) => n.try_into().ok(),
            _ => None,
        }
    }

    /// A number of any type.
    pub fn to_f64(&self) -> Option<f64> {
        match *self {
            Value::F32(x) => Some(x.into()),
            Value::F64(x) => Some(x),
            Value::I8(n) => Some(n.into()),
            Value::I16(n) => Some(n.into()),
            Value::I32(n) => Some(n.into()),
            Value::I64(n) => Some(n as f64),
            _ => self.to_u64().map(|n| n as f64),
        }
    }

    /// The value in a few words, for a listing: long strings are cut, arrays counted.
    pub fn brief(&self) -> String {
        match self {
            Value::Str(s) => {
                let cut: String = s.chars().take(60).collect();
                if cut.len() < s.len() {
                    format!("{cut:?}... ({} bytes)", s.len())
                } else {
                    format!("{cut:?}")
                }
            }
            Value::Array(array) => format!("{} x {}", array.len(), array.type_name()),
            Value::Bool(b) => b.to_string(),
            Value::F32(x) => x.to_string(),
            Value::F64(x) => x.to_string(),
            Value::I8(n) => n.to_string(),
            Value::I16(n) => n.to_string(),
            Value::I32(n) => n.to_string(),
            Value::I64(n) => n.to_string(),
            _ => self.to_u64().unwrap_or_default().to_string(),
        }
    }
}

impl Array {
    /// Elements in the array.
    pub fn len(&self) -> usize {
        match self {
            Array::U8(v) => v.len(),
            Array::I8(v) => v.len(),
            Array::U16(v) => v.len(),
            Array::I16(v) => v.len(),
            Array::U32(v) => v.len(),
            Array::I32(v) => v.len(),
            Array::F32(v) => v.len(),
            Array::Bool(v) => v.len(),
            Array::Str(v) => v.len(),
            Array::Array(v) => v.len(),
            Array::U64(v) => v.len(),
            Array::I64(v) => v.len(),
            Array::F64(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The name of the elements' type.
    pub fn type_name(&self) -> &'static str {
        match self {
            Array::U8(_) => "u8",
            Array::I8(_) => "i8",
            Array::U16(_) => "u16",
            Array::I16(_) => "i16",
            Array::U32(_) => "u32",
            Array::I32(_) => "i32",
            Array::F32(_) => "f32",
            Array::Bool(_) => "bool",
            Array::Str(_) => "string",
            Array::Array(_) => "array",
            Array::U64(_) => "u64",
            Array::I64(_) => "i64",
            Array::F64(_) => "f64",
        }
    }
}

impl From<u32> for Value {
    fn from(n: u32) -> Value {
        Value::U32(n)
    }
}

impl From<f32> for Value {
    fn from(x: f32) -> Value {
        Value::F32(x)
    }
}

impl From<bool> for Value {
    fn from(b: bool) -> Value {
        Value::Bool(b)
    }
}

impl From<&str> for Value {
    fn from(s: &str) -> Value {
        Value::Str(s.to_owned())
    }
}

impl From<String> for Value {
    fn from(s: String) -> Value {
        Value::Str(s)
    }
}

impl From<Array> for Value {
    fn from(array: Array) -> Value {
        Value::Array(array)
    }
}

/// Metadata pairs in the file's order, found by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    pairs: Vec<(String, Value)>,
    by_key: HashMap<String, usize>,
}

impl Metadata {
    /// No pairs.
    pub fn new() -> Metadata {
        Metadata::default()
    }

    /// Adds a pair, or gives an existing key a new value in its old place.
    pub fn insert(&mut self, key: impl Into<String>, value: impl Into<Value>) {
        let (key, value) = (key.into(), value.into());
        match self.by_key.get(&key) {
            Some(&i) => self.pairs[i].1 = value,
            None => {
                self.by_key.insert(key.clone(), self.pairs.len());
                self.pairs.push((key, value));
            }
        }
    }

    /// Takes a pair out.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let i = self.by_key.remove(key)?;
        let (_, value) = self.pairs.remove(i);
        for (i, (key, _)) in self.pairs.iter().enumerate().skip(i) {
            self.by_key.insert(key.clone(), i);
        }
        Some(value)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.by_key.get(key).map(|&i| &self.pairs[i].1)
    }

    /// The pairs, in the file's order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.pairs.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// How many pairs there are.
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// A string.
    pub fn str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Str(s) => Some(s),
            _ => None,
        }
    }

    /// An integer of any width that is not negative.
    pub fn u64(&self, key: &str) -> Option<u64> {
        self.get(key)?.to_u64()
    }

    /// An integer that fits 32 bits: a token id, say.
    pub fn u32(&self, key: &str) -> Option<u32> {
        self.u64(key)?.try_into().ok()
    }

    /// A number of any type.
    pub fn f64(&self, key: &str) -> Option<f64> {
        self.get(key)?.to_f64()
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// An array.
    pub fn array(&self, key: &str) -> Option<&Array> {
        match self.get(key)? {
            Value::Array(array) => Some(array),
            _ => None,
        }
    }

    /// An array of strings.
    pub fn str_array(&self, key: &str) -> Option<&[String]> {
        match self.array(key)? {
            Array::Str(v) => Some(v),
            _ => None,
        }
    }

    /// An array of integers of any width, none negative or beyond 32 bits.
    pub fn u32_array(&self, key: &str) -> Option<Vec<u32>> {
        fn each<T: Copy + TryInto<u32>>(v: &[T]) -> Option<Vec<u32>> {
            v.iter().map(|&n| n.try_into().ok()).collect()
        }
        match self.array(key)? {
            Array::U8(v) => each(v),
            Array::I8(v) => each(v),
            Array::U16(v) => each(v),
            Array::I16(v) => each(v),
            Array::U32(v) => each(v),
            Array::I32(v) => each(v),
            Array::U64(v) => each(v),
            Array::I64(v) => each(v),
            _ => None,
        }
    }

    /// An array of single-precision numbers.
    pub fn f32_array(&self, key: &str) -> Option<&[f32]> {
        match self.array(key)? {
            Array::F32(v) => Some(v),
            _ => None,
        }
    }

    /// `general.architecture`, which begins the names of the model's own keys.
    pub fn architecture(&self) -> Option<&str> {
        self.str("general.architecture")
    }

    /// The value of `<architecture>.<key>`: `model_key("block_count")` is `llama.block_count` of a Llama.
    pub fn model_key(&self, key: &str) -> Option<&Value> {
        self.get(&format!("{}.{key}", self.architecture()?))
    }
}
