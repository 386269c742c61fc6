//! What can go wrong with text. Messages name the file, key or message, the limit, and what to do next.

use std::path::PathBuf;

use openlora_types::{Classify, Fault, InvalidField};

/// Errors of tokenizers, chat templates and stop strings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// A tokenizer or template file could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A vocabulary or tokenizer file contradicts itself.
    #[error("{what}: {reason}; the model's files are damaged or incomplete")]
    Malformed {
        /// File or metadata key.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// A tokenizer of a kind this engine would not reproduce exactly.
    #[error("{what} {value:?} is not supported (supported: {supported})")]
    Unsupported {
        /// File or metadata key.
        what: String,
        /// What it says.
        value: String,
        /// What would work.
        supported: &'static str,
    },
    /// The tokenizer failed on a text.
    #[error("the tokenizer failed: {0}")]
    Encode(String),
    /// The model's chat template does not compile, or failed on these messages.
    #[error("the model's chat template failed: {0}")]
    Template(String),
    /// The template itself refused the messages (`raise_exception`), such as for roles that do not alternate.
    #[error("the model's chat template refuses these messages: {0}")]
    Refused(String),
    /// The template went over a bound of [`openlora_types::Limits`].
    #[error("the chat template {what}; the limit {limit} is {max}")]
    TemplateLimit {
        /// What it did.
        what: &'static str,
        /// Name of the limit.
        limit: &'static str,
        /// Its value.
        max: u64,
    },
    /// A field of the request was refused.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
}

impl TextError {
    pub(crate) fn malformed(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Malformed { what: what.into(), reason: reason.into() }
    }
}

impl Classify for TextError {
    fn is_retryable(&self) -> bool {
        false
    }

    fn fault(&self) -> Fault {
        match self {
            // Whether a template stays inside its bounds depends on the messages it is given.
            Self::Refused(_) | Self::TemplateLimit { .. } | Self::Invalid(_) => Fault::Client,
            _ => Fault::Server,
        }
    }
}
