//! What the CUDA backend needs of a device: memory, ordered queues of copies and launches, recorded graphs, matrix products.
//!
//! Two things are a [`Device`]: a GPU through its driver (`driver`), and the host, which runs the same kernel sources one
//! thread block after the other ([`emulated`](super::emulated)). Everything above this trait is the same for both, so that it is
//! tested where there is no GPU.

use std::fmt::Debug;
use std::sync::Arc;

use bytemuck::{NoUninit, Pod, Zeroable};

use crate::KernelError;

/// An address in device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(transparent)]
pub struct Address(pub u64);

impl Address {
    /// So many bytes further.
    #[must_use]
    pub fn plus(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// How the numbers of a buffer are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Element {
    /// Bytes of one number.
    #[must_use]
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }

    /// As kernel names end: `f32`, `bf16`, `f16`.
    #[must_use]
    pub fn suffix(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }
}

/// An ordered queue of work. Work of different streams is ordered by events only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Steps.
    Compute,
    /// Adapter pages coming in beside them.
    Copy,
}

/// One launch of a kernel.
#[derive(Clone, Copy, Debug)]
pub struct Launch<'a> {
    /// Its name in `csrc`, element suffix included.
    pub kernel: &'a str,
    /// Blocks in x and y.
    pub grid: [u32; 2],
    /// Threads of a block, a multiple of 32.
    pub threads: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// The kernel's one argument, a `repr(C)` struct by value.
    pub params: &'a [u8],
}

impl<'a> Launch<'a> {
    /// With its argument as the struct that the kernel declares.
    pub fn new<P: NoUninit>(kernel: &'a str, grid: [u32; 2], threads: u32, params: &'a P) -> Self {
        Self { kernel, grid, threads, shared_bytes: 0, params: bytemuck::bytes_of(params) }
    }

    /// With dynamic shared memory.
    #[must_use]
    pub fn shared(self, bytes: u32) -> Self {
        Self { shared_bytes: bytes, ..self }
    }
}

/// `out = x W^T`, in f32 sums: `x: [rows, inputs]`, `w: [outputs, inputs]`, `out: [rows, outputs]`, row-major, no gaps.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// Rows of x and out.
    pub rows: usize,
    /// Columns of x and w.
    pub inputs: usize,
    /// Rows of w.
    pub outputs: usize,
    /// Of x and w.
    pub element: Element,
    /// Of out.
    pub out_element: Element,
    /// x
    pub x: Address,
    /// w
    pub w: Address,
    /// out
    pub out: Address,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Properties {
    /// As its vendor calls it.
    pub name: String,
    /// Compute capability, such as (9, 0).
    pub compute: (u32, u32),
    /// How many blocks run side by side at least.
    pub multiprocessors: u32,
    /// Dynamic shared memory a block may have at most.
    pub shared_bytes_max: u32,
}

/// A device. Every call but [`Device::read`], [`Device::landed`] and [`Device::synchronise`] enqueues and returns; a fault of enqueued
/// work is reported by any later call.
pub trait Device: Send + Sync + Debug + 'static {
    /// A recorded sequence of launches, to be run again with one call.
    type Graph: Send + Debug;
    /// A point in a stream.
    type Event: Send + Debug;
    /// Host memory that bytes of the device come to while the host does something else. It may be dropped at any time.
    type Landing: Send + Debug;

    /// What this is.
    fn properties(&self) -> &Properties;

    /// Bytes of device memory nobody has taken.
    ///
    /// # Errors
    /// A device failure.
    fn memory_free(&self) -> Result<usize, KernelError>;

    /// Takes memory, aligned to 256 bytes, what is in it undefined. Prefer [`Memory::new`], which gives it back.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    fn allocate(&self, bytes: usize) -> Result<Address, KernelError>;

    /// Gives back what [`Device::allocate`] returned, once enqueued work is done with it.
    fn free(&self, address: Address, bytes: usize);

    /// Copies `bytes` to the device. They are the caller's again when this returns.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Safety
    /// `to` is in an allocation with room for them.
    unsafe fn write(&self, stream: Stream, to: Address, bytes: &[u8]) -> Result<(), KernelError>;

    /// Waits for the stream and copies from the device.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Safety
    /// `from` is in an allocation that goes on for `bytes.len()` bytes.
    unsafe fn read(&self, stream: Stream, from: Address, bytes: &mut [u8]) -> Result<(), KernelError>;

    /// Takes host memory for [`Device::enqueue_read`].
    ///
    /// # Errors
    /// A device failure.
    fn landing(&self, bytes: usize) -> Result<Self::Landing, KernelError>;

    /// Copies `bytes` bytes from the device, behind what is enqueued on the stream so far, to where [`Device::landed`] finds them. What
    /// came there before is lost.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Safety
    /// `from` is in an allocation that goes on for so many bytes.
    ///
    /// # Panics
    /// When the landing has no room for them.
    unsafe fn enqueue_read(
        &self,
        stream: Stream,
        from: Address,
        bytes: usize,
        landing: &mut Self::Landing,
    ) -> Result<(), KernelError>;

    /// Waits until the bytes enqueued last have come, also where that was for none, not for what was enqueued after them.
    ///
    /// # Errors
    /// A device failure.
    fn landed<'a>(&self, landing: &'a mut Self::Landing) -> Result<&'a [u8], KernelError>;

    /// Fills `bytes` bytes with zeros.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Safety
    /// `at` is in an allocation with room for them.
    unsafe fn zero(&self, stream: Stream, at: Address, bytes: usize) -> Result<(), KernelError>;

    /// Runs a kernel.
    ///
    /// # Errors
    /// A kernel of that name does not exist, or a device failure.
    ///
    /// # Safety
    /// `params` is the kernel's struct, and every address in it, and the numbers that say how far it is read or written, are
    /// within allocations that live until the launch is over.
    unsafe fn launch(&self, stream: Stream, launch: &Launch<'_>) -> Result<(), KernelError>;

    /// Multiplies matrices.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Safety
    /// The addresses are of allocations with room for the matrices, which live until the product is there.
    unsafe fn gemm(&self, stream: Stream, gemm: &Gemm) -> Result<(), KernelError>;

    /// Records what is enqueued on [`Stream::Compute`] by `record` instead of running it. Writes, reads and events are refused to this
    /// thread meanwhile. What other threads do there is no part of the recording: it may have to wait for its end, so `record` must not
    /// wait for them.
    ///
    /// # Errors
    /// What `record` returns, or a device failure.
    fn capture(&self, record: &mut dyn FnMut() -> Result<(), KernelError>) -> Result<Self::Graph, KernelError>;

    /// Enqueues a recorded graph on [`Stream::Compute`].
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Safety
    /// As for each of its launches.
    unsafe fn replay(&self, graph: &Self::Graph) -> Result<(), KernelError>;

    /// Marks a point in a stream.
    ///
    /// # Errors
    /// A device failure.
    fn record(&self, stream: Stream) -> Result<Self::Event, KernelError>;

    /// Marks a point in a stream whose time is kept, which costs more: for measuring.
    ///
    /// # Errors
    /// A device failure.
    fn record_timed(&self, stream: Stream) -> Result<Self::Event, KernelError> {
        self.record(stream)
    }

    /// Waits until the later of two points of [`Device::record_timed`] is passed; milliseconds between them, by the device's clock.
    ///
    /// # Errors
    /// A device that keeps no time, points whose time was not kept, or a device failure.
    fn elapsed(&self, from: &Self::Event, to: &Self::Event) -> Result<f32, KernelError> {
        let what = format!("the time from {from:?} to {to:?}");
        Err(KernelError::Device { device: self.properties().name.clone(), what, reason: "it keeps no time".into() })
    }

    /// Lets `stream` wait until the point is passed.
    ///
    /// # Errors
    /// A device failure.
    fn wait(&self, stream: Stream, event: &Self::Event) -> Result<(), KernelError>;

    /// Waits until all enqueued work is done.
    ///
    /// # Errors
    /// A device failure.
    fn synchronise(&self) -> Result<(), KernelError>;
}

/// Device memory that is given back when it is dropped.
#[derive(Debug)]
pub struct Memory<D: Device> {
    device: Arc<D>,
    address: Address,
    bytes: usize,
}

impl<D: Device> Memory<D> {
    /// Takes memory; what is in it is undefined.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn new(device: &Arc<D>, bytes: usize) -> Result<Self, KernelError> {
        // The driver refuses to allocate nothing.
        let bytes = bytes.max(1);
        Ok(Self { device: Arc::clone(device), address: device.allocate(bytes)?, bytes })
    }

    /// Takes memory that holds `values`.
    ///
    /// # Errors
    /// [`KernelError::OutOfMemory`] or a device failure.
    pub fn holding<T: NoUninit>(device: &Arc<D>, values: &[T]) -> Result<Self, KernelError> {
        let mut memory = Self::new(device, size_of_val(values))?;
        memory.write(0, values)?;
        Ok(memory)
    }

    /// Its first byte.
    #[must_use]
    pub fn address(&self) -> Address {
        self.address
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes `values` from byte `offset` on, in order with the steps.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When there is no room for them.
    pub fn write<T: NoUninit>(&mut self, offset: usize, values: &[T]) -> Result<(), KernelError> {
        let bytes = bytemuck::cast_slice(values);
        assert!(offset + bytes.len() <= self.bytes, "{} bytes at {offset} of {}", bytes.len(), self.bytes);
        // SAFETY: within this allocation, just checked.
        unsafe { self.device.write(Stream::Compute, self.address.plus(offset), bytes) }
    }

    /// Enqueues a copy of the first `bytes` bytes to `landing`, in order with the steps.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When they are not all inside, or the landing has no room for them.
    pub fn enqueue_read(&self, bytes: usize, landing: &mut D::Landing) -> Result<(), KernelError> {
        assert!(bytes <= self.bytes, "{bytes} bytes of {}", self.bytes);
        // SAFETY: within this allocation, just checked.
        unsafe { self.device.enqueue_read(Stream::Compute, self.address, bytes, landing) }
    }

    /// Waits for the steps, then reads `count` values from byte `offset` on.
    ///
    /// # Errors
    /// A device failure.
    ///
    /// # Panics
    /// When they are not all inside.
    pub fn read<T: Pod>(&self, offset: usize, count: usize) -> Result<Vec<T>, KernelError> {
        let mut values = vec![T::zeroed(); count];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        assert!(offset + bytes.len() <= self.bytes, "{} bytes at {offset} of {}", bytes.len(), self.bytes);
        // SAFETY: within this allocation, just checked.
        unsafe { self.device.read(Stream::Compute, self.address.plus(offset), bytes)? };
        Ok(values)
    }
}

impl<D: Device> Drop for Memory<D> {
    fn drop(&mut self) {
        self.device.free(self.address, self.bytes);
    }
}
