use std::path::PathBuf;

use super::super::{Capability, Skip};
use crate::service::Precision;

/// Head-room over what is counted, in percent: kernels need scratch. Measured peaks on a CPU lie at 40 to 75 of this.
const HEAD_ROOM_PERCENT: u64 = 150;

/// What a UNet's output means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Prediction {
    /// The noise.
    Eps,
    /// The velocity: noise and picture mixed.
    V,
    /// The denoised latent, preconditioned as EDM does.
    Edm,
    /// The velocity, with EDM's noise levels.
    VEdm,
}

impl Prediction {
    /// The name shown to users.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Eps => "eps",
            Self::V => "v",
            Self::Edm => "edm",
            Self::VEdm => "v-edm",
        }
    }
}

/// What a UNet takes on the channels beside the latent's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum UnetVariant {
    /// Nothing: as many channels in as out.
    Plain,
    /// Mask and masked latent: 9 channels.
    Inpaint,
    /// The latent of a picture to change: 8 channels.
    Instruct,
    /// Something else, such as depth.
    Other,
}

impl UnetVariant {
    /// The name shown to users.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Inpaint => "inpaint",
            Self::Instruct => "instruct",
            Self::Other => "other",
        }
    }
}

/// What is known of a UNet from its file's header; for SD2, from the values of one small tensor too.
#[derive(Debug, Clone, PartialEq)]
pub struct UnetFacts {
    /// The file; for messages.
    pub path: PathBuf,
    /// Family as shown to users: `sd15`, `sd2`, `sd2-unclip`, `sdxl`, `sdxl-refiner`, `ssd-1b`, `vega`, `koala`, or
    /// `generic` for other sizes, which run as well.
    pub family: &'static str,
    /// What it takes beside the latent.
    pub variant: UnetVariant,
    /// What its output means. Distillation (turbo, lightning, LCM) leaves no trace in a file.
    pub prediction: Prediction,
    /// Trained to start from pure noise.
    pub zero_terminal_snr: bool,
    /// Channels of the input: the latent's and those beside them.
    pub in_channels: u64,
    /// Channels of the output.
    pub out_channels: u64,
    /// Channels after the first convolution; all others are multiples of it.
    pub model_channels: u64,
    /// Width of the context: of a token of the encoded prompt.
    pub context_width: u64,
    /// Width of `y`, the vector beside the context; `None` where there is none.
    pub vector_width: Option<u64>,
    /// Resolutions, the latent's own included. A side that is halved rounds up, so latents of any size run.
    pub levels: u64,
    /// What each block on the way down leaves, in order: the shapes that control is added to. The middle's is the last.
    pub skips: Vec<Skip>,
    /// Elements of all weights.
    pub weight_elements: u64,
    /// Most elements of activations alive at once, per row and position of the latent.
    pub elements_per_position: u64,
    /// Elements of the largest convolution's weight: a copy in another order is alive while it runs.
    pub reordered_elements: u64,
}

impl UnetFacts {
    /// The element type this UNet computes in unless a setting says otherwise: on the CPU (`None`) float32, on a GPU
    /// float16 where it is fast, whatever the file stores.
    #[must_use]
    pub fn precision(&self, gpu: Option<Capability>) -> Precision {
        match gpu {
            Some(gpu) if gpu >= Capability::VOLTA => Precision::F16,
            _ => Precision::F32,
        }
    }

    /// Bytes of the weights in `precision`.
    #[must_use]
    pub fn weight_bytes(&self, precision: Precision) -> u64 {
        self.weight_elements.saturating_mul(precision.size_bytes())
    }

    /// Working memory of one forward, in bytes: (rows × height × width of the latent × the most elements alive at once
    /// per position + the largest convolution's weight) × bytes per element, and half of that again as head-room.
    ///
    /// The context and what is made of it are not counted, nor is what a control or adapters bring with them.
    #[must_use]
    pub fn step_bytes(&self, rows: u64, height: u64, width: u64, precision: Precision) -> u64 {
        let positions = rows.saturating_mul(height).saturating_mul(width);
        let elements = positions.saturating_mul(self.elements_per_position).saturating_add(self.reordered_elements);
        elements.saturating_mul(precision.size_bytes()).saturating_mul(HEAD_ROOM_PERCENT) / 100
    }
}
