use std::sync::Arc;
use std::time::Duration;

use luna_broker::Error;
use luna_broker::client::{AttachOptions, CallOptions};
use parking_lot::Mutex;
use pyo3::prelude::*;

use crate::errors::raise;

/// How the calls of one client wait.
#[derive(Debug, Clone)]
pub(crate) struct Patience {
    /// How long; `None`: as long as it takes.
    timeout: Option<Duration>,
    /// Called meanwhile; what it raises takes the call back.
    check: Option<Arc<Py<PyAny>>>,
}

impl Patience {
    pub(crate) fn new(timeout: Option<Duration>, check: Option<Py<PyAny>>) -> Self {
        Self { timeout, check: check.map(Arc::new) }
    }

    /// The same for a call that says itself how long.
    pub(crate) fn of_call(&self, py: Python<'_>, timeout: Option<f64>) -> PyResult<Self> {
        let timeout = timeout.map_or(Ok(self.timeout), |timeout| seconds(py, timeout).map(Some))?;
        Ok(self.with(timeout))
    }

    /// The same for another time; `None`: as long as it takes.
    pub(crate) fn with(&self, timeout: Option<Duration>) -> Self {
        Self { timeout, check: self.check.clone() }
    }
}

/// What Python raised while a call waited; the call is taken back for it.
struct Signal<'a> {
    raised: Mutex<Option<PyErr>>,
    check: Option<&'a Py<PyAny>>,
}

impl Signal<'_> {
    /// Whether the call is to be taken back: for a signal that Python handles (Ctrl-C), or what a callback raised.
    fn interrupts(&self) -> bool {
        let mut raised = self.raised.lock();
        if raised.is_none() {
            let checked = Python::attach(|py| {
                py.check_signals()?;
                self.check.map_or(Ok(()), |check| check.call0(py).map(drop))
            });
            *raised = checked.err();
        }
        raised.is_some()
    }

    fn tell(&self, progress: &Py<PyAny>, done: u64, total: u64) {
        let mut raised = self.raised.lock();
        if raised.is_none() {
            *raised = Python::attach(|py| progress.call1(py, (done, total))).err();
        }
    }
}

fn signalled<T: Send>(
    py: Python<'_>,
    patience: &Patience,
    call: impl Send + FnOnce(&Signal<'_>) -> Result<T, Error>,
) -> PyResult<T> {
    let signal = Signal { raised: Mutex::default(), check: patience.check.as_deref() };
    let done = py.detach(|| call(&signal));
    match (signal.raised.into_inner(), done) {
        (Some(raised), _) => Err(raised),
        (None, Ok(value)) => Ok(value),
        (None, Err(error)) => Err(raise(py, error)),
    }
}

/// Runs a call with the interpreter released. A signal that Python handles while it waits (Ctrl-C), or what the client's
/// check raises, takes the request back and is raised.
pub(crate) fn released<T: Send>(
    py: Python<'_>,
    patience: &Patience,
    call: impl Send + FnOnce(&CallOptions<'_>) -> Result<T, Error>,
) -> PyResult<T> {
    let timeout = patience.timeout;
    signalled(py, patience, |signal| {
        let interrupted = || signal.interrupts();
        call(&CallOptions { timeout, interrupted: Some(&interrupted), ..CallOptions::default() })
    })
}

/// As [`released`], for weights that may have to be loaded first: `progress(done, total)` is called in bytes meanwhile,
/// and what it raises takes the request back too.
pub(crate) fn loading<T: Send>(
    py: Python<'_>,
    patience: &Patience,
    progress: Option<&Py<PyAny>>,
    call: impl Send + FnOnce(&AttachOptions<'_>) -> Result<T, Error>,
) -> PyResult<T> {
    let timeout = patience.timeout;
    signalled(py, patience, |signal| {
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
