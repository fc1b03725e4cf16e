//! Legacy interprocess memory: whole plain allocations, by 64-byte handles.

use std::ffi::{c_int, c_uint};
use std::fs::File;
use std::sync::{Arc, Weak};

use crate::abi::{Bytes64, DevicePointer, Out, call};
use crate::code::{INVALID_CONTEXT, INVALID_HANDLE, INVALID_VALUE, MAP_FAILED, PEER_ACCESS_UNSUPPORTED, Result};
use crate::faults::faults;
use crate::handle::{Handle, Sort};
use crate::mapping::Access;
use crate::region::{self, Kind, Object, Region, Source, Table};
use crate::{context, device, run};

const LAZY_ENABLE_PEER_ACCESS: c_uint = 1;

fn export(pointer: DevicePointer) -> Result<Bytes64> {
    context::current()?;
    region::write(|table| {
        let region = table.at_mut(pointer).ok_or(INVALID_VALUE)?;
        let Kind::Plain { object, generation, exported } = &mut region.kind else { return Err(INVALID_VALUE) };
        if !*exported {
            // While the marker is there, the allocation is: blocks that small allocations share outlive each of them.
            run::create("export", *generation, 0)?;
            *exported = true;
        }
        let handle = Handle {
            number: object.number,
            file_bytes: object.mapping.bytes() as u64,
            offset: (region.base - object.mapping.base()) as u64,
            bytes: region.bytes as u64,
            generation: *generation,
            ..Handle::own(&device::get(region.device)?.uuid)
        };
        Ok(handle.encode(Sort::Memory))
    })
}

/// What memory and events have in common when they are opened.
pub(crate) fn admit(handle: &Handle, device: usize) -> Result {
    if faults().ipc_refused {
        return Err(INVALID_HANDLE);
    }
    if handle.is_own() {
        return Err(INVALID_CONTEXT);
    }
    if handle.namespace != faults().namespace || !run::is_alive(handle.process) {
        return Err(INVALID_VALUE);
    }
    if context::can_reach(device, &handle.gpu)? { Ok(()) } else { Err(PEER_ACCESS_UNSUPPORTED) }
}

fn open(bytes: &Bytes64, flags: c_uint) -> Result<DevicePointer> {
    let device = context::current()?;
    if faults().open.fails() {
        return Err(MAP_FAILED);
    }
    if flags != LAZY_ENABLE_PEER_ACCESS {
        return Err(INVALID_VALUE);
    }
    let handle = Handle::decode(bytes, Sort::Memory)?;
    admit(&handle, device)?;
    let file = living(&handle)?;
    region::write(|table| again(table, &handle).map_or_else(|| first_time(table, &handle, &file, device), Ok))
}

/// The file of an allocation that its owner has not freed.
fn living(handle: &Handle) -> Result<File> {
    run::existing("export", handle.process, handle.generation)?.ok_or(INVALID_VALUE)?;
    let file = run::existing("memory", handle.process, handle.number)?.ok_or(INVALID_VALUE)?;
    let long_enough = file.metadata().is_ok_and(|data| data.len() >= handle.file_bytes);
    let inside = handle.offset.checked_add(handle.bytes).is_some_and(|end| end <= handle.file_bytes);
    if long_enough && inside { Ok(file) } else { Err(INVALID_VALUE) }
}

fn again(table: &mut Table, handle: &Handle) -> Option<DevicePointer> {
    let meant = Source { process: handle.process, generation: handle.generation };
    table.all_mut().find_map(|region| match &mut region.kind {
        Kind::Imported { source, opened, .. } if *source == meant => {
            *opened += 1;
            Some(region.base as DevicePointer)
        }
        _ => None,
    })
}

fn first_time(table: &mut Table, handle: &Handle, file: &File, device: usize) -> Result<DevicePointer> {
    let block = (handle.process, handle.number);
    let object = match table.imported.get(&block).and_then(Weak::upgrade) {
        Some(object) => object,
        None => {
            let file = (!faults().corrupt_import).then_some(file);
            let object = Arc::new(Object::import(file, handle.number, handle.file_bytes as usize)?);
            table.imported.insert(block, Arc::downgrade(&object));
            object
        }
    };
    let source = Source { process: handle.process, generation: handle.generation };
    let base = object.mapping.base() + handle.offset as usize;
    let kind = Kind::Imported { _object: object, source, opened: 1 };
    Ok(table.insert(Region { base, bytes: handle.bytes as usize, device, access: Access::ReadWrite, kind }))
}

fn close(table: &mut Table, pointer: DevicePointer) -> Result {
    let region = table.at_mut(pointer).ok_or(INVALID_VALUE)?;
    let Kind::Imported { opened, .. } = &mut region.kind else { return Err(INVALID_VALUE) };
    *opened -= 1;
    if *opened == 0 {
        table.remove(pointer);
        table.imported.retain(|_, object| object.strong_count() > 0);
    }
    Ok(())
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcGetMemHandle(handle: Out<Bytes64>, pointer: DevicePointer) -> c_int {
    call(|| handle.fill(|| export(pointer)))
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcOpenMemHandle_v2(pointer: Out<DevicePointer>, handle: Bytes64, flags: c_uint) -> c_int {
    call(|| pointer.fill(|| open(&handle, flags)))
}

/// Does not wait for work that still uses the mapping: that is its user's duty, and such work fails (700).
#[unsafe(no_mangle)]
extern "C" fn cuIpcCloseMemHandle(pointer: DevicePointer) -> c_int {
    call(|| {
        context::current()?;
        region::write(|table| close(table, pointer))
    })
}
