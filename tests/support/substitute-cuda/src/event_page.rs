//! The two counters of an event: how often it was recorded, and which record is reached.

use std::fs::File;
use std::os::fd::AsFd;
use std::process;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use crate::code::Result;
use crate::mapping::Mapping;
use crate::run;

pub(crate) const BYTES: usize = 4096;
/// How often a waiting thread looks whether the process that recorded is still there.
const PATIENCE: Duration = Duration::from_millis(20);

/// The same layout in every process. All zero: never recorded.
#[repr(C)]
#[derive(Default)]
pub(crate) struct Counters {
    issued: AtomicU64,
    done: AtomicU64,
    /// Changes whenever `done` does; what waiting threads sleep on.
    bell: AtomicU32,
    /// The process of the newest record.
    recorder: AtomicU32,
}

pub(crate) enum Page {
    Local(Box<Counters>),
    Shared(Mapping),
}

impl Page {
    pub(crate) fn shared(file: &File) -> Result<Self> {
        Mapping::shared(file.as_fd(), BYTES).map(Self::Shared)
    }

    fn counters(&self) -> &Counters {
        match self {
            Self::Local(counters) => counters,
            // SAFETY: the mapping is aligned, readable and writable, at least as large as the counters, lives as long
            // as this value, and every bit pattern of atomics is valid.
            Self::Shared(mapping) => unsafe { &*(mapping.base() as *const Counters) },
        }
    }

    /// Announces a record and gives its number.
    pub(crate) fn issue(&self) -> u64 {
        let counters = self.counters();
        counters.recorder.store(process::id(), Ordering::Release);
        counters.issued.fetch_add(1, Ordering::AcqRel) + 1
    }

    pub(crate) fn issued(&self) -> u64 {
        self.counters().issued.load(Ordering::Acquire)
    }

    pub(crate) fn finish(&self, number: u64) {
        let counters = self.counters();
        counters.done.fetch_max(number, Ordering::AcqRel);
        counters.bell.fetch_add(1, Ordering::AcqRel);
        let everyone = i32::MAX;
        // SAFETY: the address is that of a live atomic; waking has no other precondition.
        unsafe { libc::syscall(libc::SYS_futex, counters.bell.as_ptr(), libc::FUTEX_WAKE, everyone) };
    }

    pub(crate) fn is_reached(&self, number: u64) -> bool {
        let counters = self.counters();
        counters.done.load(Ordering::Acquire) >= number || !run::is_alive(counters.recorder.load(Ordering::Acquire))
    }

    pub(crate) fn wait(&self, number: u64) {
        let counters = self.counters();
        let patience = libc::timespec { tv_sec: 0, tv_nsec: PATIENCE.as_nanos() as _ };
        loop {
            let bell = counters.bell.load(Ordering::Acquire);
            if self.is_reached(number) {
                return;
            }
            let (address, word) = (counters.bell.as_ptr(), libc::FUTEX_WAIT);
            // SAFETY: the address is that of a live atomic and the time outlives the call; a change between the load and
            // the call makes it return at once.
            unsafe { libc::syscall(libc::SYS_futex, address, word, bell, ptr::from_ref(&patience)) };
        }
    }
}
