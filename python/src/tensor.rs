use luna_broker::client::Tensor;
use luna_broker::device::StreamRef;
use luna_broker::service::Rung;
use luna_broker::tensor::{DType, TensorMeta};
use luna_broker::{Error, ErrorKind};
use pyo3::exceptions::{PyBufferError, PyTypeError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyCapsule, PyDict, PyTuple, PyType};

use crate::call::quick;
use crate::dlpack::{self, Borrowed, Exchange};
use crate::errors::raise;

/// The library a tensor came from, and so the one its result goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Library {
    Torch,
    Numpy,
}

/// What is looked up in torch once.
struct Torch {
    tensor: Py<PyType>,
    /// Its C functions, which versions before 2.10 do not have.
    exchange: Option<Exchange>,
    to_dlpack: Py<PyAny>,
    from_dlpack: Py<PyAny>,
    /// Whether this torch takes capsules of DLPack 1.0; older ones know `dltensor` only.
    versioned: bool,
}

/// A tensor that a caller gave, and what is known of it beside DLPack's description.
pub(crate) struct Given<'py> {
    pub(crate) library: Library,
    pub(crate) borrowed: Borrowed<'py>,
    /// The stream behind whose work it is; of the host's memory, none in particular.
    pub(crate) stream: StreamRef,
}

impl Torch {
    /// The stream that torch's work on a GPU goes to.
    fn current_stream(&self, py: Python<'_>, ordinal: i32) -> PyResult<StreamRef> {
        if let Some(exchange) = self.exchange {
            return exchange.current_stream(py, ordinal);
        }
        let stream = py.import("torch.cuda")?.call_method1("current_stream", (ordinal,))?;
        Ok(StreamRef(stream.getattr("cuda_stream")?.extract()?))
    }

    fn given<'py>(&self, object: &Bound<'py, PyAny>) -> PyResult<Given<'py>> {
        let py = object.py();
        let mut borrowed = self.borrow(object)?;
        // A view that negates when it is read says so in a bit that DLPack does not carry.
        if may_negate(&borrowed.meta()) && object.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
            borrowed = self.borrow(&object.call_method0(intern!(py, "resolve_neg"))?)?;
        }
        let Some(ordinal) = borrowed.ordinal() else {
            return Ok(Given { library: Library::Torch, borrowed, stream: StreamRef::DEFAULT });
        };
        if !borrowed.meta().is_dense() {
            borrowed = self.borrow(&object.call_method0(intern!(py, "contiguous"))?)?;
        }
        Ok(Given { library: Library::Torch, borrowed, stream: self.current_stream(py, ordinal)? })
    }

    fn hand_out<'py>(&self, py: Python<'py>, tensor: &Tensor) -> PyResult<Bound<'py, PyAny>> {
        if let Some(ordinal) = tensor.gpu_ordinal() {
            let stream = self.current_stream(py, ordinal)?;
            if tensor.gpu_rung() == Some(Rung::Peer) {
                return self.copied(py, tensor, ordinal, stream);
            }
            tensor.use_on(stream).map_err(|error| raise(py, error))?;
        }
        match self.exchange {
            Some(exchange) => exchange.hand_out(py, tensor),
            None => self.from_dlpack.bind(py).call1((dlpack::export(py, tensor, self.versioned)?,)),
        }
    }

    /// A tensor of torch's own: memory of another GPU is read once and not computed with, and what comes through the
    /// host's page-locked memory is not handed out from there.
    fn copied<'py>(
        &self,
        py: Python<'py>,
        tensor: &Tensor,
        ordinal: i32,
        stream: StreamRef,
    ) -> PyResult<Bound<'py, PyAny>> {
        let torch = py.import("torch")?;
        let options = PyDict::new(py);
        options.set_item("dtype", torch.getattr(tensor.meta().dtype.name())?)?;
        options.set_item("device", format!("cuda:{ordinal}"))?;
        let shape: Vec<u64> = tensor.meta().shape.as_slice().to_vec();
        let own = torch.call_method("empty", (shape,), Some(&options))?;
        let borrowed = self.borrow(&own)?;
        let range = borrowed.range(ordinal, stream).map_err(|error| raise(py, error))?;
        // Of what came through the host the copy is done on return, and the tensor free to go.
        quick(py, || tensor.copy_to_gpu(&range))?;
        Ok(own)
    }

    fn borrow<'py>(&self, object: &Bound<'py, PyAny>) -> PyResult<Borrowed<'py>> {
        if let Some(exchange) = self.exchange {
            return exchange.borrow(object);
        }
        let capsule = self.to_dlpack.bind(object.py()).call1((object,));
        let capsule = capsule.map_err(|cause| crate::errors::not_exported(object, cause))?;
        Borrowed::new(capsule.cast_into::<PyCapsule>()?)
    }
}

/// Whether a tensor of this layout can be a view that negates: torch makes those of the imaginary parts of complex
/// numbers, which lie two elements apart. Spares all others the question, a call through the interpreter.
fn may_negate(meta: &TensorMeta) -> bool {
    let mut dims = meta.shape.as_slice().iter().zip(meta.strides.as_slice());
    dims.all(|(&extent, stride)| extent < 2 || stride.is_multiple_of(2))
}

/// Torch, if the program has loaded it: this package never loads it by itself.
fn torch(py: Python<'_>) -> Option<&Torch> {
    static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
    let find = || -> PyResult<Torch> {
        let torch = py.import("sys")?.getattr("modules")?.get_item("torch")?;
        let exchange = torch.getattr("utils")?.getattr("dlpack")?;
        // The compiled function without its Python wrapper, where this version of torch has it: 7 µs less per result.
        let native = torch.getattr("_C")?;
        let from_dlpack = native.getattr("_from_dlpack");
        let tensor = torch.getattr("Tensor")?;
        Ok(Torch {
            exchange: Exchange::of(&tensor),
            versioned: native.hasattr("_to_dlpack_versioned")?,
            tensor: tensor.cast_into::<PyType>()?.unbind(),
            to_dlpack: exchange.getattr("to_dlpack")?.unbind(),
            from_dlpack: from_dlpack.or_else(|_| exchange.getattr("from_dlpack"))?.unbind(),
        })
    };
    TORCH.get_or_try_init(py, find).ok()
}

/// Borrows a torch tensor, or anything that speaks DLPack as numpy does, for the length of a call.
///
/// # Errors
/// `TypeError` for anything else, else as [`Borrowed::new`].
pub(crate) fn borrow<'py>(object: &Bound<'py, PyAny>) -> PyResult<Given<'py>> {
    let py = object.py();
    if let Some(torch) = torch(py)
        && object.is_instance(torch.tensor.bind(py))?
    {
        return torch.given(object);
    }
    let export = object.getattr("__dlpack__").map_err(|_| {
        let kind = object.get_type();
        PyTypeError::new_err(format!("expected a torch tensor or a numpy array, got {kind}"))
    })?;
    let given = |borrowed| Given { library: Library::Numpy, borrowed, stream: StreamRef::DEFAULT };
    if is_on_cuda(object)? {
        // Its work is made to come before what is enqueued on the legacy default stream, which DLPack numbers 1.
        let options = PyDict::new(py);
        options.set_item("stream", 1)?;
        let capsule = export.call((), Some(&options))?;
        return Ok(given(Borrowed::new(capsule.cast_into::<PyCapsule>()?)?));
    }
    let capsule = match export.call0() {
        Ok(capsule) => capsule,
        // Read-only or oddly strided arrays are not exported: their copy is.
        Err(_) => contiguous_copy(object)?.call_method0("__dlpack__")?,
    };
    match Borrowed::new(capsule.cast_into::<PyCapsule>()?) {
        Ok(borrowed) => Ok(given(borrowed)),
        Err(error) if error.is_instance_of::<crate::errors::InvalidTensor>(py) => {
            let capsule = contiguous_copy(object)?.call_method0("__dlpack__")?;
            let retried = Borrowed::new(capsule.cast_into::<PyCapsule>()?).map_err(|_| error)?;
            Ok(given(retried))
        }
        Err(error) => Err(error),
    }
}

/// As [`borrow`], with the elements in host memory one after the other: of a copy where they do not lie so.
///
/// # Errors
/// As [`borrow`].
pub(crate) fn borrow_on_host<'py>(object: &Bound<'py, PyAny>) -> PyResult<Borrowed<'py>> {
    let py = object.py();
    let is_torchs = torch(py).is_some_and(|torch| object.is_instance(torch.tensor.bind(py)).unwrap_or_default());
    if !is_torchs {
        let given = borrow(object)?;
        if given.borrowed.ordinal().is_none() && given.borrowed.meta().is_row_major() {
            return Ok(given.borrowed);
        }
        return Ok(borrow(&contiguous_copy(object)?)?.borrowed);
    }
    // Parameters too: what is published is their values.
    let mut object = object.call_method0(intern!(py, "detach"))?;
    if object.getattr(intern!(py, "is_cuda"))?.is_truthy()? {
        object = object.call_method0(intern!(py, "cpu"))?;
    }
    let given = borrow(&object)?;
    if given.borrowed.meta().is_row_major() {
        return Ok(given.borrowed);
    }
    Ok(borrow(&object.call_method0(intern!(py, "contiguous"))?)?.borrowed)
}

fn is_on_cuda(object: &Bound<'_, PyAny>) -> PyResult<bool> {
    match object.call_method0(intern!(object.py(), "__dlpack_device__")) {
        Ok(device) => Ok(device.get_item(0)?.extract::<i32>()? == dlpack::CUDA),
        // Older libraries have none; they know host memory only.
        Err(_) => Ok(false),
    }
}

fn contiguous_copy<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let options = PyDict::new(object.py());
    options.set_item("order", "C")?;
    options.set_item("copy", true)?;
    object.py().import("numpy")?.call_method("array", (object,), Some(&options))
}

/// Hands a tensor of the broker's to `library` without a copy; `wanted` is the GPU it should be on. A tensor that comes
/// through the host's memory, because the GPU's rung shares none of its own, is copied there.
pub(crate) fn hand_out<'py>(
    py: Python<'py>,
    tensor: Tensor,
    library: Library,
    wanted: Option<i32>,
) -> PyResult<Bound<'py, PyAny>> {
    match (library, torch(py)) {
        (Library::Torch, Some(torch)) => {
            if let Some(ordinal) = wanted.filter(|_| tensor.is_staged()) {
                return torch.copied(py, &tensor, ordinal, torch.current_stream(py, ordinal)?);
            }
            let here = torch.hand_out(py, &tensor)?;
            match wanted.filter(|_| tensor.gpu_ordinal().is_none()) {
                Some(ordinal) => here.call_method1("to", (format!("cuda:{ordinal}"),)),
                None => Ok(here),
            }
        }
        _ if tensor.gpu_ordinal().is_some() || !numpy_has(tensor.meta().dtype) => {
            Ok(Bound::new(py, DeviceTensor(tensor))?.into_any())
        }
        _ => py.import("numpy")?.call_method1("from_dlpack", (DeviceTensor(tensor),)),
    }
}

/// Whether numpy has the element type.
fn numpy_has(dtype: DType) -> bool {
    dtype != DType::Bf16 && !dtype.is_float8()
}

/// The library that tensors are made for where no tensor of the caller's says which.
pub(crate) fn loaded_library(py: Python<'_>) -> Library {
    if torch(py).is_some() { Library::Torch } else { Library::Numpy }
}

/// A device by torch's name for it, or torch's object: `cpu`, `cuda`, `cuda:1`.
pub(crate) enum Device {
    Cpu,
    Cuda(i32),
}

impl Device {
    pub(crate) fn named(object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let py = object.py();
        let name = object.str()?.to_string();
        let refused = || {
            let message = format!("results on device {name} are not supported");
            raise(py, Error::new(ErrorKind::Unsupported, message, "use cpu, cuda or cuda:N"))
        };
        match name.split_once(':') {
            None if name == "cpu" => Ok(Self::Cpu),
            None if name == "cuda" => match torch(py) {
                Some(_) => Ok(Self::Cuda(py.import("torch.cuda")?.call_method0("current_device")?.extract()?)),
                None => Ok(Self::Cuda(0)),
            },
            Some(("cuda", ordinal)) => ordinal.parse().map(Self::Cuda).map_err(|_| refused()),
            _ => Err(refused()),
        }
    }
}

/// Element type and library that `dtype` names: `torch.float16`, `numpy.float16`, `"float16"`.
pub(crate) fn dtype(object: &Bound<'_, PyAny>) -> PyResult<(Library, DType)> {
    let name = match object.getattr("__name__") {
        Ok(name) => name.str()?.to_string(),
        Err(_) => object.str()?.to_string(),
    };
    let (library, name) = match name.strip_prefix("torch.") {
        Some(name) => (Library::Torch, name.to_owned()),
        None => (Library::Numpy, name),
    };
    DType::from_name(&name)
        .map(|dtype| (library, dtype))
        .ok_or_else(|| PyTypeError::new_err(format!("{name} is not an element type that can cross")))
}

/// A tensor of the broker's for libraries that speak DLPack: numpy in host memory, and any in a GPU's.
#[pyclass(frozen, module = "luna_broker")]
pub(crate) struct DeviceTensor(Tensor);

#[pymethods]
impl DeviceTensor {
    /// Extents.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.meta().shape.as_slice())
    }

    /// Name of the element type.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.meta().dtype.name()
    }

    /// `cpu` or `cuda:N`.
    #[getter]
    fn device(&self) -> String {
        self.0.gpu_ordinal().map_or_else(|| "cpu".to_owned(), |ordinal| format!("cuda:{ordinal}"))
    }

    /// The bytes, copied to host memory once the broker is done with them.
    fn tobytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = quick(py, || self.0.to_vec())?;
        Ok(PyBytes::new(py, &bytes))
    }

    /// By the protocol: `stream` is the consumer's, and comes behind the broker's work.
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<isize>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        if copy == Some(true) || dl_device.is_some_and(|device| device != self.__dlpack_device__()) {
            return Err(PyBufferError::new_err("the tensor is handed out where it is, without a copy"));
        }
        // None is the legacy default stream.
        match stream.unwrap_or_default() {
            // A consumer that sees to the order itself.
            -1 => self.0.use_somewhere(),
            stream @ 0.. => {
                let stream = StreamRef(stream.cast_unsigned());
                self.0.use_on(stream).map_err(|error| raise(py, error))?;
            }
            stream => return Err(PyBufferError::new_err(format!("{stream} is no stream"))),
        }
        dlpack::export(py, &self.0, max_version.is_some_and(|(major, _)| major >= 1))
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        self.0.gpu_ordinal().map_or((dlpack::CPU, 0), |ordinal| (dlpack::CUDA, ordinal))
    }

    fn __repr__(&self) -> String {
        format!("<DeviceTensor {} {} on {}>", self.dtype(), self.0.meta().shape, self.device())
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<DeviceTensor>()
}
