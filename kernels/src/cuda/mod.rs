//! The CUDA backend.

mod blas;
pub mod compile;
mod context;
pub mod device;
pub mod driver;
#[cfg(feature = "emulated")]
pub mod emulated;
mod library;
pub mod probe;
pub mod sources;
mod staging;
pub mod step;
pub mod tensor;

pub use library::{Missing, Places};
