use std::sync::Arc;

use super::super::registry::Registry;
use super::memory::WeightPlace;
use super::set::{WeightSet, booked_bytes};
use crate::error::{Error, Result};
use crate::model::weights::WeightPlan;
use crate::model::{ModelError, ModelFile};
use crate::protocol::AttachRequest;

/// Weights as somebody wants them.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub(super) origin: Origin,
    pub(super) plan: WeightPlan,
    pub(super) place: WeightPlace,
    pub(super) booked_bytes: u64,
}

/// What tensors come from.
#[derive(Debug, Clone)]
pub(super) enum Origin {
    File(Arc<ModelFile>),
    /// What was published under a name; kept until its variant is made.
    Published {
        set: Arc<WeightSet>,
        name: String,
    },
}

impl Origin {
    /// Whether both are the same file in the same state, or the same set.
    pub(super) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(one), Self::File(other)) => one.state() == other.state(),
            (Self::Published { set: one, .. }, Self::Published { set: other, .. }) => one.id == other.id,
            _ => false,
        }
    }

    /// The name to speak of it by.
    pub(super) fn shown(&self) -> String {
        match self {
            Self::File(file) => file.path().display().to_string(),
            Self::Published { name, .. } => name.clone(),
        }
    }
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
            error => about(&path.display().to_string(), error.into()),
        })?;
        let booked_bytes = booked_bytes(&plan);
        Ok(Self { origin: Origin::File(Arc::new(file)), plan, place, booked_bytes })
    }

    /// Lays out the tensors of a published set.
    ///
    /// # Errors
    /// [`ModelError::CastTarget`] for a rule that asks for what nothing is converted to.
    pub(super) fn of_published(set: Arc<WeightSet>, request: &AttachRequest, place: WeightPlace) -> Result<Self> {
        let plan = set.plan.recast(&request.rule, place.alignment());
        let plan = plan.map_err(|error| about(&request.name, error.into()))?;
        let booked_bytes = booked_bytes(&plan);
        Ok(Self { origin: Origin::Published { set, name: request.name.clone() }, plan, place, booked_bytes })
    }
}

fn about(what: &str, error: Error) -> Error {
    Error::new(error.kind(), format!("{what}: {}", error.message()), error.remedy())
}
