use std::collections::BTreeMap;
use std::path::PathBuf;

use luna_broker::client::{self, Addresses, CallOptions};
use luna_broker::config::ClientConfig;
use luna_broker::protocol::Force;
use luna_broker::service::Service;
use luna_broker::tensor::{Dims, TensorMeta};
use luna_broker::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde::Serialize;

use crate::call::{self, Patience, quick, released};
use crate::clip::Clip;
use crate::errors::raise;
use crate::permit::Permit;
use crate::publish;
use crate::register;
use crate::session::Session;
use crate::tensor::{Device, dtype, hand_out};
use crate::unet::Unet;
use crate::vae::Vae;
use crate::weights::{self, Watch};

/// A connection to a broker.
#[pyclass(frozen, module = "luna_broker")]
pub(crate) struct Client {
    brokers: client::Brokers,
    /// Of the broker that was named first.
    client: client::Client,
    patience: Patience,
}

/// What may be passed as an address.
#[derive(FromPyObject)]
enum Address {
    One(PathBuf),
    Each(BTreeMap<String, PathBuf>),
}

impl Address {
    fn read(self, py: Python<'_>) -> PyResult<Addresses> {
        let each = match self {
            Self::One(path) => return Addresses::parse(&path.to_string_lossy()).map_err(|error| raise(py, error)),
            Self::Each(each) => each,
        };
        let named = each
            .into_iter()
            .map(|(service, path)| Ok((service_named(py, &service)?, path.to_string_lossy().into_owned())));
        named.collect::<PyResult<_>>().map(Addresses::Each)
    }
}

fn service_named(py: Python<'_>, name: &str) -> PyResult<Service> {
    Service::from_name(name).ok_or_else(|| {
        let remedy = format!("name one of {}", Service::ALL.map(Service::name).join(", "));
        raise(py, Error::new(ErrorKind::Configuration, format!("there is no service {name:?}"), remedy))
    })
}

/// Connects to a broker on this machine, or to one for each service.
#[pyfunction]
#[pyo3(signature = (address=None, timeout=None, name=None, check=None))]
fn connect(
    py: Python<'_>,
    address: Option<Address>,
    timeout: Option<f64>,
    name: Option<String>,
    check: Option<Py<PyAny>>,
) -> PyResult<Client> {
    let mut config = ClientConfig::default();
    if let Some(seconds) = timeout {
        let timeout = call::seconds(py, seconds)?;
        config.timeout = Some(timeout);
        config.connect_timeout = timeout;
    }
    config.name = name.unwrap_or_else(|| format!("python-{}-{}", std::process::id(), serial()));
    let patience = Patience::new(config.timeout, check);
    let addresses = match address {
        Some(address) => address.read(py)?,
        None => Addresses::from_environment().map_err(|error| raise(py, error))?,
    };
    let brokers = quick(py, || client::Brokers::connect(&addresses, config.clone()))?;
    Ok(Client { client: brokers.first().clone(), brokers, patience })
}

/// Tells the clients of one process apart.
fn serial() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Plain data as Python builds it from JSON: dictionaries, lists, numbers, strings.
pub(crate) fn to_python<'py>(py: Python<'py>, value: &impl Serialize) -> PyResult<Bound<'py, PyAny>> {
    let text = serde_json::to_string(value)
        .map_err(|error| raise(py, Error::new(ErrorKind::Internal, format!("no JSON could be made: {error}"), "")))?;
    py.import("json")?.call_method1("loads", (text,))
}

#[pymethods]
impl Client {
    /// What was agreed on with the broker.
    #[getter]
    fn session(&self, py: Python<'_>) -> Session {
        // Another thread may be connecting anew, which this waits for.
        py.detach(|| self.client.session()).into()
    }

    /// The client of one service's broker.
    fn of(&self, py: Python<'_>, service: &str) -> PyResult<Self> {
        let client = self.brokers.of(service_named(py, service)?).map_err(|error| raise(py, error))?;
        Ok(Self { brokers: client.clone().into(), client: client.clone(), patience: self.patience.clone() })
    }

    /// The VAE of that name or path.
    fn vae(&self, py: Python<'_>, name: PathBuf) -> PyResult<Vae> {
        let vae = quick(py, || self.brokers.vae(&name.to_string_lossy()))?;
        Ok(Vae::new(vae, self.patience.clone()))
    }

    /// The UNet of that name or path.
    fn unet(&self, py: Python<'_>, name: PathBuf) -> PyResult<Unet> {
        let unet = quick(py, || self.brokers.unet(&name.to_string_lossy()))?;
        Ok(Unet::new(unet, self.patience.clone()))
    }

    /// The text encoders in the files of these names or paths.
    #[pyo3(signature = (*names))]
    fn clip(&self, py: Python<'_>, names: Vec<PathBuf>) -> PyResult<Clip> {
        let names: Vec<String> = names.iter().map(|name| name.to_string_lossy().into_owned()).collect();
        let clip = quick(py, || self.brokers.clip(&names))?;
        Ok(Clip::new(clip, self.patience.clone()))
    }

    /// Weights that lie in the broker's memory once for everybody.
    #[pyo3(signature = (name, dtype=None, device=None, progress=None, timeout=None))]
    fn attach(
        &self,
        py: Python<'_>,
        name: PathBuf,
        dtype: Option<&Bound<'_, PyAny>>,
        device: Option<&Bound<'_, PyAny>>,
        progress: Option<Py<PyAny>>,
        timeout: Option<f64>,
    ) -> PyResult<Py<PyAny>> {
        let name = name.to_string_lossy();
        let rule = weights::cast_rule(dtype)?;
        let patience = self.patience.of_call(py, timeout)?;
        weights::shown(py, &name, progress, |progress| {
            weights::attach(&self.client, &name, rule, device, Watch { py, patience: &patience, progress })
        })
    }

    /// Hands tensors to the broker, for others to attach.
    #[pyo3(signature = (name, tensors, timeout=None))]
    fn publish(&self, name: &str, tensors: &Bound<'_, PyAny>, timeout: Option<f64>) -> PyResult<Py<PyAny>> {
        let patience = self.patience.of_call(tensors.py(), timeout)?;
        publish::publish(&self.client, name, tensors, &patience)
    }

    /// Has a model of this process's own listed.
    fn register(&self, py: Python<'_>, name: String, info: &Bound<'_, PyDict>) -> PyResult<()> {
        let model = register::model(name, info)?;
        quick(py, || self.client.register(model.clone()))
    }

    /// A turn in a lane, for work of this process.
    #[pyo3(signature = (service, bytes=0, timeout=None))]
    fn permit(&self, py: Python<'_>, service: &str, bytes: u64, timeout: Option<f64>) -> PyResult<Permit> {
        let patience = self.patience.of_call(py, timeout)?;
        Permit::new(py, &self.brokers, service, bytes, patience)
    }

    /// Compares what weights contain with what they contained.
    fn verify<'py>(&self, py: Python<'py>, name: PathBuf) -> PyResult<Bound<'py, PyAny>> {
        let reports = quick(py, || self.client.verify(&name.to_string_lossy()))?;
        to_python(py, &reports)
    }

    /// Keys, element types and shapes of the tensors in a file or a published set.
    fn header(&self, py: Python<'_>, name: PathBuf) -> PyResult<BTreeMap<String, (String, Vec<u64>)>> {
        let entries = quick(py, || self.client.header(&name.to_string_lossy()))?;
        let described = |meta: TensorMeta| (meta.dtype.to_string(), meta.shape.as_slice().to_vec());
        Ok(entries.into_iter().map(|(key, meta)| (key, described(meta))).collect())
    }

    /// A writable tensor in shared memory.
    #[pyo3(signature = (shape, dtype, device=None))]
    fn empty<'py>(
        &self,
        shape: Vec<u64>,
        dtype: &Bound<'py, PyAny>,
        device: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = dtype.py();
        let (library, dtype) = self::dtype(dtype)?;
        let shape = Dims::new(&shape).map_err(|error| raise(py, error))?;
        let meta = TensorMeta::contiguous(dtype, shape);
        let tensor = match device.map(Device::named).transpose()? {
            None | Some(Device::Cpu) => quick(py, || self.client.empty(meta))?,
            Some(Device::Cuda(ordinal)) => quick(py, || self.client.empty_on_gpu(meta, &format!("cuda:{ordinal}")))?,
        };
        hand_out(py, tensor, library, None)
    }

    /// What the broker is doing.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let status = quick(py, || self.client.status())?;
        to_python(py, &status)
    }

    /// The broker's numbers for monitoring.
    fn metrics(&self, py: Python<'_>) -> PyResult<String> {
        quick(py, || self.client.metrics())
    }

    /// The models the broker knows.
    fn models<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let models = quick(py, || self.brokers.models())?;
        to_python(py, &models)
    }

    /// Has the broker load a model now.
    fn load(&self, py: Python<'_>, name: PathBuf) -> PyResult<()> {
        let name = name.to_string_lossy();
        let load = |options: &CallOptions<'_>| {
            self.brokers.with_parts(|client| client.load_with(None, &name, options)).map(drop)
        };
        released(py, &self.patience, load)
    }

    /// Has the broker give up a model's memory.
    #[pyo3(signature = (name, force=false))]
    fn unload(&self, py: Python<'_>, name: PathBuf, force: bool) -> PyResult<()> {
        let force = if force { Force::Yes } else { Force::No };
        quick(py, || self.brokers.unload(&name.to_string_lossy(), force))
    }

    /// Seconds that an empty round trip took.
    fn ping(&self, py: Python<'_>) -> PyResult<f64> {
        released(py, &self.patience, |options| self.client.ping_with(options)).map(|taken| taken.as_secs_f64())
    }

    /// Ends the session.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.brokers.close());
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    #[pyo3(signature = (*_raised))]
    fn __exit__(&self, py: Python<'_>, _raised: &Bound<'_, PyAny>) {
        self.close(py);
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let session = py.detach(|| self.client.session());
        format!("<Client {} on {}>", session.name, session.host_rung())
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(connect, module)?)?;
    module.add_class::<Client>()
}
