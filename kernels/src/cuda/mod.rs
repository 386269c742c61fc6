//! The CUDA backend.

pub mod device;
pub mod step;
pub mod tensor;
pub mod weights;
