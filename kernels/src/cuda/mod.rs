//! The CUDA backend.

pub mod device;
#[cfg(feature = "emulated")]
pub mod emulated;
pub mod rows;
pub mod sample;
pub mod sources;
pub mod step;
pub mod tensor;
pub mod weights;
