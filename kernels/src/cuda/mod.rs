//! The CUDA backend.

mod blas;
pub mod compile;
pub mod device;
pub mod driver;
mod library;
pub mod probe;
mod staging;
pub mod step;
pub mod tensor;

pub use library::{Missing, Places};
