use std::sync::Arc;

use tch::{Device as Compute, Kind, TchError, Tensor};

use super::super::{ModelError, ModelFile, StoredTensor, WeightStorage};
use super::target::Target;
use super::{failed, kind_of};
use crate::device::{Device, DeviceError, Region};

/// Alignment of each tensor in a region of copied weights: a cache line, and what vector loads like.
const ALIGNMENT: u64 = 64;
/// The call named in errors.
const WHAT: &str = "load";

/// How a model is loaded.
#[derive(Clone, Copy)]
pub struct LoadOptions<'a> {
    /// What the model computes on.
    pub target: &'a Target,
    /// Where the weights live on the CPU; on a GPU they are always a copy in its memory.
    pub storage: WeightStorage,
    /// Allocates the memory of [`WeightStorage::Copied`].
    pub memory: &'a dyn Device,
    /// Told after each tensor how many bytes of how many are loaded, in the element types they are kept in.
    pub progress: &'a dyn Fn(u64, u64),
}

impl std::fmt::Debug for LoadOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadOptions")
            .field("target", self.target)
            .field("storage", &self.storage)
            .field("memory", &self.memory)
            .finish_non_exhaustive()
    }
}

/// What the weights of a loaded model point into. Must be dropped after them.
#[derive(Debug)]
pub(super) enum Backing {
    /// The mapped file; tensors of another element type than the one computed in have memory of their own.
    File(Arc<ModelFile>),
    /// A region that only this model holds.
    Region { _region: Arc<dyn Region> },
    /// Nothing: the tensors own their memory, which is a GPU's. Dropping this gives it back to the driver.
    Gpu(Target),
}

impl Drop for Backing {
    fn drop(&mut self) {
        if let Self::Gpu(target) = self {
            target.reclaim();
        }
    }
}

/// Makes tensors of a file's weights.
pub(super) struct Weights<'a> {
    file: &'a ModelFile,
    options: LoadOptions<'a>,
    /// The element type computed in; `None` where weights stay as they are stored.
    kind: Option<Kind>,
    region: Option<Arc<dyn Region>>,
    /// First free byte of the region.
    next: u64,
    done_bytes: u64,
    total_bytes: u64,
}

impl<'a> Weights<'a> {
    /// Prepares to load tensors of `lengths` elements each as `kind`.
    pub(super) fn new(
        file: &'a ModelFile,
        options: LoadOptions<'a>,
        kind: Kind,
        lengths: &[u64],
    ) -> Result<Self, ModelError> {
        let width = kind.elt_size_in_bytes() as u64;
        let sizes_bytes: Vec<_> = lengths.iter().map(|elements| elements.saturating_mul(width)).collect();
        Self::of_sizes(file, options, Some(kind), &sizes_bytes)
    }

    /// Prepares to load tensors of `sizes_bytes` each as they are stored.
    pub(super) fn as_stored(
        file: &'a ModelFile,
        options: LoadOptions<'a>,
        sizes_bytes: &[u64],
    ) -> Result<Self, ModelError> {
        Self::of_sizes(file, options, None, sizes_bytes)
    }

    fn of_sizes(
        file: &'a ModelFile,
        options: LoadOptions<'a>,
        kind: Option<Kind>,
        sizes_bytes: &[u64],
    ) -> Result<Self, ModelError> {
        let total_bytes = sizes_bytes.iter().copied().fold(0, u64::saturating_add);
        let region = match (options.target, options.storage) {
            (Target::Cuda { .. }, _) | (Target::Cpu, WeightStorage::Mapped) => None,
            (Target::Cpu, WeightStorage::Copied) => {
                let padded = |size_bytes: &u64| size_bytes.div_ceil(ALIGNMENT).saturating_mul(ALIGNMENT);
                let size_bytes = sizes_bytes.iter().map(padded).fold(0, u64::saturating_add);
                let size_bytes = usize::try_from(size_bytes).unwrap_or(usize::MAX);
                Some(options.memory.allocate(size_bytes).map_err(device_failed)?)
            }
        };
        Ok(Self { file, options, kind, region, next: 0, done_bytes: 0, total_bytes })
    }

    /// The tensor for `stored`.
    pub(super) fn tensor(&mut self, stored: &StoredTensor) -> Result<Tensor, ModelError> {
        let source = self.source(stored)?;
        let kind = self.kind.unwrap_or(source.kind());
        let size_bytes = stored.elements() * kind.elt_size_in_bytes() as u64;
        let tensor = match &self.region {
            Some(region) => {
                let mut target = self.place(region, stored, kind)?;
                target.f_copy_(&source).map_err(failed(WHAT))?;
                self.next += size_bytes.next_multiple_of(ALIGNMENT);
                target
            }
            // The stored bytes are what crosses to a GPU; they are converted there.
            None => {
                let there = source.f_to_device(self.options.target.device()).map_err(failed(WHAT))?;
                there.f_to_kind(kind).map_err(failed(WHAT))?
            }
        };
        self.done_bytes += size_bytes;
        (self.options.progress)(self.done_bytes, self.total_bytes);
        Ok(tensor)
    }

    /// What must outlive the tensors.
    pub(super) fn into_backing(self, file: &Arc<ModelFile>) -> Backing {
        match (self.region, self.options.target) {
            (Some(region), _) => Backing::Region { _region: region },
            (None, Target::Cpu) => Backing::File(Arc::clone(file)),
            (None, gpu @ Target::Cuda { .. }) => Backing::Gpu(gpu.clone()),
        }
    }

    /// The stored values: a view on the mapping, or a copy where the file does not align them.
    fn source(&self, stored: &StoredTensor) -> Result<Tensor, ModelError> {
        let bytes = self.file.bytes(stored)?;
        let kind = stored.element().and_then(kind_of).ok_or_else(|| ModelError::Unsupported {
            path: self.file.path().to_owned(),
            what: format!("element type {}", stored.dtype),
        })?;
        let shape = extents(stored);
        if (bytes.as_ptr() as usize).is_multiple_of(kind.elt_size_in_bytes()) {
            // SAFETY: the header's check made shape and type fill `bytes` exactly; the pointer is aligned; the mapping
            // outlives the view because `Backing` holds the file until the model's tensors are gone; nothing writes
            // through the view.
            return unsafe { Tensor::f_from_blob(bytes.as_ptr(), &shape, &[], kind, Compute::Cpu) }
                .map_err(failed(WHAT));
        }
        Tensor::f_from_data_size(bytes, &shape, kind).map_err(failed(WHAT))
    }

    /// The next free place of the region, in the shape of `stored`.
    fn place(&self, region: &Arc<dyn Region>, stored: &StoredTensor, kind: Kind) -> Result<Tensor, ModelError> {
        let end = self.next + stored.elements() * kind.elt_size_in_bytes() as u64;
        if end > region.size_bytes() as u64 {
            return Err(failed(WHAT)(TchError::Shape("more weights than were counted".to_owned())));
        }
        let address = region.address() + self.next as usize;
        // SAFETY: the range lies in the region, which is host memory of this model alone, aligned because the region
        // starts at a page and `next` is a multiple of 64; `Backing` holds the region until the tensors are gone.
        unsafe { Tensor::f_from_blob(address as *const u8, &extents(stored), &[], kind, Compute::Cpu) }
            .map_err(failed(WHAT))
    }
}

fn extents(stored: &StoredTensor) -> Vec<i64> {
    stored.shape.iter().map(|&extent| extent as i64).collect()
}

fn device_failed(error: DeviceError) -> ModelError {
    match error {
        DeviceError::OutOfMemory { .. } => ModelError::OutOfMemory { what: WHAT, cause: error.to_string() },
        other => ModelError::Executor { what: WHAT, cause: other.to_string() },
    }
}
