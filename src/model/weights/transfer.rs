use std::sync::atomic::{AtomicU64, Ordering};

use blake3::{Hash, Hasher};
use parking_lot::Mutex;

use super::cast::cast;
use super::sparse::{Run, Runs};
use crate::device::{Place, Span};
use crate::model::{ModelError, ModelFile, StoredTensor};
use crate::tensor::DType;

/// Bytes moved at a time: few enough to be hashed while the processor's cache still holds them, and for a request to
/// stop to be heard at once; enough that the system calls cost nothing.
pub(super) const CHUNK_BYTES: usize = 512 * 1024;
/// Bytes between two reports of progress.
const REPORT_BYTES: u64 = 4 << 20;
/// What a hole contains.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Who asked for a load: what it is told and what it says, shared by the threads of the load.
pub(super) struct Caller<'a> {
    total: u64,
    done: AtomicU64,
    reported: Mutex<u64>,
    progress: &'a (dyn Fn(u64, u64) + Sync),
    stop: &'a (dyn Fn() -> bool + Sync),
}

impl<'a> Caller<'a> {
    pub(super) fn start(
        total: u64,
        progress: &'a (dyn Fn(u64, u64) + Sync),
        stop: &'a (dyn Fn() -> bool + Sync),
    ) -> Self {
        progress(0, total);
        Self { total, done: AtomicU64::new(0), reported: Mutex::new(0), progress, stop }
    }

    pub(super) fn check(&self) -> Result<(), ModelError> {
        if (self.stop)() { Err(ModelError::Cancelled) } else { Ok(()) }
    }

    /// One thread reports at a time, so that numbers only grow; the others do not wait for it.
    pub(super) fn advance(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(mut reported) = self.reported.try_lock()
            && done >= reported.saturating_add(REPORT_BYTES)
        {
            *reported = done;
            (self.progress)(done, self.total);
        }
    }

    pub(super) fn finish(&self) {
        (self.progress)(self.total, self.total);
    }
}

/// What a thread reuses from chunk to chunk; grows to what is needed of it.
#[derive(Default)]
pub(super) struct Workspace {
    pub(super) stored: Vec<u8>,
    pub(super) wanted: Vec<u8>,
}

/// The first `length` bytes of `bytes`, which grows to hold them.
pub(super) fn room(bytes: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if bytes.len() < length {
        bytes.resize(length, 0);
    }
    bytes.get_mut(..length).unwrap_or_default()
}

/// Where a tensor of a file goes.
#[derive(Debug)]
pub(super) struct Target {
    /// Element type it becomes.
    pub(super) dtype: DType,
    /// Exactly its bytes. Nobody else has a span of them.
    pub(super) span: Span,
}

/// Hashes of a tensor's bytes, as they are in the file and as they are in the region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hashes {
    pub(super) stored: Hash,
    pub(super) wanted: Hash,
}

/// One tensor on its way from the file.
pub(super) struct Transfer<'a> {
    pub(super) file: &'a ModelFile,
    pub(super) tensor: &'a StoredTensor,
    pub(super) dtype: DType,
    pub(super) caller: &'a Caller<'a>,
}

impl Transfer<'_> {
    /// Reads the tensor, hashes it, and writes it to `target`, where there is one. What lies in a hole of the file is
    /// not written: the region is zeroed, and zero is zero in every type.
    pub(super) fn run(&self, mut target: Option<Target>, scratch: &mut Workspace) -> Result<Hashes, ModelError> {
        let start = self.tensor.bytes.start as u64;
        let length = self.tensor.bytes.len() as u64;
        let element = self.dtype.size_bytes() as u64;
        let wanted_element = target.as_ref().map_or(self.dtype, |target| target.dtype).size_bytes() as u64;
        let is_cast = target.as_ref().is_some_and(|target| target.dtype != self.dtype);
        let mut hashers = (Hasher::new(), Hasher::new());
        let mut runs = Runs::new(self.file);
        let mut at = 0;
        while at < length {
            self.caller.check()?;
            let end = length.min(at + CHUNK_BYTES as u64);
            let moved = match runs.at(start + at, start + end) {
                // An element that is only partly in a hole is data.
                Run::Hole(bytes) if bytes >= element => {
                    let bytes = bytes - bytes % element;
                    hash_zeros(&mut hashers.0, bytes);
                    if is_cast {
                        hash_zeros(&mut hashers.1, bytes / element * wanted_element);
                    }
                    bytes
                }
                Run::Hole(bytes) | Run::Data(bytes) => {
                    let bytes = bytes.max(1).next_multiple_of(element).min(length - at);
                    let chunk = Chunk { from: start + at, to: at / element * wanted_element, bytes: bytes as usize };
                    self.chunk(&chunk, target.as_mut(), scratch, &mut hashers)?;
                    bytes
                }
            };
            at += moved;
            self.caller.advance(moved);
        }
        let stored = hashers.0.finalize();
        Ok(Hashes { stored, wanted: if is_cast { hashers.1.finalize() } else { stored } })
    }

    fn chunk(
        &self,
        chunk: &Chunk,
        target: Option<&mut Target>,
        scratch: &mut Workspace,
        (stored_hash, wanted_hash): &mut (Hasher, Hasher),
    ) -> Result<(), ModelError> {
        let Some(Target { dtype, span }) = target else {
            let stored = room(&mut scratch.stored, chunk.bytes);
            self.file.read_exact_at(chunk.from, stored)?;
            stored_hash.update(stored);
            return Ok(());
        };
        let wanted_bytes = chunk.bytes / self.dtype.size_bytes() * dtype.size_bytes();
        let mut part = span.part(chunk.to as usize, wanted_bytes)?;
        let on_host = part.place() == Place::Host;
        if on_host {
            part.populate();
        }
        if *dtype == self.dtype && on_host {
            let stored = part.bytes_mut(chunk.bytes)?;
            self.file.read_exact_at(chunk.from, stored)?;
            stored_hash.update(stored);
            return Ok(());
        }
        let stored = room(&mut scratch.stored, chunk.bytes);
        self.file.read_exact_at(chunk.from, stored)?;
        stored_hash.update(stored);
        if *dtype == self.dtype {
            part.write(stored)?;
        } else if on_host {
            let wanted = part.bytes_mut(wanted_bytes)?;
            cast(self.dtype, *dtype, stored, wanted)?;
            wanted_hash.update(wanted);
        } else {
            let wanted = room(&mut scratch.wanted, wanted_bytes);
            cast(self.dtype, *dtype, stored, wanted)?;
            wanted_hash.update(wanted);
            part.write(wanted)?;
        }
        Ok(())
    }
}

/// Some whole elements: where they start in the file and in the target's span, and their bytes in the file.
struct Chunk {
    from: u64,
    to: u64,
    bytes: usize,
}

fn hash_zeros(hasher: &mut Hasher, mut bytes: u64) {
    while bytes > 0 {
        let some = ZEROS.get(..bytes as usize).unwrap_or(&ZEROS);
        hasher.update(some);
        bytes -= some.len() as u64;
    }
}
