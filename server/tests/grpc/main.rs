//! The doors from outside: a real engine on a tiny random model, real sockets, tonic's own client, and hand-written HTTP/2
//! where a well-behaved client would not do.

mod adapters;
mod auth;
mod charging;
mod harness;
mod hostile;
mod inference;
mod lifecycle;
mod limits;
mod owners;
mod settlement;
