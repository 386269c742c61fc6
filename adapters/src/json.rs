//! A strict reader for JSON from strangers: duplicate keys, NaN and deep nesting are refused, and an error names the
//! path of the value it happened in. `serde_json::Value` keeps the last of two equal keys, which would let a file mean
//! different things to different readers.

use std::{cell::RefCell, fmt};

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// Containers within containers; an adapter's configuration needs three.
const DEPTH_MAX: usize = 16;
/// Bytes of a key repeated in an error.
const KEY_SHOWN_MAX: usize = 256;

/// A JSON value whose objects keep their order.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Json {
    Null,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    List(Vec<Json>),
    Map(Vec<(String, Json)>),
}

impl Json {
    /// Parses one document.
    ///
    /// # Errors
    /// `(path, reason)`; the path is empty when the document as a whole is wrong.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, (String, String)> {
        let path = RefCell::new(Vec::new());
        let mut deserializer = serde_json::Deserializer::from_slice(bytes);
        let value = Reader { path: &path, depth: 0 }.deserialize(&mut deserializer);
        let value = value.and_then(|value| deserializer.end().map(|()| value));
        value.map_err(|error| {
            let reason = if error.is_syntax() {
                format!("is not JSON (which has no NaN, Infinity or comments): {error}")
            } else {
                format!("is refused: {error}")
            };
            (path.borrow().join("."), reason)
        })
    }

    /// What PEFT takes for "switched off": null, false, an empty list or object.
    pub(crate) fn is_off(&self) -> bool {
        match self {
            Self::Null | Self::Bool(false) => true,
            Self::List(items) => items.is_empty(),
            Self::Map(entries) => entries.is_empty(),
            _ => false,
        }
    }
}

/// Shortens `text` for an error message.
pub(crate) fn shown(text: &str) -> String {
    if text.len() <= KEY_SHOWN_MAX {
        return text.to_owned();
    }
    let end = (0..=KEY_SHOWN_MAX).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
    format!("{}…", &text[..end])
}

#[derive(Clone, Copy)]
struct Reader<'a> {
    /// Keys down to the value being read. Left as it is by an error, so that it says where the error is.
    path: &'a RefCell<Vec<String>>,
    depth: usize,
}

impl Reader<'_> {
    fn deeper<E: Error>(self) -> Result<Self, E> {
        if self.depth == DEPTH_MAX {
            return Err(E::custom(format_args!("nested more than {DEPTH_MAX} deep")));
        }
        Ok(Self { depth: self.depth + 1, ..self })
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Json, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Json, E> {
        Ok(Json::Int(value.into()))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Json, E> {
        Ok(Json::Int(value.into()))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Json, E> {
        Ok(Json::Float(value))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Json, E> {
        Ok(Json::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
        let inner = self.deeper()?;
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(inner)? {
            items.push(item);
        }
        Ok(Json::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
        let inner = self.deeper()?;
        let mut entries: Vec<(String, Json)> = Vec::new();
        let mut seen = std::collections::HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            self.path.borrow_mut().push(shown(&key));
            if !seen.insert(key.clone()) {
                return Err(A::Error::custom("the key stands here twice"));
            }
            let value = map.next_value_seed(inner)?;
            self.path.borrow_mut().pop();
            entries.push((key, value));
        }
        Ok(Json::Map(entries))
    }
}
