use std::time::Duration;

use luna_broker::Error;
use luna_broker::client::{AttachOptions, CallOptions};
use parking_lot::Mutex;
use pyo3::prelude::*;

use crate::errors::raise;

/// What Python raised while a call waited; the call is taken back for it.
#[derive(Default)]
struct Signal(Mutex<Option<PyErr>>);

impl Signal {
    /// Whether the call is to be taken back: for a signal that Python handles (Ctrl-C), or what a callback raised.
    fn interrupts(&self) -> bool {
        let mut raised = self.0.lock();
        if raised.is_none() {
            *raised = Python::attach(|py| py.check_signals()).err();
        }
        raised.is_some()
    }

    fn tell(&self, progress: &Py<PyAny>, done: u64, total: u64) {
        let mut raised = self.0.lock();
        if raised.is_none() {
            *raised = Python::attach(|py| progress.call1(py, (done, total))).err();
        }
    }
}

fn signalled<T: Send>(py: Python<'_>, call: impl Send + FnOnce(&Signal) -> Result<T, Error>) -> PyResult<T> {
    let signal = Signal::default();
    let done = py.detach(|| call(&signal));
    match (signal.0.into_inner(), done) {
        (Some(raised), _) => Err(raised),
        (None, Ok(value)) => Ok(value),
        (None, Err(error)) => Err(raise(py, error)),
    }
}

/// Runs a call with the interpreter released. A signal that Python handles while it waits (Ctrl-C) takes the request
/// back and is raised.
pub(crate) fn released<T: Send>(
    py: Python<'_>,
    timeout: Option<Duration>,
    call: impl Send + FnOnce(&CallOptions<'_>) -> Result<T, Error>,
) -> PyResult<T> {
    signalled(py, |signal| {
        let interrupted = || signal.interrupts();
        call(&CallOptions { timeout, interrupted: Some(&interrupted), ..CallOptions::default() })
    })
}

/// As [`released`], for weights that may have to be loaded first: `progress(done, total)` is called in bytes meanwhile,
/// and what it raises takes the request back too.
pub(crate) fn loading<T: Send>(
    py: Python<'_>,
    timeout: Option<Duration>,
    progress: Option<&Py<PyAny>>,
    call: impl Send + FnOnce(&AttachOptions<'_>) -> Result<T, Error>,
) -> PyResult<T> {
    signalled(py, |signal| {
        let interrupted = || signal.interrupts();
        let tell = |done, total| {
            if let Some(progress) = progress {
                signal.tell(progress, done, total);
            }
        };
        let interrupted: Option<&dyn Fn() -> bool> = Some(&interrupted);
        call(&AttachOptions { timeout, interrupted, progress: Some(&tell), ..AttachOptions::default() })
    })
}

/// As [`released`], for calls that take no options.
pub(crate) fn quick<T: Send>(py: Python<'_>, call: impl Send + FnOnce() -> Result<T, Error>) -> PyResult<T> {
    py.detach(call).map_err(|error| raise(py, error))
}

/// Seconds as callers give them.
pub(crate) fn seconds(py: Python<'_>, timeout: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(timeout).map_err(|error| {
        let message = format!("timeout={timeout}: {error}");
        raise(py, Error::new(luna_broker::ErrorKind::Configuration, message, "give seconds above 0, or None"))
    })
}
