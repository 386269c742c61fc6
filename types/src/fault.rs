use std::fmt;

/// Whose doing an error is. The server maps it to a status; dashboards separate it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request was wrong; sending it again unchanged cannot help.
    Client,
    /// This process failed or is out of room.
    Server,
    /// Something behind this process (storage, network) failed.
    Upstream,
}

/// Every error the server can meet answers these two questions.
pub trait Classify {
    /// Whether the same request may succeed later.
    fn is_retryable(&self) -> bool;
    /// Whose doing it is.
    fn fault(&self) -> Fault;
}

/// A value that was refused: which field, and why. Every rejection of input carries one, so that a client can show it
/// beside the field.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct InvalidField {
    /// Path of the field in the request or file, such as `sampling.top_p` or `rank_pattern`.
    pub field: String,
    /// What is wrong with it, starting with a verb: "must be …", "is 12; the limit … is 8".
    pub reason: String,
}

impl InvalidField {
    /// `field reason`.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { field: field.into(), reason: reason.into() }
    }
}

impl fmt::Display for InvalidField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.field, self.reason)
    }
}

impl Classify for InvalidField {
    fn is_retryable(&self) -> bool {
        false
    }
    fn fault(&self) -> Fault {
        Fault::Client
    }
}
