//! `cuPointerGetAttribute`.

use std::ffi::{c_int, c_uint, c_ulonglong, c_void};

use crate::abi::{DevicePointer, Opaque, Out, call};
use crate::code::{INVALID_VALUE, NOT_SUPPORTED};
use crate::region::{self, Kind};
use crate::{context, device};

const MEMORY_TYPE_HOST: c_uint = 1;
const MEMORY_TYPE_DEVICE: c_uint = 2;

#[unsafe(no_mangle)]
extern "C" fn cuPointerGetAttribute(data: Out<c_void>, attribute: c_int, pointer: DevicePointer) -> c_int {
    call(|| {
        device::all()?;
        let table = region::read();
        let region = table.find(pointer as usize).ok_or(INVALID_VALUE)?;
        let host = region.kind.is_host();
        match attribute {
            1 => data.cast::<Opaque>().put(context::opaque(region.device)),
            2 => data.cast::<c_uint>().put(if host { MEMORY_TYPE_HOST } else { MEMORY_TYPE_DEVICE }),
            3 => data.cast::<DevicePointer>().put(pointer),
            4 if host => data.cast::<DevicePointer>().put(pointer),
            7 => data.cast::<c_ulonglong>().put(match &region.kind {
                Kind::Plain { generation, .. } => *generation,
                _ => region.base as c_ulonglong,
            }),
            8 => data.cast::<u8>().put(0),
            9 => data.cast::<c_int>().put(region.device as c_int),
            10 => data.cast::<u8>().put(u8::from(matches!(region.kind, Kind::Plain { .. }))),
            11 => data.cast::<DevicePointer>().put(region.base as DevicePointer),
            12 => data.cast::<usize>().put(region.bytes),
            13 => data.cast::<u8>().put(1),
            4 => Err(INVALID_VALUE),
            _ => Err(NOT_SUPPORTED),
        }
    })
}
