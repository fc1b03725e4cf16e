use std::time::Duration;

use luna_broker::Error;
use luna_broker::client::CallOptions;
use parking_lot::Mutex;
use pyo3::prelude::*;

use crate::errors::raise;

/// Runs a call with the interpreter released. A signal that Python handles while it waits (Ctrl-C) takes the request
/// back and is raised.
pub(crate) fn released<T: Send>(
    py: Python<'_>,
    timeout: Option<Duration>,
    call: impl Send + FnOnce(&CallOptions<'_>) -> Result<T, Error>,
) -> PyResult<T> {
    let signal: Mutex<Option<PyErr>> = Mutex::new(None);
    let done = py.detach(|| {
        let interrupted = || match Python::attach(|py| py.check_signals()) {
            Ok(()) => false,
            Err(raised) => {
                *signal.lock() = Some(raised);
                true
            }
        };
        call(&CallOptions { timeout, interrupted: Some(&interrupted), ..CallOptions::default() })
    });
    match (signal.into_inner(), done) {
        (Some(raised), _) => Err(raised),
        (None, Ok(value)) => Ok(value),
        (None, Err(error)) => Err(raise(py, error)),
    }
}

/// As [`released`], for calls that take no options.
pub(crate) fn quick<T: Send>(py: Python<'_>, call: impl Send + FnOnce() -> Result<T, Error>) -> PyResult<T> {
    py.detach(call).map_err(|error| raise(py, error))
}
