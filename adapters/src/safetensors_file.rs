//! The header of an `adapter_model.safetensors`, checked before a byte of its data is read.
//!
//! Layout: a little-endian `u64` header length, the header (JSON: tensor name → dtype, shape and the byte range within
//! the data), the data. The `safetensors` crate wants the whole file in memory and keeps the last of two equal names;
//! adapters come from strangers and may be gigabytes, so the header is read by itself, within
//! [`Limits::safetensors_header_bytes_max`], and every error names the tensor. The crate serves as the oracle of the
//! fuzz test.

use std::{cell::RefCell, collections::HashSet, fmt, fs::File, os::unix::fs::FileExt};

use openlora_types::Limits;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::{error::AdapterError, json::shown};

/// The file's name in an adapter's folder.
pub(crate) const TENSORS_FILE: &str = "adapter_model.safetensors";

/// Bytes of a tensor's name.
const NAME_BYTES_MAX: usize = 512;
/// Dimensions of a tensor; factors have two.
const DIMS_MAX: usize = 8;

/// Number formats an adapter may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 32-bit floats.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl Dtype {
    /// The format's name in the file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
        }
    }

    /// Bytes of one number.
    #[must_use]
    pub fn size(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// One tensor, and where its bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name as it stands in the file.
    pub name: String,
    /// Number format.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// First byte, counted from the start of the data.
    pub start: u64,
    /// Bytes; always the product of `shape` and the format's size.
    pub bytes: u64,
}

/// A header whose tensors fill the data exactly: no gap, no overlap, no tensor twice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// In the order of their bytes.
    pub tensors: Vec<TensorEntry>,
    /// Where the data starts in the file.
    pub data_start: u64,
}

fn refuse(tensor: &str, reason: impl Into<String>) -> AdapterError {
    let field = if tensor.is_empty() { TENSORS_FILE.to_owned() } else { format!("{TENSORS_FILE}: {}", shown(tensor)) };
    AdapterError::invalid(field, reason)
}

impl Header {
    /// Reads and checks the header of `file`, which is `length` bytes long.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] naming the tensor, [`AdapterError::Io`] when the file cannot be read.
    pub fn read(file: &File, length: u64, limits: &Limits) -> Result<Self, AdapterError> {
        let mut prefix = [0; 8];
        if length < 8 {
            return Err(refuse("", format!("is {length} bytes long, too short for a safetensors file")));
        }
        file.read_exact_at(&mut prefix, 0).map_err(AdapterError::io(format!("read {TENSORS_FILE}")))?;
        let claimed = u64::from_le_bytes(prefix);
        let max = limits.safetensors_header_bytes_max;
        if claimed > max as u64 {
            let why = format!("claims a header of {claimed} bytes; the limit safetensors_header_bytes_max is {max}");
            return Err(refuse("", why));
        }
        if claimed > length - 8 {
            let why = format!("is truncated: its header takes {claimed} bytes and {} follow", length - 8);
            return Err(refuse("", why));
        }
        let mut header = vec![0; claimed as usize];
        file.read_exact_at(&mut header, 8).map_err(AdapterError::io(format!("read {TENSORS_FILE}")))?;
        Self::parse(&header, length - 8 - claimed, limits)
    }

    /// Checks the JSON of a header that is followed by `data` bytes.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] naming the tensor.
    pub fn parse(header: &[u8], data: u64, limits: &Limits) -> Result<Self, AdapterError> {
        if header.first() != Some(&b'{') {
            return Err(refuse("", "has a header that is not a JSON object; is it a safetensors file?"));
        }
        // The name of the tensor being read, for errors raised by the JSON reader itself.
        let current = RefCell::new(String::new());
        let mut deserializer = serde_json::Deserializer::from_slice(header);
        let reader = HeaderReader { current: &current, limits };
        let tensors = reader.deserialize(&mut deserializer).and_then(|tensors| deserializer.end().map(|()| tensors));
        let raw = tensors.map_err(|error| refuse(&current.borrow(), format!("has a bad header: {error}")))?;
        let mut tensors = raw.into_iter().map(RawTensor::check).collect::<Result<Vec<_>, _>>()?;
        tensors.sort_by_key(|tensor| (tensor.start, tensor.bytes));
        let mut filled = 0;
        for tensor in &tensors {
            if tensor.start != filled {
                let what =
                    if tensor.start < filled { "overlaps the tensor before it" } else { "leaves a gap before it" };
                return Err(refuse(&tensor.name, format!("starts at byte {} and {what}, at {filled}", tensor.start)));
            }
            // `check` has seen that start + bytes does not overflow.
            filled = tensor.start + tensor.bytes;
        }
        if filled != data {
            let last = tensors.last().map_or("", |tensor| tensor.name.as_str());
            let what = if filled > data { "is truncated" } else { "has bytes that belong to no tensor" };
            return Err(refuse(
                last,
                format!("ends at byte {filled} of the data and the file holds {data}: it {what}"),
            ));
        }
        Ok(Self { tensors, data_start: 8 + header.len() as u64 })
    }
}

struct RawTensor {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    offsets: (u64, u64),
}

impl RawTensor {
    fn check(self) -> Result<TensorEntry, AdapterError> {
        let Self { name, dtype, shape, offsets: (start, end) } = self;
        let dtype = match dtype.as_str() {
            "F32" => Dtype::F32,
            "F16" => Dtype::F16,
            "BF16" => Dtype::Bf16,
            other => {
                let why = format!("has the dtype {}; adapters are served in F32, F16 and BF16", shown(other));
                return Err(refuse(&name, why));
            }
        };
        let elements = shape.iter().try_fold(1_u64, |product, &dim| product.checked_mul(dim));
        let Some(bytes) = elements.and_then(|elements| elements.checked_mul(dtype.size())) else {
            return Err(refuse(&name, format!("has the shape {shape:?}, whose size overflows")));
        };
        if end < start || end - start != bytes {
            let why = format!("spans bytes {start} to {end}; {} of shape {shape:?} takes {bytes}", dtype.name());
            return Err(refuse(&name, why));
        }
        let narrow = |dim: u64| usize::try_from(dim).map_err(|_| refuse(&name, "has a dimension out of range"));
        let shape = shape.iter().map(|&dim| narrow(dim)).collect::<Result<Vec<_>, _>>()?;
        Ok(TensorEntry { name, dtype, shape, start, bytes })
    }
}

struct HeaderReader<'a> {
    current: &'a RefCell<String>,
    limits: &'a Limits,
}

impl<'de> DeserializeSeed<'de> for HeaderReader<'_> {
    type Value = Vec<RawTensor>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for HeaderReader<'_> {
    type Value = Vec<RawTensor>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let max = self.limits.adapter_tensors_max;
        let mut tensors = Vec::new();
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            *self.current.borrow_mut() = shown(&name);
            if name.len() > NAME_BYTES_MAX {
                return Err(A::Error::custom(format_args!("the name is longer than {NAME_BYTES_MAX} bytes")));
            }
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom("the name stands here twice"));
            }
            if name == "__metadata__" {
                map.next_value_seed(Metadata)?;
            } else {
                if tensors.len() == max {
                    let why = format_args!("more tensors than the limit adapter_tensors_max, {max}");
                    return Err(A::Error::custom(why));
                }
                let (dtype, shape, offsets) = map.next_value_seed(TensorReader)?;
                tensors.push(RawTensor { name, dtype, shape, offsets });
            }
            self.current.borrow_mut().clear();
        }
        Ok(tensors)
    }
}

/// `__metadata__`: strings by name, of no meaning here.
struct Metadata;

impl<'de> DeserializeSeed<'de> for Metadata {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Metadata {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while map.next_entry::<IgnoredAny, String>()?.is_some() {}
        Ok(())
    }
}

struct TensorReader;

impl<'de> DeserializeSeed<'de> for TensorReader {
    type Value = (String, Vec<u64>, (u64, u64));

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for TensorReader {
    type Value = (String, Vec<u64>, (u64, u64));

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with dtype, shape and data_offsets")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let (mut dtype, mut shape, mut offsets) = (None, None, None);
        while let Some(key) = map.next_key::<String>()? {
            let again = match key.as_str() {
                "dtype" => dtype.replace(map.next_value::<String>()?).is_some(),
                "shape" => shape.replace(map.next_value_seed(ShapeReader)?).is_some(),
                "data_offsets" => offsets.replace(map.next_value::<(u64, u64)>()?).is_some(),
                _ => return Err(A::Error::custom(format_args!("the unknown field `{}`", shown(&key)))),
            };
            if again {
                return Err(A::Error::custom(format_args!("the field `{key}` stands here twice")));
            }
        }
        let missing = |field| A::Error::custom(format_args!("the field `{field}` is missing"));
        Ok((
            dtype.ok_or_else(|| missing("dtype"))?,
            shape.ok_or_else(|| missing("shape"))?,
            offsets.ok_or_else(|| missing("data_offsets"))?,
        ))
    }
}

struct ShapeReader;

impl<'de> DeserializeSeed<'de> for ShapeReader {
    type Value = Vec<u64>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Vec<u64>, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ShapeReader {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {DIMS_MAX} dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<u64>, A::Error> {
        let mut shape = Vec::new();
        while let Some(dim) = seq.next_element()? {
            if shape.len() == DIMS_MAX {
                return Err(A::Error::custom(format_args!("more than {DIMS_MAX} dimensions")));
            }
            shape.push(dim);
        }
        Ok(shape)
    }
}
