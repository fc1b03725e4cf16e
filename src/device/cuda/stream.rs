use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;

use super::api::{Raw, note_failure};
use super::context::Context;
use crate::device::{DeviceError, StreamRef};

/// The stream does not order with the default stream, on which other libraries of the process may work.
pub(super) const NON_BLOCKING: u32 = 1;

/// From where to where a copy goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CopyWay {
    /// Within GPU memory.
    DeviceToDevice,
    /// From host to GPU memory.
    HostToDevice,
    /// From GPU to host memory.
    DeviceToHost,
}

impl StreamRef {
    pub(super) fn raw(self) -> sys::CUstream {
        std::ptr::with_exposed_provenance_mut(self.0)
    }
}

/// A stream of its own, which does not order with the default stream. Destroyed on drop; what is enqueued still runs.
#[derive(Debug)]
pub struct CudaStream {
    stream: Raw<sys::CUstream_st>,
    context: Arc<Context>,
}

impl CudaStream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, DeviceError> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: the out-pointer is valid for the call; the context is current.
        unsafe { context.current()?.cuStreamCreate(&raw mut stream, NON_BLOCKING) }?;
        Ok(Self { stream: Raw(stream), context: Arc::clone(context) })
    }

    /// The stream's handle, valid while this lives.
    #[must_use]
    pub fn handle(&self) -> StreamRef {
        StreamRef(self.stream.0.expose_provenance())
    }

    /// Blocks until the stream has run everything enqueued so far.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] where the GPU failed, also at work enqueued before.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        synchronize(&self.context, self.handle())
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        let stream = self.stream.0;
        // SAFETY: made in `new`, destroyed here alone.
        note_failure(self.context.current().and_then(|cuda| unsafe { cuda.cuStreamDestroy_v2(stream) }));
    }
}

pub(super) fn synchronize(context: &Context, stream: StreamRef) -> Result<(), DeviceError> {
    // SAFETY: a `StreamRef` names a living stream of this context.
    unsafe { context.current()?.cuStreamSynchronize(stream.raw()) }
}

pub(super) fn delay(context: &Context, stream: StreamRef, time: Duration) -> Result<(), DeviceError> {
    unsafe extern "C" fn pause(nanoseconds: *mut c_void) {
        std::thread::sleep(Duration::from_nanos(nanoseconds.addr() as u64));
    }
    // The time travels in place of the pointer: nothing has to outlive this call.
    let nanoseconds = usize::try_from(time.as_nanos()).unwrap_or(usize::MAX);
    let argument = std::ptr::without_provenance_mut(nanoseconds);
    // SAFETY: a `StreamRef` names a living stream of this context; the function makes no driver call, which it must not,
    // and dereferences nothing.
    unsafe { context.current()?.cuLaunchHostFunc(stream.raw(), Some(pause), argument) }
}
