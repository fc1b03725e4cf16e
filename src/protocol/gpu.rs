use serde::{Deserialize, Serialize};

use super::message::{ArenaHandle, ArenaOffer};
use super::negotiate::{DeviceRung, NONCE_BYTES, RungFailure};
use crate::id::{GpuUuid, LeaseRef};
use crate::service::Rung;

/// A client's wish to share memory of a GPU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenGpu {
    /// The client's GPU.
    pub gpu: GpuUuid,
    /// The only rung it wants.
    pub forced: Option<Rung>,
    /// The rung that worked and does no more, and why: only lower ones are tried.
    pub failed: Option<RungFailure>,
}

/// GPU memory to probe. From `lease`'s offset on lie four nonces: the broker's, the client's, and again the broker's
/// and the client's, these two written behind a pause of the writer's stream and marked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuOffer {
    /// The client's GPU.
    pub gpu: GpuUuid,
    /// The rung this would be.
    pub rung: Rung,
    /// The arena of the probed slot, where the client does not have it; its handle is attached before the page's.
    pub arena: Option<ArenaOffer>,
    /// The slot with the nonces.
    pub lease: LeaseRef,
    /// Where it starts, in bytes from the start of its arena.
    pub offset: u64,
    /// The events of both directions and the page that counts their marks; absent where events cannot be had.
    pub fence: Option<FenceOffer>,
}

/// What a client opens to wait for the broker's GPU work and to be waited for.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FenceOffer {
    /// Host memory that both sides map, handed over like an arena.
    pub page: ArenaHandle,
    /// Bytes of it.
    pub page_bytes: u64,
    /// Handles of the events, one after the other.
    pub events: Vec<u8>,
}

impl std::fmt::Debug for FenceOffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Handles are capabilities and do not belong in logs.
        f.debug_struct("FenceOffer").finish_non_exhaustive()
    }
}

/// What a client found in offered GPU memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuProbed {
    /// The client's GPU.
    pub gpu: GpuUuid,
    /// What came of it.
    pub outcome: GpuProbeOutcome,
}

/// Result of opening and reading offered GPU memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GpuProbeOutcome {
    /// It opened.
    Opened(GpuFindings),
    /// It could not be opened, and why.
    Failed(String),
}

/// What a client read and wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuFindings {
    /// How long opening took, in microseconds.
    pub open_us: u32,
    /// The broker's first nonce as read.
    pub read: [u8; NONCE_BYTES],
    /// The client's first nonce as written.
    pub wrote: [u8; NONCE_BYTES],
    /// What waiting by events gave; absent where that could not be tried.
    pub marked: Option<MarkedFindings>,
}

/// What a client read behind the broker's mark, and wrote before its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MarkedFindings {
    /// The broker's second nonce as read by a stream that waited for its mark.
    pub read: [u8; NONCE_BYTES],
    /// The client's second nonce as written.
    pub wrote: [u8; NONCE_BYTES],
    /// The client's mark behind it.
    pub sequence: u64,
}

/// One opening of a GPU in a session: after a demotion there is another, with memory and marks of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuTarget {
    /// The client's GPU.
    pub gpu: GpuUuid,
    /// Counted in the session.
    pub opening: u32,
}

/// Where the search for a GPU's rung is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum GpuAnswer {
    /// Probe this.
    Probe(GpuOffer),
    /// The marked nonce is on its way, behind a pause and before this mark.
    Marked {
        /// The broker's mark.
        sequence: u64,
    },
    /// This is the rung.
    Settled {
        /// How tensors cross.
        rung: DeviceRung,
        /// What to call this opening in requests.
        target: GpuTarget,
    },
}
