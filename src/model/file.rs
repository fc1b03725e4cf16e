use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use memmap2::Mmap;

use super::ModelError;
use super::companion::Companion;
use super::header::{Header, quote, read_header};
use super::weights::WeightPlan;
use crate::device::Span;
use crate::id::ContentDigest;
use crate::tensor::DType;

/// Bytes read at once for a digest.
const DIGESTED_BYTES: usize = 1 << 20;

/// Under which name diffusers has peft's settings in the header of what it saves.
pub(super) const ADAPTER_NOTES: &str = "lora_adapter_metadata";

/// Element type as a file stores it; wider than [`DType`], which lists what can be computed with.
pub type StoredDType = safetensors::Dtype;

/// One tensor of a model file, as the header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Element type.
    pub dtype: StoredDType,
    /// Extents.
    pub shape: Vec<usize>,
    /// Place in the file, in bytes from its start. Not necessarily aligned to the element type.
    pub bytes: Range<usize>,
}

impl StoredTensor {
    /// Element type, where it is one whose elements fill whole bytes.
    #[must_use]
    pub fn element(&self) -> Option<DType> {
        Some(match self.dtype {
            StoredDType::BOOL => DType::Bool,
            StoredDType::U8 => DType::U8,
            StoredDType::I8 => DType::I8,
            StoredDType::U16 => DType::U16,
            StoredDType::I16 => DType::I16,
            StoredDType::U32 => DType::U32,
            StoredDType::I32 => DType::I32,
            StoredDType::U64 => DType::U64,
            StoredDType::I64 => DType::I64,
            StoredDType::F8_E4M3 => DType::F8E4M3Fn,
            StoredDType::F8_E5M2 => DType::F8E5M2,
            StoredDType::F16 => DType::F16,
            StoredDType::BF16 => DType::Bf16,
            StoredDType::F32 => DType::F32,
            StoredDType::F64 => DType::F64,
            _ => return None,
        })
    }

    /// As a file would store elements of this type.
    fn stored(dtype: DType) -> StoredDType {
        match dtype {
            DType::Bool => StoredDType::BOOL,
            DType::U8 => StoredDType::U8,
            DType::I8 => StoredDType::I8,
            DType::U16 => StoredDType::U16,
            DType::I16 => StoredDType::I16,
            DType::U32 => StoredDType::U32,
            DType::I32 => StoredDType::I32,
            DType::U64 => StoredDType::U64,
            DType::I64 => StoredDType::I64,
            DType::F8E4M3Fn => StoredDType::F8_E4M3,
            DType::F8E5M2 => StoredDType::F8_E5M2,
            DType::F16 => StoredDType::F16,
            DType::Bf16 => StoredDType::BF16,
            DType::F32 => StoredDType::F32,
            DType::F64 => StoredDType::F64,
        }
    }

    /// Number of elements; the header's own check rules out an overflow.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&extent| extent as u64).product()
    }
}

/// An open safetensors file: header read and checked, data mapped read-only once [`ModelFile::bytes`] asks for it.
///
/// The mapping shows the file itself. Whoever shortens a mapped file in place takes the process down with it; replacing
/// it by renaming another over it is harmless, and [`ModelFile::check_unchanged`] notices both. A file that is not mapped
/// may be shortened at any moment.
///
/// It may also be no file at all, but [tensors in memory](ModelFile::in_memory) that nobody changes: those are used as a
/// mapped file is.
#[derive(Debug)]
pub struct ModelFile {
    state: FileState,
    source: Source,
    tensors: BTreeMap<String, StoredTensor>,
    notes: Notes,
}

/// What is said about an adapter's tensors apart from them: two ways of the same trainers.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// In the file's header.
    pub(super) header: Option<String>,
    /// In a file beside it.
    pub(super) beside: Option<String>,
}

/// Where the tensors are.
#[derive(Debug)]
enum Source {
    Disk {
        file: File,
        mapping: OnceLock<Mmap>,
    },
    Memory {
        span: Span,
        /// Whatever says that the memory is in use.
        _keeper: Arc<dyn Debug + Send + Sync>,
    },
}

/// A file as it was found at some moment. Keeps it neither open nor, where it is deleted, on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileState {
    path: PathBuf,
    /// Absent for memory, which does not change.
    identity: Option<Identity>,
    companion: Option<Companion>,
}

impl FileState {
    /// The path the file was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Checks that the path still names the same file, in the same state, and that so do the settings beside it. A `stat`
    /// for each.
    ///
    /// # Errors
    /// [`ModelError::Changed`] where it does not or is gone, [`ModelError::Unreadable`] where it cannot be told.
    pub fn check_unchanged(&self) -> Result<(), ModelError> {
        let Some(identity) = self.identity else { return Ok(()) };
        if let Some(companion) = self.companion.as_ref().filter(|companion| !companion.is_unchanged()) {
            return Err(ModelError::Changed { path: companion.path().to_owned() });
        }
        match std::fs::metadata(&self.path) {
            Ok(metadata) if Identity::of(&metadata) == identity => Ok(()),
            Ok(_) => Err(ModelError::Changed { path: self.path.clone() }),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => {
                Err(ModelError::Changed { path: self.path.clone() })
            }
            Err(cause) => Err(ModelError::Unreadable { path: self.path.clone(), cause }),
        }
    }
}

/// What tells one state of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    #[cfg(unix)]
    device: u64,
    #[cfg(unix)]
    inode: u64,
    size_bytes: u64,
    modified: Option<SystemTime>,
}

impl Identity {
    pub(super) fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        use std::os::unix::fs::MetadataExt;
        Self {
            #[cfg(unix)]
            device: metadata.dev(),
            #[cfg(unix)]
            inode: metadata.ino(),
            size_bytes: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}

impl ModelFile {
    /// Opens and checks the file at `path`. Reads the header only, and what peft saves beside an adapter; maps nothing.
    ///
    /// # Errors
    /// [`ModelError::Unreadable`] for a missing or forbidden file and for what is no regular file,
    /// [`ModelError::Directory`], [`ModelError::Pickle`], [`ModelError::Changed`] for a file that is shortened meanwhile,
    /// and [`ModelError::Malformed`] for all else that is not a safetensors file whose tensors fill it exactly.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let (file, metadata) = open_regular(path)?;
        let read = |at, target: &mut [u8]| read_exact_at(&file, path, at, target);
        let Header { metadata: header, data_start } = read_header(path, metadata.len(), read)?;
        let (companion, beside) = Companion::of(path)?.unzip();
        let said = header.metadata().as_ref().and_then(|said| said.get(ADAPTER_NOTES));
        let notes = Notes { header: said.cloned(), beside: beside.flatten() };
        let tensors = header
            .tensors()
            .into_iter()
            .map(|(name, stored)| {
                let (start, end) = stored.data_offsets;
                let bytes = data_start + start..data_start + end;
                (name, StoredTensor { dtype: stored.dtype, shape: stored.shape.clone(), bytes })
            })
            .collect();
        let state = FileState { path: path.to_owned(), identity: Some(Identity::of(&metadata)), companion };
        Ok(Self { state, source: Source::Disk { file, mapping: OnceLock::new() }, tensors, notes })
    }

    /// The tensors of a set that lie in memory as `plan` says and are called `name` together. `keeper` is kept as long as the
    /// value lives. Nobody may change the memory from now on.
    ///
    /// # Errors
    /// [`ModelError::Memory`] for memory that is not the host's, [`ModelError::PlanMismatch`] where a tensor is beyond it.
    pub fn in_memory(
        name: &str,
        plan: &WeightPlan,
        span: Span,
        keeper: Arc<dyn Debug + Send + Sync>,
    ) -> Result<Self, ModelError> {
        // Nothing is read of what a GPU has.
        span.bytes(span.length())?;
        let mut tensors = BTreeMap::new();
        for tensor in &plan.tensors {
            let mismatch = |reason| ModelError::PlanMismatch { tensor: quote(&tensor.key), reason };
            let start =
                usize::try_from(tensor.offset).map_err(|_| mismatch("its offset is beyond the address space"))?;
            let end = start.checked_add(tensor.meta.size_bytes()?).filter(|&end| end <= span.length());
            let end = end.ok_or_else(|| mismatch("it reaches beyond the end of the memory"))?;
            let shape = tensor.meta.shape.as_slice().iter().map(|&extent| extent as usize).collect();
            let dtype = StoredTensor::stored(tensor.meta.dtype);
            tensors.insert(tensor.key.clone(), StoredTensor { dtype, shape, bytes: start..end });
        }
        let state = FileState { path: name.into(), identity: None, companion: None };
        let source = Source::Memory { span, _keeper: keeper };
        Ok(Self { state, source, tensors, notes: Notes::default() })
    }

    /// The path the file was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.state.path
    }

    /// What tells whether the file is still the same once it is closed.
    #[must_use]
    pub fn state(&self) -> &FileState {
        &self.state
    }

    /// Bytes of the whole file when it was opened.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        match (&self.state.identity, &self.source) {
            (Some(identity), _) => identity.size_bytes,
            (None, Source::Memory { span, .. }) => span.length() as u64,
            (None, Source::Disk { .. }) => 0,
        }
    }

    /// All tensors, by name in alphabetical order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &StoredTensor)> {
        self.tensors.iter().map(|(name, stored)| (name.as_str(), stored))
    }

    /// The tensor called `name`.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        self.tensors.get(name)
    }

    /// The mapped bytes of a tensor of this file. From the first of them on, the file must not be shortened.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] where `stored` is not of this file and reaches beyond it, or the file was shortened
    /// before it was mapped; [`ModelError::Unreadable`] where it cannot be mapped.
    pub fn bytes(&self, stored: &StoredTensor) -> Result<&[u8], ModelError> {
        let all = match &self.source {
            Source::Disk { file, mapping } => self.map(file, mapping)?,
            Source::Memory { span, .. } => span.bytes(span.length())?,
        };
        all.get(stored.bytes.clone()).ok_or_else(|| ModelError::Malformed {
            path: self.state.path.clone(),
            reason: "a tensor reaches beyond the end of the file".to_owned(),
        })
    }

    fn map<'a>(&self, file: &File, mapping: &'a OnceLock<Mmap>) -> Result<&'a Mmap, ModelError> {
        if let Some(mapping) = mapping.get() {
            return Ok(mapping);
        }
        // SAFETY: the mapping is read-only and private to this type. The file may change while it is mapped: the
        // bytes are then other numbers or, where it was shortened, the documented end of the process; no Rust
        // value other than plain numbers is ever read from them.
        let mapped = unsafe { Mmap::map(file) }
            .map_err(|cause| ModelError::Unreadable { path: self.state.path.clone(), cause })?;
        Ok(mapping.get_or_init(|| mapped))
    }

    /// Fills `target` with what the file holds from byte `at` on. Unlike the mapping, it survives a file that shrinks.
    ///
    /// # Errors
    /// [`ModelError::Changed`] where the file now ends before, [`ModelError::Unreadable`] where it cannot be read.
    pub fn read_exact_at(&self, at: u64, target: &mut [u8]) -> Result<(), ModelError> {
        match &self.source {
            Source::Disk { file, .. } => read_exact_at(file, &self.state.path, at, target),
            Source::Memory { span, .. } => {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                Ok(span.part(at, target.len()).and_then(|part| part.read(target))?)
            }
        }
    }

    /// The stored bytes of a tensor, read and not mapped: whoever looks at a file for others must survive one that is
    /// rewritten meanwhile.
    ///
    /// # Errors
    /// As [`ModelFile::read_exact_at`].
    pub(super) fn read(&self, stored: &StoredTensor) -> Result<Vec<u8>, ModelError> {
        let mut bytes = vec![0; stored.bytes.len()];
        self.read_exact_at(stored.bytes.start as u64, &mut bytes)?;
        Ok(bytes)
    }

    /// The digest of all that is in the file, header included, and in the settings beside it; or of the memory. Reads it
    /// once.
    ///
    /// # Errors
    /// As [`ModelFile::read_exact_at`].
    pub fn digest(&self) -> Result<ContentDigest, ModelError> {
        let mut hasher = blake3::Hasher::new();
        let mut piece = vec![0; DIGESTED_BYTES];
        let size = self.size_bytes();
        let mut at = 0;
        while at < size {
            let length = usize::try_from(size - at).unwrap_or(usize::MAX).min(DIGESTED_BYTES);
            let piece = piece.get_mut(..length).unwrap_or_default();
            self.read_exact_at(at, piece)?;
            hasher.update(piece);
            at += length as u64;
        }
        if let Some(settings) = &self.notes.beside {
            hasher.update(settings.as_bytes());
        }
        Ok(ContentDigest(*hasher.finalize().as_bytes()))
    }

    /// What is said about an adapter's tensors apart from them.
    pub(super) fn notes(&self) -> &Notes {
        &self.notes
    }

    /// Where the settings beside it are, or would be.
    pub(super) fn settings_path(&self) -> Option<&Path> {
        self.state.companion.as_ref().map(Companion::path)
    }

    /// The open file, for questions about how it is stored; absent for memory.
    #[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only Linux is asked for holes"))]
    pub(super) fn file(&self) -> Option<&File> {
        match &self.source {
            Source::Disk { file, .. } => Some(file),
            Source::Memory { .. } => None,
        }
    }

    /// As [`FileState::check_unchanged`].
    ///
    /// # Errors
    /// [`ModelError::Changed`] where it does not or is gone, [`ModelError::Unreadable`] where it cannot be told.
    pub fn check_unchanged(&self) -> Result<(), ModelError> {
        self.state.check_unchanged()
    }

    /// What is in the file, in a few words for a message: how many tensors, and the first of them.
    #[must_use]
    pub fn summary(&self) -> String {
        match self.tensors.keys().next() {
            None => "no tensors".to_owned(),
            Some(first) => format!("{} tensors, first: {}", self.tensors.len(), quote(first)),
        }
    }
}

fn read_exact_at(file: &File, path: &Path, mut at: u64, mut target: &mut [u8]) -> Result<(), ModelError> {
    while !target.is_empty() {
        match read_at(file, target, at) {
            Ok(0) => return Err(ModelError::Changed { path: path.to_owned() }),
            Ok(read) => {
                target = target.get_mut(read..).unwrap_or_default();
                at += read as u64;
            }
            Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
            Err(cause) => return Err(ModelError::Unreadable { path: path.to_owned(), cause }),
        }
    }
    Ok(())
}

#[cfg(unix)]
fn read_at(file: &File, target: &mut [u8], at: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, target, at)
}

#[cfg(windows)]
fn read_at(file: &File, target: &mut [u8], at: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, target, at)
}

/// Opens what must be a regular file, without ever waiting for a writer at the other end of a pipe.
pub(super) fn open_regular(path: &Path) -> Result<(File, Metadata), ModelError> {
    let unreadable = |cause| ModelError::Unreadable { path: path.to_owned(), cause };
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, rustix::fs::OFlags::NONBLOCK.bits().cast_signed());
    // Some systems refuse to open a directory at all, with an answer that does not say why.
    if path.is_dir() {
        return Err(ModelError::Directory { path: path.to_owned() });
    }
    let file = options.open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if metadata.is_dir() {
        return Err(ModelError::Directory { path: path.to_owned() });
    }
    if !metadata.is_file() {
        return Err(unreadable(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    Ok((file, metadata))
}
