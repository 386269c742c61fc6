//! The CUDA backend.

pub mod attention;
pub mod backend;
pub mod device;
#[cfg(feature = "emulated")]
pub mod emulated;
pub mod lora;
pub mod pages;
pub mod rope;
pub mod rows;
pub mod sample;
pub mod sources;
pub mod step;
pub mod tensor;
pub mod weights;

pub use backend::Cuda;
