use std::path::PathBuf;

use luna_broker::client::{self, CallOptions};
use luna_broker::service::{Control, UnetInput};
use parking_lot::Mutex;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::call::{Patience, released};
use crate::client::to_python;
use crate::errors::raise;
use crate::run::{self, Run};
use crate::tensor::{Given, borrow, hand_out};
use crate::vae::{Call, result_place, settle, unshared};

/// A UNet that lives in the broker.
#[pyclass(frozen, module = "luna_broker")]
pub(crate) struct Unet {
    unet: client::Unet,
    patience: Patience,
    last: Mutex<Option<Call>>,
}

impl Unet {
    pub(crate) fn new(unet: client::Unet, patience: Patience) -> Self {
        Self { unet, patience, last: Mutex::new(None) }
    }
}

#[pymethods]
impl Unet {
    /// Facts about the model.
    #[getter]
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, self.unet.info())
    }

    /// How the last call through this object went.
    #[getter]
    fn last(&self, py: Python<'_>) -> PyResult<Option<Py<Call>>> {
        let last = self.last.lock().clone();
        last.map(|call| Py::new(py, call)).transpose()
    }

    /// The network's output for one step.
    #[pyo3(signature = (x, timesteps, context, y=None, control=None, loras=None, lora_mode="auto", device=None))]
    #[expect(clippy::too_many_arguments, reason = "they are the call's own")]
    fn __call__<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        timesteps: &Bound<'py, PyAny>,
        context: &Bound<'py, PyAny>,
        y: Option<&Bound<'py, PyAny>>,
        control: Option<&Bound<'py, PyDict>>,
        loras: Option<Vec<(PathBuf, f64)>>,
        lora_mode: &str,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = x.py();
        let given = UnetInput {
            x: borrow(x)?,
            timesteps: borrow(timesteps)?,
            context: borrow(context)?,
            y: y.map(borrow).transpose()?,
            control: control.map(lists).transpose()?,
        };
        let adapters = run::stack(py, loras, lora_mode)?;
        let (library, ordinal) = (given.x.library, given.x.borrowed.ordinal());
        let (wanted, result) = result_place(py, device, ordinal)?;
        let input = given.try_map(&mut |one| one.borrowed.input(one.stream));
        let input = input.map_err(|error| raise(py, error))?;
        let unshared = unshared(library);
        let output = released(py, &self.patience, |options| {
            self.unet.call(&input, &adapters, &CallOptions { result, unshared, ..*options })
        })?;
        for one in given.each() {
            settle(py, one.library, one.borrowed.ordinal())?;
        }
        *self.last.lock() = Some(Call::from(&output));
        hand_out(py, output.tensor, library, wanted)
    }

    /// Opens a sampling run.
    #[pyo3(signature = (loras=None, fb_cache=None, sigmas=None, lora_mode="auto"))]
    fn run(
        &self,
        py: Python<'_>,
        loras: Option<Vec<(PathBuf, f64)>>,
        fb_cache: Option<&Bound<'_, PyAny>>,
        sigmas: Option<Vec<f64>>,
        lora_mode: &str,
    ) -> PyResult<Run> {
        let settings = run::settings(run::stack(py, loras, lora_mode)?, fb_cache, sigmas)?;
        let run = released(py, &self.patience, |options| self.unet.run_with(settings.clone(), options))?;
        Ok(Run::new(run, self.patience.clone()))
    }

    /// Has adapters read and put together now.
    #[pyo3(signature = (loras, lora_mode="auto"))]
    fn prefetch<'py>(
        &self,
        py: Python<'py>,
        loras: Vec<(PathBuf, f64)>,
        lora_mode: &str,
    ) -> PyResult<Bound<'py, PyAny>> {
        let adapters = run::stack(py, Some(loras), lora_mode)?;
        let taken = released(py, &self.patience, |options| self.unet.prefetch(&adapters, options))?;
        to_python(py, &taken)
    }

    fn __repr__(&self) -> String {
        let info = self.unet.info();
        format!("<Unet {} ({})>", info.name, info.family)
    }
}

/// A control as ComfyUI passes it: lists of tensors and `None` under `input`, `middle` and `output`.
pub(crate) fn lists<'py>(control: &Bound<'py, PyDict>) -> PyResult<Control<Given<'py>>> {
    let mut lists = Control { input: Vec::new(), middle: Vec::new(), output: Vec::new() };
    for (name, list) in control {
        let name: String = name.extract()?;
        let target = match name.as_str() {
            "input" => &mut lists.input,
            "middle" => &mut lists.middle,
            "output" => &mut lists.output,
            _ => return Err(PyTypeError::new_err(format!("a control has no {name:?}, but input, middle and output"))),
        };
        for one in list.try_iter()? {
            let one = one?;
            target.push(if one.is_none() { None } else { Some(borrow(&one)?) });
        }
    }
    Ok(lists)
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Unet>()
}
