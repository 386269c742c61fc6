//! The CUDA device where there is no GPU: what is missing is named, kernels are compiled and kept, and the driver's part runs
//! against a stand-in for the driver (`fake.rs`). `device.rs` has what needs a real GPU.

mod compile;
mod missing;
