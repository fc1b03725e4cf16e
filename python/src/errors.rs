use luna_broker::{Error, ErrorKind};
use pyo3::create_exception;
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

create_exception!(luna_broker, LunaBrokerError, PyException, "Base of every error of this package.");

macro_rules! classes {
    ($($name:ident: $doc:literal;)*) => {
        $(create_exception!(luna_broker, $name, LunaBrokerError, $doc);)*

        pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
            let py = module.py();
            let base = py.get_type::<LunaBrokerError>();
            base.setattr("kind", "")?;
            base.setattr("remedy", "")?;
            module.add("LunaBrokerError", base)?;
            $(module.add(stringify!($name), py.get_type::<$name>())?;)*
            module.add_function(wrap_pyfunction!(out_of_memory_class, module)?)
        }
    };
}

classes! {
    ConnectionLost: "The broker is not there, went away, or the client was closed.";
    Refused: "The broker ended the negotiation.";
    Busy: "A bounded queue is full; the request never entered it.";
    OutOfMemory: "A byte budget or an allocator said no; what the request held was given back.";
    ModelNotFound: "No model of that name, or no such file.";
    InvalidModel: "The path exists but is nothing that can be used.";
    InvalidTensor: "A tensor does not fit the operation.";
    Stale: "Something refers to an earlier life.";
    Unsupported: "Recognised, but nothing this build or device can do.";
    InUse: "Somebody uses what the request would replace or take away.";
    Timeout: "The deadline passed before the answer came.";
    Cancelled: "The request was taken back before it was done.";
    ShuttingDown: "The broker is stopping.";
    ProtocolError: "The peer broke the protocol.";
    ConfigurationError: "A setting is wrong.";
}

/// The exception that an error of the crate is in Python.
pub(crate) fn raise(py: Python<'_>, error: impl Into<Error>) -> PyErr {
    let error = error.into();
    let kind = error.kind();
    let class = match kind {
        ErrorKind::ConnectionLost => py.get_type::<ConnectionLost>(),
        ErrorKind::Refused => py.get_type::<Refused>(),
        ErrorKind::Busy => py.get_type::<Busy>(),
        ErrorKind::OutOfMemory => out_of_memory(py),
        ErrorKind::ModelNotFound => py.get_type::<ModelNotFound>(),
        ErrorKind::InvalidModel => py.get_type::<InvalidModel>(),
        ErrorKind::InvalidTensor => py.get_type::<InvalidTensor>(),
        ErrorKind::Stale => py.get_type::<Stale>(),
        ErrorKind::Unsupported => py.get_type::<Unsupported>(),
        ErrorKind::InUse => py.get_type::<InUse>(),
        ErrorKind::Timeout => py.get_type::<Timeout>(),
        ErrorKind::Cancelled => py.get_type::<Cancelled>(),
        ErrorKind::ShuttingDown => py.get_type::<ShuttingDown>(),
        ErrorKind::Protocol => py.get_type::<ProtocolError>(),
        ErrorKind::Configuration => py.get_type::<ConfigurationError>(),
        _ => py.get_type::<LunaBrokerError>(),
    };
    let remedy = error.remedy().to_owned();
    let exception = PyErr::from_type(class, error.to_string());
    let value = exception.value(py);
    let described = value.setattr("kind", format!("{kind:?}")).and_then(|()| value.setattr("remedy", remedy));
    described.err().unwrap_or(exception)
}

/// Another library's refusal to export `object`: its first line, as what follows is a stack of C++, and a way out.
pub(crate) fn not_exported(object: &Bound<'_, PyAny>, cause: PyErr) -> PyErr {
    let py = object.py();
    if !cause.is_instance_of::<PyException>(py) {
        return cause;
    }
    let attribute = |name| object.getattr(name).map_or_else(|_| format!("unknown {name}"), |value| value.to_string());
    let [dtype, shape, layout, device] = ["dtype", "shape", "layout", "device"].map(attribute);
    let said = cause.value(py).to_string();
    let said = said.lines().next().unwrap_or_default();
    let message = format!("a tensor of {dtype}, {shape}, {layout}, on {device} cannot cross: {said}");
    let remedy = "pass a dense tensor in the CPU's memory; tensor.to_dense() or tensor.dequantize() makes one";
    let refused = raise(py, Error::new(ErrorKind::InvalidTensor, message, remedy));
    refused.set_cause(py, Some(cause));
    refused
}

/// `OutOfMemory`, which where torch is loaded is a `torch.OutOfMemoryError` too: code that catches that one and falls
/// back to tiles keeps working.
fn out_of_memory(py: Python<'_>) -> Bound<'_, PyType> {
    static WITH_TORCH: PyOnceLock<Py<PyType>> = PyOnceLock::new();
    let made = WITH_TORCH.get_or_try_init(py, || {
        let modules = py.import("sys")?.getattr("modules")?;
        let torchs = modules.get_item("torch")?.getattr("OutOfMemoryError")?;
        let ours = py.get_type::<OutOfMemory>();
        let bases = PyTuple::new(py, [ours.clone().into_any(), torchs])?;
        let names = PyDict::new(py);
        names.set_item("__module__", "luna_broker")?;
        names.set_item("__doc__", ours.getattr("__doc__")?)?;
        let class = py.get_type::<PyType>().call1(("OutOfMemory", bases, names))?;
        Ok::<_, PyErr>(class.cast_into::<PyType>()?.unbind())
    });
    made.map_or_else(|_| py.get_type::<OutOfMemory>(), |class| class.bind(py).clone())
}

/// The class that running out of memory raises at this moment.
#[pyfunction]
fn out_of_memory_class(py: Python<'_>) -> Bound<'_, PyType> {
    out_of_memory(py)
}
