//! Who holds money, in what, and where it is paid to.

use std::{fmt, str::FromStr};

use openlora_types::InvalidField;

/// Bytes of an account's name, an asset and a key, each.
pub(crate) const NAME_BYTES_MAX: usize = 128;

/// Refuses text that is empty, too long or not printable.
pub(crate) fn check_text(field: &str, text: &str) -> Result<(), InvalidField> {
    if text.is_empty() || text.len() > NAME_BYTES_MAX || text.chars().any(char::is_control) {
        let why = format!("must be 1 to {NAME_BYTES_MAX} bytes without control characters");
        return Err(InvalidField::new(field, why));
    }
    Ok(())
}

/// An account. Its text, such as `owner/acme`, is what the database and the journal say, and what ties are broken by.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Account {
    /// `application/NAME`: what a caller has prepaid.
    Application(String),
    /// `pending/NAME`: what of it is reserved for requests that run.
    Pending(String),
    /// `owner/NAME`: owner of adapters.
    Owner(String),
    /// `contributor/NAME`: giver of training data.
    Contributor(String),
    /// `base/NAME`: owner of a base model.
    BaseOwner(String),
    /// `operator`: who runs the server.
    Operator,
    /// `pool`: what nobody could be named for.
    Pool,
    /// `dust`: what rounding fees up to whole units brings.
    Dust,
    /// `held`: contributors' parts whose share tables have not come.
    Held,
    /// `payout/0xADDRESS`: what sealed epochs owe an address.
    Payout(Address),
    /// `world`: where deposits come from and claims go to. The only account that is ever overdrawn.
    World,
}

impl Account {
    /// Whether what it gets is paid out to an address.
    #[must_use]
    pub fn is_paid(&self) -> bool {
        use Account::{BaseOwner, Contributor, Dust, Operator, Owner, Pool};
        matches!(self, Owner(_) | Contributor(_) | BaseOwner(_) | Operator | Pool | Dust)
    }

    pub(crate) fn check(&self, field: &str) -> Result<(), InvalidField> {
        use Account::{Application, BaseOwner, Contributor, Owner, Pending};
        match self {
            Application(name) | Pending(name) | Owner(name) | Contributor(name) | BaseOwner(name) => {
                check_text(field, name)
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Application(name) => write!(f, "application/{name}"),
            Self::Pending(name) => write!(f, "pending/{name}"),
            Self::Owner(name) => write!(f, "owner/{name}"),
            Self::Contributor(name) => write!(f, "contributor/{name}"),
            Self::BaseOwner(name) => write!(f, "base/{name}"),
            Self::Operator => f.write_str("operator"),
            Self::Pool => f.write_str("pool"),
            Self::Dust => f.write_str("dust"),
            Self::Held => f.write_str("held"),
            Self::Payout(address) => write!(f, "payout/{address}"),
            Self::World => f.write_str("world"),
        }
    }
}

impl FromStr for Account {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Self, InvalidField> {
        let account = match text.split_once('/') {
            Some(("application", name)) => Self::Application(name.into()),
            Some(("pending", name)) => Self::Pending(name.into()),
            Some(("owner", name)) => Self::Owner(name.into()),
            Some(("contributor", name)) => Self::Contributor(name.into()),
            Some(("base", name)) => Self::BaseOwner(name.into()),
            Some(("payout", address)) => Self::Payout(address.parse()?),
            None if text == "operator" => Self::Operator,
            None if text == "pool" => Self::Pool,
            None if text == "dust" => Self::Dust,
            None if text == "held" => Self::Held,
            None if text == "world" => Self::World,
            _ => return Err(InvalidField::new("account", "must be an account such as owner/acme or operator")),
        };
        account.check("account")?;
        Ok(account)
    }
}

/// What amounts are counted in: a token's short symbol or id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Asset(String);

impl Asset {
    /// Accepts 1 to 64 ASCII letters, digits, `.`, `_`, `:` and `-`.
    ///
    /// # Errors
    /// [`InvalidField`] on `asset`.
    pub fn parse(text: &str) -> Result<Self, InvalidField> {
        let fine = |b: u8| b.is_ascii_alphanumeric() || b"._:-".contains(&b);
        if text.is_empty() || text.len() > 64 || !text.bytes().all(fine) {
            return Err(InvalidField::new("asset", "must be 1 to 64 letters, digits, '.', '_', ':' and '-'"));
        }
        Ok(Self(text.into()))
    }

    /// As written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Asset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Asset {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Self, InvalidField> {
        Self::parse(text)
    }
}

/// An address on the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(pub [u8; 20]);

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0x")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for Address {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Self, InvalidField> {
        let bad = || InvalidField::new("address", "must be 0x and 40 hexadecimal digits");
        let digits =
            text.strip_prefix("0x").filter(|digits| digits.len() == 40 && digits.is_ascii()).ok_or_else(bad)?;
        let mut bytes = [0; 20];
        for (byte, pair) in bytes.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|_| bad())?;
            if pair.starts_with('+') {
                return Err(bad());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}

/// A number of an asset's smallest units. As text it is decimal, so that no reader of JSON rounds it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Amount(pub u128);

impl Amount {
    /// As the database keeps it: 16 bytes, the most significant first, which sort as the numbers do.
    #[must_use]
    pub fn to_bytes(self) -> Vec<u8> {
        self.0.to_be_bytes().to_vec()
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        Some(Self(u128::from_be_bytes(bytes.try_into().ok()?)))
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for Amount {
    type Err = InvalidField;

    fn from_str(text: &str) -> Result<Self, InvalidField> {
        let bad = || InvalidField::new("amount", "must be a whole number below 2^128 in decimal digits");
        let canonical = text == "0" || (!text.starts_with('0') && text.bytes().all(|b| b.is_ascii_digit()));
        if !canonical {
            return Err(bad());
        }
        text.parse().map(Self).map_err(|_| bad())
    }
}

/// In JSON these are their text.
macro_rules! as_text {
    ($($name:ty),*) => {$(
        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}

as_text!(Account, Asset, Address, Amount);
