//! The CUDA backend.

pub mod device;
pub mod rows;
pub mod sample;
pub mod step;
pub mod tensor;
