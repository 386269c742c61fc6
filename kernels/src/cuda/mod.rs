//! The CUDA backend.

pub mod attention;
pub mod device;
#[cfg(feature = "emulated")]
pub mod emulated;
pub mod rope;
pub mod sources;
pub mod step;
pub mod tensor;
