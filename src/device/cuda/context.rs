use std::collections::HashMap;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;
use std::sync::{Arc, LazyLock, Weak};

use cudarc::driver::sys;
use parking_lot::Mutex;

use super::api::{Api, Raw, note_failure};
use super::driver::{Driver, Gpu};
use super::ipc::Opened;
use super::region::CudaRegion;
use super::stream::NON_BLOCKING;
use crate::device::{DeviceError, Place};
use crate::id::GpuUuid;

/// Regions opened by handle. The driver allows one opening per handle, process and GPU; so do we.
pub(super) type Openings = HashMap<[u8; 64], Weak<CudaRegion<Opened>>>;

/// The primary context of one GPU, the one that all libraries of the process share, retained while this lives.
pub(super) struct Context {
    api: &'static Api,
    gpu: Gpu,
    device: sys::CUdevice,
    context: Raw<sys::CUctx_st>,
    /// Runs the copies between host slices and regions. Does not order with the default stream.
    copies: Raw<sys::CUstream_st>,
    /// Held while a handle is opened or closed, so that the two do not cross.
    pub(super) openings: Mutex<Openings>,
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the openings: their keys are capabilities and do not belong in logs.
        f.debug_struct("Context").field("gpu", &self.gpu).finish_non_exhaustive()
    }
}

impl Context {
    /// The process's one context of this GPU, made where there is none.
    pub(super) fn of(uuid: GpuUuid) -> Result<Arc<Self>, DeviceError> {
        static CONTEXTS: LazyLock<Mutex<HashMap<GpuUuid, Weak<Context>>>> = LazyLock::new(Mutex::default);
        let mut contexts = CONTEXTS.lock();
        if let Some(context) = contexts.get(&uuid).and_then(Weak::upgrade) {
            return Ok(context);
        }
        let context = Arc::new(Self::retain(uuid)?);
        contexts.insert(uuid, Arc::downgrade(&context));
        Ok(context)
    }

    fn retain(uuid: GpuUuid) -> Result<Self, DeviceError> {
        let driver = Driver::get()?;
        let gpu = driver.gpu(uuid)?.clone();
        let device = driver.device(uuid)?;
        let api = driver.api();
        let mut context = std::ptr::null_mut();
        // SAFETY: the out-pointer is valid for the call; the device is the driver's.
        unsafe { api.cuDevicePrimaryCtxRetain(&raw mut context, device) }?;
        // From here on dropping the value releases the context.
        let mut this = Self {
            api,
            gpu,
            device,
            context: Raw(context),
            copies: Raw(std::ptr::null_mut()),
            openings: Mutex::default(),
        };
        let mut copies = std::ptr::null_mut();
        // SAFETY: the out-pointer is valid for the call, the context is current.
        unsafe { this.current()?.cuStreamCreate(&raw mut copies, NON_BLOCKING) }?;
        this.copies = Raw(copies);
        Ok(this)
    }

    /// Makes the context current on this thread until the answer is dropped. Calls that need a context go through it.
    pub(super) fn current(&self) -> Result<Current<'_>, DeviceError> {
        let mut before = std::ptr::null_mut();
        // SAFETY: the out-pointer is valid for the call.
        unsafe { self.api.cuCtxGetCurrent(&raw mut before) }?;
        if before != self.context.0 {
            // SAFETY: retained while `self` lives.
            unsafe { self.api.cuCtxSetCurrent(self.context.0) }?;
        }
        Ok(Current { context: self, before, this_thread: PhantomData })
    }

    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(super) fn place(&self) -> Place {
        Place::Gpu(self.gpu.uuid)
    }

    pub(super) fn device(&self) -> sys::CUdevice {
        self.device
    }

    /// The stream for copies that the caller waits for.
    pub(super) fn copies(&self) -> sys::CUstream {
        self.copies.0
    }

    /// Waits for everything this process has enqueued on the GPU.
    pub(super) fn synchronize(&self) -> Result<(), DeviceError> {
        // SAFETY: a plain call, with the context current.
        unsafe { self.current()?.cuCtxSynchronize() }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if !self.copies.0.is_null() {
            // SAFETY: made in `retain`, used only through `self`, destroyed here alone.
            note_failure(self.current().and_then(|cuda| unsafe { cuda.cuStreamDestroy_v2(self.copies.0) }));
        }
        // SAFETY: balances the one retain in `retain`.
        note_failure(unsafe { self.api.cuDevicePrimaryCtxRelease_v2(self.device) });
    }
}

/// The driver's functions while a context is current on this thread.
pub(super) struct Current<'c> {
    context: &'c Context,
    before: sys::CUcontext,
    /// What is current belongs to the thread.
    this_thread: PhantomData<*const ()>,
}

impl Deref for Current<'_> {
    type Target = Api;

    fn deref(&self) -> &Api {
        self.context.api
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        if self.before != self.context.context.0 {
            // SAFETY: it was current on this thread when this value was made, and whoever made it so still counts on it.
            note_failure(unsafe { self.context.api.cuCtxSetCurrent(self.before) });
        }
    }
}
