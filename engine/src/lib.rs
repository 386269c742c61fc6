//! The engine owns the device: one thread takes requests from a bounded queue, asks the scheduler for the next step, runs
//! the model over all scheduled rows and hands out tokens. It knows no money, wire format or network.
//!
//! Start reading at [`EngineHandle`] (how other threads reach it), then `step.rs` (one step is schedule → forward → sample →
//! update, steps five to seven of a request) and `loader.rs` (adapters on their way to the device).
//!
//! **Invariant: one thread mutates.** Everything a step changes belongs to the step thread; other threads see it through
//! the queue, each request's own channel and a copy of the statistics.

mod config;
mod engine;
mod error;
mod handle;
mod loader;
mod request;
mod stats;
mod step;

pub use config::EngineConfig;
pub use engine::Engine;
pub use error::EngineError;
pub use handle::{EngineHandle, Event, OutputStream, Submit};
pub use openlora_scheduler::Rate;
pub use stats::EngineStats;
