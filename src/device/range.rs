use std::marker::PhantomData;

use super::StreamRef;
use crate::id::GpuUuid;

/// GPU memory of somebody else in this process: a tensor of another library's, and the stream its work is on.
#[derive(Debug, Clone, Copy)]
pub struct GpuRange<'a> {
    gpu: GpuUuid,
    address: usize,
    length: usize,
    stream: StreamRef,
    owner: PhantomData<&'a ()>,
}

impl<'a> GpuRange<'a> {
    /// `length` bytes at `address` of `gpu`, for work on `stream`.
    ///
    /// # Safety
    /// The memory must be valid for every piece of work that is enqueued on `stream` while the value lives: freed at
    /// once only after the stream has run it, or in the order of that stream. Whoever gets the value writable must be
    /// the only one to use the memory. `stream` must be one of the GPU's primary context and live as long.
    #[must_use]
    pub const unsafe fn new(gpu: GpuUuid, address: usize, length: usize, stream: StreamRef) -> Self {
        Self { gpu, address, length, stream, owner: PhantomData }
    }

    /// The GPU, as this process's driver names it.
    #[must_use]
    pub const fn gpu(&self) -> GpuUuid {
        self.gpu
    }

    /// The device address.
    #[must_use]
    pub const fn address(&self) -> usize {
        self.address
    }

    /// Bytes.
    #[must_use]
    pub const fn length(&self) -> usize {
        self.length
    }

    /// The stream.
    #[must_use]
    pub const fn stream(&self) -> StreamRef {
        self.stream
    }
}
