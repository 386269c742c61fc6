//! The CUDA device where there is no GPU: what is missing is named, kernels are compiled and kept, and the driver's part runs
//! against a stand-in for the driver. `device::on_a_gpu` needs a real one.

mod compile;
mod device;
mod fake;
mod missing;
