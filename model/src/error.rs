//! What can go wrong with a base model's files and with a step. Messages name the tensor, key or limit, and what to do.

use std::path::PathBuf;

use openlora_kernels::KernelError;
use openlora_types::{Classify, Fault, InvalidField};

use crate::text::TextError;

/// Errors of this room; tokenizing and templates have their own, [`TextError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file could not be opened, read or mapped.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The path is neither a GGUF file nor a Hugging Face folder, or its container format is broken.
    #[error("{file}: {reason}")]
    Malformed {
        /// The file, or its kind where only bytes are known.
        file: String,
        /// What is wrong, and where.
        reason: String,
    },
    /// A metadata key (GGUF) or field (`config.json`) is missing, of the wrong type or out of range.
    #[error("model metadata: {0}")]
    Metadata(InvalidField),
    /// Something a model asks for that this engine does not compute.
    #[error("{what} {value:?} is not supported; supported: {supported}")]
    Unsupported {
        /// The key or property.
        what: String,
        /// Its value.
        value: String,
        /// What would have been accepted.
        supported: String,
    },
    /// A tensor in a storage format without a kernel.
    #[error("tensor {name}: type {format} is not supported; convert the file to one of {supported}")]
    TensorFormat {
        /// Tensor name in the file.
        name: String,
        /// Its type.
        format: String,
        /// What would have been accepted.
        supported: &'static str,
    },
    /// A tensor's description is inconsistent with its file.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// Tensor name in the file.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A tensor the architecture needs is not in the file.
    #[error("tensor {name} is missing: the file is incomplete or of another architecture than {architecture}")]
    MissingTensor {
        /// Tensor name.
        name: String,
        /// The architecture that needs it.
        architecture: String,
    },
    /// A tensor that nothing would compute with: serving without it would not be the model in the file.
    #[error("tensor {name} is not part of architecture {architecture}; refusing to ignore it")]
    UnknownTensor {
        /// Tensor name.
        name: String,
        /// The architecture.
        architecture: String,
    },
    /// A tensor has another shape than the configuration says.
    #[error("tensor {name} has shape {found:?}; the configuration needs {expected:?}")]
    TensorShape {
        /// Tensor name.
        name: String,
        /// `[outputs, inputs]` or `[length]` the configuration needs.
        expected: Vec<usize>,
        /// What the file has.
        found: Vec<usize>,
    },
    /// A bound of [`openlora_types::Limits`] was exceeded.
    #[error("{what} is {value}; the limit {limit} is {max}")]
    Limit {
        /// What was counted.
        what: String,
        /// How much there was.
        value: u64,
        /// Name of the limit.
        limit: &'static str,
        /// Its value.
        max: u64,
    },
    /// A step does not fit the buffers the model was loaded with.
    #[error("the step's {what} is {value}, more than the {max} this model was loaded for")]
    Step {
        /// What does not fit.
        what: &'static str,
        /// What was asked for.
        value: usize,
        /// What there is room for.
        max: usize,
    },
    /// An adapter that cannot be applied to this model.
    #[error("adapter: {0}")]
    Adapter(InvalidField),
    /// The device failed or refused.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The tokenizer or chat template of the model failed.
    #[error(transparent)]
    Text(#[from] TextError),
}

impl ModelError {
    /// A missing or bad metadata key.
    pub(crate) fn metadata(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Metadata(InvalidField::new(field, reason))
    }
}

impl Classify for ModelError {
    fn is_retryable(&self) -> bool {
        match self {
            Self::Kernel(error) => error.is_retryable(),
            Self::Text(error) => error.is_retryable(),
            _ => false,
        }
    }

    fn fault(&self) -> Fault {
        match self {
            Self::Adapter(_) => Fault::Client,
            Self::Kernel(error) => error.fault(),
            Self::Text(error) => error.fault(),
            _ => Fault::Server,
        }
    }
}
