//! The CUDA kernels on the host: their own sources, under the address sanitiser, against the references.

mod backend;
mod emulator;
mod rows;
mod sample;
mod lora;
mod attention;
mod rope;
mod support;
