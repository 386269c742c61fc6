//! The whole system from outside: the real binary, the real model, real sockets.

mod answers;
mod charging;
mod commands;
mod lifecycle;
mod settlement;
mod settlement_door;
mod support;
