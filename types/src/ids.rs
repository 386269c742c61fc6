use std::fmt;

use crate::{InvalidField, Limits};

/// Index into the base model's vocabulary. An alias and not a newtype: it is a number that kernels compute with,
/// never the identity of anything.
pub type Token = u32;

/// Logical time in microseconds. Rooms that must be simulated (the scheduler) take it as an argument and never read a
/// clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub u64);

impl Time {
    /// `self + micros`, saturating.
    #[must_use]
    pub fn after_micros(self, micros: u64) -> Self {
        Self(self.0.saturating_add(micros))
    }

    /// Microseconds from `earlier` to `self`; 0 when `earlier` is later.
    #[must_use]
    pub fn since_micros(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// One sequence inside the engine. Assigned by the engine, never by a client, and never reused in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

impl fmt::Display for SequenceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seq-{}", self.0)
    }
}

/// Who a request is accounted to: the name of the API key that authenticated it. Fairness and the prefix cache's salt
/// are per tenant.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(pub String);

impl fmt::Display for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The immutable identity of an adapter: BLAKE3 over its canonical configuration and tensors. KV-cache keys, device
/// slots and receipts carry this and never a reusable name.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub [u8; 32]);

impl Generation {
    /// The first 12 hexadecimal digits, for people; never used as a key.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string()[..12].to_owned()
    }

    /// Parses 64 lower-case hexadecimal digits.
    ///
    /// # Errors
    /// Anything else is an [`InvalidField`] on `generation`.
    pub fn from_hex(text: &str) -> Result<Self, InvalidField> {
        let bad = || InvalidField::new("generation", "must be 64 lower-case hexadecimal digits");
        let digit = |c: u8| match c {
            b'0'..=b'9' => Some(c - b'0'),
            b'a'..=b'f' => Some(c - b'a' + 10),
            _ => None,
        };
        let text = text.as_bytes();
        if text.len() != 64 {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
            *byte = digit(pair[0]).ok_or_else(bad)? << 4 | digit(pair[1]).ok_or_else(bad)?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Generation({})", self.short())
    }
}

/// An adapter's name as people type it: `owner/name` or `name`. Reusable, so never a key of anything that outlives a
/// lookup.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Alias(String);

impl Alias {
    /// Accepts 1 to [`Limits::alias_bytes_max`] bytes: segments of ASCII letters, digits, `.`, `_` and `-`, joined by
    /// single `/`, each segment starting with a letter or digit. Commas are out because routers join aliases with
    /// them, `..` and a leading `/` or `~` because aliases also name folders.
    ///
    /// # Errors
    /// An [`InvalidField`] on `field` that says what is wrong.
    pub fn parse(field: &str, text: &str, limits: &Limits) -> Result<Self, InvalidField> {
        if text.is_empty() {
            return Err(InvalidField::new(field, "must not be empty"));
        }
        if text.len() > limits.alias_bytes_max {
            let why = format!("is {} bytes long; the limit alias_bytes_max is {}", text.len(), limits.alias_bytes_max);
            return Err(InvalidField::new(field, why));
        }
        let segment_ok = |segment: &str| {
            segment.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric)
                && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        };
        if !text.split('/').all(segment_ok) {
            return Err(InvalidField::new(
                field,
                "must be segments of letters, digits, '.', '_' and '-' joined by '/', each starting with a letter or digit",
            ));
        }
        Ok(Self(text.to_owned()))
    }

    /// The alias as typed.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Alias {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aliases_that_could_leave_their_folder_are_refused() {
        let limits = Limits::default();
        let long = "a".repeat(10_000);
        for bad in
            ["", "../x", "/etc/passwd", "~", "~/x", "a\0b", "a,b", "a b", "a//b", "a/", "a/../b", ".hidden", "é", &long]
        {
            let error = Alias::parse("alias", bad, &limits).expect_err(bad);
            assert_eq!(error.field, "alias");
        }
        for good in ["cwe", "acme/cwe", "Acme/cwe-r8.v2_x", "0"] {
            assert_eq!(Alias::parse("alias", good, &limits).expect(good).as_str(), good);
        }
    }

    #[test]
    fn generations_survive_a_round_trip_through_hex() {
        let generation = Generation(std::array::from_fn(|i| (i * 37) as u8));
        assert_eq!(Generation::from_hex(&generation.to_string()), Ok(generation));
        for bad in ["", "00", &"g".repeat(64), &"A".repeat(64), &"0".repeat(63)] {
            assert!(Generation::from_hex(bad).is_err(), "{bad}");
        }
    }
}
