//! The doors of OpenLoRA: gRPC services, the HTTP door for metrics and health, keys, limits and streaming. The only room
//! that sees wire types, and the only one that knows there is a network.
//!
//! Start reading at [`run`] (what is opened, served and drained), then `edge.rs` (what happens to every call before its
//! service: steps one and a deadline), `inference.rs` (steps one to four and eight of a request) and `answer.rs` (tokens
//! → text → messages). `settlement.rs` shows accounts and epochs; what it needs of a chain is [`Epochs`]. `auth.rs` has the
//! one table of who may call what, `status.rs` the one mapping of errors to gRPC.
//!
//! **Invariants.** Every door asks for a key, but for health. Nothing from outside is used before it is bounded. Prompts,
//! keys and tokens are never logged. A response stream that is dropped ends its request within one step.

mod adapters;
mod answer;
mod app;
mod auth;
mod charge;
mod config;
mod convert;
mod edge;
mod epochs;
mod error;
mod frames;
mod http;
mod inference;
mod info;
pub mod keys;
mod metrics;
mod net;
mod run;
mod settlement;
mod status;
mod upload;
mod watch;

pub use app::{App, Books, EngineLimits, ModelFacts};
pub use config::{Auth, ConnectionLimits, ServerConfig, Tls};
pub use epochs::{ClaimProof, Epochs, EpochsError, Place, Proposed, Sealed, Standing};
pub use error::ServerError;
pub use run::{BoundAddrs, run};
pub use status::ERROR_DOMAIN;
