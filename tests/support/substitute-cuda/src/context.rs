//! Primary contexts, the current context of each thread, and access between devices.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::{c_int, c_uint};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use crate::abi::{Opaque, Out, call};
use crate::code::{
    CONTEXT_IS_DESTROYED, Code, INVALID_CONTEXT, INVALID_DEVICE, INVALID_VALUE, PEER_ACCESS_ALREADY_ENABLED,
    PEER_ACCESS_NOT_ENABLED, PEER_ACCESS_UNSUPPORTED, Result,
};
use crate::faults::faults;
use crate::{device, stream};

/// Contexts, streams and events are numbers from ranges of their own, so that mixing them up is noticed.
const FIRST: Opaque = 0x00c0_0000_0000;
const STEP: Opaque = 0x100;

struct Primary {
    retained: Mutex<u64>,
    /// The first failure of asynchronous work; from then on every call that needs the context repeats it.
    fault: AtomicI32,
    peers: Mutex<BTreeSet<usize>>,
}

fn primaries() -> Result<&'static [Primary]> {
    static PRIMARIES: OnceLock<Vec<Primary>> = OnceLock::new();
    let count = device::all()?.len();
    let fresh = || Primary { retained: Mutex::default(), fault: AtomicI32::new(0), peers: Mutex::default() };
    Ok(PRIMARIES.get_or_init(|| (0..count).map(|_| fresh()).collect()))
}

fn primary(device: usize) -> Result<&'static Primary> {
    primaries()?.get(device).ok_or(INVALID_DEVICE)
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    static CURRENT: RefCell<Vec<Option<usize>>> = const { RefCell::new(Vec::new()) };
}

/// A thread that is ending has no context any more.
fn top() -> Option<usize> {
    CURRENT.try_with(|stack| stack.borrow().last().copied().flatten()).ok().flatten()
}

/// The device whose context is current in this thread and healthy.
pub(crate) fn current() -> Result<usize> {
    device::all()?;
    let device = top().ok_or(INVALID_CONTEXT)?;
    if *hold(&primary(device)?.retained) == 0 {
        return Err(CONTEXT_IS_DESTROYED);
    }
    health(device)?;
    Ok(device)
}

pub(crate) fn health(device: usize) -> Result {
    match primary(device)?.fault.load(Ordering::Acquire) {
        0 => Ok(()),
        code => Err(Code(code)),
    }
}

pub(crate) fn poison(device: usize, code: Code) {
    if let Ok(primary) = primary(device) {
        // Only the first failure is kept.
        let _ = primary.fault.compare_exchange(0, code.0, Ordering::AcqRel, Ordering::Acquire);
    }
}

/// Whether the current context may reach the memory of another device at all.
///
/// `other` is a UUID or as much of it as a handle has room for.
pub(crate) fn can_reach(device: usize, other: &[u8]) -> Result<bool> {
    Ok(device::get(device)?.uuid.starts_with(other) || faults().peer_access)
}

pub(crate) fn retained_contexts() -> u64 {
    primaries().map_or(0, |all| all.iter().filter(|primary| *hold(&primary.retained) > 0).count() as u64)
}

pub(crate) fn opaque(device: usize) -> Opaque {
    FIRST + device * STEP
}

pub(crate) fn decode(context: Opaque) -> Result<Option<usize>> {
    if context == 0 {
        return Ok(None);
    }
    let offset = context.checked_sub(FIRST).filter(|offset| offset % STEP == 0).ok_or(INVALID_CONTEXT)?;
    let device = offset / STEP;
    primary(device).map_err(|_| INVALID_CONTEXT)?;
    Ok(Some(device))
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: Out<Opaque>, device: c_int) -> c_int {
    call(|| {
        context.fill(|| {
            let device = device::ordinal(device)?;
            *hold(&primary(device)?.retained) += 1;
            Ok(opaque(device))
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> c_int {
    call(|| {
        let mut retained = hold(&primary(device::ordinal(device)?)?.retained);
        *retained = retained.checked_sub(1).ok_or(INVALID_CONTEXT)?;
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxGetState(device: c_int, flags: Out<c_uint>, active: Out<c_int>) -> c_int {
    call(|| {
        let retained = *hold(&primary(device::ordinal(device)?)?.retained);
        flags.put(0)?;
        active.put(c_int::from(retained > 0))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetCurrent(context: Out<Opaque>) -> c_int {
    call(|| {
        device::all()?;
        context.put(top().map_or(0, opaque))
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: Opaque) -> c_int {
    call(|| {
        device::all()?;
        let chosen = decode(context)?;
        CURRENT.with_borrow_mut(|stack| {
            stack.pop();
            stack.push(chosen);
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPushCurrent_v2(context: Opaque) -> c_int {
    call(|| {
        let chosen = decode(context)?.ok_or(INVALID_VALUE)?;
        CURRENT.with_borrow_mut(|stack| stack.push(Some(chosen)));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPopCurrent_v2(context: Out<Opaque>) -> c_int {
    call(|| {
        device::all()?;
        let popped = CURRENT.with_borrow_mut(Vec::pop).flatten().ok_or(INVALID_CONTEXT)?;
        context.offer(opaque(popped));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetDevice(device: Out<c_int>) -> c_int {
    call(|| device.fill(|| current().map(|device| device as c_int)))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> c_int {
    call(|| {
        let device = current()?;
        stream::drain(device);
        health(device)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceCanAccessPeer(can: Out<c_int>, device: c_int, peer: c_int) -> c_int {
    call(|| {
        can.fill(|| {
            let (device, peer) = (device::ordinal(device)?, device::ordinal(peer)?);
            Ok(c_int::from(device != peer && faults().peer_access))
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxEnablePeerAccess(peer: Opaque, flags: c_uint) -> c_int {
    call(|| {
        let device = current()?;
        let peer = decode(peer)?.ok_or(INVALID_CONTEXT)?;
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        if peer == device {
            return Err(INVALID_CONTEXT);
        }
        if !faults().peer_access {
            return Err(PEER_ACCESS_UNSUPPORTED);
        }
        if hold(&primary(device)?.peers).insert(peer) { Ok(()) } else { Err(PEER_ACCESS_ALREADY_ENABLED) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxDisablePeerAccess(peer: Opaque) -> c_int {
    call(|| {
        let device = current()?;
        let peer = decode(peer)?.ok_or(INVALID_CONTEXT)?;
        if hold(&primary(device)?.peers).remove(&peer) { Ok(()) } else { Err(PEER_ACCESS_NOT_ENABLED) }
    })
}
