//! What `status` and `models` tell.

use serde::{Deserialize, Serialize};

use super::clip::ClipReport;
use super::negotiate::DeviceRung;
use crate::id::{ContentDigest, RunId, SessionId, WeightSetId};
use crate::service::{AdapterMode, AdapterUse, BlockCache, RunReport, Service};

/// Everything about a broker at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Crate version of the broker.
    pub version: String,
    /// Process id of the broker.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: f64,
    /// Where it listens.
    pub address: String,
    /// Negotiated sessions.
    pub sessions: Vec<SessionReport>,
    /// Models loaded, and models known but not loaded.
    pub models: Vec<ModelReport>,
    /// Sets of weights that clients attach.
    pub weights: Vec<WeightReport>,
    /// Lanes.
    pub lanes: Vec<LaneReport>,
    /// Sampling runs that are open.
    pub runs: Vec<RunStatus>,
    /// Adapters put together for models.
    pub stacks: Vec<StackReport>,
    /// Requests answered since the start, faults included.
    pub requests: u64,
    /// Faults among them.
    pub faults: u64,
    /// Connections that ended before they became sessions.
    pub refused: u64,
    /// Sessions that ended without a goodbye.
    pub sessions_lost: u64,
}

/// One session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionReport {
    /// Its id.
    pub id: SessionId,
    /// The name the client gave itself.
    pub name: String,
    /// Process id of the client, where the system tells.
    pub pid: Option<u32>,
    /// User id of the client, where the system tells.
    pub uid: Option<u32>,
    /// Rung per device, and why.
    pub rungs: Vec<DeviceRung>,
    /// Tensors it holds.
    pub leases: u64,
    /// Slots it keeps for its next inputs.
    #[serde(default)]
    pub input_slots: u64,
    /// Bytes of both.
    pub leased_bytes: u64,
    /// Bytes of address space of its arenas; pages that were never used cost nothing.
    pub arena_bytes: u64,
    /// Requests not yet answered.
    pub in_flight: u64,
    /// Requests answered.
    pub requests: u64,
    /// Whether it is over and its GPU memory is kept from others until its process has ended.
    #[serde(default)]
    pub quarantined: bool,
}

/// One model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelReport {
    /// Name to use in requests.
    pub name: String,
    /// File it comes from, the first of several; empty for a built-in model.
    pub path: String,
    /// Service that runs it.
    pub service: Service,
    /// Architecture.
    pub family: String,
    /// Whether its weights are in memory.
    pub loaded: bool,
    /// Bytes of weights held once for everybody; what loading would take while it is not loaded.
    pub bytes: u64,
    /// Device it runs on.
    pub device: String,
    /// Sessions that have asked for it by name since its weights were last given up.
    #[serde(default)]
    pub users: u64,
    /// Seconds since the last request for it ended; absent while one waits for it or runs on it.
    #[serde(default)]
    pub idle_s: Option<f64>,
    /// Channels of the latent; 0 for a model that has nothing to do with latents.
    pub latent_channels: u64,
    /// Pixels per latent element in each direction; 0 for a model that has nothing to do with pixels.
    pub ratio: u64,
    /// What else there is to know of a UNet.
    #[serde(default)]
    pub unet: Option<UnetReport>,
    /// The session that has loaded it itself and only told of it; absent for what the broker can run.
    #[serde(default)]
    pub registered_by: Option<SessionId>,
    /// What else there is to know of text encoders.
    #[serde(default)]
    pub clip: Option<ClipReport>,
}

/// What a UNet takes, and what its output means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnetReport {
    /// What it takes on the channels beside the latent's: `plain`, `inpaint`, `instruct`, `other`.
    pub variant: String,
    /// What its output means: `eps`, `v`, `edm`, `v-edm`.
    pub prediction: String,
    /// Trained to start from pure noise.
    pub zero_terminal_snr: bool,
    /// Channels of the input: the latent's and those beside them.
    pub in_channels: u64,
    /// Width of a token of the context.
    pub context_width: u64,
    /// Width of `y`, the vector beside the context; absent where there is none.
    pub vector_width: Option<u64>,
}

/// One lane.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LaneReport {
    /// Service it runs.
    pub service: Service,
    /// Device it runs on.
    pub device: String,
    /// Requests waiting, for their turn or for their input.
    pub queued: u64,
    /// Most requests that may wait for their turn; those that wait for their input come on top.
    pub capacity: u64,
    /// Whether one is running.
    pub busy: bool,
    /// Requests it has run.
    pub completed: u64,
    /// How often it ran some, one or several at once.
    pub batches: u64,
    /// The session that has it by a permit.
    pub permitted: Option<SessionId>,
}

/// One sampling run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunStatus {
    /// Whose it is.
    pub session: SessionId,
    /// Its id in that session.
    pub run: RunId,
    /// The model.
    pub model: String,
    /// Adapters of every step.
    pub adapters: u64,
    /// Whether steps may be left out.
    pub cache: Option<BlockCache>,
    /// The run until now.
    pub report: RunReport,
    /// How many times as long it would have taken without its block cache.
    pub speed_up: f64,
}

/// Adapters that are put together for a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StackReport {
    /// The model.
    pub model: String,
    /// Each adapter, as it was first asked for, with its strength.
    pub adapters: Vec<AdapterUse>,
    /// How they are applied.
    pub mode: AdapterMode,
    /// Whether it became private copies of weights because it is asked for often.
    pub merged: bool,
    /// Bytes of what was put together.
    pub bytes: u64,
    /// Requests and runs that use it now.
    pub users: u64,
}

/// One set of weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WeightReport {
    /// Its id.
    pub id: WeightSetId,
    /// Names by which it was asked for or published.
    pub names: Vec<String>,
    /// File it comes from; empty for a published set.
    pub path: String,
    /// What its tensors contain.
    pub content: ContentDigest,
    /// Element types of its tensors, with how many there are of each.
    pub dtypes: Vec<(String, u64)>,
    /// Device it lies on.
    pub device: String,
    /// Bytes of its memory.
    pub bytes: u64,
    /// Bytes that its holders would take in addition if each had its own.
    pub saved_bytes: u64,
    /// Whether it can be attached.
    pub state: WeightState,
    /// Who has it attached.
    pub holders: Vec<HolderReport>,
}

/// What can be done with a set of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightState {
    /// It is being loaded.
    Loading,
    /// It can be attached.
    Ready,
    /// The file has changed since: it stays until its holders give it back.
    Outdated,
    /// It was unloaded by force: it stays until its holders give it back.
    Revoked,
}

impl WeightState {
    /// The name used in `status`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Outdated => "outdated",
            Self::Revoked => "revoked",
        }
    }
}

/// One session's hold on a set of weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HolderReport {
    /// The session.
    pub session: SessionId,
    /// The name the client gave itself.
    pub name: String,
    /// Process id of the client, where the system tells.
    pub pid: Option<u32>,
    /// How often it has the set attached.
    pub attachments: u64,
    /// Bytes of pages that the client has written to, which are its own since; absent where the system does not tell.
    pub diverged_bytes: Option<u64>,
}
