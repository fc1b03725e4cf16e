//! Ranges of this process's address space.

use std::ffi::{c_int, c_void};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use crate::code::{INVALID_VALUE, MAP_FAILED, OUT_OF_MEMORY, Result};

/// Sizes and addresses of device memory are multiples of this, as the real driver's large pages are.
pub(crate) const GRANULE: usize = 2 << 20;

pub(crate) fn round_up(bytes: usize) -> Result<usize> {
    bytes.checked_next_multiple_of(GRANULE).ok_or(OUT_OF_MEMORY)
}

/// What may be done with a range.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Access {
    None,
    Read,
    ReadWrite,
}

impl Access {
    fn protection(self) -> c_int {
        match self {
            Self::None => libc::PROT_NONE,
            Self::Read => libc::PROT_READ,
            Self::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        }
    }
}

/// An aligned range that belongs to nobody else; unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: usize,
    bytes: usize,
}

impl Mapping {
    /// A range of addresses with nothing behind it.
    pub(crate) fn reserve(bytes: usize, alignment: usize) -> Result<Self> {
        let alignment = alignment.max(GRANULE);
        if !alignment.is_power_of_two() {
            return Err(INVALID_VALUE);
        }
        let padded = bytes.checked_add(alignment).ok_or(OUT_OF_MEMORY)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the system's choice touches no memory in use.
        let raw = unsafe { libc::mmap(ptr::null_mut(), padded, libc::PROT_NONE, flags, -1, 0) };
        if raw == libc::MAP_FAILED {
            return Err(OUT_OF_MEMORY);
        }
        let raw = raw as usize;
        let base = raw.next_multiple_of(alignment);
        unmap(raw, base - raw);
        unmap(base + bytes, raw + padded - (base + bytes));
        Ok(Self { base, bytes })
    }

    /// Shows the beginning of `file`, shared with all who map it.
    pub(crate) fn shared(file: BorrowedFd<'_>, bytes: usize) -> Result<Self> {
        let mapping = Self::reserve(bytes, GRANULE)?;
        mapping.show(mapping.base, bytes, file, Access::ReadWrite)?;
        Ok(mapping)
    }

    /// Zeroes of its own.
    pub(crate) fn private(bytes: usize) -> Result<Self> {
        let mapping = Self::reserve(bytes, GRANULE)?;
        mapping.protect(mapping.base, bytes, Access::ReadWrite)?;
        Ok(mapping)
    }

    pub(crate) fn base(&self) -> usize {
        self.base
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(crate) fn contains(&self, start: usize, bytes: usize) -> bool {
        start >= self.base && start.checked_add(bytes).is_some_and(|end| end <= self.base + self.bytes)
    }

    /// Puts the beginning of `file` at `start` within this range.
    pub(crate) fn show(&self, start: usize, bytes: usize, file: BorrowedFd<'_>, access: Access) -> Result {
        let flags = libc::MAP_SHARED | libc::MAP_FIXED;
        self.replace(start, bytes, flags, file.as_raw_fd(), access)
    }

    /// Takes away what `show` put there; the addresses stay reserved.
    pub(crate) fn hide(&self, start: usize, bytes: usize) -> Result {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        self.replace(start, bytes, flags, -1, Access::None)
    }

    fn replace(&self, start: usize, bytes: usize, flags: c_int, file: c_int, access: Access) -> Result {
        if !self.contains(start, bytes) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the range lies in this mapping, which belongs to this value alone; work on it holds the lock of the
        // table of regions, which callers hold for writing when something was mapped there before.
        let at = unsafe { libc::mmap(start as *mut c_void, bytes, access.protection(), flags, file, 0) };
        if at == libc::MAP_FAILED { Err(MAP_FAILED) } else { Ok(()) }
    }

    pub(crate) fn protect(&self, start: usize, bytes: usize, access: Access) -> Result {
        if !self.contains(start, bytes) {
            return Err(INVALID_VALUE);
        }
        // SAFETY: as in `replace`: the range is this value's own.
        let outcome = unsafe { libc::mprotect(start as *mut c_void, bytes, access.protection()) };
        if outcome == 0 { Ok(()) } else { Err(MAP_FAILED) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.base, self.bytes);
    }
}

fn unmap(base: usize, bytes: usize) {
    if bytes > 0 {
        // SAFETY: callers pass what `reserve` mapped and nobody else knows: the trimmed ends, or a range being dropped.
        unsafe { libc::munmap(base as *mut c_void, bytes) };
    }
}
