//! Events that other processes open.

use std::ffi::c_int;
use std::sync::Mutex;

use crate::abi::{Bytes64, Opaque, Out, call};
use crate::code::{INVALID_HANDLE, INVALID_VALUE, MAP_FAILED, Result};
use crate::event::{self, Event, Reach};
use crate::event_page::Page;
use crate::faults::faults;
use crate::handle::{Handle, Sort};
use crate::{context, device, ipc, run};

fn export(event: Opaque) -> Result<Bytes64> {
    let event = event::get(event)?;
    let Reach::Exportable(number) = event.reach else { return Err(INVALID_HANDLE) };
    let handle = Handle { number, ..Handle::own(&device::get(event.device)?.uuid) };
    Ok(handle.encode(Sort::Event))
}

fn open(bytes: &Bytes64) -> Result<Opaque> {
    let device = context::current()?;
    if faults().event_open.fails() {
        return Err(MAP_FAILED);
    }
    let handle = Handle::decode(bytes, Sort::Event)?;
    ipc::admit(&handle, device)?;
    let file = run::existing("event", handle.process, handle.number)?.ok_or(INVALID_VALUE)?;
    Ok(event::insert(Event { device, reach: Reach::Imported, page: Page::shared(&file)?, newest: Mutex::default() }))
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcGetEventHandle(handle: Out<Bytes64>, event: Opaque) -> c_int {
    call(|| handle.fill(|| export(event)))
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcOpenEventHandle(event: Out<Opaque>, handle: Bytes64) -> c_int {
    call(|| event.fill(|| open(&handle)))
}
