//! Reading and writing device memory: the only place that touches its bytes.

use crate::abi::DevicePointer;
use crate::code::{ILLEGAL_ADDRESS, INVALID_VALUE, Result};
use crate::mapping::Access;
use crate::region::{self, Reading};

/// One end of a copy.
#[derive(Clone)]
pub(crate) enum Place {
    /// Memory that the driver knows; looked up when the copy runs, so that it may be gone by then.
    Known(DevicePointer),
    /// Memory of the caller that the driver does not know and that outlives the copy.
    Caller(usize),
    /// Bytes taken from the caller when the copy was queued.
    Snapshot(Vec<u8>),
}

impl Place {
    /// Memory at an address that may be device or host memory.
    pub(crate) fn of(address: DevicePointer) -> Self {
        match region::read().find(address as usize) {
            Some(_) => Self::Known(address),
            None => Self::Caller(address as usize),
        }
    }

    /// Checks at submission what the real driver checks then: that device pointers are such.
    pub(crate) fn check(&self, bytes: usize) -> Result {
        match self {
            Self::Known(address) if covers(&region::read(), *address, bytes, Access::None) => Ok(()),
            Self::Known(_) | Self::Caller(0) => Err(INVALID_VALUE),
            Self::Caller(_) | Self::Snapshot(_) => Ok(()),
        }
    }

    /// Whether it is page-locked, of host memory; `None` for a GPU's.
    pub(crate) fn host(&self) -> Option<bool> {
        match self {
            Self::Known(address) => {
                let table = region::read();
                table.find(*address as usize).filter(|region| region.kind.is_host()).map(|_| true)
            }
            Self::Caller(_) | Self::Snapshot(_) => Some(false),
        }
    }

    pub(crate) fn snapshot(self, bytes: usize) -> Self {
        let Self::Caller(address) = self else { return self };
        let mut taken = vec![0; bytes];
        // SAFETY: the caller of the driver gives `bytes` readable bytes, and waits for this call.
        unsafe { taken.as_mut_ptr().copy_from_nonoverlapping(address as *const u8, bytes) };
        Self::Snapshot(taken)
    }

    fn address(&self, table: &Reading, bytes: usize, access: Access) -> Result<usize> {
        match self {
            Self::Known(address) if covers(table, *address, bytes, access) => Ok(*address as usize),
            Self::Known(_) => Err(ILLEGAL_ADDRESS),
            Self::Caller(address) => Ok(*address),
            Self::Snapshot(taken) => Ok(taken.as_ptr() as usize),
        }
    }
}

/// Whether regions that allow `access` lie back to back over the whole range.
fn covers(table: &Reading, address: DevicePointer, bytes: usize, access: Access) -> bool {
    let Some(end) = (address as usize).checked_add(bytes) else { return false };
    let mut next = address as usize;
    while next < end {
        match table.find(next) {
            Some(region) if region.access >= access => next = region.base + region.bytes,
            _ => return false,
        }
    }
    true
}

pub(crate) fn copy(to: &Place, from: &Place, bytes: usize) -> Result {
    let table = region::read();
    let source = from.address(&table, bytes, Access::Read)?;
    let target = to.address(&table, bytes, Access::ReadWrite)?;
    // SAFETY: known ranges are mapped with these rights for as long as the table is held; the caller's own outlive the
    // copy, which it waits for or must keep them for. Overlap is allowed.
    unsafe { (target as *mut u8).copy_from(source as *const u8, bytes) };
    Ok(())
}

pub(crate) fn fill(to: &Place, value: u8, bytes: usize) -> Result {
    let table = region::read();
    let target = to.address(&table, bytes, Access::ReadWrite)?;
    // SAFETY: as in `copy`.
    unsafe { (target as *mut u8).write_bytes(value, bytes) };
    Ok(())
}
