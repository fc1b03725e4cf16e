use std::sync::Arc;

use parking_lot::Mutex;

use super::leases::{GpuLease, Lease};
use super::open_gpu::LinkGpu;
use super::weights::Attached;
use crate::device::{DeviceError, Element, GpuRange, Place, Span, StreamRef};
use crate::error::{Error, ErrorKind, Result};
use crate::service::Rung;
use crate::tensor::TensorMeta;

/// A tensor that came from the broker, or that is being built for it. Cloning shares it; dropping the last clone
/// gives its slot back.
#[derive(Debug, Clone)]
pub struct Tensor {
    meta: TensorMeta,
    storage: Arc<Storage>,
}

#[derive(Debug)]
pub(super) enum Storage {
    /// In a slot of a shared arena.
    Leased(Lease),
    /// On its way to a GPU, in a slot whose pages may be locked. Nobody gets to see its address: what copies out of
    /// such memory asynchronously may outlive the lease.
    Staged(Lease, Arc<LinkGpu>),
    /// In memory of this process, where bytes crossed in frames.
    Received(PooledBytes),
    /// In weights that nobody changes. In this order: memory of a GPU is closed behind the work that uses it, and given back
    /// after that.
    Attached { span: Span, weights: Arc<Attached> },
}

impl Tensor {
    pub(super) fn new(meta: TensorMeta, storage: Storage) -> Self {
        Self { meta, storage: Arc::new(storage) }
    }

    pub(super) fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Element type, shape and strides.
    #[must_use]
    pub fn meta(&self) -> &TensorMeta {
        &self.meta
    }

    /// The memory it lies in. On the rung `peer` the GPU is the client's, which reaches the memory.
    #[must_use]
    pub fn place(&self) -> Place {
        match &*self.storage {
            Storage::Attached { span, .. } => span.place(),
            _ => self.on_gpu().map_or(Place::Host, |on_gpu| Place::Gpu(on_gpu.gpu.gpu)),
        }
    }

    /// The rung on which a tensor in GPU memory came.
    #[must_use]
    pub fn gpu_rung(&self) -> Option<Rung> {
        self.on_gpu().map(|on_gpu| on_gpu.gpu.rung.rung)
    }

    /// This process's ordinal of the GPU that the tensor lies on.
    #[must_use]
    pub fn gpu_ordinal(&self) -> Option<i32> {
        match &*self.storage {
            Storage::Attached { weights, .. } => weights.ordinal(),
            _ => self.on_gpu().map(|on_gpu| on_gpu.gpu.device.ordinal()),
        }
    }

    fn on_gpu(&self) -> Option<&GpuLease> {
        match &*self.storage {
            Storage::Leased(lease) => lease.gpu().map(|gpu| &**gpu),
            Storage::Staged(..) | Storage::Received(_) | Storage::Attached { .. } => None,
        }
    }

    /// Whether the tensor is on its way to a GPU, where [`Tensor::copy_to_gpu`] brings it: it has no address.
    #[must_use]
    pub fn is_staged(&self) -> bool {
        matches!(&*self.storage, Storage::Staged(..))
    }

    /// Work enqueued on `stream` from now on may use a tensor in GPU memory: it comes behind the broker's, and the
    /// memory is not given back before it is done. Does nothing for a tensor in host memory.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`], [`DeviceError::NotRecorded`].
    pub fn use_on(&self, stream: StreamRef) -> Result<()> {
        if let Some(on_gpu) = self.on_gpu() {
            on_gpu.used_on(stream);
            on_gpu.gpu.wait(on_gpu.ready(), stream)?;
        }
        Ok(())
    }

    /// Work on streams that cannot be named may use a tensor in GPU memory: its memory is given back only after all GPU
    /// work of this process at that time. Its order behind the broker's is the caller's business.
    pub fn use_somewhere(&self) {
        if let Some(on_gpu) = self.on_gpu() {
            on_gpu.used_somewhere();
        }
    }

    /// Copies a tensor in GPU memory, or on its way there, to memory of the caller's, on the range's stream. What the
    /// rung `peer` needs before the tensor is computed with, and [`Unshared::Staging`] before it is anything. The copy of
    /// a staged tensor is made in one piece and done on return: it may be dropped at once.
    ///
    /// [`Unshared::Staging`]: super::Unshared::Staging
    ///
    /// # Errors
    /// [`DeviceError::WrongHandle`] for a tensor in host memory, [`DeviceError::OutOfBounds`], [`DeviceError::Cuda`].
    pub fn copy_to_gpu(&self, range: &GpuRange<'_>) -> Result<()> {
        if let Storage::Staged(lease, gpu) = &*self.storage {
            return Ok(gpu.device.write(lease.span().bytes(self.meta.span_bytes()?)?, range)?);
        }
        let (Some(on_gpu), Storage::Leased(lease)) = (self.on_gpu(), &*self.storage) else {
            return Err(DeviceError::WrongHandle { device: "CUDA" }.into());
        };
        self.use_on(range.stream())?;
        let from = lease.span().part(0, self.meta.span_bytes()?)?;
        Ok(on_gpu.gpu.device.copy_out(&from, range)?)
    }

    /// Copies the bytes from the first to the last element, wherever they lie, once the broker is done with them.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`].
    pub fn to_vec(&self) -> Result<Vec<u8>> {
        let length = self.meta.span_bytes()?;
        let (Some(on_gpu), Storage::Leased(lease)) = (self.on_gpu(), &*self.storage) else {
            if let Storage::Attached { span, .. } = &*self.storage {
                let mut bytes = vec![0; length];
                span.read(&mut bytes)?;
                return Ok(bytes);
            }
            if let Storage::Staged(lease, _) = &*self.storage {
                return Ok(lease.span().bytes(length)?.to_vec());
            }
            return Ok(self.bytes()?.to_vec());
        };
        on_gpu.gpu.synchronize(on_gpu.ready())?;
        let mut bytes = vec![0; length];
        lease.span().read(&mut bytes)?;
        Ok(bytes)
    }

    /// Address of the first element, on the GPU where it lies there; valid while any clone of the tensor lives. `None`
    /// for one that is staged.
    #[must_use]
    pub fn address(&self) -> Option<usize> {
        match &*self.storage {
            Storage::Leased(lease) => Some(lease.span().address()),
            Storage::Staged(..) => None,
            Storage::Received(bytes) => Some(bytes.bytes.as_ptr() as usize),
            Storage::Attached { span, .. } => Some(span.address()),
        }
    }

    /// The bytes from the first to the last element.
    ///
    /// # Errors
    /// [`DeviceError::NotHost`] for a tensor in GPU memory, [`ErrorKind::Unsupported`] for one on its way there.
    pub fn bytes(&self) -> Result<&[u8]> {
        let length = self.meta.span_bytes()?;
        Ok(match &*self.storage {
            Storage::Leased(lease) => lease.span().bytes(length)?,
            Storage::Staged(..) => return Err(staged()),
            Storage::Received(bytes) => bytes.bytes.get(..length).unwrap_or_default(),
            Storage::Attached { span, .. } => span.bytes(length)?,
        })
    }

    /// The elements of a contiguous float32 tensor, in order.
    ///
    /// # Errors
    /// As [`Tensor::bytes`]; another element type or layout is an error too.
    pub fn floats(&self) -> Result<std::borrow::Cow<'_, [f32]>> {
        use crate::tensor::{DType, TensorError};
        let TensorMeta { dtype, shape, strides } = self.meta;
        if dtype != DType::F32 || strides != shape.contiguous_strides() {
            let expected = "a contiguous float32 tensor".to_owned();
            return Err(TensorError::Unexpected { tensor: "tensor", expected, shape, dtype }.into());
        }
        let count = self.meta.elements()?;
        Ok(match &*self.storage {
            Storage::Leased(lease) => lease.span().elements::<f32>(count)?.into(),
            Storage::Attached { span, .. } => span.elements::<f32>(count)?.into(),
            Storage::Staged(..) => return Err(staged()),
            Storage::Received(_) => {
                let (elements, _) = self.bytes()?.as_chunks::<4>();
                elements.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect::<Vec<_>>().into()
            }
        })
    }

    /// The elements of a contiguous tensor in shared memory, in order.
    ///
    /// # Errors
    /// [`DeviceError::NotHost`] for a tensor in GPU memory; another element type or layout than asked for, and a tensor
    /// whose bytes crossed in a frame, are errors too.
    pub fn values<T: Element>(&self) -> Result<&[T]> {
        use crate::tensor::TensorError;
        let TensorMeta { dtype, shape, strides } = self.meta;
        let span = match &*self.storage {
            Storage::Leased(lease) => lease.span(),
            Storage::Attached { span, .. } => span,
            Storage::Staged(..) => return Err(staged()),
            Storage::Received(_) => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "the tensor crossed as bytes, which need not be aligned to its elements",
                    "read it with Tensor::bytes",
                ));
            }
        };
        if dtype != T::DTYPE || strides != shape.contiguous_strides() {
            let expected = format!("a contiguous {} tensor", T::DTYPE);
            return Err(TensorError::Unexpected { tensor: "tensor", expected, shape, dtype }.into());
        }
        Ok(span.elements(self.meta.elements()?)?)
    }

    /// Copies `bytes` to the start of the tensor's memory. For tensors from [`crate::client::Client::empty`].
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] where they do not fit, [`ErrorKind::InvalidTensor`] where the tensor has clones or
    /// is not in shared memory.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        match Arc::get_mut(&mut self.storage) {
            Some(Storage::Leased(lease)) => {
                if let Some(on_gpu) = lease.gpu() {
                    // The call that read it last may have been answered before it was run.
                    on_gpu.gpu.synchronize(on_gpu.ready())?;
                }
                Ok(lease.span().write(bytes)?)
            }
            Some(Storage::Staged(..) | Storage::Received(_) | Storage::Attached { .. }) => Err(Error::new(
                ErrorKind::InvalidTensor,
                "the tensor is not in memory shared with the broker; nothing was written",
                "write to a tensor from Client::empty, or pass bytes of your own as the input",
            )),
            None => Err(Error::new(
                ErrorKind::InvalidTensor,
                "the tensor has clones, which may be read at this moment; nothing was written",
                "write before cloning it, or drop the clones first",
            )),
        }
    }
}

fn staged() -> Error {
    Error::new(
        ErrorKind::Unsupported,
        "the tensor is on its way to a GPU and not read where it passes through",
        "copy it to the GPU's memory, or ask for the result in host memory",
    )
}

/// Memory for bytes behind frames, kept from call to call.
#[derive(Debug)]
pub(super) struct BytePool {
    idle: Mutex<Vec<Vec<u8>>>,
    limit: u64,
}

impl BytePool {
    pub(super) fn new(limit: u64) -> Self {
        Self { idle: Mutex::default(), limit }
    }

    /// At least `length` bytes of undetermined content.
    pub(super) fn take(self: &Arc<Self>, length: usize) -> PooledBytes {
        let mut idle = self.idle.lock();
        let fitting = idle.iter().position(|bytes| bytes.len() >= length);
        let bytes = fitting.map(|at| idle.swap_remove(at));
        drop(idle);
        PooledBytes { bytes: bytes.unwrap_or_else(|| vec![0; length]), length, pool: Arc::clone(self) }
    }
}

/// Bytes that go back to their pool.
#[derive(Debug)]
pub(super) struct PooledBytes {
    pub(super) bytes: Vec<u8>,
    length: usize,
    pool: Arc<BytePool>,
}

impl PooledBytes {
    /// The bytes that were received.
    pub(super) fn received(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

impl Drop for PooledBytes {
    fn drop(&mut self) {
        let mut idle = self.pool.idle.lock();
        let kept: usize = idle.iter().map(Vec::len).sum();
        // One result of any size is always kept: a client that asks for large images asks again.
        if idle.is_empty() || (kept + self.bytes.len()) as u64 <= self.pool.limit {
            idle.push(std::mem::take(&mut self.bytes));
        }
    }
}
