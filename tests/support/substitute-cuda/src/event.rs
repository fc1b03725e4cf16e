//! Events. A wait is for the newest record that was submitted before it; if there is none, it waits for nothing.

use std::collections::HashMap;
use std::ffi::{c_int, c_uint};
use std::sync::{Arc, Mutex, PoisonError};

use crate::abi::{Opaque, Out, call};
use crate::code::{INVALID_HANDLE, INVALID_VALUE, NOT_READY, Result};
use crate::event_page::{BYTES, Page};
use crate::faults::faults;
use crate::thread_of_work::Ticket;
use crate::{context, run, stream};

const DISABLE_TIMING: c_uint = 2;
const INTERPROCESS: c_uint = 4;
const ALL_FLAGS: c_uint = 7;
/// Handles of events are numbers of a range of their own; see `context`.
const FIRST: Opaque = 0x00e0_0000_0000;
const STEP: Opaque = 0x100;

/// How an event relates to other processes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    Local,
    /// Its page is the file of this number.
    Exportable(u64),
    Imported,
}

pub(crate) struct Event {
    pub(crate) device: usize,
    pub(crate) reach: Reach,
    pub(crate) page: Page,
    /// The newest record of this process. A wait keeps it, since a later record, on a faster stream, may be reached
    /// before this one.
    pub(crate) newest: Mutex<Option<Ticket>>,
}

static EVENTS: Mutex<Option<HashMap<Opaque, Arc<Event>>>> = Mutex::new(None);

fn with_events<T>(work: impl FnOnce(&mut HashMap<Opaque, Arc<Event>>) -> T) -> T {
    work(EVENTS.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
}

pub(crate) fn insert(event: Event) -> Opaque {
    let handle = FIRST + run::fresh_number() as usize * STEP;
    with_events(|events| events.insert(handle, Arc::new(event)));
    handle
}

pub(crate) fn get(handle: Opaque) -> Result<Arc<Event>> {
    with_events(|events| events.get(&handle).cloned()).ok_or(INVALID_HANDLE)
}

/// How many events this process made, and how many it opened.
pub(crate) fn counts() -> (u64, u64) {
    with_events(|events| {
        let opened = events.values().filter(|event| event.reach == Reach::Imported).count();
        ((events.len() - opened) as u64, opened as u64)
    })
}

fn create(flags: c_uint) -> Result<Opaque> {
    let device = context::current()?;
    if flags & !ALL_FLAGS != 0 || flags & (INTERPROCESS | DISABLE_TIMING) == INTERPROCESS {
        return Err(INVALID_VALUE);
    }
    if flags & INTERPROCESS == 0 {
        return Ok(insert(Event {
            device,
            reach: Reach::Local,
            page: Page::Local(Box::default()),
            newest: Mutex::default(),
        }));
    }
    let number = run::fresh_number();
    let page = Page::shared(&run::create("event", number, BYTES as u64)?)?;
    Ok(insert(Event { device, reach: Reach::Exportable(number), page, newest: Mutex::default() }))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: Out<Opaque>, flags: c_uint) -> c_int {
    call(|| event.fill(|| create(flags)))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: Opaque) -> c_int {
    call(|| {
        let destroyed = with_events(|events| events.remove(&event)).ok_or(INVALID_HANDLE)?;
        if let Reach::Exportable(number) = destroyed.reach {
            run::remove("event", number);
        }
        Ok(())
    })
}

fn record(event: Opaque, on: Opaque) -> c_int {
    call(|| {
        let (event, stream) = (get(event)?, stream::resolve(on)?);
        if event.device != stream.device() {
            return Err(INVALID_HANDLE);
        }
        let number = event.page.issue();
        if faults().lose_events && event.reach != Reach::Local {
            event.page.finish(number);
            return Ok(());
        }
        let reached = Arc::clone(&event);
        let record = stream.submit(move || {
            reached.page.finish(number);
            Ok(())
        });
        *event.newest.lock().unwrap_or_else(PoisonError::into_inner) = Some(record);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: Opaque, on: Opaque) -> c_int {
    record(event, on)
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecordWithFlags(event: Opaque, on: Opaque, _flags: c_uint) -> c_int {
    record(event, on)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(on: Opaque, event: Opaque, flags: c_uint) -> c_int {
    call(|| {
        let (event, stream) = (get(event)?, stream::resolve(on)?);
        if flags > 1 {
            return Err(INVALID_VALUE);
        }
        let number = event.page.issued();
        let newest = event.newest.lock().unwrap_or_else(PoisonError::into_inner).clone();
        stream.submit(move || {
            match (event.reach, newest) {
                (Reach::Local, Some(record)) => record.wait(),
                _ => event.page.wait(number),
            }
            Ok(())
        });
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: Opaque) -> c_int {
    call(|| {
        let event = get(event)?;
        context::health(event.device)?;
        if event.page.is_reached(event.page.issued()) { Ok(()) } else { Err(NOT_READY) }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: Opaque) -> c_int {
    call(|| {
        let event = get(event)?;
        event.page.wait(event.page.issued());
        context::health(event.device)
    })
}
