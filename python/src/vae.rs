use std::time::Duration;

use luna_broker::client::{self, CallOptions, ResultPlace, Unshared, VaeOutput, gpu_named, synchronize_default_stream};
use luna_broker::service::{TileShape, Tiling, VaeCall, VaeMode, VaeOperation};
use parking_lot::Mutex;
use pyo3::prelude::*;

use crate::call::{quick, released};
use crate::client::to_python;
use crate::errors::raise;
use crate::tensor::{Device, Given, Library, borrow, hand_out};

/// A VAE that lives in the broker.
#[pyclass(frozen, module = "luna_broker")]
pub(crate) struct Vae {
    vae: client::Vae,
    timeout: Option<Duration>,
    last: Mutex<Option<Call>>,
}

/// How one call went.
#[pyclass(frozen, get_all, module = "luna_broker")]
#[derive(Clone, Copy)]
pub(crate) struct Call {
    mode: &'static str,
    queued_s: f64,
    run_s: f64,
    bytes_copied_in: u64,
    bytes_copied_out: u64,
}

impl From<&VaeOutput> for Call {
    fn from(output: &VaeOutput) -> Self {
        let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e9;
        let times = output.times;
        Self {
            mode: match output.mode {
                VaeMode::Full => "full",
                VaeMode::Tiled(_) => "tiled",
            },
            queued_s: seconds(times.enqueued_ns, times.started_ns),
            run_s: seconds(times.started_ns, times.finished_ns),
            bytes_copied_in: output.copied_in_bytes,
            bytes_copied_out: output.copied_out_bytes,
        }
    }
}

impl Vae {
    pub(crate) fn new(vae: client::Vae, timeout: Option<Duration>) -> Self {
        Self { vae, timeout, last: Mutex::new(None) }
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
        let wanted = match device.map(Device::named).transpose()? {
            None => borrowed.ordinal(),
            Some(Device::Cpu) => None,
            Some(Device::Cuda(ordinal)) => Some(ordinal),
        };
        let call = VaeCall { operation, tiling };
        let input = borrowed.input(stream).map_err(|error| raise(py, error))?;
        let result = match wanted {
            None => ResultPlace::Host,
            Some(_) if wanted == borrowed.ordinal() => ResultPlace::LikeInput,
            Some(ordinal) => {
                let gpu = quick(py, || gpu_named(&format!("cuda:{ordinal}")))?;
                ResultPlace::Gpu(gpu)
            }
        };
        // Only torch gives memory of its own for a result to be copied to.
        let unshared = if library == Library::Torch { Unshared::Staging } else { Unshared::Host };
        let output = released(py, self.timeout, |options| {
            self.vae.call(call, input, &CallOptions { result, unshared, ..*options })
        })?;
        if let (Library::Numpy, Some(ordinal)) = (library, borrowed.ordinal()) {
            // Libraries other than torch may reuse the input's memory, in an order of their own, once the call is over.
            quick(py, || synchronize_default_stream(&format!("cuda:{ordinal}")))?;
        }
        *self.last.lock() = Some(Call::from(&output));
        hand_out(py, output.tensor, library, wanted)
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
        let last = *self.last.lock();
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
