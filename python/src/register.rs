use luna_broker::protocol::RegisteredModel;
use luna_broker::service::Service;
use luna_broker::{Error, ErrorKind};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors::raise;

/// What a registered model is listed with; `info` says at least what it does.
pub(crate) fn model(name: String, info: &Bound<'_, PyDict>) -> PyResult<RegisteredModel> {
    let mut model =
        RegisteredModel { name, service: Service::Unet, family: String::new(), bytes: 0, device: "cpu".to_owned() };
    let mut service = None;
    for (key, value) in info {
        match key.extract::<String>()?.as_str() {
            "service" => service = Some(value.extract::<String>()?),
            "family" => model.family = value.extract()?,
            "bytes" => model.bytes = value.extract()?,
            // A torch.device as well as its name.
            "device" => model.device = value.str()?.to_string(),
            key => return Err(refused(info.py(), &format!("info has no key {key:?}"))),
        }
    }
    let found = service.as_deref().and_then(Service::from_name);
    let wrong = || match &service {
        Some(service) => format!("there is no service {service:?}"),
        None => "info does not say what the model does".to_owned(),
    };
    model.service = found.ok_or_else(|| refused(info.py(), &wrong()))?;
    Ok(model)
}

fn refused(py: Python<'_>, message: &str) -> PyErr {
    let services = Service::ALL.map(Service::name).join(", ");
    let remedy = format!("pass {{\"service\": …}} with one of {services}, and family, bytes and device as you like");
    raise(py, Error::new(ErrorKind::Configuration, message, remedy))
}
