use std::ffi::c_char;
use std::sync::Arc;

use cudarc::driver::sys;

use super::api::{Raw, note_failure};
use super::context::Context;
use crate::device::{DeviceError, StreamRef};

const DISABLE_TIMING: u32 = 2;
const INTERPROCESS: u32 = 4;

/// A point in the work of one stream. Destroyed on drop, which does not disturb what already waits for it here.
#[derive(Debug)]
pub(super) struct Event {
    event: Raw<sys::CUevent_st>,
    context: Arc<Context>,
}

impl Event {
    /// An event of this process.
    pub(super) fn local(context: &Arc<Context>) -> Result<Self, DeviceError> {
        Self::create(context, DISABLE_TIMING)
    }

    /// An event that another process can open.
    pub(super) fn interprocess(context: &Arc<Context>) -> Result<Self, DeviceError> {
        Self::create(context, DISABLE_TIMING | INTERPROCESS)
    }

    fn create(context: &Arc<Context>, flags: u32) -> Result<Self, DeviceError> {
        let mut event = std::ptr::null_mut();
        // SAFETY: the out-pointer is valid for the call; the context is current.
        unsafe { context.current()?.cuEventCreate(&raw mut event, flags) }?;
        Ok(Self { event: Raw(event), context: Arc::clone(context) })
    }

    /// Another process's event.
    pub(super) fn open(context: &Arc<Context>, handle: [u8; 64]) -> Result<Self, DeviceError> {
        let handle = sys::CUipcEventHandle { reserved: handle.map(u8::cast_signed) };
        let mut event = std::ptr::null_mut();
        // SAFETY: the out-pointer is valid for the call; a handle that is none is refused by the driver.
        unsafe { context.current()?.cuIpcOpenEventHandle(&raw mut event, handle) }?;
        Ok(Self { event: Raw(event), context: Arc::clone(context) })
    }

    pub(super) fn handle(&self) -> Result<[u8; 64], DeviceError> {
        let mut handle = sys::CUipcEventHandle { reserved: [0; 64] };
        // SAFETY: the out-pointer is valid for the call; the event lives while `self` does.
        unsafe { self.context.current()?.cuIpcGetEventHandle(&raw mut handle, self.event.0) }?;
        Ok(handle.reserved.map(c_char::cast_unsigned))
    }

    /// Puts the event behind everything enqueued on the stream so far, in place of where it was.
    pub(super) fn record(&self, stream: StreamRef) -> Result<(), DeviceError> {
        // SAFETY: the event lives while `self` does; a `StreamRef` names a living stream of this context.
        unsafe { self.context.current()?.cuEventRecord(self.event.0, stream.raw()) }
    }

    /// What is enqueued on the stream from now on runs after what the event stands behind now.
    pub(super) fn hold_back(&self, stream: StreamRef) -> Result<(), DeviceError> {
        // SAFETY: as in `record`; 0 is the default of the flags.
        unsafe { self.context.current()?.cuStreamWaitEvent(stream.raw(), self.event.0, 0) }
    }

    /// Whether the GPU has come past the newest record.
    pub(super) fn is_done(&self) -> Result<bool, DeviceError> {
        // SAFETY: the event lives while `self` does.
        unsafe { self.context.current()?.is_done(self.event.0) }
    }

    /// Blocks until the GPU has come past the newest record.
    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        // SAFETY: the event lives while `self` does.
        unsafe { self.context.current()?.cuEventSynchronize(self.event.0) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let event = self.event.0;
        // SAFETY: created or opened once, destroyed here alone.
        note_failure(self.context.current().and_then(|cuda| unsafe { cuda.cuEventDestroy_v2(event) }));
    }
}
