//! Python extension of luna-broker: types and errors translated, nothing decided.
#![deny(unsafe_code)]

use pyo3::prelude::*;

mod call;
mod client;
mod clip;
mod dlpack;
mod doctor;
mod errors;
mod permit;
mod publish;
mod register;
mod run;
mod session;
mod tensor;
mod unet;
mod vae;
mod weights;

/// The compiled client; `luna_broker` re-exports it.
#[pymodule]
#[pyo3(name = "_native")]
fn native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    errors::register(module)?;
    session::register(module)?;
    tensor::register(module)?;
    vae::register(module)?;
    unet::register(module)?;
    run::register(module)?;
    clip::register(module)?;
    weights::register(module)?;
    permit::register(module)?;
    client::register(module)?;
    doctor::register(module)
}
