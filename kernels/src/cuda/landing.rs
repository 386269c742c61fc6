//! Pinned memory that bytes of the device come to while the host does something else: what a step drew, while the next is enqueued.

use std::fmt;
use std::sync::Arc;

use super::context::{CudaEvent, Pinned, Shared};
use super::device::{Address, Stream};
use crate::KernelError;

/// Room for one copy at a time.
pub struct CudaLanding {
    pinned: Pinned,
    /// Of the copy enqueued last.
    bytes: usize,
    /// Behind that copy, until it has been waited for.
    event: Option<CudaEvent>,
}

impl fmt::Debug for CudaLanding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaLanding({} of {} bytes, {:?})", self.bytes, self.pinned.bytes, self.event)
    }
}

impl CudaLanding {
    /// With the context current.
    pub(super) fn new(shared: &Arc<Shared>, bytes: usize) -> Result<Self, KernelError> {
        // The driver refuses to take nothing.
        Ok(Self { pinned: Pinned::new(shared, bytes.max(1))?, bytes: 0, event: None })
    }

    /// With the context current, and the turn on the stream.
    ///
    /// # Safety
    /// As for [`Device::enqueue_read`](super::device::Device::enqueue_read).
    pub(super) unsafe fn enqueue(&mut self, stream: Stream, from: Address, bytes: usize) -> Result<(), KernelError> {
        assert!(bytes <= self.pinned.bytes, "{bytes} bytes where there is room for {}", self.pinned.bytes);
        self.wait()?;
        self.bytes = 0;
        let (shared, what) = (Arc::clone(&self.pinned.shared), "reading from the device");
        let event = shared.event()?;
        // Of no bytes there is the event, which says that what was enqueued before is done.
        if bytes > 0 {
            // SAFETY: there is room for the bytes, and no copy goes there: the one before has been waited for. The caller vouches for
            // where they are read from.
            let status = unsafe {
                let to = self.pinned.start.cast();
                (shared.cuda.cuMemcpyDtoHAsync_v2)(to, from.0, bytes, shared.stream(stream))
            };
            shared.check(what, status)?;
        }
        // SAFETY: both are alive.
        let status = unsafe { (shared.cuda.cuEventRecord)(event.handle, shared.stream(stream)) };
        if status != 0 {
            // Nobody would know when the bytes are there.
            return Err(shared.lose(what, shared.cuda.explain(status)));
        }
        (self.bytes, self.event) = (bytes, Some(event));
        Ok(())
    }

    /// Waits for the copy, with the context current.
    pub(super) fn wait(&mut self) -> Result<&[u8], KernelError> {
        let shared = &self.pinned.shared;
        if let Some(event) = &self.event {
            // SAFETY: the event is alive.
            let status = unsafe { (shared.cuda.cuEventSynchronize)(event.handle) };
            if status != 0 {
                // As above: the memory is the copy's for ever.
                return Err(shared.lose("waiting for results", shared.cuda.explain(status)));
            }
            self.event = None;
        }
        // SAFETY: the copy has filled so many bytes and is over; none is enqueued while they are borrowed.
        Ok(unsafe { std::slice::from_raw_parts(self.pinned.start, self.bytes) })
    }
}

impl Drop for CudaLanding {
    fn drop(&mut self) {
        // Where this fails the device is lost, and the pinned memory goes with the process.
        if self.event.is_some() && self.pinned.shared.enter("giving results up").is_ok() {
            let _ = self.wait();
        }
    }
}
