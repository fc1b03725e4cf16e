use std::sync::Arc;

use half::{bf16, f16};

use super::{DeviceError, Place, Region, check_range};
use crate::tensor::DType;

/// A checked range of a region; keeps the region alive.
#[derive(Debug, Clone)]
pub struct Span {
    region: Arc<dyn Region>,
    offset: usize,
    length: usize,
}

impl Span {
    /// The `length` bytes at `offset`.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] where the range leaves the region.
    pub fn new(region: Arc<dyn Region>, offset: usize, length: usize) -> Result<Self, DeviceError> {
        check_range(offset, length, region.size_bytes())?;
        Ok(Self { region, offset, length })
    }

    /// The region the range lies in.
    #[must_use]
    pub fn region(&self) -> &Arc<dyn Region> {
        &self.region
    }

    /// The `length` bytes at `offset` bytes from the start of the range.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] where they leave the range.
    pub fn part(&self, offset: usize, length: usize) -> Result<Self, DeviceError> {
        check_range(offset, length, self.length)?;
        Ok(Self { region: Arc::clone(&self.region), offset: self.offset + offset, length })
    }

    /// The kind of memory.
    #[must_use]
    pub fn place(&self) -> Place {
        self.region.place()
    }

    /// Bytes in the range.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// Address of the first byte in this process.
    #[must_use]
    pub fn address(&self) -> usize {
        self.region.address() + self.offset
    }

    /// Copies `bytes` to the start of the range.
    ///
    /// # Errors
    /// As [`Span::write_at`].
    pub fn write(&self, bytes: &[u8]) -> Result<(), DeviceError> {
        self.write_at(0, bytes)
    }

    /// Copies `bytes` to `offset` bytes from the start of the range and returns when they are there.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] where they do not fit, [`DeviceError::ReadOnly`], [`DeviceError::Cuda`].
    pub fn write_at(&self, offset: usize, bytes: &[u8]) -> Result<(), DeviceError> {
        check_range(offset, bytes.len(), self.length)?;
        self.region.copy_in(self.offset + offset, bytes)
    }

    /// Copies the start of the range into `target`.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] where the range is shorter, [`DeviceError::Cuda`].
    pub fn read(&self, target: &mut [u8]) -> Result<(), DeviceError> {
        check_range(0, target.len(), self.length)?;
        self.region.copy_out(self.offset, target)
    }

    /// The first `length` bytes, for a caller that holds the slot's lease or pin.
    ///
    /// A peer that breaks the protocol and writes meanwhile changes values, nothing else: every bit pattern is a byte.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] where the range is shorter, [`DeviceError::NotHost`] for GPU memory.
    pub(crate) fn bytes(&self, length: usize) -> Result<&[u8], DeviceError> {
        self.check(length)?;
        // SAFETY: mapped host memory inside the region, kept mapped by `self`; the lease or pin rules out writers.
        Ok(unsafe { std::slice::from_raw_parts(self.address() as *const u8, length) })
    }

    /// The first `length` bytes for writing, for the one caller that holds the slot's only lease or pin.
    ///
    /// # Errors
    /// As [`Span::bytes`].
    pub(crate) fn bytes_mut(&mut self, length: usize) -> Result<&mut [u8], DeviceError> {
        self.check(length)?;
        // SAFETY: as in `bytes`; the lease is exclusive and the borrow of `self` keeps this process to one slice.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.address() as *mut u8, length) })
    }

    /// Makes the pages of the range ready to be written, in one call instead of a fault for each. Contents stay as they
    /// are. Only a hint: where the system knows no such call, the first write to each page does it.
    pub(crate) fn populate(&self) {
        #[cfg(target_os = "linux")]
        if self.region.place() == Place::Host && self.length > 0 {
            let page = rustix::param::page_size();
            let start = self.address() / page * page;
            let length = self.address() + self.length - start;
            // SAFETY: the range is mapped host memory, kept mapped by `self`: a region starts at a page or, behind a
            // header, within the mapping's first ones, so rounding down stays inside. The call changes no byte.
            _ = unsafe {
                rustix::mm::madvise(
                    std::ptr::with_exposed_provenance_mut(start),
                    length,
                    rustix::mm::Advice::LinuxPopulateWrite,
                )
            };
        }
    }

    /// The first `count` elements, for a caller that holds the slot's lease or pin.
    ///
    /// # Errors
    /// As [`Span::bytes`]; [`DeviceError::OutOfBounds`] also for a range that is not aligned for the elements.
    pub(crate) fn elements<T: Element>(&self, count: usize) -> Result<&[T], DeviceError> {
        let bytes = self.bytes(count.saturating_mul(size_of::<T>()))?;
        // SAFETY: every bit pattern is an element, by the list of those that are; `align_to` takes care of alignment.
        match unsafe { bytes.align_to::<T>() } {
            ([], elements, []) => Ok(elements),
            _ => Err(DeviceError::OutOfBounds { offset: self.offset, length: self.length, size_bytes: self.length }),
        }
    }

    fn check(&self, length: usize) -> Result<(), DeviceError> {
        if self.region.place() != Place::Host {
            return Err(DeviceError::NotHost);
        }
        check_range(0, length, self.length)
    }
}

/// A type whose every bit pattern is an element of a tensor.
pub trait Element: sealed::Sealed + Copy + 'static {
    /// What tensors of it say.
    const DTYPE: DType;
}

mod sealed {
    /// Nobody else says of a type that all its bit patterns are good.
    pub trait Sealed {}
}

macro_rules! elements {
    ($($element:ty => $dtype:ident,)*) => {$(
        impl sealed::Sealed for $element {}
        impl Element for $element {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}

elements! {
    u8 => U8,
    i8 => I8,
    u16 => U16,
    i16 => I16,
    u32 => U32,
    i32 => I32,
    u64 => U64,
    i64 => I64,
    f16 => F16,
    bf16 => Bf16,
    f32 => F32,
    f64 => F64,
}
