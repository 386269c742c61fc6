//! What can go wrong in this room.

use std::{io, sync::Arc};

use openlora_database::{DatabaseError, Failure};
use openlora_types::{Classify, Fault, Generation, InvalidField};

/// Every error of this room. Cloneable, because one failed load answers all requests that waited for it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// The alias, path, configuration or a tensor was refused; the field is named. INVALID_ARGUMENT.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// The alias is taken, or is the base model's own name. ALREADY_EXISTS.
    #[error("alias {alias} {reason}")]
    AlreadyExists {
        /// The alias asked for.
        alias: String,
        /// Why it cannot be had, and what to do.
        reason: &'static str,
    },
    /// No such alias, or the alias never stood for that generation. NOT_FOUND.
    #[error("adapter {name} is not registered here; list what is with `openlora adapter ls`")]
    NotFound {
        /// What was asked for.
        name: String,
    },
    /// Somebody else's alias. PERMISSION_DENIED.
    #[error("alias {alias} belongs to another owner; only its owner or an administrator may change it")]
    PermissionDenied {
        /// The alias.
        alias: String,
    },
    /// Somebody else's quota, or one's own to set. PERMISSION_DENIED.
    #[error("the quota of {owner} is shown to {owner} and administrators, and set by administrators")]
    QuotaDenied {
        /// Whose.
        owner: String,
    },
    /// The alias does not stand for the generation the caller expected. FAILED_PRECONDITION.
    #[error("alias {alias} stands for generation {found}, not for {expected}; read it again and retry")]
    Conflict {
        /// The alias.
        alias: String,
        /// What the caller expected.
        expected: Generation,
        /// What it is.
        found: Generation,
    },
    /// A bound of the store is reached. RESOURCE_EXHAUSTED.
    #[error("{reason}; the limit {limit} is {max}")]
    LimitReached {
        /// The limit's name in the configuration.
        limit: &'static str,
        /// Its value.
        max: u64,
        /// What ran into it.
        reason: String,
        /// Whether it passes by itself (requests end) or somebody must act.
        passes: bool,
    },
    /// The stored bytes are no longer those that were registered. Only requests for this generation fail. INTERNAL.
    #[error("the stored files of generation {generation} are damaged: {reason}; register the adapter again")]
    Corrupt {
        /// Which generation.
        generation: Generation,
        /// What is wrong with it.
        reason: String,
    },
    /// The probe itself failed: the device, or its memory. UNAVAILABLE.
    #[error("could not probe the adapter: {reason}")]
    Probe {
        /// What failed.
        reason: String,
    },
    /// The registry's database refused something or cannot be reached. UNAVAILABLE.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// The store's disk refused something (full, failing, read-only). UNAVAILABLE.
    #[error("could not {action}: {source}")]
    Io {
        /// What was being done, in words.
        action: String,
        /// The system's error.
        source: Arc<io::Error>,
    },
}

impl AdapterError {
    /// Wraps a system error; `action` completes "could not …".
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| {
            // Errors of the tempfile crate carry the server's paths, which are no client's business; keep their kind.
            let ours = matches!(source.kind(), io::ErrorKind::Other | io::ErrorKind::ResourceBusy);
            let wrapped = source.raw_os_error().is_none() && !ours;
            let source = if wrapped { source.kind().into() } else { source };
            Self::Io { action: action.into(), source: Arc::new(source) }
        }
    }

    /// Wraps an error of the database; `action` completes "could not …".
    pub(crate) fn database(action: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self::Database(DatabaseError::new(action)(source))
    }

    /// A refused field.
    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid(InvalidField::new(field, reason))
    }
}

impl Failure for AdapterError {
    fn database(&self) -> Option<&DatabaseError> {
        match self {
            Self::Database(error) => Some(error),
            _ => None,
        }
    }
}

impl Classify for AdapterError {
    fn is_retryable(&self) -> bool {
        match self {
            Self::Io { .. } | Self::Database { .. } | Self::Probe { .. } => true,
            Self::LimitReached { passes, .. } => *passes,
            _ => false,
        }
    }

    fn fault(&self) -> Fault {
        match self {
            Self::Io { .. } | Self::Database { .. } | Self::Corrupt { .. } | Self::Probe { .. } => Fault::Server,
            Self::LimitReached { passes, .. } if *passes => Fault::Server,
            _ => Fault::Client,
        }
    }
}
