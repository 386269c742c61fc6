//! The CUDA kernels on the host: their own sources, under the address sanitiser, against the references.

mod emulator;
mod support;
