//! The CUDA backend.

pub mod attention;
pub mod backend;
mod blas;
pub mod compile;
mod context;
pub mod device;
pub mod driver;
#[cfg(feature = "emulated")]
pub mod emulated;
mod landing;
mod library;
pub mod lora;
pub mod measure;
pub mod pages;
pub mod probe;
pub mod rope;
pub mod rows;
pub mod sample;
pub mod sources;
mod staging;
mod state;
pub mod step;
pub mod tensor;
pub mod weights;

pub use backend::Cuda;
pub use library::{Missing, Places};
