//! DLPack, the one place where this extension touches raw memory.
//!
//! Structures as in the DLPack 1.x header. Capsules made here own their tensor in the same
//! allocation; a capsule that nobody consumed frees it in its destructor, as consumers rename the capsules they take.
#![allow(unsafe_code, reason = "DLPack is a C interface")]

use std::ffi::{CStr, c_int, c_void};
use std::ptr::{self, NonNull};

use luna_broker::client::{Input, Tensor, gpu_named};
use luna_broker::device::{GpuRange, StreamRef};
use luna_broker::tensor::{DType, Dims, MAX_RANK, TensorMeta};
use luna_broker::{Error, ErrorKind};
use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods};

mod exchange;

pub(crate) use exchange::Exchange;
use exchange::Taken;

const LEGACY: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";
/// Device type of host memory.
pub(crate) const CPU: c_int = 1;
/// Device type of memory of an NVIDIA GPU.
pub(crate) const CUDA: c_int = 2;

#[repr(C)]
#[derive(Clone, Copy)]
struct DlDevice {
    kind: c_int,
    id: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct DlDataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct DlTensor {
    data: *mut c_void,
    device: DlDevice,
    rank: i32,
    dtype: DlDataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

#[repr(C)]
struct Legacy {
    tensor: DlTensor,
    owner: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Legacy)>,
}

#[repr(C)]
struct Versioned {
    major: u32,
    minor: u32,
    owner: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Versioned)>,
    flags: u64,
    tensor: DlTensor,
}

/// A managed tensor of ours: what consumers see, and what it points into, in one allocation.
#[repr(C)]
struct Managed<Header> {
    /// First, so that a pointer to it is a pointer to the whole.
    header: Header,
    shape: [i64; MAX_RANK],
    strides: [i64; MAX_RANK],
    _tensor: Tensor,
}

const DTYPES: [(DType, u8, u8); 15] = [
    (DType::I8, 0, 8),
    (DType::I16, 0, 16),
    (DType::I32, 0, 32),
    (DType::I64, 0, 64),
    (DType::U8, 1, 8),
    (DType::U16, 1, 16),
    (DType::U32, 1, 32),
    (DType::U64, 1, 64),
    (DType::F16, 2, 16),
    (DType::F32, 2, 32),
    (DType::F64, 2, 64),
    (DType::Bf16, 4, 16),
    (DType::Bool, 6, 8),
    (DType::F8E4M3Fn, 10, 8),
    (DType::F8E5M2, 12, 8),
];

/// A tensor borrowed from another library for the length of a call.
pub(crate) struct Borrowed<'py> {
    meta: TensorMeta,
    data: *const u8,
    length: usize,
    /// Where the memory is: this process's ordinal of a GPU, or the host.
    ordinal: Option<i32>,
    /// Keeps the memory alive.
    _owner: Owner<'py>,
}

/// What a borrow of another library's tensor ends with.
enum Owner<'py> {
    /// Never consumed, so its own destructor frees it.
    Capsule { _capsule: Bound<'py, PyCapsule> },
    /// Made for this borrow by the library's C functions.
    Managed { _managed: Taken },
}

impl<'py> Borrowed<'py> {
    /// The tensor in `capsule`, made by `__dlpack__` of another library.
    ///
    /// # Errors
    /// `InvalidTensor` for an element type or layout that cannot cross, `Unsupported` for memory of a GPU.
    pub(crate) fn new(capsule: Bound<'py, PyCapsule>) -> PyResult<Self> {
        let py = capsule.py();
        // SAFETY: a capsule of this name holds a valid pointer to the structure of that name, by the DLPack protocol;
        // it stays valid while the capsule is neither consumed nor dropped, and the borrow ends before that.
        let tensor = unsafe {
            if let Ok(pointer) = capsule.pointer_checked(Some(VERSIONED)) {
                let managed = pointer.cast::<Versioned>().as_ref();
                if managed.major != 1 {
                    let message = format!("DLPack version {} is not one this package knows", managed.major);
                    return Err(crate::errors::raise(py, Error::new(ErrorKind::Unsupported, message, "")));
                }
                &managed.tensor
            } else {
                &capsule.pointer_checked(Some(LEGACY))?.cast::<Legacy>().as_ref().tensor
            }
        };
        let tensor = ptr::from_ref(tensor);
        // SAFETY: as above; `Owner` keeps the capsule for as long as the borrow lives.
        Self::of(py, unsafe { &*tensor }, Owner::Capsule { _capsule: capsule })
    }

    fn of(py: Python<'py>, tensor: &DlTensor, owner: Owner<'py>) -> PyResult<Self> {
        let (meta, data, length) = describe(tensor).map_err(|error| crate::errors::raise(py, error))?;
        let ordinal = (tensor.device.kind == CUDA).then_some(tensor.device.id);
        Ok(Self { meta, data, length, ordinal, _owner: owner })
    }

    /// This process's ordinal of the GPU whose memory it is.
    pub(crate) fn ordinal(&self) -> Option<i32> {
        self.ordinal
    }

    /// The tensor as a call sends it; of a GPU's memory, as work on `stream` has left it.
    ///
    /// # Errors
    /// As [`Input::new`] and [`Input::on_gpu`].
    pub(crate) fn input(&self, stream: StreamRef) -> Result<Input<'_>, Error> {
        match self.ordinal {
            None => Input::new(self.meta, self.bytes()),
            Some(ordinal) => Input::on_gpu(self.meta, self.range(ordinal, stream)?),
        }
    }

    /// The memory of a GPU, for work on `stream`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the driver shows no such GPU.
    pub(crate) fn range(&self, ordinal: i32, stream: StreamRef) -> Result<GpuRange<'_>, Error> {
        let gpu = gpu_named(&format!("cuda:{ordinal}"))?;
        // SAFETY: the library that made the borrow keeps the memory for as long as it lives, and frees it in the order of
        // its current stream, which is the caller's `stream`.
        Ok(unsafe { GpuRange::new(gpu, self.data.addr(), self.length, stream) })
    }

    pub(crate) fn meta(&self) -> TensorMeta {
        self.meta
    }

    /// The bytes from the first to the last element.
    pub(crate) fn bytes(&self) -> &[u8] {
        if self.length == 0 || self.ordinal.is_some() {
            return &[];
        }
        // SAFETY: the library that made the capsule promises memory for shape and strides at `data`, alive while the
        // capsule is; `length` is the span of those. Python code that writes to it meanwhile changes values only.
        unsafe { std::slice::from_raw_parts(self.data, self.length) }
    }
}

fn describe(tensor: &DlTensor) -> Result<(TensorMeta, *const u8, usize), Error> {
    let refuse = |kind, message: String, remedy: &str| Err(Error::new(kind, message, remedy));
    if ![CPU, CUDA].contains(&tensor.device.kind) {
        let message = format!("the tensor is in memory of device type {}", tensor.device.kind);
        return refuse(ErrorKind::Unsupported, message, "move it to the CPU first: tensor.cpu()");
    }
    let DlDataType { code, bits, lanes } = tensor.dtype;
    let known = DTYPES.iter().find(|(_, known_code, known_bits)| (*known_code, *known_bits, 1) == (code, bits, lanes));
    let Some((dtype, ..)) = known else {
        let message = format!("elements of DLPack type {code}, {bits} bits, {lanes} lanes cannot cross");
        return refuse(ErrorKind::InvalidTensor, message, "convert the tensor to float32");
    };
    let rank = usize::try_from(tensor.rank).unwrap_or(usize::MAX);
    let extents = |pointer: *mut i64| -> Option<Vec<u64>> {
        if rank == 0 || pointer.is_null() || rank > MAX_RANK {
            return (rank == 0).then(Vec::new);
        }
        // SAFETY: the protocol promises `rank` elements at a pointer that is not null.
        let values = unsafe { std::slice::from_raw_parts(pointer, rank) };
        values.iter().map(|value| u64::try_from(*value).ok()).collect()
    };
    let Some(shape) = extents(tensor.shape) else {
        return refuse(ErrorKind::InvalidTensor, format!("a tensor of {rank} dimensions cannot cross"), "");
    };
    let shape = Dims::new(&shape)?;
    let strides = match extents(tensor.strides) {
        Some(strides) => Dims::new(&strides)?,
        None if tensor.strides.is_null() => shape.contiguous_strides(),
        None => {
            return refuse(
                ErrorKind::InvalidTensor,
                "a tensor with negative strides cannot cross".to_owned(),
                "copy it first",
            );
        }
    };
    let meta = TensorMeta::strided(*dtype, shape, strides)?;
    let length = meta.span_bytes()?;
    if length > 0 && tensor.data.is_null() {
        let message = "the tensor has no memory: it only describes one".to_owned();
        return refuse(ErrorKind::InvalidTensor, message, "pass a tensor that holds its elements");
    }
    let offset = usize::try_from(tensor.byte_offset).unwrap_or(0);
    Ok((meta, tensor.data.cast_const().cast::<u8>().wrapping_add(offset), length))
}

impl Versioned {
    fn of(tensor: DlTensor) -> Self {
        Self { major: 1, minor: 0, owner: ptr::null_mut(), deleter: Some(delete_versioned), flags: 0, tensor }
    }
}

/// Gives `Managed` access to the description inside its header.
trait Header {
    fn tensor(&mut self) -> &mut DlTensor;
}

impl Header for Versioned {
    fn tensor(&mut self) -> &mut DlTensor {
        &mut self.tensor
    }
}

impl Header for Legacy {
    fn tensor(&mut self) -> &mut DlTensor {
        &mut self.tensor
    }
}

/// A managed tensor on the memory of `tensor`; its deleter frees it.
///
/// # Errors
/// `BufferError` for a tensor that is staged: it is copied to its GPU and not handed out.
fn manage<H: Header>(tensor: &Tensor, header: impl FnOnce(DlTensor) -> H) -> PyResult<*mut Managed<H>> {
    let Some(address) = tensor.address() else {
        return Err(PyBufferError::new_err("a tensor on its way to a GPU is not handed out before it is there"));
    };
    let meta = tensor.meta();
    let signed = |dims: &Dims| std::array::from_fn(|at| dims.as_slice().get(at).map_or(0, |extent| *extent as i64));
    let (shape, strides) = (signed(&meta.shape), signed(&meta.strides));
    let (_, code, bits) = DTYPES.iter().find(|(dtype, ..)| *dtype == meta.dtype).copied().unwrap_or((DType::U8, 1, 8));
    let described = DlTensor {
        data: address as *mut c_void,
        device: tensor.gpu_ordinal().map_or(DlDevice { kind: CPU, id: 0 }, |id| DlDevice { kind: CUDA, id }),
        rank: meta.shape.rank() as i32,
        dtype: DlDataType { code, bits, lanes: 1 },
        shape: ptr::null_mut(),
        strides: ptr::null_mut(),
        byte_offset: 0,
    };
    let managed =
        Box::into_raw(Box::new(Managed { header: header(described), shape, strides, _tensor: tensor.clone() }));
    // SAFETY: just allocated and nobody else's. No reference to the whole is made: it would end the right of the
    // pointers kept here to what they point to.
    unsafe {
        let (shape, strides) = ((&raw mut (*managed).shape).cast(), (&raw mut (*managed).strides).cast());
        let described = (*managed).header.tensor();
        (described.shape, described.strides) = (shape, strides);
    }
    Ok(managed)
}

/// A capsule that hands `tensor` to another library without a copy: versioned where the consumer knows that.
pub(crate) fn export<'py>(py: Python<'py>, tensor: &Tensor, versioned: bool) -> PyResult<Bound<'py, PyAny>> {
    let (pointer, name, destructor): (*mut c_void, &CStr, ffi::PyCapsule_Destructor) = if versioned {
        (manage(tensor, Versioned::of)?.cast(), VERSIONED, drop_versioned)
    } else {
        let legacy = |tensor| Legacy { tensor, owner: ptr::null_mut(), deleter: Some(delete_legacy) };
        (manage(tensor, legacy)?.cast(), LEGACY, drop_legacy)
    };
    // SAFETY: the pointer is not null, the name is static, the destructor has the right signature, and the thread is
    // attached to the interpreter.
    unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyCapsule_New(pointer, name.as_ptr(), Some(destructor))) }
}

/// Called once by whoever consumed the capsule, on any thread, perhaps without the interpreter: touches no Python.
unsafe extern "C" fn delete_versioned(managed: *mut Versioned) {
    // SAFETY: the header of an allocation that `manage` leaked; the protocol promises a single call.
    drop(unsafe { Box::from_raw(managed.cast::<Managed<Versioned>>()) });
}

/// As [`delete_versioned`].
unsafe extern "C" fn delete_legacy(managed: *mut Legacy) {
    // SAFETY: the header of an allocation that `manage` leaked; the protocol promises a single call.
    drop(unsafe { Box::from_raw(managed.cast::<Managed<Legacy>>()) });
}

/// The pointer in a capsule that still has the name it was made with: nobody consumed it.
unsafe fn unconsumed(capsule: *mut ffi::PyObject, name: &CStr) -> Option<NonNull<c_void>> {
    // SAFETY: called by the interpreter with a valid capsule while it is being destroyed.
    unsafe {
        (ffi::PyCapsule_IsValid(capsule, name.as_ptr()) == 1)
            .then(|| NonNull::new(ffi::PyCapsule_GetPointer(capsule, name.as_ptr())))?
    }
}

unsafe extern "C" fn drop_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter passes the capsule it destroys; an unconsumed one still owns its tensor.
    unsafe {
        if let Some(managed) = unconsumed(capsule, VERSIONED) {
            delete_versioned(managed.as_ptr().cast());
        }
    }
}

unsafe extern "C" fn drop_legacy(capsule: *mut ffi::PyObject) {
    // SAFETY: the interpreter passes the capsule it destroys; an unconsumed one still owns its tensor.
    unsafe {
        if let Some(managed) = unconsumed(capsule, LEGACY) {
            delete_legacy(managed.as_ptr().cast());
        }
    }
}
