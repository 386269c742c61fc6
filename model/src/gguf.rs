//! The GGUF container, versions 2 and 3 (ggml's `docs/gguf.md`): metadata and tensor descriptions, parsed from bytes that
//! nobody vouches for. Every length is checked against the bytes that are left before anything is allocated for it,
//! every sum for overflow, and every bound has a name in [`Limits`]. Weights are not read here: a [`GgufTensor`] says
//! where they lie.
//!
//! ```text
//! "GGUF" | version u32 | tensors u64 | keys u64
//! keys    x { key string | type u32 | value }          string = length u64, UTF-8
//! tensors x { name string | dims u32 | dim u64 x dims (fastest first) | type u32 | offset u64 }
//! padding to general.alignment | tensor data, offsets relative to here
//! ```

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use openlora_kernels::BlockFormat;
use openlora_types::Limits;

use crate::error::ModelError;

/// Storage types with a kernel, for messages.
pub(crate) const SUPPORTED_FORMATS: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q6_K";
const ALIGNMENT_DEFAULT: u64 = 32;
const ALIGNMENT_MAX: u64 = 1 << 20;
const DIMS_MAX: u32 = 4;
const TENSOR_NAME_BYTES_MAX: usize = 1 << 10;
/// Smallest bytes of a metadata entry (empty key, type, one byte) and of a tensor description, so that a counter in the
/// header cannot promise more entries than the file has bytes for.
const KEY_BYTES_MIN: u64 = 8 + 4 + 1;
const TENSOR_BYTES_MIN: u64 = 8 + 4 + 8 + 4 + 8;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// Any unsigned integer type.
    Uint(u64),
    /// Any signed integer type.
    Int(i64),
    /// f32 or f64.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// A string.
    String(String),
    /// An array of any integer type (64-bit unsigned values above `i64::MAX` are refused).
    Ints(Vec<i64>),
    /// An array of f32 or f64.
    Floats(Vec<f64>),
    /// An array of booleans.
    Bools(Vec<bool>),
    /// An array of strings.
    Strings(Vec<String>),
}

impl GgufValue {
    /// What it is, for messages.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Uint(_) | Self::Int(_) => "an integer",
            Self::Float(_) => "a float",
            Self::Bool(_) => "a boolean",
            Self::String(_) => "a string",
            Self::Ints(_) => "an array of integers",
            Self::Floats(_) => "an array of floats",
            Self::Bools(_) => "an array of booleans",
            Self::Strings(_) => "an array of strings",
        }
    }
}

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// Name in the file.
    pub name: String,
    /// Row-major shape, slowest first: `[outputs, inputs]` of a matrix (the file stores it fastest first).
    pub shape: Vec<usize>,
    /// Storage.
    pub format: BlockFormat,
    /// Its bytes in the file.
    pub range: Range<usize>,
}

/// A parsed GGUF header.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufFile {
    version: u32,
    metadata: BTreeMap<String, GgufValue>,
    tensors: Vec<GgufTensor>,
}

impl GgufFile {
    /// Parses a whole file's bytes (normally mapped: only the header is touched).
    ///
    /// # Errors
    /// Anything that is not a well-formed GGUF v2 or v3 whose tensors all lie inside `bytes` without overlap, a tensor
    /// type without a kernel, a duplicate key or tensor name, or a bound of `limits` exceeded.
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Self, ModelError> {
        let mut reader = Reader { bytes, at: 0 };
        let version = reader.preamble()?;
        let tensor_count = reader.u64()?;
        let key_count = reader.u64()?;
        limit("number of GGUF tensors", tensor_count, "model_tensors_max", limits.model_tensors_max)?;
        limit("number of GGUF metadata keys", key_count, "model_metadata_keys_max", limits.model_metadata_keys_max)?;
        let needed = key_count * KEY_BYTES_MIN + tensor_count * TENSOR_BYTES_MIN;
        if needed > reader.left() as u64 {
            return Err(malformed(format!("{key_count} keys and {tensor_count} tensors cannot fit in the file")));
        }
        let metadata = reader.metadata(key_count, limits)?;
        let infos = (0..tensor_count).map(|_| reader.tensor_info()).collect::<Result<Vec<_>, _>>()?;
        let alignment = alignment(&metadata)?;
        let data_start = (reader.at as u64).next_multiple_of(alignment);
        let tensors = place_tensors(infos, data_start, alignment, bytes.len() as u64)?;
        Ok(Self { version, metadata, tensors })
    }

    /// 2 or 3.
    #[must_use]
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Tensors in the order of the file.
    #[must_use]
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// All metadata, by key.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &GgufValue)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A value, whatever its type.
    #[must_use]
    pub fn value(&self, key: &str) -> Option<&GgufValue> {
        self.metadata.get(key)
    }

    /// A string; `None` where the key is absent.
    ///
    /// # Errors
    /// A value of another type, naming the key. So do all accessors below.
    pub fn string(&self, key: &str) -> Result<Option<&str>, ModelError> {
        self.typed(key, "a string", |value| match value {
            GgufValue::String(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A boolean; `None` where the key is absent.
    ///
    /// # Errors
    /// As [`Self::string`].
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.typed(key, "a boolean", |value| match value {
            GgufValue::Bool(value) => Some(*value),
            _ => None,
        })
    }

    /// A non-negative integer of any width; `None` where the key is absent.
    ///
    /// # Errors
    /// As [`Self::string`].
    pub fn uint(&self, key: &str) -> Result<Option<u64>, ModelError> {
        self.typed(key, "a non-negative integer", |value| match value {
            GgufValue::Uint(value) => Some(*value),
            GgufValue::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        })
    }

    /// A number as f32; `None` where the key is absent.
    ///
    /// # Errors
    /// As [`Self::string`].
    pub fn float(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.typed(key, "a number", |value| match value {
            GgufValue::Float(value) => Some(*value as f32),
            GgufValue::Uint(value) => Some(*value as f32),
            GgufValue::Int(value) => Some(*value as f32),
            _ => None,
        })
    }

    /// An array of strings; `None` where the key is absent.
    ///
    /// # Errors
    /// As [`Self::string`].
    pub fn strings(&self, key: &str) -> Result<Option<&[String]>, ModelError> {
        self.typed(key, "an array of strings", |value| match value {
            GgufValue::Strings(values) => Some(values.as_slice()),
            _ => None,
        })
    }

    /// An array of integers of any width; `None` where the key is absent.
    ///
    /// # Errors
    /// As [`Self::string`].
    pub fn ints(&self, key: &str) -> Result<Option<&[i64]>, ModelError> {
        self.typed(key, "an array of integers", |value| match value {
            GgufValue::Ints(values) => Some(values.as_slice()),
            _ => None,
        })
    }

    /// An array of floats; `None` where the key is absent.
    ///
    /// # Errors
    /// As [`Self::string`].
    pub fn floats(&self, key: &str) -> Result<Option<&[f64]>, ModelError> {
        self.typed(key, "an array of floats", |value| match value {
            GgufValue::Floats(values) => Some(values.as_slice()),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        pick: impl FnOnce(&'a GgufValue) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.metadata.get(key) else { return Ok(None) };
        let mismatch = || ModelError::metadata(key, format!("must be {expected}; it is {}", value.kind()));
        pick(value).ok_or_else(mismatch).map(Some)
    }
}

struct TensorInfo {
    name: String,
    shape: Vec<usize>,
    format: BlockFormat,
    offset: u64,
    bytes: u64,
}

fn malformed(reason: impl Into<String>) -> ModelError {
    ModelError::Malformed { file: "GGUF file".into(), reason: reason.into() }
}

fn limit(what: &str, value: u64, limit: &'static str, max: usize) -> Result<(), ModelError> {
    if value > max as u64 {
        return Err(ModelError::Limit { what: what.into(), value, limit, max: max as u64 });
    }
    Ok(())
}

fn alignment(metadata: &BTreeMap<String, GgufValue>) -> Result<u64, ModelError> {
    match metadata.get("general.alignment") {
        None => Ok(ALIGNMENT_DEFAULT),
        Some(GgufValue::Uint(value)) if value.is_power_of_two() && (8..=ALIGNMENT_MAX).contains(value) => Ok(*value),
        Some(_) => Err(ModelError::metadata(
            "general.alignment",
            format!("must be an unsigned power of two from 8 to {ALIGNMENT_MAX}"),
        )),
    }
}

/// Turns relative offsets into byte ranges and refuses any that leave the file or overlap.
fn place_tensors(
    infos: Vec<TensorInfo>,
    data_start: u64,
    alignment: u64,
    file_len: u64,
) -> Result<Vec<GgufTensor>, ModelError> {
    let mut names = HashSet::with_capacity(infos.len());
    let mut tensors = Vec::with_capacity(infos.len());
    for info in &infos {
        let wrong = |reason: String| ModelError::Tensor { name: info.name.clone(), reason };
        if !names.insert(info.name.as_str()) {
            return Err(wrong("is described twice".into()));
        }
        if !info.offset.is_multiple_of(alignment) {
            return Err(wrong(format!("offset {} is not a multiple of the alignment {alignment}", info.offset)));
        }
        let start = data_start.checked_add(info.offset);
        let range = start.and_then(|start| Some(start..start.checked_add(info.bytes)?));
        let Some(range) = range.filter(|range| range.end <= file_len) else {
            let (offset, bytes) = (info.offset, info.bytes);
            return Err(wrong(format!(
                "its {bytes} bytes at data offset {offset} leave the file of {file_len} bytes; the file is truncated"
            )));
        };
        tensors.push(GgufTensor {
            name: info.name.clone(),
            shape: info.shape.clone(),
            format: info.format,
            range: range.start as usize..range.end as usize,
        });
    }
    let mut by_start: Vec<&GgufTensor> = tensors.iter().collect();
    by_start.sort_by_key(|tensor| (tensor.range.start, tensor.range.end));
    for pair in by_start.windows(2) {
        if pair[0].range.end > pair[1].range.start {
            let reason = format!("its bytes overlap those of {}", pair[0].name);
            return Err(ModelError::Tensor { name: pair[1].name.clone(), reason });
        }
    }
    Ok(tensors)
}

/// The block format of a ggml type number (`ggml.h`, `enum ggml_type`), or the name of one without a kernel.
fn block_format(ggml_type: u32) -> Result<BlockFormat, String> {
    Ok(match ggml_type {
        0 => BlockFormat::F32,
        1 => BlockFormat::F16,
        2 => BlockFormat::Q4_0,
        3 => BlockFormat::Q4_1,
        6 => BlockFormat::Q5_0,
        7 => BlockFormat::Q5_1,
        8 => BlockFormat::Q8_0,
        12 => BlockFormat::Q4K,
        14 => BlockFormat::Q6K,
        30 => BlockFormat::Bf16,
        9 => return Err("Q8_1".into()),
        10 => return Err("Q2_K".into()),
        11 => return Err("Q3_K".into()),
        13 => return Err("Q5_K".into()),
        15 => return Err("Q8_K".into()),
        16 => return Err("IQ2_XXS".into()),
        17 => return Err("IQ2_XS".into()),
        18 => return Err("IQ3_XXS".into()),
        19 => return Err("IQ1_S".into()),
        20 => return Err("IQ4_NL".into()),
        21 => return Err("IQ3_S".into()),
        22 => return Err("IQ2_S".into()),
        23 => return Err("IQ4_XS".into()),
        24 => return Err("I8".into()),
        25 => return Err("I16".into()),
        26 => return Err("I32".into()),
        27 => return Err("I64".into()),
        28 => return Err("F64".into()),
        29 => return Err("IQ1_M".into()),
        34 => return Err("TQ1_0".into()),
        35 => return Err("TQ2_0".into()),
        39 => return Err("MXFP4".into()),
        other => return Err(format!("number {other}")),
    })
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], ModelError> {
        let bytes = self.bytes.get(self.at..).and_then(|rest| rest.get(..count));
        let bytes = bytes.ok_or_else(|| {
            malformed(format!("ends in the middle of its header: {count} bytes wanted at offset {}", self.at))
        })?;
        self.at += count;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ModelError> {
        Ok(self.take(N)?.try_into().expect("take gives exactly N bytes"))
    }

    fn u32(&mut self) -> Result<u32, ModelError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, ModelError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn preamble(&mut self) -> Result<u32, ModelError> {
        if self.take(4)? != b"GGUF" {
            return Err(malformed("does not start with the bytes GGUF"));
        }
        match self.u32()? {
            version @ (2 | 3) => Ok(version),
            version if matches!(version.swap_bytes(), 1..=3) => {
                Err(malformed("is big-endian; convert it to a little-endian file"))
            }
            version => Err(malformed(format!("has version {version}; versions 2 and 3 are supported"))),
        }
    }

    fn string(&mut self, what: &str, bytes_max: usize) -> Result<String, ModelError> {
        let length = self.u64()?;
        if length > bytes_max as u64 {
            return Err(malformed(format!("{what} has {length} bytes; at most {bytes_max} are accepted")));
        }
        let at = self.at;
        let bytes = self.take(length as usize)?;
        let text =
            std::str::from_utf8(bytes).map_err(|_| malformed(format!("{what} at offset {at} is not valid UTF-8")))?;
        Ok(text.to_owned())
    }

    fn metadata(&mut self, count: u64, limits: &Limits) -> Result<BTreeMap<String, GgufValue>, ModelError> {
        let mut metadata = BTreeMap::new();
        for _ in 0..count {
            let key = self.string("a metadata key", limits.model_metadata_bytes_max)?;
            let kind = self.u32()?;
            let value = self.value(&key, kind, limits.model_metadata_bytes_max)?;
            if metadata.contains_key(&key) {
                return Err(ModelError::metadata(key, "is given twice"));
            }
            metadata.insert(key, value);
        }
        Ok(metadata)
    }

    fn value(&mut self, key: &str, kind: u32, bytes_max: usize) -> Result<GgufValue, ModelError> {
        Ok(match kind {
            0 => GgufValue::Uint(u64::from(u8::from_le_bytes(self.array()?))),
            2 => GgufValue::Uint(u64::from(u16::from_le_bytes(self.array()?))),
            4 => GgufValue::Uint(u64::from(self.u32()?)),
            10 => GgufValue::Uint(self.u64()?),
            1 => GgufValue::Int(i64::from(i8::from_le_bytes(self.array()?))),
            3 => GgufValue::Int(i64::from(i16::from_le_bytes(self.array()?))),
            5 => GgufValue::Int(i64::from(i32::from_le_bytes(self.array()?))),
            11 => GgufValue::Int(i64::from_le_bytes(self.array()?)),
            6 => GgufValue::Float(f64::from(f32::from_le_bytes(self.array()?))),
            12 => GgufValue::Float(f64::from_le_bytes(self.array()?)),
            7 => GgufValue::Bool(self.boolean(key)?),
            8 => GgufValue::String(self.string(key, bytes_max)?),
            9 => self.array_value(key, bytes_max)?,
            _ => return Err(ModelError::metadata(key, format!("has the unknown GGUF type {kind}"))),
        })
    }

    fn boolean(&mut self, key: &str) -> Result<bool, ModelError> {
        match self.array::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [other] => Err(ModelError::metadata(key, format!("is a boolean of value {other}"))),
        }
    }

    fn array_value(&mut self, key: &str, bytes_max: usize) -> Result<GgufValue, ModelError> {
        let kind = self.u32()?;
        let count = self.u64()?;
        let size: u64 = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 | 8 => 8,
            9 => return Err(ModelError::metadata(key, "is an array of arrays; no supported model has one")),
            _ => return Err(ModelError::metadata(key, format!("is an array of the unknown GGUF type {kind}"))),
        };
        // A string takes at least its 8 bytes of length, so this bounds the allocation for strings as well.
        let bytes = count.saturating_mul(size);
        limit(&format!("bytes in {key}"), bytes, "model_metadata_bytes_max", bytes_max)?;
        if bytes > self.left() as u64 {
            return Err(ModelError::metadata(key, format!("has {count} elements; the file ends before them")));
        }
        let count = count as usize;
        match kind {
            6 => {
                let values = (0..count).map(|_| Ok(f64::from(f32::from_le_bytes(self.array()?))));
                Ok(GgufValue::Floats(values.collect::<Result<_, ModelError>>()?))
            }
            12 => {
                let values = (0..count).map(|_| Ok(f64::from_le_bytes(self.array()?)));
                Ok(GgufValue::Floats(values.collect::<Result<_, ModelError>>()?))
            }
            7 => Ok(GgufValue::Bools((0..count).map(|_| self.boolean(key)).collect::<Result<_, _>>()?)),
            8 => self.strings(key, count, bytes_max),
            _ => Ok(GgufValue::Ints((0..count).map(|_| self.int(key, kind)).collect::<Result<_, _>>()?)),
        }
    }

    fn strings(&mut self, key: &str, count: usize, bytes_max: usize) -> Result<GgufValue, ModelError> {
        let mut strings = Vec::with_capacity(count);
        let start = self.at;
        for _ in 0..count {
            strings.push(self.string(key, bytes_max)?);
            let bytes = (self.at - start) as u64;
            limit(&format!("bytes in {key}"), bytes, "model_metadata_bytes_max", bytes_max)?;
        }
        Ok(GgufValue::Strings(strings))
    }

    fn int(&mut self, key: &str, kind: u32) -> Result<i64, ModelError> {
        match self.value(key, kind, 0)? {
            GgufValue::Int(value) => Ok(value),
            GgufValue::Uint(value) => {
                i64::try_from(value).map_err(|_| ModelError::metadata(key, format!("holds {value}, beyond 2^63")))
            }
            _ => Err(ModelError::metadata(key, format!("is an array of the unknown GGUF type {kind}"))),
        }
    }

    fn tensor_info(&mut self) -> Result<TensorInfo, ModelError> {
        let name = self.string("a tensor name", TENSOR_NAME_BYTES_MAX)?;
        let wrong = |reason: String| ModelError::Tensor { name: name.clone(), reason };
        let dims = self.u32()?;
        if dims == 0 || dims > DIMS_MAX {
            return Err(wrong(format!("has {dims} dimensions; 1 to {DIMS_MAX} are possible")));
        }
        let mut shape = Vec::with_capacity(dims as usize);
        for _ in 0..dims {
            let dim = usize::try_from(self.u64()?).ok().filter(|dim| *dim > 0);
            shape.push(dim.ok_or_else(|| wrong("has a dimension that is 0 or beyond this machine".into()))?);
        }
        shape.reverse();
        let ggml_type = self.u32()?;
        let offset = self.u64()?;
        let format = block_format(ggml_type).map_err(|format| ModelError::TensorFormat {
            name: name.clone(),
            format,
            supported: SUPPORTED_FORMATS,
        })?;
        let bytes = tensor_bytes(&shape, format).map_err(wrong)?;
        Ok(TensorInfo { shape, format, offset, bytes, name })
    }
}

/// Bytes of a tensor whose rows (the last dimension) are whole blocks.
pub(crate) fn tensor_bytes(shape: &[usize], format: BlockFormat) -> Result<u64, String> {
    let inputs = shape.last().copied().unwrap_or(1);
    if !inputs.is_multiple_of(format.block_elements()) {
        let block = format.block_elements();
        return Err(format!("its rows of {inputs} elements are not whole {} blocks of {block}", format.name()));
    }
    let elements = shape.iter().try_fold(1_u64, |product, dim| product.checked_mul(*dim as u64));
    let blocks = elements.map(|elements| elements / format.block_elements() as u64);
    blocks
        .and_then(|blocks| blocks.checked_mul(format.block_bytes() as u64))
        .ok_or_else(|| format!("its shape {shape:?} overflows"))
}
