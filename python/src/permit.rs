use luna_broker::client;
use luna_broker::service::Service;
use luna_broker::{Error, ErrorKind};
use parking_lot::Mutex;
use pyo3::prelude::*;

use crate::call::{Patience, released};
use crate::errors::raise;

/// A turn in one of the broker's lanes, taken by entering it.
#[pyclass(frozen, module = "luna_broker")]
pub(crate) struct Permit {
    client: client::Client,
    service: Service,
    bytes: u64,
    patience: Patience,
    held: Mutex<Option<client::Permit>>,
}

impl Permit {
    pub(crate) fn new(
        py: Python<'_>,
        brokers: &client::Brokers,
        service: &str,
        bytes: u64,
        patience: Patience,
    ) -> PyResult<Self> {
        let service = Service::from_name(service).ok_or_else(|| {
            let message = format!("there is no service {service:?}");
            raise(py, Error::new(ErrorKind::Unsupported, message, "permits are for \"vae\""))
        })?;
        let client = brokers.of(service).map_err(|error| raise(py, error))?.clone();
        Ok(Self { client, service, bytes, patience, held: Mutex::new(None) })
    }
}

#[pymethods]
impl Permit {
    fn __enter__(slf: PyRef<'_, Self>) -> PyResult<PyRef<'_, Self>> {
        let permit: &Self = &slf;
        if permit.held.lock().is_some() {
            let message = "the permit is held already: entering it once more would wait for itself";
            return Err(raise(
                slf.py(),
                Error::new(ErrorKind::InUse, message, "ask for another one in this thread's place"),
            ));
        }
        let granted = released(slf.py(), &permit.patience, |options| {
            permit.client.permit(permit.service, permit.bytes, options)
        })?;
        *permit.held.lock() = Some(granted);
        Ok(slf)
    }

    #[pyo3(signature = (*_raised))]
    fn __exit__(&self, py: Python<'_>, _raised: &Bound<'_, PyAny>) {
        let held = self.held.lock().take();
        py.detach(|| drop(held));
    }

    fn __repr__(&self) -> String {
        let state = if self.held.lock().is_some() { "held" } else { "not held" };
        format!("<Permit {}, {} bytes, {state}>", self.service.name(), self.bytes)
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Permit>()
}
