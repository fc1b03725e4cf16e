//! `cuMemAlloc` and what belongs to it.

use std::ffi::c_int;
use std::sync::Arc;

use crate::abi::{DevicePointer, Out, call};
use crate::code::{INVALID_VALUE, NOT_FOUND, Result};
use crate::faults::faults;
use crate::mapping::{Access, round_up};
use crate::region::{self, Kind, Object, Region, Table};
use crate::slab::SMALL;
use crate::{context, run, stream};

fn allocate(device: usize, bytes: usize) -> Result<DevicePointer> {
    if bytes == 0 {
        return Err(INVALID_VALUE);
    }
    region::write(|table| {
        let (object, offset) = if bytes < SMALL {
            table.slabs.cut(device, bytes)?
        } else {
            (Arc::new(Object::create(device, round_up(bytes)?)?), 0)
        };
        let base = object.mapping.base() + offset;
        let kind = Kind::Plain { object, generation: run::fresh_number(), exported: false };
        Ok(table.insert(Region { base, bytes, device, access: Access::ReadWrite, kind }))
    })
}

/// Frees what `cuMemFree` accepts: plain and stream-ordered memory, by its base.
pub(crate) fn release(table: &mut Table, pointer: DevicePointer) -> Result {
    match table.at(pointer).map(|region| &region.kind) {
        Some(Kind::Plain { .. } | Kind::Ordered { .. }) => {}
        _ => return Err(INVALID_VALUE),
    }
    let Some(region) = table.remove(pointer) else { return Err(INVALID_VALUE) };
    if let Kind::Plain { object, generation, exported } = region.kind {
        if exported {
            run::remove("export", generation);
        }
        table.slabs.give_back(&object, region.base - object.mapping.base(), region.bytes);
    }
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(pointer: Out<DevicePointer>, bytes: usize) -> c_int {
    call(|| pointer.fill(|| allocate(context::current()?, bytes)))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(pointer: DevicePointer) -> c_int {
    call(|| {
        let device = context::current()?;
        let known = region::read().find(pointer as usize).map(|region| region.device);
        stream::drain(known.unwrap_or(device));
        region::write(|table| release(table, pointer))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetAddressRange_v2(base: Out<DevicePointer>, bytes: Out<usize>, pointer: DevicePointer) -> c_int {
    call(|| {
        context::current()?;
        let table = region::read();
        let region = table.find(pointer as usize).filter(|region| !region.kind.is_host()).ok_or(NOT_FOUND)?;
        base.offer(region.base as DevicePointer);
        bytes.offer(region.bytes);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) -> c_int {
    call(|| {
        let used = run::used_memory(context::current()?)?;
        free.put(faults().memory.saturating_sub(used) as usize)?;
        total.put(faults().memory as usize)
    })
}
