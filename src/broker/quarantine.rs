use std::time::Duration;

/// How often a wait looks whether the broker stops.
const TICK: Duration = Duration::from_millis(200);

/// A client's process, which only its death parts from GPU memory it has open: its connection says nothing about the
/// work it has enqueued.
#[derive(Debug)]
pub(super) struct Process {
    #[cfg(target_os = "linux")]
    descriptor: Option<std::os::fd::OwnedFd>,
}

impl Process {
    /// The process of that id, which is alive: it is being talked to.
    pub(super) fn of(pid: Option<u32>) -> Self {
        #[cfg(target_os = "linux")]
        {
            use rustix::process::{Pid, PidfdFlags, pidfd_open};
            let pid = pid.and_then(|pid| Pid::from_raw(pid.cast_signed()));
            let opened = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty()));
            let descriptor = opened.and_then(|opened| {
                opened.inspect_err(|error| tracing::warn!(%error, "a client's process cannot be watched")).ok()
            });
            Self { descriptor }
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = pid;
            Self {}
        }
    }

    /// Waits until the process is gone or `give_up` says so. One that cannot be watched, as in another PID namespace, is
    /// never known to be gone.
    pub(super) fn wait_gone(&self, give_up: impl Fn() -> bool) {
        #[cfg(target_os = "linux")]
        {
            use rustix::event::{PollFd, PollFlags, Timespec, poll};
            let Some(descriptor) = &self.descriptor else {
                tracing::warn!("the client's process cannot be watched: its GPU memory is kept until the broker stops");
                while !give_up() {
                    std::thread::sleep(TICK);
                }
                return;
            };
            let tick = Timespec { tv_sec: 0, tv_nsec: i64::from(TICK.subsec_nanos()) };
            while !give_up() {
                // Readable once the process has ended, its files and with them the driver's included.
                if let Ok(1..) = poll(&mut [PollFd::new(descriptor, PollFlags::IN)], Some(&tick)) {
                    return;
                }
            }
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = (give_up, TICK);
        }
    }
}
