use luna_broker::client::SessionInfo;
use luna_broker::service::GpuOrder;
use pyo3::prelude::*;

/// How tensors cross for one device.
#[pyclass(frozen, get_all, module = "luna_broker")]
#[derive(Clone)]
pub(crate) struct Rung {
    device: String,
    rung: String,
    reason: String,
    order: Option<&'static str>,
    pages: Option<String>,
}

#[pymethods]
impl Rung {
    fn __repr__(&self) -> String {
        format!("<Rung {} {}: {}>", self.device, self.rung, self.reason)
    }
}

/// What the broker and a client agreed on.
#[pyclass(frozen, get_all, module = "luna_broker")]
pub(crate) struct Session {
    name: String,
    broker_version: String,
    rungs: Vec<Rung>,
}

impl From<SessionInfo> for Session {
    fn from(info: SessionInfo) -> Self {
        let rungs = info.rungs.into_iter().map(|rung| Rung {
            device: rung.device,
            rung: rung.rung.to_string(),
            reason: rung.reason.to_string(),
            order: rung.order.map(|order| match order {
                GpuOrder::Events => "events",
                GpuOrder::Host => "host",
            }),
            pages: rung.pages.map(|pages| pages.to_string()),
        });
        Self { name: info.name, broker_version: info.broker_version, rungs: rungs.collect() }
    }
}

impl<'py> IntoPyObject<'py> for &Rung {
    type Target = Rung;
    type Output = Bound<'py, Rung>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> Result<Self::Output, PyErr> {
        Bound::new(py, self.clone())
    }
}

#[pymethods]
impl Session {
    fn __repr__(&self) -> String {
        let rungs: Vec<String> = self.rungs.iter().map(|rung| format!("{} {}", rung.device, rung.rung)).collect();
        format!("<Session {}, broker {}, {}>", self.name, self.broker_version, rungs.join(", "))
    }
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Rung>()?;
    module.add_class::<Session>()
}
