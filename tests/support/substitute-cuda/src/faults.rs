//! Faults and settings from the environment; the crate's page lists them.

use std::env;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub(crate) struct Faults {
    pub(crate) no_device: bool,
    pub(crate) devices: Vec<String>,
    pub(crate) memory: u64,
    pub(crate) dirty: bool,
    pub(crate) peer_access: bool,
    pub(crate) ipc_refused: bool,
    pub(crate) vmm_refused: bool,
    pub(crate) host_register_refused: bool,
    pub(crate) open: Countdown,
    pub(crate) event_open: Countdown,
    pub(crate) import: Countdown,
    pub(crate) delay: Duration,
    pub(crate) lose_events: bool,
    pub(crate) corrupt_import: bool,
    /// Zero: the namespace of processes that name none.
    pub(crate) namespace: u32,
    pub(crate) leaks: Option<PathBuf>,
}

pub(crate) fn faults() -> &'static Faults {
    static FAULTS: OnceLock<Faults> = OnceLock::new();
    FAULTS.get_or_init(Faults::from_environment)
}

impl Faults {
    fn from_environment() -> Self {
        let devices = setting("DEVICES").unwrap_or_else(|| "substitute".into());
        Self {
            no_device: is_set("NO_DEVICE"),
            devices: devices.split(',').map(|name| name.trim().to_owned()).filter(|name| !name.is_empty()).collect(),
            memory: number("MEMORY").unwrap_or(16 << 30),
            dirty: is_set("DIRTY"),
            peer_access: is_set("P2P"),
            ipc_refused: setting("IPC").is_some_and(|value| value == "refused"),
            vmm_refused: setting("VMM").is_some_and(|value| value == "refused"),
            host_register_refused: setting("HOST_REGISTER").is_some_and(|value| value == "refused"),
            open: Countdown::from_setting("FAIL_OPEN"),
            event_open: Countdown::from_setting("FAIL_EVENT_OPEN"),
            import: Countdown::from_setting("FAIL_IMPORT"),
            delay: Duration::from_millis(number("DELAY_MS").unwrap_or(0)),
            lose_events: is_set("LOSE_EVENTS"),
            corrupt_import: is_set("CORRUPT_IMPORT"),
            namespace: setting("PID_NAMESPACE").map_or(0, |name| fingerprint(&name, 0) as u32 | 1),
            leaks: env::var_os("SUBSTITUTE_CUDA_LEAKS").map(PathBuf::from),
        }
    }
}

/// Fails the n-th call, or each from the n-th.
pub(crate) struct Countdown {
    calls: AtomicU64,
    first: Option<u64>,
    onwards: bool,
}

impl Countdown {
    fn from_setting(name: &str) -> Self {
        let value = setting(name).unwrap_or_default();
        let onwards = value.ends_with('+');
        let first = value.trim_end_matches('+').parse().ok();
        if first.is_none() && !value.is_empty() {
            complain(name, &value);
        }
        Self { calls: AtomicU64::new(0), first, onwards }
    }

    /// Counts one call and says whether it is to fail.
    pub(crate) fn fails(&self) -> bool {
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        self.first.is_some_and(|first| call == first || (self.onwards && call > first))
    }
}

/// FNV-1a with a seed: UUIDs and namespaces are the same in every process that uses the same name.
pub(crate) fn fingerprint(text: &str, seed: u64) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325 ^ seed, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn setting(name: &str) -> Option<String> {
    env::var(format!("SUBSTITUTE_CUDA_{name}")).ok().filter(|value| !value.is_empty())
}

fn is_set(name: &str) -> bool {
    setting(name).is_some_and(|value| value != "0")
}

fn number(name: &str) -> Option<u64> {
    let value = setting(name)?;
    let number = value.parse().ok();
    if number.is_none() {
        complain(name, &value);
    }
    number
}

/// A fault that silently does not happen would make its test pass for nothing.
fn complain(name: &str, value: &str) {
    eprintln!("substitute CUDA driver: SUBSTITUTE_CUDA_{name}={value} is not a number and has no effect");
}
