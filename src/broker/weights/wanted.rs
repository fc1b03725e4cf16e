use std::sync::Arc;

use super::super::registry::Registry;
use super::memory::WeightPlace;
use super::set::WeightSet;
use crate::error::{Error, ErrorKind, Result};
use crate::model::weights::WeightPlan;
use crate::model::{ModelError, ModelFile};
use crate::protocol::AttachRequest;
use crate::tensor::CastRule;

/// The weights of a file as somebody wants them.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) file: Arc<ModelFile>,
    pub(super) plan: WeightPlan,
    pub(super) place: WeightPlace,
}

impl Wanted {
    /// Opens the file and lays its tensors out; reads the header alone.
    ///
    /// # Errors
    /// [`crate::model::ModelError`]: not found, not safetensors, an element type that cannot be had.
    pub(super) fn of_file(registry: &Registry, request: &AttachRequest, place: WeightPlace) -> Result<Self> {
        let path = registry.locate(&request.name)?;
        let file = ModelFile::open(&path)?;
        let plan = WeightPlan::of_file(&file, &request.rule, place.alignment()).map_err(|error| match error {
            ModelError::EmptySet => ModelError::Malformed { path, reason: "it holds no tensors".to_owned() }.into(),
            ModelError::CastTarget { .. } => Error::from(error),
            // Speaks of a tensor alone.
            error => {
                let error = Error::from(error);
                Error::new(error.kind(), format!("{}: {}", path.display(), error.message()), error.remedy())
            }
        })?;
        Ok(Self { file: Arc::new(file), plan, place })
    }
}

/// That a published set is as `rule` wants it: only files are cast.
///
/// # Errors
/// [`ErrorKind::Unsupported`] naming the first tensor that is not.
pub(super) fn check_published(set: &WeightSet, name: &str, rule: &CastRule) -> Result<()> {
    let differs = set.plan.tensors.iter().find(|one| rule.wanted(&one.key, one.meta.dtype) != one.meta.dtype);
    match differs {
        None => Ok(()),
        Some(tensor) => Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{name} was published with {:?} as {}, and is not there as {}",
                tensor.key,
                tensor.meta.dtype,
                rule.wanted(&tensor.key, tensor.meta.dtype)
            ),
            "attach it as it was published, or publish it in that type under another name",
        )),
    }
}
