//! The room's promises, checked through its public interface: adapters from PEFT are understood exactly, whatever is
//! wrong is refused by name, and the store survives concurrency, crashes and a failing disk.

mod concurrency;
mod crash;
mod fixtures;
mod folders;
mod fuzz;
mod generation;
mod make;
mod probe;
mod refusals;
mod registry;
mod store;
