//! Transactions against a real node: anvil, started by each test for itself.

mod anvil;
mod crash;
mod faults;
mod keys;
mod preflight;
mod proxy;
mod sending;
mod stage;
