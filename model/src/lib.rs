//! Base models: files (GGUF, Hugging Face folders), configurations, the forward pass, tokenizer and chat template.
//!
//! It knows tensors by name, layers and tokens, and computes through [`openlora_kernels::Backend`]; it knows no requests,
//! queues, adapter names or wire formats. Start at [`ModelFiles`] (what is on disk, validated and memory-mapped), then
//! [`Model`] (the same, loaded on a device) whose [`Model::forward`] is the whole architecture on one page.
//!
//! **Invariant: a model is served exactly or not at all.** A tensor nothing computes with, a missing one, a wrong shape, a
//! rope scaling or architecture without an implementation is an error that names it.

mod adapter;
mod config;
pub mod conformance;
mod error;
mod files;
mod forward;
mod gguf;
mod hf;
mod probe;
mod ready;
mod roles;
mod rope;
pub mod text;
mod weights;

#[cfg(test)]
mod fuzz_tests;
#[cfg(test)]
mod gguf_tests;
#[cfg(test)]
mod hf_tests;
#[cfg(test)]
mod testing;

pub use config::{Architecture, Biases, ModelConfig};
pub use error::ModelError;
pub use files::{ModelFiles, ModelSummary, TensorListing};
pub use forward::Activations;
pub use gguf::{GgufFile, GgufTensor, GgufValue};
pub use probe::{PROBE_DIVERGENCE_MAX, Probe, ProbeDistance, ProbeReport};
pub use rope::{RopeConfig, RopeScaling, Yarn, YarnAttention};
pub use weights::{LoadOptions, Model};
