use std::sync::Arc;

use openlora_types::{Classify, Fault};

/// The database refused something or cannot be reached.
#[derive(Clone, Debug, thiserror::Error)]
#[error("could not {action}: {source}")]
pub struct DatabaseError {
    /// What was being done, in words.
    pub action: &'static str,
    /// The database's error.
    pub source: Arc<sqlx::Error>,
}

impl DatabaseError {
    /// Wraps an error of the database; `action` completes "could not …".
    pub fn new(action: &'static str) -> impl FnOnce(sqlx::Error) -> Self {
        move |source| Self { action, source: Arc::new(source) }
    }
}

impl Classify for DatabaseError {
    fn is_retryable(&self) -> bool {
        true
    }

    fn fault(&self) -> Fault {
        Fault::Server
    }
}

/// The error of a room that keeps its tables here.
pub trait Failure: From<DatabaseError> {
    /// The database's error, where this is one.
    fn database(&self) -> Option<&DatabaseError>;
}
