use luna_broker::client::{
    self, CallOptions, ResultPlace, UnetOutput, Unshared, VaeOutput, gpu_named, synchronize_default_stream,
};
use luna_broker::protocol::Times;
use luna_broker::service::{TileShape, Tiling, UnetStep, VaeCall, VaeMode, VaeOperation};
use parking_lot::Mutex;
use pyo3::prelude::*;

use crate::call::{Patience, quick, released};
use crate::client::to_python;
use crate::errors::raise;
use crate::tensor::{Device, Given, Library, borrow, hand_out};

/// A VAE that lives in the broker.
#[pyclass(frozen, module = "luna_broker")]
pub(crate) struct Vae {
    vae: client::Vae,
    patience: Patience,
    last: Mutex<Option<Call>>,
}

/// How one call went.
#[pyclass(frozen, module = "luna_broker")]
#[derive(Clone)]
pub(crate) struct Call {
    #[pyo3(get)]
    mode: Option<&'static str>,
    #[pyo3(get)]
    queued_s: f64,
    #[pyo3(get)]
    run_s: f64,
    #[pyo3(get)]
    bytes_copied_in: u64,
    #[pyo3(get)]
    bytes_copied_out: u64,
    step: Option<UnetStep>,
}

#[pymethods]
impl Call {
    /// How a step of a UNet was run.
    #[getter]
    fn step<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.step.as_ref().map(|step| to_python(py, step)).transpose()
    }
}

impl Call {
    fn new(mode: Option<&'static str>, times: Times, bytes_copied_in: u64, bytes_copied_out: u64) -> Self {
        let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e9;
        let queued_s = seconds(times.enqueued_ns, times.started_ns);
        let run_s = seconds(times.started_ns, times.finished_ns);
        Self { mode, queued_s, run_s, bytes_copied_in, bytes_copied_out, step: None }
    }
}

impl From<&VaeOutput> for Call {
    fn from(output: &VaeOutput) -> Self {
        let mode = match output.mode {
            VaeMode::Full => "full",
            VaeMode::Tiled(_) => "tiled",
        };
        Self::new(Some(mode), output.times, output.copied_in_bytes, output.copied_out_bytes)
    }
}

impl From<&UnetOutput> for Call {
    fn from(output: &UnetOutput) -> Self {
        let call = Self::new(None, output.times, output.copied_in_bytes, output.copied_out_bytes);
        Self { step: Some(output.step.clone()), ..call }
    }
}

impl Vae {
    pub(crate) fn new(vae: client::Vae, patience: Patience) -> Self {
        Self { vae, patience, last: Mutex::new(None) }
    }

    fn run<'py>(
        &self,
        input: &Bound<'py, PyAny>,
        operation: VaeOperation,
        tiling: Tiling,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = input.py();
        let Given { library, borrowed, stream } = borrow(input)?;
        let (wanted, result) = result_place(py, device, borrowed.ordinal())?;
        let call = VaeCall { operation, tiling };
        let input = borrowed.input(stream).map_err(|error| raise(py, error))?;
        let unshared = unshared(library);
        let output = released(py, &self.patience, |options| {
            self.vae.call(call, input, &CallOptions { result, unshared, ..*options })
        })?;
        settle(py, library, borrowed.ordinal())?;
        *self.last.lock() = Some(Call::from(&output));
        hand_out(py, output.tensor, library, wanted)
    }
}

/// Where a result goes: the ordinal of its GPU in this process, and what that means to the client.
pub(crate) fn result_place(
    py: Python<'_>,
    device: Option<&Bound<'_, PyAny>>,
    given: Option<i32>,
) -> PyResult<(Option<i32>, ResultPlace)> {
    let wanted = match device.map(Device::named).transpose()? {
        None => given,
        Some(Device::Cpu) => None,
        Some(Device::Cuda(ordinal)) => Some(ordinal),
    };
    let place = match wanted {
        None => ResultPlace::Host,
        Some(_) if wanted == given => ResultPlace::LikeInput,
        Some(ordinal) => ResultPlace::Gpu(quick(py, || gpu_named(&format!("cuda:{ordinal}")))?),
    };
    Ok((wanted, place))
}

/// Only torch gives memory of its own for a result to be copied to.
pub(crate) fn unshared(library: Library) -> Unshared {
    if library == Library::Torch { Unshared::Staging } else { Unshared::Host }
}

/// Libraries other than torch may reuse an input's memory, in an order of their own, once the call is over.
pub(crate) fn settle(py: Python<'_>, library: Library, given: Option<i32>) -> PyResult<()> {
    match (library, given) {
        (Library::Numpy, Some(ordinal)) => quick(py, || synchronize_default_stream(&format!("cuda:{ordinal}"))),
        _ => Ok(()),
    }
}

fn tiles(tile_x: u32, tile_y: u32, overlap: u32) -> Tiling {
    Tiling::Tiles(TileShape { width: tile_x, height: tile_y, overlap })
}

#[pymethods]
impl Vae {
    /// Facts about the model.
    #[getter]
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, self.vae.info())
    }

    /// How the last call through this object went.
    #[getter]
    fn last(&self, py: Python<'_>) -> PyResult<Option<Py<Call>>> {
        let last = self.last.lock().clone();
        last.map(|call| Py::new(py, call)).transpose()
    }

    /// The image of a latent.
    #[pyo3(signature = (latent, device=None))]
    fn decode<'py>(
        &self,
        latent: &Bound<'py, PyAny>,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.run(latent, VaeOperation::Decode, Tiling::Auto, device)
    }

    /// The latent of an image.
    #[pyo3(signature = (image, device=None))]
    fn encode<'py>(
        &self,
        image: &Bound<'py, PyAny>,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.run(image, VaeOperation::Encode, Tiling::Auto, device)
    }

    /// As `decode`, always in tiles; sizes in latent elements.
    #[pyo3(signature = (latent, tile_x=64, tile_y=64, overlap=16, device=None))]
    fn decode_tiled<'py>(
        &self,
        latent: &Bound<'py, PyAny>,
        tile_x: u32,
        tile_y: u32,
        overlap: u32,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.run(latent, VaeOperation::Decode, tiles(tile_x, tile_y, overlap), device)
    }

    /// As `encode`, always in tiles; sizes in pixels.
    #[pyo3(signature = (image, tile_x=512, tile_y=512, overlap=64, device=None))]
    fn encode_tiled<'py>(
        &self,
        image: &Bound<'py, PyAny>,
        tile_x: u32,
        tile_y: u32,
        overlap: u32,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        self.run(image, VaeOperation::Encode, tiles(tile_x, tile_y, overlap), device)
    }

    fn __repr__(&self) -> String {
        let info = self.vae.info();
        format!("<Vae {} ({})>", info.name, info.family)
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Vae>()?;
    module.add_class::<Call>()
}
