//! Measurements: the engine in this process (`openlora bench`), a server from outside (`openlora-load`), and what both
//! need: random adapters on disk, percentiles, run folders. `examples/step_rate.rs` times single steps and the operations in them,
//! without a scheduler, also for random models of other shapes. Peers are measured by the scripts in `peers/`, side by side by
//! `compare.sh`; dated results are in `runs/`.
//!
//! Start reading at [`engine_bench`]: the same work that the peers' scripts do, so that the figures can be compared.

pub mod adapters;
pub mod engine_bench;
pub mod gpu;
pub mod load;
pub mod register;
pub mod replay;
pub mod shapes;
pub mod stats;
pub mod timed;
pub mod trace;
