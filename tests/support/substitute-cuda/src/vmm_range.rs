//! Reserved addresses, what is mapped at them, and who may do what there.

use std::ffi::{c_int, c_uint, c_ulonglong};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::abi::{AccessDescription, DevicePointer, In, Location, Out, call};
use crate::code::{INVALID_DEVICE, INVALID_VALUE, OUT_OF_MEMORY, Result};
use crate::mapping::{Access, GRANULE, Mapping};
use crate::region::{self, Kind, Region, Table};
use crate::{context, device, vmm};

/// Calls of `cuMemMap` that are still to be refused.
static REFUSED: AtomicU64 = AtomicU64::new(0);

impl Access {
    fn from_flags(flags: c_uint) -> Result<Self> {
        match flags {
            0 => Ok(Self::None),
            1 => Ok(Self::Read),
            3 => Ok(Self::ReadWrite),
            _ => Err(INVALID_VALUE),
        }
    }

    fn flags(self) -> c_ulonglong {
        match self {
            Self::None => 0,
            Self::Read => 1,
            Self::ReadWrite => 3,
        }
    }
}

fn is_whole(value: usize) -> bool {
    value.is_multiple_of(GRANULE)
}

fn reservation(table: &Table, address: usize, bytes: usize) -> Result<&Mapping> {
    let (_, mapping) = table.reserved.range(..=address).next_back().ok_or(INVALID_VALUE)?;
    if mapping.contains(address, bytes) { Ok(mapping) } else { Err(INVALID_VALUE) }
}

fn map(table: &mut Table, address: usize, bytes: usize, handle: u64) -> Result {
    let physical = vmm::get(handle)?;
    if table.overlaps(address, bytes) || bytes > physical.bytes {
        return Err(INVALID_VALUE);
    }
    reservation(table, address, bytes)?.show(address, bytes, physical.file.as_fd(), Access::None)?;
    // Memory of a GPU that is hidden here counts as the first device's; access to it is refused below.
    let device = device::all()?.iter().position(|device| device.uuid == physical.uuid).unwrap_or(0);
    table.insert(Region { base: address, bytes, device, access: Access::None, kind: Kind::Mapped(physical) });
    Ok(())
}

fn set_access(table: &mut Table, address: usize, bytes: usize, wanted: &AccessDescription) -> Result {
    let device = vmm::located(wanted.location)?;
    let access = Access::from_flags(wanted.flags)?;
    let bases = table.mapped_within(address, bytes)?;
    for base in &bases {
        let Some(Region { kind: Kind::Mapped(physical), .. }) = table.at(*base as DevicePointer) else { continue };
        if !context::can_reach(device, &physical.uuid)? {
            return Err(INVALID_DEVICE);
        }
    }
    reservation(table, address, bytes)?.protect(address, bytes, access)?;
    for base in bases {
        if let Some(region) = table.at_mut(base as DevicePointer) {
            region.access = access;
        }
    }
    Ok(())
}

fn unmap(table: &mut Table, address: usize, bytes: usize) -> Result {
    let bases = table.mapped_within(address, bytes)?;
    reservation(table, address, bytes)?.hide(address, bytes)?;
    for base in bases {
        table.remove(base as DevicePointer);
    }
    Ok(())
}

fn free(table: &mut Table, address: usize, bytes: usize) -> Result {
    let whole = table.reserved.get(&address).is_some_and(|mapping| mapping.bytes() == bytes);
    if !whole || table.overlaps(address, bytes) {
        return Err(INVALID_VALUE);
    }
    table.reserved.remove(&address);
    Ok(())
}

/// The wished address is a hint, which this driver never takes.
#[unsafe(no_mangle)]
extern "C" fn cuMemAddressReserve(
    pointer: Out<DevicePointer>,
    bytes: usize,
    alignment: usize,
    _wished: DevicePointer,
    flags: c_ulonglong,
) -> c_int {
    call(|| {
        pointer.fill(|| {
            device::all()?;
            if bytes == 0 || !is_whole(bytes) || flags != 0 {
                return Err(INVALID_VALUE);
            }
            let mapping = Mapping::reserve(bytes, alignment)?;
            let base = mapping.base();
            region::write(|table| table.reserved.insert(base, mapping));
            Ok(base as DevicePointer)
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAddressFree(pointer: DevicePointer, bytes: usize) -> c_int {
    call(|| region::write(|table| free(table, pointer as usize, bytes)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemMap(pointer: DevicePointer, bytes: usize, offset: usize, handle: u64, flags: c_ulonglong) -> c_int {
    call(|| {
        let address = pointer as usize;
        if bytes == 0 || !is_whole(bytes) || !is_whole(address) || offset != 0 || flags != 0 {
            return Err(INVALID_VALUE);
        }
        if REFUSED.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            return Err(OUT_OF_MEMORY);
        }
        region::write(|table| map(table, address, bytes, handle))
    })
}

/// The next so many `cuMemMap` of this process have no memory for their page tables.
#[unsafe(no_mangle)]
extern "C" fn substituteCudaRefuseMaps(calls: u64) {
    REFUSED.store(calls, Ordering::Relaxed);
}

#[unsafe(no_mangle)]
extern "C" fn cuMemUnmap(pointer: DevicePointer, bytes: usize) -> c_int {
    call(|| region::write(|table| unmap(table, pointer as usize, bytes)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemSetAccess(
    pointer: DevicePointer,
    bytes: usize,
    wanted: In<AccessDescription>,
    count: usize,
) -> c_int {
    call(|| {
        if count == 0 {
            return Err(INVALID_VALUE);
        }
        region::write(|table| {
            (0..count).try_for_each(|at| set_access(table, pointer as usize, bytes, &wanted.get(at)?))
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetAccess(flags: Out<c_ulonglong>, location: In<Location>, pointer: DevicePointer) -> c_int {
    call(|| {
        flags.fill(|| {
            vmm::located(location.get(0)?)?;
            let table = region::read();
            let region = table.find(pointer as usize).filter(|region| matches!(region.kind, Kind::Mapped(_)));
            Ok(region.ok_or(INVALID_VALUE)?.access.flags())
        })
    })
}
