//! Result codes and their names.

use std::ffi::{CStr, c_char, c_int};

use crate::abi::Out;

/// A result of the driver.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Code(pub(crate) c_int);

pub(crate) type Result<T = ()> = std::result::Result<T, Code>;

macro_rules! codes {
    ($($name:ident = $number:literal, $text:literal;)*) => {
        $(#[allow(dead_code, reason = "the table also serves cuGetErrorName")]
        pub(crate) const $name: Code = Code($number);)*
        const TEXTS: &[(c_int, &CStr, &CStr)] = &[$(($number, name(concat!("CUDA_ERROR_", stringify!($name), "\0")), $text)),*];
    };
}

codes! {
    INVALID_VALUE = 1, c"invalid argument";
    OUT_OF_MEMORY = 2, c"out of memory";
    NOT_INITIALIZED = 3, c"initialization error";
    DEINITIALIZED = 4, c"driver shutting down";
    NO_DEVICE = 100, c"no CUDA-capable device is detected";
    INVALID_DEVICE = 101, c"invalid device ordinal";
    INVALID_CONTEXT = 201, c"invalid device context";
    MAP_FAILED = 205, c"mapping of buffer object failed";
    ALREADY_MAPPED = 208, c"resource already mapped";
    PEER_ACCESS_UNSUPPORTED = 217, c"peer access is not supported between these two devices";
    INVALID_HANDLE = 400, c"invalid resource handle";
    NOT_FOUND = 500, c"named symbol not found";
    NOT_READY = 600, c"device not ready";
    ILLEGAL_ADDRESS = 700, c"an illegal memory access was encountered";
    PEER_ACCESS_ALREADY_ENABLED = 704, c"peer access is already enabled";
    PEER_ACCESS_NOT_ENABLED = 705, c"peer access has not been enabled";
    CONTEXT_IS_DESTROYED = 709, c"context is destroyed";
    TOO_MANY_PEERS = 711, c"peer mapping resources exhausted";
    HOST_MEMORY_ALREADY_REGISTERED = 712, c"part or all of the requested memory range is already mapped";
    HOST_MEMORY_NOT_REGISTERED = 713, c"pointer does not correspond to a registered memory region";
    NOT_PERMITTED = 800, c"operation not permitted";
    NOT_SUPPORTED = 801, c"operation not supported";
    UNKNOWN = 999, c"unknown error";
}

const fn name(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("each name ends with its only NUL"),
    }
}

fn texts(code: c_int) -> Option<(&'static CStr, &'static CStr)> {
    match code {
        0 => Some((c"CUDA_SUCCESS", c"no error")),
        code => TEXTS.iter().find(|(number, ..)| *number == code).map(|&(_, name, text)| (name, text)),
    }
}

fn give(out: &Out<*const c_char>, text: Option<&'static CStr>) -> c_int {
    let pointer = text.map_or(std::ptr::null(), CStr::as_ptr);
    match out.put(pointer) {
        Ok(()) if text.is_some() => 0,
        _ => INVALID_VALUE.0,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(code: c_int, name: Out<*const c_char>) -> c_int {
    give(&name, texts(code).map(|(name, _)| name))
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(code: c_int, text: Out<*const c_char>) -> c_int {
    give(&text, texts(code).map(|(_, text)| text))
}
