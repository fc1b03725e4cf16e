use std::num::NonZeroU32;
use std::path::PathBuf;

use luna_broker::client::{self, CallOptions, ClipOutput};
use luna_broker::model::clip::SdxlSizes;
use luna_broker::service::{
    AdapterStack, AdapterTaken, Chunk, ClipKind, ClipOptions, ClipPrompt, ClipText, Token, WeightedToken,
};
use luna_broker::tensor::{DType, Dims};
use luna_broker::{Error, ErrorKind};
use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyDict};

use crate::call::{Patience, released};
use crate::client::to_python;
use crate::errors::raise;
use crate::run::stack;
use crate::tensor::{Library, borrow, borrow_on_host, hand_out, loaded_library};
use crate::vae::{result_place, unshared};

/// Text encoders that live in the broker.
#[pyclass(frozen, module = "luna_broker")]
pub(crate) struct Clip {
    clip: client::Clip,
    patience: Patience,
    last: Mutex<Option<TextCall>>,
}

/// How one prompt was encoded.
#[pyclass(frozen, module = "luna_broker")]
#[derive(Clone)]
pub(crate) struct TextCall {
    #[pyo3(get)]
    queued_s: f64,
    #[pyo3(get)]
    run_s: f64,
    #[pyo3(get)]
    bytes_copied_in: u64,
    #[pyo3(get)]
    bytes_copied_out: u64,
    #[pyo3(get)]
    ignored: Vec<(String, String)>,
    adapters: Vec<AdapterTaken>,
}

#[pymethods]
impl TextCall {
    /// What the text encoders took up of each adapter.
    #[getter]
    fn adapters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.adapters)
    }
}

impl From<&ClipOutput> for TextCall {
    fn from(output: &ClipOutput) -> Self {
        let seconds = |from: u64, to: u64| to.saturating_sub(from) as f64 / 1e9;
        Self {
            queued_s: seconds(output.times.enqueued_ns, output.times.started_ns),
            run_s: seconds(output.times.started_ns, output.times.finished_ns),
            bytes_copied_in: output.copied_in_bytes,
            bytes_copied_out: output.copied_out_bytes,
            ignored: output.ignored.iter().map(|one| (one.name.clone(), one.reason.clone())).collect(),
            adapters: output.adapters.clone(),
        }
    }
}

impl Clip {
    pub(crate) fn new(clip: client::Clip, patience: Patience) -> Self {
        Self { clip, patience, last: Mutex::new(None) }
    }

    /// Makes a call and hands both results out, to torch where it is loaded: words say nothing of a library.
    fn run<'py>(
        &self,
        py: Python<'py>,
        device: Option<&Bound<'py, PyAny>>,
        adapters: &AdapterStack,
        call: impl Send + FnOnce(&client::Clip, &CallOptions<'_>) -> Result<ClipOutput, Error>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let library = loaded_library(py);
        let (wanted, result) = result_place(py, device, None)?;
        let unshared = unshared(library);
        let clip = self.clip.with_adapters(adapters);
        let output =
            released(py, &self.patience, |options| call(&clip, &CallOptions { result, unshared, ..*options }))?;
        *self.last.lock() = Some(TextCall::from(&output));
        Ok((hand_out(py, output.cond, library, wanted)?, hand_out(py, output.pooled, library, wanted)?))
    }
}

#[pymethods]
impl Clip {
    /// Facts about the text encoders.
    #[getter]
    fn info<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, self.clip.info())
    }

    /// How the last call through this object went.
    #[getter]
    fn last(&self, py: Python<'_>) -> PyResult<Option<Py<TextCall>>> {
        let last = self.last.lock().clone();
        last.map(|call| Py::new(py, call)).transpose()
    }

    /// Conditioning and pooled row of a prompt in words.
    #[pyo3(signature = (text, text_g=None, skip=None, project=true, loras=None, lora_mode="auto", device=None))]
    #[expect(clippy::too_many_arguments, reason = "they are the call's own")]
    fn encode<'py>(
        &self,
        py: Python<'py>,
        text: String,
        text_g: Option<String>,
        skip: Option<i64>,
        project: bool,
        loras: Option<Vec<(PathBuf, f64)>>,
        lora_mode: &str,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let (text, how) = (ClipText { text, text_g }, options(py, skip, project)?);
        let adapters = stack(py, loras, lora_mode)?;
        self.run(py, device, &adapters, |clip, options| clip.encode_with(&text, how, options))
    }

    /// Conditioning and pooled row of tokens.
    #[pyo3(signature = (tokens, skip=None, project=true, loras=None, lora_mode="auto", device=None))]
    #[expect(clippy::too_many_arguments, reason = "they are the call's own")]
    fn encode_tokens<'py>(
        &self,
        py: Python<'py>,
        tokens: &Bound<'py, PyDict>,
        skip: Option<i64>,
        project: bool,
        loras: Option<Vec<(PathBuf, f64)>>,
        lora_mode: &str,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let prompts = tokens.iter().map(|(name, chunks)| prompt(&name, &chunks)).collect::<PyResult<Vec<_>>>()?;
        let how = options(py, skip, project)?;
        let adapters = stack(py, loras, lora_mode)?;
        self.run(py, device, &adapters, |clip, options| clip.encode_tokens_with(&prompts, how, options))
    }

    fn __repr__(&self) -> String {
        let info = self.clip.info();
        format!("<Clip {} ({})>", info.name, info.family)
    }
}

fn options(py: Python<'_>, skip: Option<i64>, project: bool) -> PyResult<ClipOptions> {
    let number = |skip: i64| {
        u32::try_from(skip).ok().and_then(NonZeroU32::new).ok_or_else(|| {
            let message = format!("skip={skip}: blocks are counted from the end, and 1 is the last");
            raise(py, Error::new(ErrorKind::Configuration, message, "give a number from 1 on; ComfyUI's -2 is 2 here"))
        })
    };
    Ok(ClipOptions { from_end: skip.map(number).transpose()?, project })
}

/// A prompt for one encoder as ComfyUI's tokenizers give it: chunks of tuples of a token, or a row, and its weight.
fn prompt(name: &Bound<'_, PyAny>, chunks: &Bound<'_, PyAny>) -> PyResult<ClipPrompt> {
    let name: String = name.extract()?;
    let kind = match name.as_str() {
        // What ComfyUI calls them.
        "l" => Some(ClipKind::L),
        "h" => Some(ClipKind::H),
        "g" => Some(ClipKind::G),
        name => ClipKind::from_name(name),
    };
    let kind = kind.ok_or_else(|| {
        let known = ClipKind::ALL.map(ClipKind::name).join(", ");
        PyValueError::new_err(format!("there is no text encoder {name:?}, but {known}"))
    })?;
    let chunk =
        |chunk: PyResult<Bound<'_, PyAny>>| chunk?.try_iter()?.map(|at| position(&at?)).collect::<PyResult<Chunk>>();
    Ok(ClipPrompt { kind, chunks: chunks.try_iter()?.map(chunk).collect::<PyResult<_>>()? })
}

fn position(at: &Bound<'_, PyAny>) -> PyResult<WeightedToken> {
    // Behind them ComfyUI may have the number of a word.
    let (token, weight) = (at.get_item(0)?, at.get_item(1)?.extract()?);
    let token = match token.extract::<i64>() {
        Ok(id) => Token::Id(u32::try_from(id).map_err(|_| PyValueError::new_err(format!("there is no token {id}")))?),
        Err(_) => Token::Vector(row(&token)?.into()),
    };
    Ok(WeightedToken { token, weight })
}

/// The numbers of a row, in whatever type it is.
fn row(tensor: &Bound<'_, PyAny>) -> PyResult<Vec<f32>> {
    let (shape, row) = floats(tensor)?;
    if shape.rank() != 1 {
        let message = format!("a row is a vector of numbers, not a tensor {shape}");
        return Err(raise(tensor.py(), Error::new(ErrorKind::InvalidTensor, message, "give each position its own")));
    }
    Ok(row)
}

/// Shape and numbers of a tensor in float32.
fn floats(tensor: &Bound<'_, PyAny>) -> PyResult<(Dims, Vec<f32>)> {
    let borrowed = borrow_on_host(tensor)?;
    let shape = borrowed.meta().shape;
    if borrowed.meta().dtype == DType::F32 {
        return Ok((shape, numbers(borrowed.bytes())));
    }
    // torch's word for it, or numpy's.
    let converted = tensor.call_method0(intern!(tensor.py(), "float"));
    let converted = converted.or_else(|_| tensor.call_method1(intern!(tensor.py(), "astype"), ("float32",)))?;
    Ok((shape, numbers(borrow_on_host(&converted)?.bytes())))
}

fn numbers(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect()
}

/// The vector that SDXL takes beside the prompt.
#[pyfunction]
#[pyo3(signature = (pooled, original, crop=(0.0, 0.0), target=None, aesthetic=None))]
fn sdxl_vector<'py>(
    pooled: &Bound<'py, PyAny>,
    original: (f32, f32),
    crop: (f32, f32),
    target: Option<(f32, f32)>,
    aesthetic: Option<f32>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = pooled.py();
    let (original, crop) = (original.into(), crop.into());
    let sizes = match (target, aesthetic) {
        (Some(_), Some(_)) => {
            return Err(PyValueError::new_err("the refiner, which takes an aesthetic, has no target"));
        }
        (target, None) => SdxlSizes::Base { original, crop, target: target.map_or(original, Into::into) },
        (None, Some(aesthetic)) => SdxlSizes::Refiner { original, crop, aesthetic },
    };
    let library = borrow(pooled)?.library;
    let (shape, values) = floats(pooled)?;
    let [rows, width] = *shape.as_slice() else {
        let message = format!("pooled rows are [rows, width], not {shape}");
        return Err(raise(py, Error::new(ErrorKind::InvalidTensor, message, "pass what encoding a prompt gave")));
    };
    let width = usize::try_from(width.max(1)).unwrap_or(usize::MAX);
    let vectors = values.chunks_exact(width).flat_map(|row| luna_broker::model::clip::sdxl_vector(row, sizes));
    let bytes: Vec<u8> = vectors.flat_map(f32::to_ne_bytes).collect();
    let module = py.import(if library == Library::Torch { "torch" } else { "numpy" })?;
    let options = PyDict::new(py);
    options.set_item("dtype", module.getattr("float32")?)?;
    let vector = module.call_method("frombuffer", (PyByteArray::new(py, &bytes),), Some(&options))?;
    let vector = vector.call_method1("reshape", (rows, -1))?;
    match library {
        Library::Torch => vector.call_method1("to", (pooled.getattr("device")?,)),
        Library::Numpy => Ok(vector),
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(sdxl_vector, module)?)?;
    module.add_class::<Clip>()?;
    module.add_class::<TextCall>()
}
