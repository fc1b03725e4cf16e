use std::path::PathBuf;

use luna_broker::client::{self, CallOptions};
use luna_broker::service::{AdapterMode, AdapterStack, AdapterUse, BlockCache, RunSettings, StepInput};
use luna_broker::{Error, ErrorKind};
use parking_lot::Mutex;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::call::{Patience, quick, released};
use crate::client::to_python;
use crate::errors::raise;
use crate::tensor::{borrow, hand_out};
use crate::unet::lists;
use crate::vae::{Call, result_place, settle, unshared};

/// One sampling run of a UNet that lives in the broker.
#[pyclass(frozen, module = "luna_broker")]
pub(crate) struct Run {
    run: client::Run,
    patience: Patience,
    last: Mutex<Option<Call>>,
}

impl Run {
    pub(crate) fn new(run: client::Run, patience: Patience) -> Self {
        Self { run, patience, last: Mutex::new(None) }
    }
}

#[pymethods]
impl Run {
    /// What the model took up of each adapter.
    #[getter]
    fn adapters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.run.adapters())
    }

    /// The run until now.
    #[getter]
    fn report<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let report = self.run.report();
        let told = to_python(py, &report)?;
        told.set_item("speed_up", report.speed_up())?;
        Ok(told)
    }

    /// How the last step through this object went.
    #[getter]
    fn last(&self, py: Python<'_>) -> PyResult<Option<Py<Call>>> {
        let last = self.last.lock().clone();
        last.map(|call| Py::new(py, call)).transpose()
    }

    /// The network's output for one step of the run.
    #[pyo3(signature = (x, timesteps, context=None, y=None, control=None, conds=vec![0], device=None))]
    #[expect(clippy::too_many_arguments, reason = "they are the call's own")]
    fn __call__<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        timesteps: &Bound<'py, PyAny>,
        context: Option<&Bound<'py, PyAny>>,
        y: Option<&Bound<'py, PyAny>>,
        control: Option<&Bound<'py, PyDict>>,
        conds: Vec<u32>,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = x.py();
        let given = StepInput {
            x: borrow(x)?,
            timesteps: borrow(timesteps)?,
            context: context.map(borrow).transpose()?,
            y: y.map(borrow).transpose()?,
            control: control.map(lists).transpose()?,
        };
        let (library, ordinal) = (given.x.library, given.x.borrowed.ordinal());
        let (wanted, result) = result_place(py, device, ordinal)?;
        let input = given.try_map(&mut |one| one.borrowed.input(one.stream)).map_err(|error| raise(py, error))?;
        let unshared = unshared(library);
        let output = released(py, &self.patience, |options| {
            self.run.call(&input, &conds, &CallOptions { result, unshared, ..*options })
        })?;
        for one in given.each() {
            settle(py, one.library, one.borrowed.ordinal())?;
        }
        *self.last.lock() = Some(Call::from(&output));
        hand_out(py, output.tensor, library, wanted)
    }

    /// Ends the run.
    fn close(&self, py: Python<'_>) -> PyResult<()> {
        quick(py, || {
            self.run.close();
            Ok(())
        })
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_raised))]
    fn __exit__(&self, py: Python<'_>, _raised: &Bound<'_, PyAny>) -> PyResult<()> {
        self.close(py)
    }

    fn __repr__(&self) -> String {
        let report = self.run.report();
        format!("<Run of {} steps, {} of them left out>", report.steps, report.hits)
    }
}

/// Adapters as callers give them: pairs of file and strength, in order.
pub(crate) fn stack(py: Python<'_>, loras: Option<Vec<(PathBuf, f64)>>, mode: &str) -> PyResult<AdapterStack> {
    let mode = AdapterMode::from_name(mode).ok_or_else(|| {
        let message = format!("lora_mode={mode:?} is none of {}", AdapterMode::ALL.map(AdapterMode::name).join(", "));
        raise(py, Error::new(ErrorKind::Configuration, message, "leave it out for \"auto\""))
    })?;
    let used = |(path, strength): (PathBuf, f64)| AdapterUse { name: path.to_string_lossy().into_owned(), strength };
    Ok(AdapterStack { adapters: loras.into_iter().flatten().map(used).collect(), mode })
}

/// What a run is opened with.
pub(crate) fn settings(
    adapters: AdapterStack,
    cache: Option<&Bound<'_, PyAny>>,
    sigmas: Option<Vec<f64>>,
) -> PyResult<RunSettings> {
    Ok(RunSettings { adapters, cache: cache.map(block_cache).transpose()?, sigmas: sigmas.unwrap_or_default() })
}

/// A threshold alone, or a dictionary with more.
fn block_cache(given: &Bound<'_, PyAny>) -> PyResult<BlockCache> {
    let Ok(given) = given.cast::<PyDict>() else {
        return Ok(BlockCache::new(given.extract()?));
    };
    let mut cache = BlockCache::new(f64::NAN);
    for (name, value) in given {
        match name.extract::<String>()?.as_str() {
            "threshold" => cache.threshold = value.extract()?,
            "start" => cache.start = value.extract()?,
            "end" => cache.end = value.extract()?,
            "max_hits" => cache.max_hits = value.extract()?,
            other => {
                let known = "threshold, start, end and max_hits";
                return Err(PyTypeError::new_err(format!("fb_cache has no {other:?}, but {known}")));
            }
        }
    }
    if cache.threshold.is_nan() {
        return Err(PyValueError::new_err("fb_cache needs a threshold, such as 0.1"));
    }
    Ok(cache)
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Run>()
}
