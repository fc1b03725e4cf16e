//! The folder that the processes of one run share: their files, who of them is alive, and how much memory each holds.
//!
//! A process holds a lock on its page `process-<pid>` for as long as it lives. The kernel releases the lock however the
//! process ends, so a lock that can be taken means a process that is gone.

use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::code::{OUT_OF_MEMORY, Result, UNKNOWN};
use crate::device::{self, Uuid};
use crate::faults::faults;

static RUN: OnceLock<Run> = OnceLock::new();
static NEXT: AtomicU64 = AtomicU64::new(1);

struct Run {
    folder: PathBuf,
    /// Locked; holds (UUID, bytes) for each visible device.
    page: File,
    /// Held while memory is counted and taken, so that two processes cannot both take the last bytes.
    ledger: File,
}

/// Joins the run. Called by `cuInit`.
pub(crate) fn join() -> Result {
    if RUN.get().is_some() {
        return Ok(());
    }
    let run = start().map_err(|error| {
        eprintln!("substitute CUDA driver: the folder of the run cannot be used: {error}");
        UNKNOWN
    })?;
    RUN.get_or_init(|| run);
    Ok(())
}

fn start() -> io::Result<Run> {
    let folder = env::var_os("SUBSTITUTE_CUDA_RUN").map_or_else(default_folder, PathBuf::from);
    DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    let page = open(&folder.join(format!("process-{}", process::id())))?;
    lock(&page, libc::LOCK_EX)?;
    page.set_len(0)?;
    let ledger = open(&folder.join("ledger"))?;
    Ok(Run { folder, page, ledger })
}

fn default_folder() -> PathBuf {
    // SAFETY: getuid has no preconditions.
    let user = unsafe { libc::getuid() };
    env::temp_dir().join(format!("luna-substitute-cuda-{user}"))
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)
}

fn lock(file: &File, how: i32) -> io::Result<()> {
    // SAFETY: flock on a descriptor that `file` keeps open.
    match unsafe { libc::flock(file.as_raw_fd(), how) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn run() -> Result<&'static Run> {
    RUN.get().ok_or(UNKNOWN)
}

/// A number that this process has not used before.
pub(crate) fn fresh_number() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// The path of a shared file; its name is unique by owner and number.
pub(crate) fn path(kind: &str, owner: u32, number: u64) -> Result<PathBuf> {
    Ok(run()?.folder.join(format!("{kind}-{owner}-{number}")))
}

/// A new file of `bytes` zeroes that take no space until they are written.
pub(crate) fn create(kind: &str, number: u64, bytes: u64) -> Result<File> {
    let file = open(&path(kind, process::id(), number)?).map_err(|_| OUT_OF_MEMORY)?;
    file.set_len(bytes).map_err(|_| OUT_OF_MEMORY)?;
    Ok(file)
}

/// Writes into a new file of memory what somebody else might have left there.
pub(crate) fn litter(file: BorrowedFd<'_>, bytes: u64) -> Result {
    let file = File::from(file.try_clone_to_owned().map_err(|_| OUT_OF_MEMORY)?);
    let leftovers = [0xa5; 1 << 16];
    for at in (0..bytes).step_by(leftovers.len()) {
        let length = leftovers.len().min((bytes - at) as usize);
        file.write_all_at(&leftovers[..length], at).map_err(|_| OUT_OF_MEMORY)?;
    }
    Ok(())
}

pub(crate) fn existing(kind: &str, owner: u32, number: u64) -> Result<Option<File>> {
    Ok(OpenOptions::new().read(true).write(true).open(path(kind, owner, number)?).ok())
}

pub(crate) fn remove(kind: &str, number: u64) {
    if let Ok(path) = path(kind, process::id(), number) {
        // It is already gone when a test has swept the run.
        let _ = fs::remove_file(path);
    }
}

pub(crate) fn is_alive(process: u32) -> bool {
    if process == process::id() {
        return true;
    }
    let Ok(run) = run() else { return false };
    File::open(run.folder.join(format!("process-{process}"))).is_ok_and(|page| lives(&page))
}

fn lives(page: &File) -> bool {
    lock(page, libc::LOCK_SH | libc::LOCK_NB).is_err()
}

/// Books `bytes` of a device for this process, or says that they are not there.
pub(crate) fn take_memory(device: usize, bytes: u64) -> Result {
    with_ledger(|run| match used_memory(device)? {
        used if used.saturating_add(bytes) > faults().memory => Err(OUT_OF_MEMORY),
        _ => add_memory(run, device, |own| own + bytes),
    })
}

pub(crate) fn return_memory(device: usize, bytes: u64) {
    // Nothing can be done for a book that cannot be written; the next allocation will say so.
    let _ = with_ledger(|run| add_memory(run, device, |own| own.saturating_sub(bytes)));
}

/// The lock of the file keeps other processes out, the mutex other threads of this one.
fn with_ledger(work: impl FnOnce(&Run) -> Result) -> Result {
    static THREADS: Mutex<()> = Mutex::new(());
    let _alone = THREADS.lock().unwrap_or_else(PoisonError::into_inner);
    let run = run()?;
    lock(&run.ledger, libc::LOCK_EX).map_err(|_| UNKNOWN)?;
    let outcome = work(run);
    lock(&run.ledger, libc::LOCK_UN).map_err(|_| UNKNOWN)?;
    outcome
}

/// Bytes of a device in use by the living processes of this run.
pub(crate) fn used_memory(device: usize) -> Result<u64> {
    let uuid = device::get(device)?.uuid;
    let own = process::id();
    let mut used = 0u64;
    for entry in fs::read_dir(&run()?.folder).map_err(|_| UNKNOWN)?.flatten() {
        let name = entry.file_name();
        let Some(process) = name.to_str().and_then(|name| name.strip_prefix("process-")) else { continue };
        let Ok(page) = File::open(entry.path()) else { continue };
        if process.parse() == Ok(own) || lives(&page) {
            used = used.saturating_add(entries(&page).filter(|(of, _)| *of == uuid).map(|(_, bytes)| bytes).sum());
        }
    }
    Ok(used)
}

const ENTRY: usize = 24;

fn entries(page: &File) -> impl Iterator<Item = (Uuid, u64)> + '_ {
    (0..).map_while(|at| {
        let mut entry = [0; ENTRY];
        page.read_exact_at(&mut entry, (at * ENTRY) as u64).ok()?;
        let (uuid, bytes) = entry.split_at(16);
        Some((uuid.try_into().ok()?, u64::from_le_bytes(bytes.try_into().ok()?)))
    })
}

fn add_memory(run: &Run, device: usize, change: impl Fn(u64) -> u64) -> Result {
    let mut page = Vec::new();
    for (at, device_of_entry) in device::all()?.iter().enumerate() {
        let before = entries(&run.page).nth(at).map_or(0, |(_, bytes)| bytes);
        page.extend_from_slice(&device_of_entry.uuid);
        page.extend_from_slice(&(if at == device { change(before) } else { before }).to_le_bytes());
    }
    run.page.write_all_at(&page, 0).map_err(|_| UNKNOWN)
}

/// Removes what this process made. Others that have it mapped keep what they see.
pub(crate) fn leave() {
    let Ok(run) = run() else { return };
    let own = format!("-{}", process::id());
    let Ok(folder) = fs::read_dir(&run.folder) else { return };
    for entry in folder.flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.ends_with(&own) && name.starts_with("process-") || name.contains(&format!("{own}-")) {
            // Sweeping is best effort: the test removes the folder anyway.
            let _ = fs::remove_file(entry.path());
        }
    }
}
