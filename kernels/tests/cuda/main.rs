//! The CUDA kernels on the host: their own sources, under the address sanitiser, against the references.

mod attention;
mod backend;
mod emulator;
mod lora;
mod pages;
mod rope;
mod rows;
mod sample;
mod support;
mod two_steps;
