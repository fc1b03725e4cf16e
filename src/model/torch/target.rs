use tch::{Device, Kind};

use super::super::{Capability, ModelError, UnetFacts, VaeFacts};
use super::cuda::{Current, TorchCuda};
use crate::device::StreamRef;
use crate::service::Precision;

/// What a model computes on.
#[derive(Debug, Clone, Default)]
pub enum Target {
    /// The CPU, in float32.
    #[default]
    Cpu,
    /// A GPU, on one lane's stream.
    Cuda {
        /// The GPU and the stream.
        lane: TorchCuda,
        /// The element type computed in; `None` for what suits model and GPU, see [`VaeFacts::precision`] and
        /// [`UnetFacts::precision`].
        precision: Option<Precision>,
    },
}

impl Target {
    /// The element type that a VAE computes in here.
    #[must_use]
    pub fn precision(&self, facts: &VaeFacts) -> Precision {
        self.chosen(|gpu| facts.precision(gpu))
    }

    /// The element type that a UNet computes in here.
    #[must_use]
    pub fn unet_precision(&self, facts: &UnetFacts) -> Precision {
        self.chosen(|gpu| facts.precision(gpu))
    }

    fn chosen(&self, suits: impl Fn(Option<Capability>) -> Precision) -> Precision {
        match self {
            Self::Cpu => suits(None),
            Self::Cuda { precision: Some(precision), .. } => *precision,
            Self::Cuda { lane, precision: None } => suits(Some(lane.facts().capability)),
        }
    }

    /// The tensor library's name of the device.
    pub(super) fn device(&self) -> Device {
        match self {
            Self::Cpu => Device::Cpu,
            Self::Cuda { lane, .. } => Device::Cuda(usize::try_from(lane.ordinal()).unwrap_or(0)),
        }
    }

    pub(super) fn stream(&self) -> Option<StreamRef> {
        match self {
            Self::Cpu => None,
            Self::Cuda { lane, .. } => Some(lane.stream()),
        }
    }

    /// Sends what this thread computes to the lane's stream until the answer is dropped; nothing to do on the CPU.
    pub(super) fn make_current(&self) -> Result<Option<Current>, ModelError> {
        match self {
            Self::Cpu => Ok(None),
            Self::Cuda { lane, .. } => lane.make_current().map(Some),
        }
    }

    /// Gives back what the allocator keeps for later. On the CPU it keeps nothing that matters: large blocks go back
    /// to the system as they are freed.
    pub(super) fn reclaim(&self) {
        if let Self::Cuda { lane, .. } = self
            && let Err(error) = lane.empty_cache()
        {
            tracing::warn!(%error, "memory kept for later could not be given back");
        }
    }
}

/// The library's name of the element type.
pub(super) fn kind_of_precision(precision: Precision) -> Kind {
    match precision {
        Precision::F32 => Kind::Float,
        Precision::Bf16 => Kind::BFloat16,
        Precision::F16 => Kind::Half,
    }
}
