use serde::{Deserialize, Serialize};

use crate::error::Fault;
use crate::id::{ArenaId, Epoch, LeaseRef, RequestId};
use crate::service::{VaeCall, VaeMode};
use crate::tensor::{DType, Dims, TensorMeta};

use super::negotiate::{Accepted, Hello, ProbeAnswer, Welcome};
use super::report::{ModelReport, Status};

/// Everything a client says.
#[expect(clippy::large_enum_variant, reason = "moved a few times; a box would be an allocation per call")]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ClientMessage {
    /// The first message: who is there and what it can do.
    Hello(Hello),
    /// What the probe of a shared arena showed.
    Probed(ProbeAnswer),
    /// Work, answered by exactly one [`Reply`] with the same id.
    Request(Request),
    /// The caller no longer waits for this request. Not answered by itself; the request still is.
    Cancel {
        /// The request taken back.
        id: RequestId,
    },
    /// Leases given back. Not answered.
    Release(Vec<LeaseRef>),
    /// The arena is mapped: its name, if it had one, can go. Not answered.
    Opened {
        /// The mapped arena.
        arena: ArenaId,
    },
    /// The session ends in order.
    Goodbye,
}

/// Everything a broker says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum ServerMessage {
    /// The session exists; an arena to probe may come with it.
    Welcome(Welcome),
    /// The probe is settled: these are the session's rungs.
    Accepted(Accepted),
    /// There is no session.
    Refused(Fault),
    /// The answer to one request.
    Reply(Reply),
    /// The broker stops after the requests it is running.
    Closing,
}

/// One piece of work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the client, unique among its requests in flight.
    pub id: RequestId,
    /// How long the caller waits from now on, in milliseconds; absent: as long as it takes.
    #[serde(default)]
    pub timeout_ms: Option<u32>,
    /// Leases given back with this request, before it is looked at.
    #[serde(default)]
    pub releases: Vec<LeaseRef>,
    /// The work.
    pub operation: Operation,
}

/// What a request asks for.
#[expect(clippy::large_enum_variant, reason = "moved a few times; a box would be an allocation per call")]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Operation {
    /// An empty round trip.
    Ping,
    /// A slot of at least this many bytes for an input.
    Allocate {
        /// Bytes needed.
        size_bytes: u64,
        /// Whether the client keeps the slot from call to call; for `status` only.
        #[serde(default)]
        kept: bool,
    },
    /// A VAE call.
    Vae(VaeRequest),
    /// What a model is; loads nothing.
    Describe {
        /// Name or path.
        model: String,
    },
    /// Load a model now instead of with its first call.
    Load {
        /// Name or path.
        model: String,
    },
    /// Forget a model; the next call loads it anew.
    Unload {
        /// Name or path.
        model: String,
    },
    /// Models loaded and models found in the configured folders.
    Models,
    /// Everything about sessions, models and lanes.
    Status,
}

/// A VAE call with its input.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VaeRequest {
    /// Name or path of the model.
    pub model: String,
    /// Direction and tiling.
    pub call: VaeCall,
    /// The input tensor.
    pub input: TensorSource,
}

/// Where a request's tensor is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum TensorSource {
    /// In a slot that the session holds.
    Leased(Descriptor),
    /// In the bytes behind this frame.
    Inline(TensorMeta),
}

/// Plain data that lets the peer find a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// The broker's life this belongs to.
    pub epoch: Epoch,
    /// The slot the tensor lies in.
    pub lease: LeaseRef,
    /// Bytes from the start of the *arena* to the first element.
    pub offset: u64,
    /// The arena's write sequence that includes this tensor; 0 for a tensor the sender knows to be visible.
    pub sequence: u64,
    /// Element type, shape and strides.
    pub meta: TensorMeta,
}

/// A new arena of the session, sent with the first reply that uses it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArenaOffer {
    /// Its id.
    pub arena: ArenaId,
    /// Usable bytes.
    pub size_bytes: u64,
    /// How to map it.
    pub handle: ArenaHandle,
}

/// How an arena is handed over.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ArenaHandle {
    /// By the next handle attached to the frame.
    Attached,
    /// By the name of a shared segment.
    Named(String),
}

impl std::fmt::Debug for ArenaHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A segment's name is a capability and does not belong in logs.
        f.write_str(match self {
            Self::Attached => "Attached",
            Self::Named(_) => "Named(…)",
        })
    }
}

/// When things happened to a request, in nanoseconds of the broker's clock; differences are what counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Times {
    /// The request was read and queued.
    pub enqueued_ns: u64,
    /// Its execution began.
    pub started_ns: u64,
    /// Its execution ended.
    pub finished_ns: u64,
}

/// The answer to one request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// The request answered.
    pub id: RequestId,
    /// When it ran.
    pub times: Times,
    /// Arenas the client has not seen yet; their handles are attached in this order.
    #[serde(default)]
    pub arenas: Vec<ArenaOffer>,
    /// What came of it.
    pub outcome: Outcome,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Outcome {
    /// It was not done; nothing else changed.
    Fault(Fault),
    /// Done, and there is nothing to say.
    Done,
    /// A slot for an input.
    Allocated {
        /// Where it is; dtype and shape say only how many bytes there are.
        descriptor: Descriptor,
    },
    /// A tensor in a slot now leased to the session.
    Tensor {
        /// Where it is.
        descriptor: Descriptor,
        /// How it was computed.
        mode: VaeMode,
    },
    /// A tensor in the bytes behind this frame.
    InlineTensor {
        /// Element type, shape and strides.
        meta: TensorMeta,
        /// How it was computed.
        mode: VaeMode,
    },
    /// One model.
    Model(ModelReport),
    /// All models.
    Models(Vec<ModelReport>),
    /// Everything.
    Status(Box<Status>),
}

impl Descriptor {
    /// A descriptor of `length` raw bytes.
    #[must_use]
    pub fn bytes(epoch: Epoch, lease: LeaseRef, offset: u64, length: u64) -> Self {
        let meta = TensorMeta::contiguous(DType::U8, Dims::of([length]));
        Self { epoch, lease, offset, sequence: 0, meta }
    }
}
