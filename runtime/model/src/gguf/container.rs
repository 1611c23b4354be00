//! The container: typed metadata, tensor descriptions, aligned tensor data.

use super::quantization;
use crate::ModelError;
use std::collections::HashMap;

pub const MAGIC: &[u8] = b"GGUF";

const DEFAULT_ALIGNMENT: usize = 32;
const MAX_DIMENSIONS: usize = 4;
/// Far above any vocabulary; keeps a small hostile file from claiming a large array.
const MAX_ARRAY: usize = 1 << 22;
const MAX_ENTRIES: usize = 1 << 16;

/// A metadata value. All integers are widened.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(Vec<Value>),
}

/// Where one tensor lies and how it is packed.
#[derive(Clone, Debug)]
pub struct TensorInfo {
    pub name: String,
    /// Row-major, slowest dimension first (GGUF writes the fastest first).
    pub shape: Vec<i64>,
    /// ggml's type number.
    pub kind: u32,
    offset: usize,
    length: usize,
}

/// A parsed header over the bytes of the whole file.
#[derive(Debug)]
pub struct Gguf<'a> {
    metadata: HashMap<String, Value>,
    tensors: Vec<TensorInfo>,
    start: usize,
    data: &'a [u8],
}

impl<'a> Gguf<'a> {
    /// Reads the header; refuses a file whose tensors do not lie within it.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ModelError> {
        let gguf = Self::header(bytes)?;
        gguf.tensors.iter().try_for_each(|info| gguf.data(info).map(|_| ()))?;
        Ok(gguf)
    }

    /// Reads the header of a file of which no more than the beginning need be there.
    pub fn header(bytes: &'a [u8]) -> Result<Self, ModelError> {
        let mut reader = Reader { bytes, position: 0 };
        if reader.take(MAGIC.len())? != MAGIC {
            return Err(gguf_error("it does not start with GGUF"));
        }
        match reader.u32()? {
            2 | 3 => {}
            version => return Err(gguf_error(format!("version {version}; 2 and 3 are supported"))),
        }
        let tensor_count = reader.count(MAX_ENTRIES, "tensors")?;
        let entry_count = reader.count(MAX_ENTRIES, "metadata entries")?;
        let metadata = (0..entry_count).map(|_| reader.entry()).collect::<Result<HashMap<_, _>, _>>()?;
        let tensors = (0..tensor_count).map(|_| reader.tensor()).collect::<Result<Vec<_>, _>>()?;
        let start = reader.position.next_multiple_of(alignment(&metadata)?);
        let data = bytes.get(start..).unwrap_or_default();
        Ok(Self { metadata, tensors, start, data })
    }

    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.tensors.iter().any(|info| info.name == name)
    }

    /// All values of a tensor, if there is one of that name.
    pub fn values(&self, name: &str) -> Result<Option<Vec<f32>>, ModelError> {
        let found = self.tensors.iter().find(|info| info.name == name);
        found.map(|info| quantization::dequantize(name, info.kind, self.data(info)?)).transpose()
    }

    /// Where in the file a tensor's bytes start, and how many they are.
    pub fn range(&self, info: &TensorInfo) -> (usize, usize) {
        (self.start + info.offset, info.length)
    }

    /// The packed bytes of a tensor.
    pub fn data(&self, info: &TensorInfo) -> Result<&'a [u8], ModelError> {
        info.offset
            .checked_add(info.length)
            .and_then(|end| self.data.get(info.offset..end))
            .ok_or_else(|| gguf_error(format!("tensor {} lies beyond the end of the file", info.name)))
    }

    pub fn text(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.metadata.get(key) {
            Some(Value::Bool(value)) => Some(*value),
            _ => None,
        }
    }

    pub fn float(&self, key: &str) -> Option<f64> {
        match self.metadata.get(key) {
            Some(Value::Float(value)) => Some(*value),
            _ => None,
        }
    }

    pub fn array(&self, key: &str) -> Option<&[Value]> {
        match self.metadata.get(key) {
            Some(Value::Array(values)) => Some(values),
            _ => None,
        }
    }

    pub fn array_length(&self, key: &str) -> Option<usize> {
        self.array(key).map(<[Value]>::len)
    }

    /// A required number of things.
    pub fn size(&self, key: &str) -> Result<usize, ModelError> {
        self.integer(key)
            .and_then(|value| usize::try_from(value).ok())
            .ok_or_else(|| gguf_error(format!("metadata {key} is missing or not a number")))
    }

    pub fn token_id(&self, key: &str) -> Option<u32> {
        self.integer(key).and_then(|value| u32::try_from(value).ok())
    }

    fn integer(&self, key: &str) -> Option<u64> {
        self.metadata.get(key)?.integer()
    }
}

impl Value {
    pub fn integer(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(*value),
            Self::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    pub fn number(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            _ => None,
        }
    }

    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
}

fn alignment(metadata: &HashMap<String, Value>) -> Result<usize, ModelError> {
    let Some(value) = metadata.get("general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match value.integer() {
        Some(bytes @ 1..=65_536) if bytes.is_power_of_two() => Ok(bytes as usize),
        _ => Err(gguf_error(format!("general.alignment is {value:?}"))),
    }
}

/// Reads little-endian fields; every read is checked against the end.
struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], ModelError> {
        let end = self.position.checked_add(length);
        let taken = end.and_then(|end| self.bytes.get(self.position..end));
        let taken = taken.ok_or_else(|| gguf_error(format!("it ends within its header at byte {}", self.position)))?;
        self.position += length;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ModelError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn count(&mut self, limit: usize, what: &str) -> Result<usize, ModelError> {
        let count = self.u64()?;
        match usize::try_from(count) {
            Ok(count) if count <= limit => Ok(count),
            _ => Err(gguf_error(format!("it claims {count} {what}; at most {limit} are plausible"))),
        }
    }

    fn text(&mut self) -> Result<String, ModelError> {
        let length = self.count(self.bytes.len(), "bytes of text")?;
        let bytes = self.take(length)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| gguf_error("a text in its header is not UTF-8"))
    }

    fn entry(&mut self) -> Result<(String, Value), ModelError> {
        let key = self.text()?;
        let kind = self.u32()?;
        Ok((key, self.value(kind)?))
    }

    fn value(&mut self, kind: u32) -> Result<Value, ModelError> {
        const ARRAY: u32 = 9;
        if kind != ARRAY {
            return self.scalar(kind);
        }
        let element = self.u32()?;
        let count = self.count(MAX_ARRAY, "array elements")?;
        (0..count).map(|_| self.scalar(element)).collect::<Result<_, _>>().map(Value::Array)
    }

    fn scalar(&mut self, kind: u32) -> Result<Value, ModelError> {
        Ok(match kind {
            0 => Value::Unsigned(u8::from_le_bytes(self.array()?).into()),
            1 => Value::Signed(i8::from_le_bytes(self.array()?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array()?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array()?).into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array()?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array()?).into()),
            7 => Value::Bool(self.array::<1>()? != [0]),
            8 => Value::Text(self.text()?),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(i64::from_le_bytes(self.array()?)),
            12 => Value::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(gguf_error(format!("metadata of unknown type {other}"))),
        })
    }

    fn tensor(&mut self) -> Result<TensorInfo, ModelError> {
        let name = self.text()?;
        let dimensions = self.u32()? as usize;
        if dimensions > MAX_DIMENSIONS {
            return Err(gguf_error(format!("tensor {name} has {dimensions} dimensions")));
        }
        let mut shape = (0..dimensions).map(|_| self.u64()).collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        let kind = self.u32()?;
        let offset = usize::try_from(self.u64()?).map_err(|_| gguf_error("an offset is too large"))?;
        let elements = shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
        let elements = elements
            .and_then(|count| usize::try_from(count).ok())
            .filter(|count| *count < 1 << 40)
            .ok_or_else(|| gguf_error(format!("tensor {name} has the impossible shape {shape:?}")))?;
        let length = quantization::packed_length(&name, kind, elements)?;
        let shape = shape.into_iter().map(|size| size as i64).collect();
        Ok(TensorInfo { name, shape, kind, offset, length })
    }
}

fn gguf_error(message: impl Into<String>) -> ModelError {
    ModelError::Gguf(message.into())
}
