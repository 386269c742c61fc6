//! LoRA adapters from PEFT folders to verified weights: parsing, content identity, the registry, the host cache and
//! leases.
//!
//! This room knows files and the base model's *sizes* ([`openlora_types::ModelShape`]); it knows no device, no network
//! and no arithmetic. Everything it reads comes from strangers, so it fails closed: a field that is not understood, a
//! tensor that matches no module, a module without its tensors, a NaN: the adapter is refused with the field named.
//! PEFT is laxer, and then serves the base model in the adapter's name.
//!
//! Where to start: [`AdapterStore`] (`store.rs`) is the whole; one adapter is read in this order: `folder.rs` opens the
//! files, `config.rs` checks `adapter_config.json`, `safetensors_file.rs` the tensors' header, `matching.rs` decides as
//! PEFT would which site each tensor belongs to, `weights.rs` reads and hashes them into a generation
//! (docs/generation.md). `files.rs` keeps the files in an object store, `registry.rs` what is known of them in a
//! database, `change.rs` changes both through crashes, and `cache.rs` holds weights in memory.

// The tests' helpers name the crate as its users do.
#[cfg(test)]
extern crate self as openlora_adapters;

mod cache;
mod change;
mod config;
#[cfg(test)]
mod crash_tests;
mod error;
mod files;
mod folder;
mod info;
mod inspect;
mod json;
mod lease;
mod matching;
mod names;
mod parse;
mod pattern;
mod registry;
mod safetensors_file;
mod sizes;
mod store;
mod sweep;
mod upload;
mod weights;

pub use config::LoraConfig;
pub use error::AdapterError;
pub use info::{Actor, AdapterInfo, Registration, StoreStats};
pub use inspect::{Inspection, MatchedModule, inspect_folder};
pub use lease::Lease;
pub use parse::BaseRows;
pub use registry::{Lineage, Quota};
pub use safetensors_file::{Dtype, Header, TensorEntry};
pub use store::{AdapterStore, Probe, StoreConfig};
pub use upload::Upload;
