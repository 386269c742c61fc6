//! The arithmetic: one [`Backend`] trait of coarse operations, the f32 reference of every operation beside it, and the
//! CPU backend with AVX-512 VNNI, AVX2 and portable kernels chosen at run time. The only room with `unsafe`.
//!
//! It knows tensors, rows, blocks and factors; not models, requests or file formats ([`mapped`] only lends the bytes of a
//! file). Start reading at [`Backend`], then [`reference`] (what each operation means), then [`cpu`] (how it is made fast).
//!
//! **Invariant: a row's result does not depend on the rows beside it.** For every operation the arithmetic of one
//! row, its order included, is the same whatever the number of rows, threads, segments or chunks. The conformance
//! tests compare bits.

mod backend;
pub mod conformance;
pub mod cpu;
pub mod cuda;
mod error;
pub mod mapped;
mod pages;
pub mod reference;
mod tensor_source;

pub use backend::{
    AttentionSpec, Backend, DrawnToken, ForwardScope, LayerAttention, LoraRows, LoraSegment, Numbers, RopeTable,
    SampleRow, SampledRow, SequenceRows, StepRows,
};
pub use error::KernelError;
pub use tensor_source::{BlockFormat, LinearSpec, Precision, SiteSpan, TensorSource};
