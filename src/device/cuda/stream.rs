use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use cudarc::driver::sys;

use super::api::{Raw, note_failure};
use super::context::Context;
use crate::device::{CopyStream, DeviceError, Place, Span, StreamRef};

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

impl CopyStream for CudaStream {
    fn handle(&self) -> StreamRef {
        Self::handle(self)
    }

    fn copy(&self, from: &Span, to: &Span) -> Result<(), DeviceError> {
        let to = to.part(0, from.length())?;
        let (target, source, bytes) = (to.address(), from.address(), from.length());
        if bytes == 0 {
            return Ok(());
        }
        let (target_gpu, source_gpu) = (target as u64, source as u64);
        let target_host = std::ptr::with_exposed_provenance_mut(target);
        let source_host = std::ptr::with_exposed_provenance(source);
        let cuda = self.context.current()?;
        let stream = self.stream.0;
        // SAFETY: both ranges lie in regions, of the kinds that their places say. Regions of GPU memory wait for the GPU
        // before they close, and a copy with host memory is waited for below.
        let enqueued = unsafe {
            match (from.place(), to.place()) {
                (Place::Gpu(_), Place::Gpu(_)) => {
                    return cuda.cuMemcpyDtoDAsync_v2(target_gpu, source_gpu, bytes, stream);
                }
                (Place::Host, Place::Gpu(_)) => cuda.cuMemcpyHtoDAsync_v2(target_gpu, source_host, bytes, stream),
                (Place::Gpu(_), Place::Host) => cuda.cuMemcpyDtoHAsync_v2(target_host, source_gpu, bytes, stream),
                (Place::Host, Place::Host) => {
                    std::ptr::copy(source_host.cast::<u8>(), target_host.cast(), bytes);
                    Ok(())
                }
            }
        };
        drop(cuda);
        // In any case: nothing may use the host's side once this has returned.
        enqueued.and(self.synchronize())
    }

    fn synchronize(&self) -> Result<(), DeviceError> {
        Self::synchronize(self)
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
