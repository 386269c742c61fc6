//! What each operation means, in plain f32 loops that follow the formula: the yardstick of every backend's tests and the
//! definition a reader should start with. Nothing here is fast and nothing here is used while serving.

pub mod attention;
pub mod dequantise;
pub mod embed;
pub mod linear;
pub mod lora;
pub mod norm;
pub mod rope;
pub mod sample;
pub mod swiglu;
