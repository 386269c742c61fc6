//! What is to be known of a GPU before it serves: whether its answers are right ([`check`], `openlora gpu-check`), and how fast it is
//! beside what its memory and its tensor cores could do ([`bench`], `openlora bench --device cuda`). Both are written for any
//! [`Device`](openlora_kernels::cuda::device::Device), so that tests run them on the emulated one.

pub mod bench;
pub mod check;
pub mod model_steps;
pub mod report;
pub mod steps;
