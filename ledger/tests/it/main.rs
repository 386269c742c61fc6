//! The room's promises, checked through its public interface: money is conserved to the unit, nothing happens twice, and
//! what is changed by hand is found.

mod bench;
mod crash;
mod epochs;
mod money;
mod simulation;
mod tampering;
