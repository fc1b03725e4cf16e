use super::device::CudaDevice;
use super::stream::CopyWay;
use crate::device::{DeviceError, GpuRange, Place, Span, check_range};

impl CudaDevice {
    fn check_gpu(&self, range: &GpuRange<'_>) -> Result<(), DeviceError> {
        if range.gpu() == self.gpu().uuid { Ok(()) } else { Err(DeviceError::WrongHandle { device: "CUDA" }) }
    }

    /// Enqueues a copy of `from` to the start of `to`, which is GPU memory, on the range's stream.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`], [`DeviceError::WrongHandle`] for host memory, [`DeviceError::Cuda`].
    pub fn copy_range_in(&self, from: &GpuRange<'_>, to: &Span) -> Result<(), DeviceError> {
        check_range(0, from.length(), to.length())?;
        self.check_gpu(from)?;
        gpu_memory(to)?;
        // SAFETY: the range is valid for work on its stream, as whoever made it promised; the span's region waits for
        // the GPU before it closes.
        unsafe { self.copy(to.address(), from.address(), from.length(), CopyWay::DeviceToDevice, from.stream()) }
    }

    /// Enqueues a copy of `from`, which is GPU memory, to the start of `to`, on the range's stream.
    ///
    /// # Errors
    /// As [`CudaDevice::copy_range_in`].
    pub fn copy_range_out(&self, from: &Span, to: &GpuRange<'_>) -> Result<(), DeviceError> {
        check_range(0, from.length(), to.length())?;
        self.check_gpu(to)?;
        gpu_memory(from)?;
        // SAFETY: as in `copy_range_in`.
        unsafe { self.copy(to.address(), from.address(), from.length(), CopyWay::DeviceToDevice, to.stream()) }
    }

    /// Copies `from` to host memory, behind what is enqueued on the range's stream, and returns when it is there.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] where `to` is shorter, [`DeviceError::Cuda`].
    pub fn read_range(&self, from: &GpuRange<'_>, to: &mut [u8]) -> Result<(), DeviceError> {
        check_range(0, from.length(), to.len())?;
        self.check_gpu(from)?;
        let target = to.as_mut_ptr().expose_provenance();
        // SAFETY: the range is valid for work on its stream; the stream has run the copy before the borrow of `to` ends.
        let enqueued =
            unsafe { self.copy(target, from.address(), from.length(), CopyWay::DeviceToHost, from.stream()) };
        // In any case: nothing may write to `to` once this has returned.
        let done = self.synchronize_stream(from.stream());
        enqueued.and(done)
    }

    /// Copies host memory to the start of `to`, behind what is enqueued on the range's stream, and returns when it is
    /// there: nothing reads `from` afterwards, page-locked or not.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] where `to` is shorter, [`DeviceError::Cuda`].
    pub fn write_range(&self, from: &[u8], to: &GpuRange<'_>) -> Result<(), DeviceError> {
        check_range(0, from.len(), to.length())?;
        self.check_gpu(to)?;
        let source = from.as_ptr().expose_provenance();
        // SAFETY: as in `read_range`, the other way round.
        let enqueued = unsafe { self.copy(to.address(), source, from.len(), CopyWay::HostToDevice, to.stream()) };
        // In any case: nothing may read `from` once this has returned.
        let done = self.synchronize_stream(to.stream());
        enqueued.and(done)
    }
}

fn gpu_memory(span: &Span) -> Result<(), DeviceError> {
    match span.place() {
        Place::Gpu(_) => Ok(()),
        Place::Host => Err(DeviceError::WrongHandle { device: "CUDA" }),
    }
}
