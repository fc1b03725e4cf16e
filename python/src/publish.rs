use luna_broker::client::{self, Published};
use luna_broker::tensor::TensorMeta;
use pyo3::intern;
use pyo3::prelude::*;

use crate::call::{Patience, released};
use crate::dlpack::Borrowed;
use crate::tensor::borrow_on_host;
use crate::weights::Attached;

/// Publishes tensors and hands out the dictionary of their views.
pub(crate) fn publish(
    client: &client::Client,
    name: &str,
    tensors: &Bound<'_, PyAny>,
    patience: &Patience,
) -> PyResult<Py<PyAny>> {
    let py = tensors.py();
    // Any mapping, as `state_dict()` gives one of its own kind.
    let items = tensors.call_method0(intern!(py, "items"))?.try_iter()?;
    let borrowed: Vec<(String, Borrowed<'_>)> = items
        .map(|item| {
            let (key, tensor): (String, Bound<'_, PyAny>) = item?.extract()?;
            Ok((key, borrow_on_host(&tensor)?))
        })
        .collect::<PyResult<_>>()?;
    let published: Vec<Published<'_>> = borrowed
        .iter()
        .map(|(key, tensor)| {
            let TensorMeta { dtype, shape, .. } = tensor.meta();
            Published { key, meta: TensorMeta::contiguous(dtype, shape), bytes: tensor.bytes() }
        })
        .collect();
    let weights = released(py, patience, |options| client.publish(name, &published, options))?;
    Attached::mapping(py, client, weights, patience)
}
