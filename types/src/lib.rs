//! The words every other room speaks: identities, limits, sampling parameters, the shape of a base model and the
//! factors of an adapter. No I/O, no async, no clock, and nothing of ours is imported here.
//!
//! A newcomer starts with [`Generation`] (identity is content), [`Limits`] (every bound has a name) and
//! [`SamplingParams`] (what a request may ask for).

mod adapter;
mod fault;
mod ids;
mod limits;
mod request;
mod sampling;
mod shape;

pub use adapter::{AdapterSizes, AdapterWeights, Elements, Matrix, SiteSize, SiteWeights};
pub use fault::{Classify, Fault, InvalidField};
pub use ids::{Alias, Generation, SequenceId, TenantId, Time, Token};
pub use limits::Limits;
pub use request::{FinishReason, Priority, TokenLogprob, TokenOutput, Usage};
pub use sampling::SamplingParams;
pub use shape::{ModelShape, Module, Site};
