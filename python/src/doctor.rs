use std::path::PathBuf;

use luna_broker::doctor::{self, PATIENCE, examine};
use pyo3::prelude::*;

use crate::client::to_python;

/// What this process finds on its way to a broker.
#[pyclass(frozen, module = "luna_broker")]
pub(crate) struct Diagnosis(doctor::Diagnosis);

#[pymethods]
impl Diagnosis {
    /// One dictionary for each thing that was looked at.
    #[getter]
    fn findings<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.0.findings)
    }

    /// 0 where a client in this process could work.
    #[getter]
    fn exit_code(&self) -> u8 {
        self.0.exit_code()
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }
}

/// Looks at everything between this process and a broker.
#[pyfunction]
#[pyo3(signature = (address=None))]
fn diagnose(py: Python<'_>, address: Option<PathBuf>) -> Diagnosis {
    let address = address.map(|path| path.to_string_lossy().into_owned());
    Diagnosis(py.detach(|| examine(address.as_deref(), PATIENCE)))
}

pub(crate) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(diagnose, module)?)?;
    module.add_class::<Diagnosis>()
}
