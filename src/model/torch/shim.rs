//! The C++ shim for what the tensor library's binding lacks on CUDA: its table of functions, and the calls as Rust
//! sees them. `torch_shim.cpp` is the other half.

use std::ffi::c_char;

use super::super::{CudaUnavailable, ModelError};

#[cfg(target_os = "linux")]
mod open;
#[cfg(not(target_os = "linux"))]
#[path = "shim/nowhere.rs"]
mod open;

pub(super) use open::shim;

/// Raised with every change of a struct below; `torch_shim.cpp` says the same number.
const VERSION: u32 = 1;
/// Room for the words of an error.
const TEXT_BYTES: usize = 1024;

/// Where the shim writes the words of an error, ended by a zero.
#[repr(C)]
struct Text {
    bytes: *mut c_char,
    capacity: usize,
}

/// What counting the GPUs gave.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Devices {
    pub(super) count: i32,
    /// The runtime's error number; 0 where counting worked.
    pub(super) code: i32,
    /// 1000 × major + 10 × minor; 0 without a driver.
    pub(super) driver: i32,
    /// The same of the runtime that libtorch brings along.
    pub(super) runtime: i32,
}

/// What one GPU is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub(super) major: i32,
    pub(super) minor: i32,
    pub(super) total_bytes: u64,
    /// Ended by a zero.
    pub(super) name: [u8; 256],
}

/// A stream of the library's pool: its own numbers, and the driver's handle.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct StreamNumbers {
    pub(super) id: i64,
    pub(super) device: i32,
    pub(super) raw: usize,
}

/// What was current on a thread before a stream was made current there.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Before {
    stream: i64,
    stream_device: i32,
    device: i32,
}

/// The caching allocator's books, in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Memory {
    pub(super) allocated: u64,
    pub(super) reserved: u64,
    pub(super) peak_allocated: u64,
    pub(super) peak_reserved: u64,
}

/// 0 or 1 each, in the order of `CudaSwitches`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Switches(pub(super) [u8; 7]);

/// The shim's functions. Each answers 0, or 1 with words in `Text`; none lets an exception out.
#[repr(C)]
struct Table {
    version: u32,
    bytes: u32,
    devices: unsafe extern "C" fn(*mut Devices, Text) -> i32,
    has_cuda_half: unsafe extern "C" fn(*mut i32, Text) -> i32,
    open: unsafe extern "C" fn(i32, *mut Facts, Text) -> i32,
    stream: unsafe extern "C" fn(i32, *mut StreamNumbers, Text) -> i32,
    make_current: unsafe extern "C" fn(*const StreamNumbers, *mut Before, Text) -> i32,
    restore: unsafe extern "C" fn(*const Before, Text) -> i32,
    synchronize: unsafe extern "C" fn(*const StreamNumbers, Text) -> i32,
    empty_cache: unsafe extern "C" fn(Text) -> i32,
    memory: unsafe extern "C" fn(i32, *mut Memory, Text) -> i32,
    reset_peak: unsafe extern "C" fn(i32, Text) -> i32,
    switches: unsafe extern "C" fn(*mut Switches, Text) -> i32,
    set_switches: unsafe extern "C" fn(*const Switches, Text) -> i32,
}

/// The open shim. It is never closed: streams, memory and the library's own state outlive any owner.
#[derive(Debug)]
pub(super) struct Shim {
    table: &'static Table,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Table").field("version", &self.version).finish_non_exhaustive()
    }
}

impl Shim {
    /// The shim's version of its own interface.
    pub(super) fn version(&self) -> u32 {
        self.table.version
    }

    /// Counts the GPUs. The words are the runtime's about a code that is not 0.
    pub(super) fn devices(&self) -> Result<(Devices, String), ModelError> {
        let mut devices = Devices::default();
        // SAFETY: `call` hands over a valid `Text`; `devices` is a live struct of the layout both halves declare.
        let words = call("count GPUs", |text| unsafe { (self.table.devices)(&raw mut devices, text) })?;
        Ok((devices, words))
    }

    /// Whether the tensor library found its CUDA half when it looked; looks, if it has not yet.
    pub(super) fn has_cuda_half(&self) -> Result<bool, ModelError> {
        let mut found = 0;
        // SAFETY: as in `devices`, with a live integer.
        call("look for CUDA", |text| unsafe { (self.table.has_cuda_half)(&raw mut found, text) })?;
        Ok(found != 0)
    }

    /// Makes the library ready for CUDA; what the GPU is.
    pub(super) fn open(&self, ordinal: i32) -> Result<Facts, ModelError> {
        let mut facts = Facts { major: 0, minor: 0, total_bytes: 0, name: [0; 256] };
        // SAFETY: as in `devices`; the library checks the ordinal.
        call("open a GPU", |text| unsafe { (self.table.open)(ordinal, &raw mut facts, text) })?;
        Ok(facts)
    }

    /// A stream of the library's pool, valid as long as the process.
    pub(super) fn stream(&self, ordinal: i32) -> Result<StreamNumbers, ModelError> {
        let mut stream = StreamNumbers::default();
        // SAFETY: as in `devices`; the library checks the ordinal.
        call("open a stream", |text| unsafe { (self.table.stream)(ordinal, &raw mut stream, text) })?;
        Ok(stream)
    }

    /// Makes the stream and its device current on this thread; what was current before.
    pub(super) fn make_current(&self, stream: &StreamNumbers) -> Result<Before, ModelError> {
        let mut before = Before::default();
        // SAFETY: as in `devices`; `stream` came from the shim and names a stream that lives as long as the process.
        call("switch streams", |text| unsafe { (self.table.make_current)(stream, &raw mut before, text) })?;
        Ok(before)
    }

    /// Undoes a [`Shim::make_current`] of this thread.
    pub(super) fn restore(&self, before: &Before) -> Result<(), ModelError> {
        // SAFETY: as in `make_current`; `before` was filled by it.
        call("switch streams", |text| unsafe { (self.table.restore)(before, text) }).map(drop)
    }

    /// Waits for all work on the stream.
    pub(super) fn synchronize(&self, stream: &StreamNumbers) -> Result<(), ModelError> {
        // SAFETY: as in `make_current`.
        call("wait for a stream", |text| unsafe { (self.table.synchronize)(stream, text) }).map(drop)
    }

    /// Gives memory that the library keeps for later back to the driver.
    pub(super) fn empty_cache(&self) -> Result<(), ModelError> {
        // SAFETY: `call` hands over a valid `Text`.
        call("give memory back", |text| unsafe { (self.table.empty_cache)(text) }).map(drop)
    }

    /// The library's books of one GPU's memory.
    pub(super) fn memory(&self, ordinal: i32) -> Result<Memory, ModelError> {
        let mut memory = Memory::default();
        // SAFETY: as in `devices`; the library checks the ordinal.
        call("read memory statistics", |text| unsafe { (self.table.memory)(ordinal, &raw mut memory, text) })?;
        Ok(memory)
    }

    /// Lets the peaks start again from what is in use now.
    pub(super) fn reset_peak(&self, ordinal: i32) -> Result<(), ModelError> {
        // SAFETY: `call` hands over a valid `Text`; the library checks the ordinal.
        call("reset memory statistics", |text| unsafe { (self.table.reset_peak)(ordinal, text) }).map(drop)
    }

    /// How kernels are chosen.
    pub(super) fn switches(&self) -> Result<Switches, ModelError> {
        let mut switches = Switches::default();
        // SAFETY: as in `devices`.
        call("read switches", |text| unsafe { (self.table.switches)(&raw mut switches, text) })?;
        Ok(switches)
    }

    /// Changes how kernels are chosen, for the whole process.
    pub(super) fn set_switches(&self, switches: &Switches) -> Result<(), ModelError> {
        // SAFETY: as in `devices`; the shim only reads `switches`.
        call("set switches", |text| unsafe { (self.table.set_switches)(switches, text) }).map(drop)
    }
}

/// Runs one of the shim's functions with room for words; the words where it answers 0.
fn call(what: &'static str, function: impl FnOnce(Text) -> i32) -> Result<String, ModelError> {
    let mut room = [0u8; TEXT_BYTES];
    let answer = function(Text { bytes: room.as_mut_ptr().cast(), capacity: room.len() });
    let words = until_zero(&room);
    match answer {
        0 => Ok(words),
        _ => Err(super::failed(what)(tch::TchError::Torch(words))),
    }
}

/// The text up to the first zero.
pub(super) fn until_zero(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Checks a table before anything in it is called.
fn checked(table: &'static Table) -> Result<Shim, CudaUnavailable> {
    if table.version == VERSION && table.bytes as usize == size_of::<Table>() {
        return Ok(Shim { table });
    }
    let cause = format!("it is version {}, not {VERSION}", table.version);
    Err(CudaUnavailable::Library { library: "the CUDA shim".to_owned(), cause })
}
