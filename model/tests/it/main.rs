//! The model room against answers from outside: transformers and PEFT in f32 for the real model and for tiny random models of
//! every family (fixtures/make), and against itself for the promise that a row does not depend on its neighbours.

mod batch;
mod cuda;
mod families;
mod golden;
mod probe;
mod quantised;
mod support;
