//! LoRA adapters from PEFT folders to verified weights: parsing, content identity, the registry, the host cache and
//! leases.
//!
//! This room knows files and the base model's *sizes* ([`openlora_types::ModelShape`]); it knows no device, no network
//! and no arithmetic. Everything it reads comes from strangers, so it fails closed: a field that is not understood, a
//! tensor that matches no module, a module without its tensors, a NaN: the adapter is refused with the field named.
//! PEFT is laxer, and then serves the base model in the adapter's name.
//!
//! Where to start: [`AdapterStore`] (`store.rs`) is the registry; one adapter is read in this order: `folder.rs` opens
//! the files, `config.rs` checks `adapter_config.json`, `safetensors_file.rs` the tensors' header, `matching.rs` decides
//! as PEFT would which site each tensor belongs to, `weights.rs` reads and hashes them into a generation
//! (docs/generation.md), `disk.rs` keeps them through crashes and `cache.rs` in memory.

mod cache;
mod config;
mod disk;
mod error;
mod folder;
mod inspect;
mod json;
mod matching;
mod parse;
mod pattern;
mod safetensors_file;
mod store;
mod upload;
mod weights;

pub use cache::Lease;
pub use config::LoraConfig;
pub use error::AdapterError;
pub use inspect::{Inspection, MatchedModule, inspect_folder};
pub use parse::BaseRows;
pub use safetensors_file::{Dtype, Header, TensorEntry};
pub use store::{Actor, AdapterInfo, AdapterStore, StoreConfig, StoreStats};
pub use upload::Upload;
