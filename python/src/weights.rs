use luna_broker::client::{self, gpu_named};
use luna_broker::protocol::HolderReport;
use luna_broker::tensor::CastRule;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::call::{Patience, loading, quick, released};
use crate::tensor::{Device, dtype, hand_out, loaded_library};

/// Weights that lie in the broker's memory; `luna_broker.Weights` is the dictionary of their tensors.
#[pyclass(frozen, module = "luna_broker._native")]
pub(crate) struct Attached {
    client: client::Client,
    weights: client::Weights,
    patience: Patience,
}

impl Attached {
    /// The dictionary of the tensors of `weights`.
    pub(crate) fn mapping(
        py: Python<'_>,
        client: &client::Client,
        weights: client::Weights,
        patience: &Patience,
    ) -> PyResult<Py<PyAny>> {
        let patience = patience.with(client.config().timeout);
        let attached = Bound::new(py, Self { client: client.clone(), weights, patience })?;
        Ok(py.import("luna_broker.weights")?.call_method1("Weights", (attached,))?.unbind())
    }
}

/// The element types that `dtype` asks for: none, one for all, or a dictionary by the beginnings of keys.
pub(crate) fn cast_rule(wanted: Option<&Bound<'_, PyAny>>) -> PyResult<CastRule> {
    let Some(wanted) = wanted else { return Ok(CastRule::stored()) };
    let Ok(by_prefix) = wanted.cast::<PyDict>() else { return Ok(CastRule::all(dtype(wanted)?.1)) };
    by_prefix.iter().try_fold(CastRule::stored(), |rule, (prefix, wanted)| {
        let prefix: String = prefix.extract().map_err(|_| {
            PyTypeError::new_err(format!("dtype: a dictionary's keys are beginnings of keys, not {prefix}"))
        })?;
        let wanted = if wanted.is_none() { None } else { Some(dtype(&wanted)?.1) };
        Ok(rule.with(prefix, wanted))
    })
}

/// Attaches weights and hands out their dictionary.
pub(crate) fn attach(
    client: &client::Client,
    name: &str,
    rule: CastRule,
    device: Option<&Bound<'_, PyAny>>,
    watch: Watch<'_>,
) -> PyResult<Py<PyAny>> {
    let Watch { py, patience, progress } = watch;
    let gpu = match device.map(Device::named).transpose()? {
        None | Some(Device::Cpu) => None,
        Some(Device::Cuda(ordinal)) => Some(quick(py, || gpu_named(&format!("cuda:{ordinal}")))?),
    };
    let weights = loading(py, patience, progress, |options| {
        client.attach_with(name, &client::AttachOptions { rule, gpu, ..options.clone() })
    })?;
    Attached::mapping(py, client, weights, patience)
}

/// Runs `load` with who is told how far it is: the caller's own, nobody for `False`, else a bar on the terminal.
pub(crate) fn shown<T>(
    py: Python<'_>,
    name: &str,
    progress: Option<Py<PyAny>>,
    load: impl FnOnce(Option<&Py<PyAny>>) -> PyResult<T>,
) -> PyResult<T> {
    match progress {
        Some(told) if told.bind(py).is_callable() => load(Some(&told)),
        Some(told) if !told.bind(py).is_truthy()? => load(None),
        Some(told) => {
            Err(PyTypeError::new_err(format!("progress={told}: give a function of (done, total), False or None")))
        }
        None => {
            let bar = py.import("luna_broker.progress")?.call_method1("Bar", (name,))?.unbind();
            let loaded = load(Some(&bar));
            bar.call_method0(py, "close")?;
            loaded
        }
    }
}

/// How long somebody waits, and what they are told meanwhile.
pub(crate) struct Watch<'py> {
    pub(crate) py: Python<'py>,
    pub(crate) patience: &'py Patience,
    pub(crate) progress: Option<&'py Py<PyAny>>,
}

#[pymethods]
impl Attached {
    /// What they were asked for by.
    #[getter]
    fn name(&self) -> &str {
        self.weights.name()
    }

    /// What the tensors contain, in hexadecimal digits.
    #[getter]
    fn digest(&self) -> String {
        self.weights.content().to_string()
    }

    /// Bytes of shared memory that they lie in.
    #[getter]
    fn size_bytes(&self) -> u64 {
        self.weights.size_bytes()
    }

    /// `cpu` or `cuda:N`.
    #[getter]
    fn device(&self) -> String {
        let first = self.weights.keys().next().and_then(|key| self.weights.tensor(key).ok());
        let ordinal = first.and_then(|tensor| tensor.gpu_ordinal());
        ordinal.map_or_else(|| "cpu".to_owned(), |ordinal| format!("cuda:{ordinal}"))
    }

    /// All tensors by key: torch's where that is loaded, else numpy's.
    fn tensors<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let library = loaded_library(py);
        let tensors = PyDict::new(py);
        for key in self.weights.keys() {
            let tensor = self.weights.tensor(key).map_err(|error| crate::errors::raise(py, error))?;
            tensors.set_item(key, hand_out(py, tensor, library, None)?)?;
        }
        Ok(tensors)
    }

    /// First address of the memory and the one behind it.
    #[getter]
    fn span(&self) -> PyResult<(usize, usize)> {
        let start = self.weights.address();
        let size_bytes = usize::try_from(self.weights.size_bytes())?;
        Ok((start, start + size_bytes))
    }

    /// Whether the broker still counts them as held.
    fn check(&self, py: Python<'_>) -> PyResult<()> {
        released(py, &self.patience, |options| self.weights.check_with(options))
    }

    /// Takes hold of them anew.
    #[pyo3(signature = (progress=None))]
    fn reattach(&self, py: Python<'_>, progress: Option<Py<PyAny>>) -> PyResult<()> {
        shown(py, self.weights.name(), progress, |progress| {
            loading(py, &self.patience.with(None), progress, |options| self.weights.reattach_with(options))
        })
    }

    /// Bytes of pages that this process has written to; `None` where the system does not tell.
    #[getter]
    fn diverged_bytes(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        let status = quick(py, || self.client.status())?;
        let session = self.client.session().id;
        let same = status.weights.iter().filter(|set| set.content == self.weights.content());
        let own = same.flat_map(|set| &set.holders).filter(|holder: &&HolderReport| holder.session == session);
        Ok(own.filter_map(|holder| holder.diverged_bytes).max())
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Attached>()
}
