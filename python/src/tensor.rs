use luna_broker::client::Tensor;
use luna_broker::tensor::{DType, TensorMeta};
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyCapsule, PyDict, PyType};

use crate::dlpack::{self, Borrowed, Exchange};

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

impl Torch {
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
pub(crate) fn borrow<'py>(object: &Bound<'py, PyAny>) -> PyResult<(Library, Borrowed<'py>)> {
    let py = object.py();
    if let Some(torch) = torch(py)
        && object.is_instance(torch.tensor.bind(py))?
    {
        let borrowed = torch.borrow(object)?;
        // A view that negates when it is read says so in a bit that DLPack does not carry.
        if may_negate(&borrowed.meta()) && object.call_method0(intern!(py, "is_neg"))?.is_truthy()? {
            return Ok((Library::Torch, torch.borrow(&object.call_method0(intern!(py, "resolve_neg"))?)?));
        }
        return Ok((Library::Torch, borrowed));
    }
    let export = object.getattr("__dlpack__").map_err(|_| {
        let kind = object.get_type();
        PyTypeError::new_err(format!("expected a torch tensor or a numpy array, got {kind}"))
    })?;
    let capsule = match export.call0() {
        Ok(capsule) => capsule,
        // Read-only or oddly strided arrays are not exported: their copy is.
        Err(_) => contiguous_copy(object)?.call_method0("__dlpack__")?,
    };
    match Borrowed::new(capsule.cast_into::<PyCapsule>()?) {
        Ok(borrowed) => Ok((Library::Numpy, borrowed)),
        Err(error) if error.is_instance_of::<crate::errors::InvalidTensor>(py) => {
            let capsule = contiguous_copy(object)?.call_method0("__dlpack__")?;
            let retried = Borrowed::new(capsule.cast_into::<PyCapsule>()?).map_err(|_| error)?;
            Ok((Library::Numpy, retried))
        }
        Err(error) => Err(error),
    }
}

fn contiguous_copy<'py>(object: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let options = PyDict::new(object.py());
    options.set_item("order", "C")?;
    options.set_item("copy", true)?;
    object.py().import("numpy")?.call_method("array", (object,), Some(&options))
}

/// Hands a tensor of the broker's to `library` without a copy.
pub(crate) fn hand_out<'py>(py: Python<'py>, tensor: Tensor, library: Library) -> PyResult<Bound<'py, PyAny>> {
    match (library, torch(py)) {
        (Library::Torch, Some(Torch { exchange: Some(exchange), .. })) => exchange.hand_out(py, &tensor),
        (Library::Torch, Some(torch)) => {
            torch.from_dlpack.bind(py).call1((dlpack::export(py, &tensor, torch.versioned)?,))
        }
        _ => py.import("numpy")?.call_method1("from_dlpack", (Exported(tensor),)),
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
    let known = [
        DType::F16,
        DType::Bf16,
        DType::F32,
        DType::F64,
        DType::U8,
        DType::I8,
        DType::I16,
        DType::I32,
        DType::I64,
        DType::Bool,
    ];
    let found = known.into_iter().find(|dtype| dtype.name() == name);
    found
        .map(|dtype| (library, dtype))
        .ok_or_else(|| PyTypeError::new_err(format!("{name} is not an element type that can cross")))
}

/// What `numpy.from_dlpack` wants: an object with the two methods of the protocol.
#[pyclass(frozen, module = "luna_broker")]
struct Exported(Tensor);

#[pymethods]
impl Exported {
    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    #[expect(unused_variables, reason = "host memory has no stream, no other device and needs no copy")]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<Bound<'py, PyAny>>,
        copy: Option<bool>,
    ) -> PyResult<Bound<'py, PyAny>> {
        dlpack::export(py, &self.0, max_version.is_some_and(|(major, _)| major >= 1))
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        (dlpack::CPU, 0)
    }
}
