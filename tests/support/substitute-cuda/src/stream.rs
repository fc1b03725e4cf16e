//! Streams, their handles, and the order between them.
//!
//! The legacy stream of a device waits for all earlier work of the streams that do not opt out, and they wait for its.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::abi::{Opaque, Out, call};
use crate::code::{INVALID_HANDLE, INVALID_VALUE, NOT_READY, Result};
use crate::context;
use crate::run::fresh_number;
use crate::thread_of_work::{Progress, Queue, Ticket};

/// The handle of the legacy default stream; NULL means the same.
pub(crate) const LEGACY: Opaque = 1;
const PER_THREAD: Opaque = 2;
const NON_BLOCKING: c_uint = 1;
/// Handles of streams are numbers of a range of their own; see `context`.
const FIRST: Opaque = 0x00d0_0000_0000;
const STEP: Opaque = 0x100;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    Legacy,
    Blocking,
    NonBlocking,
}

pub(crate) struct Stream {
    device: usize,
    manner: Manner,
    queue: Queue,
}

/// What remains known of a stream until its thread is done, even if it is destroyed earlier.
struct Trace {
    device: usize,
    manner: Manner,
    progress: Weak<Progress>,
}

#[derive(Default)]
struct Table {
    created: HashMap<Opaque, Arc<Stream>>,
    legacy: HashMap<usize, Arc<Stream>>,
    traces: Vec<Trace>,
}

static TABLE: Mutex<Option<Table>> = Mutex::new(None);

thread_local! {
    static OWN: RefCell<HashMap<usize, Arc<Stream>>> = RefCell::default();
}

/// Held while work is queued: "earlier" must mean the same for all streams, or two could wait for each other.
fn with_table<T>(work: impl FnOnce(&mut Table) -> T) -> T {
    let mut table: MutexGuard<'_, _> = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
    work(table.get_or_insert_default())
}

impl Table {
    fn start(&mut self, device: usize, manner: Manner) -> Arc<Stream> {
        let stream = Arc::new(Stream { device, manner, queue: Queue::start(device) });
        self.traces.retain(|trace| trace.progress.strong_count() > 0);
        self.traces.push(Trace { device, manner, progress: Arc::downgrade(&stream.queue.progress) });
        stream
    }

    fn unfinished(&self, device: usize, meant: impl Fn(Manner) -> bool) -> Vec<Ticket> {
        let traces = self.traces.iter().filter(|trace| trace.device == device && meant(trace.manner));
        let alive = traces.filter_map(|trace| trace.progress.upgrade()).filter(|progress| !progress.is_idle());
        alive.map(|progress| Ticket { number: progress.submitted(), progress }).collect()
    }
}

impl Stream {
    pub(crate) fn device(&self) -> usize {
        self.device
    }

    pub(crate) fn submit(&self, work: impl FnOnce() -> Result + Send + 'static) -> Ticket {
        with_table(|table| {
            let after = match self.manner {
                Manner::Legacy => table.unfinished(self.device, |other| other == Manner::Blocking),
                Manner::Blocking => table.unfinished(self.device, |other| other == Manner::Legacy),
                Manner::NonBlocking => Vec::new(),
            };
            self.queue.push(after, Box::new(work))
        })
    }

    fn last(&self) -> Ticket {
        let progress = Arc::clone(&self.queue.progress);
        Ticket { number: progress.submitted(), progress }
    }
}

/// The stream of a handle. NULL, legacy and per-thread mean those of the current context.
pub(crate) fn resolve(handle: Opaque) -> Result<Arc<Stream>> {
    let device = context::current()?;
    match handle {
        0 | LEGACY => Ok(with_table(|table| {
            if let Some(stream) = table.legacy.get(&device) {
                return Arc::clone(stream);
            }
            let stream = table.start(device, Manner::Legacy);
            table.legacy.insert(device, Arc::clone(&stream));
            stream
        })),
        PER_THREAD => Ok(OWN.with_borrow_mut(|own| {
            Arc::clone(own.entry(device).or_insert_with(|| with_table(|table| table.start(device, Manner::Blocking))))
        })),
        handle => with_table(|table| table.created.get(&handle).cloned()).ok_or(INVALID_HANDLE),
    }
}

/// Waits for all work of a device that is queued now.
pub(crate) fn drain(device: usize) {
    for ticket in with_table(|table| table.unfinished(device, |_| true)) {
        ticket.wait();
    }
}

pub(crate) fn created() -> u64 {
    with_table(|table| table.created.len() as u64)
}

fn create(flags: c_uint) -> Result<Opaque> {
    let device = context::current()?;
    let manner = match flags {
        0 => Manner::Blocking,
        NON_BLOCKING => Manner::NonBlocking,
        _ => return Err(INVALID_VALUE),
    };
    let handle = FIRST + fresh_number() as usize * STEP;
    with_table(|table| {
        let stream = table.start(device, manner);
        table.created.insert(handle, stream);
    });
    Ok(handle)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: Out<Opaque>, flags: c_uint) -> c_int {
    call(|| stream.fill(|| create(flags)))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreateWithPriority(stream: Out<Opaque>, flags: c_uint, _priority: c_int) -> c_int {
    call(|| stream.fill(|| create(flags)))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxGetStreamPriorityRange(least: Out<c_int>, greatest: Out<c_int>) -> c_int {
    call(|| {
        context::current()?;
        least.offer(0);
        greatest.offer(0);
        Ok(())
    })
}

/// Returns at once; queued work still runs, as on the real driver.
#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: Opaque) -> c_int {
    call(|| {
        let destroyed = with_table(|table| table.created.remove(&stream));
        destroyed.map(|_| ()).ok_or(INVALID_HANDLE)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: Opaque) -> c_int {
    call(|| {
        let stream = resolve(stream)?;
        stream.last().wait();
        context::health(stream.device)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: Opaque) -> c_int {
    call(|| if resolve(stream)?.queue.progress.is_idle() { Ok(()) } else { Err(NOT_READY) })
}

type HostFunction = unsafe extern "C" fn(*mut c_void);

#[unsafe(no_mangle)]
extern "C" fn cuLaunchHostFunc(on: Opaque, function: Option<HostFunction>, data: usize) -> c_int {
    call(|| {
        let stream = resolve(on)?;
        let function = function.ok_or(INVALID_VALUE)?;
        stream.submit(move || {
            // SAFETY: the caller vouches for the function and its data until the stream has run it.
            unsafe { function(data as *mut c_void) };
            Ok(())
        });
        Ok(())
    })
}
