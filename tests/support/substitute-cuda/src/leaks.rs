//! What this process still holds, for tests that nothing leaks.

use std::fmt::Write as _;
use std::fs;
use std::process;
use std::sync::Once;

use crate::faults::faults;
use crate::region::{self, Kind, Table};
use crate::{context, event, run, stream, vmm};

/// The counters, in the order of `substituteCudaLive`.
const NAMES: [&str; 11] = [
    "allocations",
    "host_allocations",
    "registered",
    "imports",
    "mappings",
    "vmm_handles",
    "reserved",
    "events",
    "opened_events",
    "streams",
    "contexts",
];

fn counts() -> [u64; NAMES.len()] {
    let memory = region::read();
    let of = |meant: fn(&Kind) -> bool| {
        let regions = memory.table().into_iter().flat_map(Table::all);
        regions.filter(|region| meant(&region.kind)).count() as u64
    };
    let (events, opened_events) = event::counts();
    [
        of(|kind| matches!(kind, Kind::Plain { .. } | Kind::Ordered { .. })),
        of(|kind| matches!(kind, Kind::Pinned(_))),
        of(|kind| matches!(kind, Kind::Registered)),
        of(|kind| matches!(kind, Kind::Imported { .. })),
        of(|kind| matches!(kind, Kind::Mapped(_))),
        vmm::handles(),
        memory.table().map_or(0, |table| table.reserved.len() as u64),
        events,
        opened_events,
        stream::created(),
        context::retained_contexts(),
    ]
}

fn report() -> std::io::Result<()> {
    let Some(prefix) = &faults().leaks else { return Ok(()) };
    let mut text = String::new();
    for (name, count) in NAMES.iter().zip(counts()) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name} {count}");
    }
    let mut path = prefix.clone().into_os_string();
    path.push(format!(".{}", process::id()));
    fs::write(path, text)
}

extern "C" fn at_exit() {
    if let Err(error) = report() {
        eprintln!("substitute CUDA driver: the counts of what is alive cannot be written: {error}");
    }
    run::leave();
}

pub(crate) fn report_at_exit() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the function takes nothing and stays loaded: users of a driver do not unload it.
        unsafe { libc::atexit(at_exit) };
    });
}

/// Writes the first `room` counters and gives their number; NULL only asks for it.
#[unsafe(no_mangle)]
extern "C" fn substituteCudaLive(counters: *mut u64, room: usize) -> usize {
    if !counters.is_null() {
        for (at, count) in counts().into_iter().take(room).enumerate() {
            // SAFETY: the caller gives `room` counters and `at` is below that.
            unsafe { counters.add(at).write(count) };
        }
    }
    NAMES.len()
}

/// Writes the report of the exit now. Zero, or one when it cannot be written.
#[unsafe(no_mangle)]
extern "C" fn substituteCudaReport() -> i32 {
    i32::from(report().is_err())
}
