//! The engine's promises, checked through its handle with tiny real models on the CPU backend, and on the CUDA backend's emulated
//! device: answers equal recorded ones whatever the batch, the chunks and the preemptions; readers that leave, lag or come too late
//! cost nobody else anything; and a device that fails ends every stream.
//!
//! Start at `probe.rs`, the backend that lets a test hold, count and break the engine's steps: no test depends on timing.

mod adapters;
mod answers;
mod deaths;
mod device;
mod limits;
mod preemption;
mod probe;
mod readers;
mod rig;
mod samples;
