use std::{fmt, path::Path};

use openlora_types::InvalidField;

/// Which database, and so which dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Sqlite,
    Postgres,
}

/// Where a database is. Never shown: it may hold a password.
#[derive(Clone)]
pub struct DatabaseUrl {
    pub(crate) text: String,
    pub(crate) kind: Kind,
}

impl DatabaseUrl {
    /// A URL as in the settings.
    ///
    /// # Errors
    /// [`InvalidField`] on `field` for a URL of another kind of database.
    pub fn parse(field: &str, text: &str) -> Result<Self, InvalidField> {
        let kind = match text.split_once(':') {
            Some(("sqlite", _)) => Kind::Sqlite,
            Some(("postgres" | "postgresql", _)) => Kind::Postgres,
            _ => {
                let why = "must begin with sqlite: or postgres:, or be empty for a SQLite file in the data folder";
                return Err(InvalidField::new(field, why));
            }
        };
        Ok(Self { text: text.to_owned(), kind })
    }

    /// A SQLite file, created if missing.
    #[must_use]
    pub fn sqlite(file: &Path) -> Self {
        use std::{fmt::Write, os::unix::ffi::OsStrExt};
        let mut text = String::from("sqlite://");
        for &byte in file.as_os_str().as_bytes() {
            if byte.is_ascii_alphanumeric() || b"/._-".contains(&byte) {
                text.push(byte.into());
            } else {
                // Writing to a String cannot fail.
                let _written = write!(text, "%{byte:02X}");
            }
        }
        text.push_str("?mode=rwc");
        Self { text, kind: Kind::Sqlite }
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DatabaseUrl({:?})", self.kind)
    }
}
