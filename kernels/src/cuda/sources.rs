//! The kernels' sources, and how NVRTC is to compile them.

/// A file of `include` or `csrc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name, without a folder.
    pub name: &'static str,
    /// What is in it.
    pub text: &'static str,
}

macro_rules! sources {
    ($folder:literal: $($name:literal,)*) => {
        &[$(Source { name: $name, text: include_str!(concat!("../../", $folder, "/", $name)) }),*]
    };
}

/// What kernels include.
pub const HEADERS: &[Source] = sources!("include":
    "platform.cuh",
    "step.cuh",
);

/// The files of kernels, each compiled by itself. A kernel's name is unique among them all.
pub const KERNELS: &[Source] = sources!("csrc":
    "attention.cu",
    "lora.cu",
    "rope.cu",
    "rows.cu",
    "sample.cu",
);

/// What NVRTC is given for an architecture, such as `sm_90a`.
#[must_use]
pub fn nvrtc_options(architecture: &str) -> Vec<String> {
    vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".into(),
        "--device-as-default-execution-space".into(),
    ]
}
