//! Host memory that the driver knows: allocated by it or registered with it.

use std::ffi::{c_int, c_uint};

use crate::abi::{DevicePointer, Out, call};
use crate::code::{
    Code, HOST_MEMORY_ALREADY_REGISTERED, HOST_MEMORY_NOT_REGISTERED, INVALID_VALUE, NOT_SUPPORTED, Result,
};
use crate::faults::faults;
use crate::mapping::{Access, Mapping};
use crate::region::{self, Kind, Region};
use crate::{context, device, stream};

const HOST_ALLOC_FLAGS: c_uint = 0b111;
const REGISTER_FLAGS: c_uint = 0b1111;

fn allocate(bytes: usize, flags: c_uint) -> Result<usize> {
    let device = context::current()?;
    if bytes == 0 || flags & !HOST_ALLOC_FLAGS != 0 {
        return Err(INVALID_VALUE);
    }
    let mapping = Mapping::private(bytes.next_multiple_of(4096))?;
    let base = mapping.base();
    region::write(|table| {
        table.insert(Region { base, bytes, device, access: Access::ReadWrite, kind: Kind::Pinned(mapping) });
    });
    Ok(base)
}

/// Forgets a range by its base once the work that may use it is done.
fn forget(pointer: usize, is_meant: fn(&Kind) -> bool, otherwise: Code) -> Result {
    context::current()?;
    // Any device may be copying from or to it.
    (0..device::all()?.len()).for_each(stream::drain);
    region::write(|table| {
        let meant = table.at(pointer as DevicePointer).is_some_and(|region| is_meant(&region.kind));
        if !meant {
            return Err(otherwise);
        }
        table.remove(pointer as DevicePointer);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(pointer: Out<usize>, bytes: usize, flags: c_uint) -> c_int {
    call(|| pointer.fill(|| allocate(bytes, flags)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAllocHost_v2(pointer: Out<usize>, bytes: usize) -> c_int {
    call(|| pointer.fill(|| allocate(bytes, 0)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(pointer: usize) -> c_int {
    call(|| forget(pointer, |kind| matches!(kind, Kind::Pinned(_)), INVALID_VALUE))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostRegister_v2(pointer: usize, bytes: usize, flags: c_uint) -> c_int {
    call(|| {
        let device = context::current()?;
        if pointer == 0 || bytes == 0 || pointer.checked_add(bytes).is_none() || flags & !REGISTER_FLAGS != 0 {
            return Err(INVALID_VALUE);
        }
        if faults().host_register_refused {
            return Err(NOT_SUPPORTED);
        }
        region::write(|table| {
            if table.overlaps(pointer, bytes) {
                return Err(HOST_MEMORY_ALREADY_REGISTERED);
            }
            table.insert(Region { base: pointer, bytes, device, access: Access::ReadWrite, kind: Kind::Registered });
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostUnregister(pointer: usize) -> c_int {
    call(|| forget(pointer, |kind| matches!(kind, Kind::Registered), HOST_MEMORY_NOT_REGISTERED))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostGetDevicePointer_v2(out: Out<DevicePointer>, pointer: usize, flags: c_uint) -> c_int {
    call(|| {
        out.fill(|| {
            context::current()?;
            let known = region::read().find(pointer).is_some_and(|region| region.kind.is_host());
            if known && flags == 0 { Ok(pointer as DevicePointer) } else { Err(INVALID_VALUE) }
        })
    })
}
