//! Stream-ordered memory, `cuMemAllocAsync`: of the default pool, hence never exportable.

use std::ffi::c_int;
use std::sync::Arc;

use crate::abi::{DevicePointer, Opaque, Out, call};
use crate::code::{INVALID_VALUE, Result};
use crate::mapping::{Access, round_up};
use crate::region::{self, Kind, Object, Region};
use crate::{plain, stream};

#[unsafe(no_mangle)]
extern "C" fn cuMemAllocAsync(pointer: Out<DevicePointer>, bytes: usize, on: Opaque) -> c_int {
    call(|| {
        pointer.fill(|| {
            let device = stream::resolve(on)?.device();
            if bytes == 0 {
                return Err(INVALID_VALUE);
            }
            region::write(|table| {
                let object = Arc::new(Object::create(device, round_up(bytes)?)?);
                let base = object.mapping.base();
                let kind = Kind::Ordered { _object: object, freed: false };
                Ok(table.insert(Region { base, bytes, device, access: Access::ReadWrite, kind }))
            })
        })
    })
}

/// Refuses what `cuMemFree` would refuse, and a second free before the first one ran.
fn announce(pointer: DevicePointer) -> Result {
    region::write(|table| match table.at_mut(pointer).map(|region| &mut region.kind) {
        Some(Kind::Ordered { freed, .. }) if !*freed => {
            *freed = true;
            Ok(())
        }
        Some(Kind::Plain { .. }) => Ok(()),
        _ => Err(INVALID_VALUE),
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeAsync(pointer: DevicePointer, on: Opaque) -> c_int {
    call(|| {
        let stream = stream::resolve(on)?;
        announce(pointer)?;
        stream.submit(move || region::write(|table| plain::release(table, pointer)));
        Ok(())
    })
}
