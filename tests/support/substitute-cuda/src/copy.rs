//! Copies and fills. The synchronous ones run on the legacy stream and are waited for.

use std::ffi::{c_int, c_uchar};
use std::sync::Arc;

use crate::abi::{DevicePointer, Opaque, call};
use crate::code::{INVALID_CONTEXT, Result};
use crate::context;
use crate::memory::{self, Place};
use crate::stream::{self, LEGACY, Stream};
use crate::transit;

fn run(on: &Arc<Stream>, work: impl FnOnce() -> Result + Send + 'static, wait: bool) -> Result {
    let ticket = on.submit(work);
    if wait {
        ticket.wait();
        context::health(on.device())?;
    }
    Ok(())
}

fn now(to: Place, from: Place, bytes: usize) -> c_int {
    call(|| {
        let stream = stream::resolve(LEGACY)?;
        to.check(bytes)?;
        from.check(bytes)?;
        transit::note(&to, &from, bytes);
        run(&stream, move || memory::copy(&to, &from, bytes), true)
    })
}

/// Memory that the driver does not know is read at once and written before the call returns, as the documentation of
/// asynchronous copies says of pageable memory.
fn later(to: Place, from: Place, bytes: usize, on: Opaque) -> c_int {
    call(|| {
        let stream = stream::resolve(on)?;
        to.check(bytes)?;
        from.check(bytes)?;
        transit::note(&to, &from, bytes);
        let wait = matches!(to, Place::Caller(_));
        let from = from.snapshot(bytes);
        run(&stream, move || memory::copy(&to, &from, bytes), wait)
    })
}

fn fill(to: DevicePointer, value: c_uchar, bytes: usize, on: Opaque, wait: bool) -> c_int {
    call(|| {
        let stream = stream::resolve(on)?;
        let to = Place::Known(to);
        to.check(bytes)?;
        run(&stream, move || memory::fill(&to, value, bytes), wait)
    })
}

/// A context named in a call must be one that is there; where the bytes are follows from their addresses.
fn named(contexts: [Opaque; 2]) -> Result {
    contexts.into_iter().try_for_each(|context| context::decode(context)?.map(|_| ()).ok_or(INVALID_CONTEXT))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoD_v2(to: DevicePointer, from: usize, bytes: usize) -> c_int {
    now(Place::Known(to), Place::of(from as DevicePointer), bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoH_v2(to: usize, from: DevicePointer, bytes: usize) -> c_int {
    now(Place::of(to as DevicePointer), Place::Known(from), bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoD_v2(to: DevicePointer, from: DevicePointer, bytes: usize) -> c_int {
    now(Place::Known(to), Place::Known(from), bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpy(to: DevicePointer, from: DevicePointer, bytes: usize) -> c_int {
    now(Place::of(to), Place::of(from), bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: DevicePointer, from: usize, bytes: usize, on: Opaque) -> c_int {
    later(Place::Known(to), Place::of(from as DevicePointer), bytes, on)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: usize, from: DevicePointer, bytes: usize, on: Opaque) -> c_int {
    later(Place::of(to as DevicePointer), Place::Known(from), bytes, on)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: DevicePointer, from: DevicePointer, bytes: usize, on: Opaque) -> c_int {
    later(Place::Known(to), Place::Known(from), bytes, on)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyAsync(to: DevicePointer, from: DevicePointer, bytes: usize, on: Opaque) -> c_int {
    later(Place::of(to), Place::of(from), bytes, on)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyPeer(
    to: DevicePointer,
    to_context: Opaque,
    from: DevicePointer,
    from_context: Opaque,
    bytes: usize,
) -> c_int {
    match call(|| named([to_context, from_context])) {
        0 => now(Place::Known(to), Place::Known(from), bytes),
        code => code,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyPeerAsync(
    to: DevicePointer,
    to_context: Opaque,
    from: DevicePointer,
    from_context: Opaque,
    bytes: usize,
    on: Opaque,
) -> c_int {
    match call(|| named([to_context, from_context])) {
        0 => later(Place::Known(to), Place::Known(from), bytes, on),
        code => code,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8_v2(to: DevicePointer, value: c_uchar, bytes: usize) -> c_int {
    fill(to, value, bytes, LEGACY, true)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(to: DevicePointer, value: c_uchar, bytes: usize, on: Opaque) -> c_int {
    fill(to, value, bytes, on, false)
}
