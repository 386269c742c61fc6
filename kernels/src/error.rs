use openlora_types::{Classify, Fault, Site};

/// What can go wrong on a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// A tensor's length does not fit the shape it was declared with.
    #[error("{name}: expected {expected} bytes for {format} of shape [{rows}, {cols}], found {found}")]
    TensorSize {
        /// Tensor name in the file.
        name: String,
        /// Storage format.
        format: &'static str,
        /// Outputs.
        rows: usize,
        /// Inputs.
        cols: usize,
        /// Bytes the shape needs.
        expected: usize,
        /// Bytes there are.
        found: usize,
    },
    /// A width that the kernels' blocks of 32 do not divide.
    #[error("{name}: {cols} inputs; the block formats need a multiple of {multiple}")]
    Width {
        /// Tensor name in the file.
        name: String,
        /// Inputs.
        cols: usize,
        /// What must divide it.
        multiple: usize,
    },
    /// A weight that is not finite, or too large for the format it is packed into.
    #[error("{name}: row {row} holds a weight that is not finite or out of the packed format's range")]
    WeightRange {
        /// Tensor name in the file.
        name: String,
        /// Output.
        row: usize,
    },
    /// A row order that is not one existing row per row.
    #[error("{name}: the row order does not name rows below {rows}, one for each")]
    RowOrder {
        /// Tensor name in the file.
        name: String,
        /// Outputs.
        rows: usize,
    },
    /// The parts of a fused linear do not fit together.
    #[error("{name}: {found} {what}, but the linear it is part of has {expected}")]
    Parts {
        /// Tensor name in the file.
        name: String,
        /// What differs: inputs, bias values, outputs of the sites.
        what: &'static str,
        /// Of the part.
        found: usize,
        /// Of the linear.
        expected: usize,
    },
    /// An adapter's factor does not fit the linear it targets.
    #[error("{site}: factor of shape [{rows}, {cols}] does not fit a linear of {inputs} inputs and {outputs} outputs")]
    AdapterShape {
        /// Where.
        site: Site,
        /// Rows of the factor.
        rows: usize,
        /// Columns of the factor.
        cols: usize,
        /// Inputs of the linear.
        inputs: usize,
        /// Outputs of the linear.
        outputs: usize,
    },
    /// An adapter's numbers cannot be held in the device's format.
    #[error(
        "{site}: {value} is out of the range of 16-bit floats; serve with precision = \"f32\" or rescale the adapter"
    )]
    AdapterRange {
        /// Where.
        site: Site,
        /// The value.
        value: f32,
    },
    /// An adapter's rank is larger than the device's kernels have room for.
    #[error("{site}: rank {rank}; this device's kernels take up to {max}")]
    AdapterRank {
        /// Where.
        site: Site,
        /// The rank.
        rank: usize,
        /// The largest.
        max: usize,
    },
    /// An adapter was given too few pages.
    #[error("the adapter needs {needed} pages of the pool and was given {given}")]
    AdapterPages {
        /// Pages that the factors take.
        needed: usize,
        /// Pages given.
        given: usize,
    },
    /// A page of the pool cannot be used for what was asked.
    #[error("page {page} {what}")]
    Page {
        /// Its number in the pool.
        page: u32,
        /// Why not.
        what: &'static str,
    },
    /// The device has no room for an allocation.
    #[error("{what}: {bytes} bytes could not be allocated")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// Bytes asked for.
        bytes: usize,
    },
    /// The GPU, its driver or one of its libraries refused; the device may not be usable any more.
    #[error("{device}: {what}: {reason}")]
    Device {
        /// Which device, as `cuda:0`.
        device: String,
        /// What was being done.
        what: String,
        /// What the driver said.
        reason: String,
    },
    /// The thread pool could not be made.
    #[error("{threads} kernel threads: {reason}")]
    Threads {
        /// Threads asked for.
        threads: usize,
        /// Why not.
        reason: String,
    },
    /// A kernel thread panicked; the device must not be used again.
    #[error("a kernel thread panicked: {0}")]
    ThreadPanicked(String),
}

impl Classify for KernelError {
    fn is_retryable(&self) -> bool {
        false
    }
    fn fault(&self) -> Fault {
        match self {
            Self::AdapterShape { .. } | Self::AdapterRange { .. } | Self::AdapterRank { .. } => Fault::Client,
            _ => Fault::Server,
        }
    }
}
