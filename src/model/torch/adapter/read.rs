use tch::{Device, Kind, TchError, Tensor};

use super::super::super::adapter::{Change, Part};
use super::super::super::header::quote;
use super::super::super::{AdapterFile, ModelError};
use super::super::{failed, kind_of};

/// The call named in errors.
const WHAT: &str = "adapter";

/// A change with its tensors read, in float32 on `device`. They own their memory: the file may go.
pub(in crate::model::torch) fn tensors(
    adapter: &AdapterFile,
    change: &Change<Part>,
    device: Device,
) -> Result<Change<Tensor>, ModelError> {
    change.try_map(&mut |part| {
        let refused = |reason: String| {
            let reason = format!("{} {reason}", quote(&part.key));
            ModelError::AdapterFile { path: adapter.path().to_owned(), reason }
        };
        let stored = &part.stored;
        let kind = stored.element().and_then(kind_of);
        let kind = kind.ok_or_else(|| refused(format!("is stored as {}, which is not read", stored.dtype)))?;
        let mut bytes = vec![0; stored.bytes.len()];
        adapter.file().read_exact_at(stored.bytes.start as u64, &mut bytes)?;
        let shape: Vec<i64> = stored.shape.iter().map(|&extent| extent as i64).collect();
        let tensor = Tensor::f_from_data_size(&bytes, &shape, kind).map_err(failed(WHAT))?;
        if !is_finite(&tensor).map_err(failed(WHAT))? {
            return Err(refused("has elements that are no finite numbers".to_owned()));
        }
        tensor.f_to_device(device).and_then(|there| there.f_to_kind(Kind::Float)).map_err(failed(WHAT))
    })
}

fn is_finite(tensor: &Tensor) -> Result<bool, TchError> {
    Ok(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? != 0)
}
