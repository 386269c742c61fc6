//! The CUDA backend.

pub mod device;
#[cfg(feature = "emulated")]
pub mod emulated;
pub mod sources;
pub mod step;
pub mod tensor;
