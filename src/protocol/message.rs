use serde::{Deserialize, Serialize};

use crate::error::Fault;
use crate::id::{ArenaId, AttachmentId, DraftId, Epoch, GpuUuid, LeaseRef, PermitId, RequestId, RunId};
use crate::service::{AdapterStack, AdapterTaken, How, RunSettings, Service, StepInput, VaeCall};
use crate::tensor::{DType, Dims, TensorMeta};

use super::clip::{ClipRequest, EncodedPrompt, EncodersTask};
use super::gpu::{GpuAnswer, GpuProbed, GpuTarget, OpenGpu};
use super::negotiate::{Accepted, Hello, ProbeAnswer, Welcome};
use super::report::{ModelReport, Status};
use super::weights::{AttachRequest, AttachedWeights, DraftOffer, PublishRequest, VerifyReport};

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
    /// The caller no longer waits for this request. Not answered by itself; the request still is. A permit that is its
    /// answer, on its way already, ends with it.
    Cancel {
        /// The request taken back.
        id: RequestId,
    },
    /// Leases given back. Not answered.
    Release(Vec<Release>),
    /// The arena is mapped: its name, if it had one, can go. Not answered.
    Opened {
        /// The mapped arena.
        arena: ArenaId,
    },
    /// Attachments given back: nothing of this process uses their memory any more. Not answered.
    Detach(Vec<AttachmentId>),
    /// A draft that was offered will not be filled. Not answered.
    Abandon {
        /// The draft.
        draft: DraftId,
    },
    /// A place in a lane is given back. Not answered.
    EndPermit {
        /// The place.
        permit: PermitId,
    },
    /// A run is over. Not answered.
    CloseRun {
        /// The run.
        run: RunId,
    },
    /// The session ends in order.
    Goodbye,
}

/// Everything a broker says.
#[expect(clippy::large_enum_variant, reason = "moved a few times; a box would be an allocation per call")]
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
    pub releases: Vec<Release>,
    /// The work.
    pub operation: Operation,
}

/// A lease given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// The lease.
    pub lease: LeaseRef,
    /// The client's mark behind its last use of GPU memory; 0 where it is done with the slot already.
    pub sequence: u64,
}

/// What a request asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Operation {
    /// An empty round trip.
    Ping,
    /// A slot of at least this many bytes for an input.
    Allocate {
        /// The memory it is wanted in.
        place: SlotPlace,
        /// Bytes needed.
        size_bytes: u64,
        /// Whether the client keeps the slot from call to call; for `status` only.
        kept: bool,
    },
    /// Find the best rung for a GPU of the client's.
    OpenGpu(OpenGpu),
    /// The offered GPU memory and its events are open: write the marked nonce now.
    GpuReady {
        /// The client's GPU.
        gpu: GpuUuid,
    },
    /// What the client found in the GPU memory it was offered.
    GpuProbed(GpuProbed),
    /// A VAE call.
    Vae(VaeRequest),
    /// One step of a UNet.
    Unet(Box<UnetRequest>),
    /// A sampling run: what stays the same from step to step.
    OpenRun(Box<OpenRun>),
    /// Put adapters together now instead of with the first request that asks for them.
    Prefetch {
        /// Who runs the model.
        service: Service,
        /// Names or paths of the files that hold the model; text encoders may be in several.
        models: Vec<String>,
        /// The adapters.
        adapters: AdapterStack,
    },
    /// A prompt for text encoders.
    Clip(Box<ClipRequest>),
    /// A set of text encoders, which may be in several files.
    Encoders {
        /// Names or paths of the files, in any order.
        models: Vec<String>,
        /// What is done to it.
        task: EncodersTask,
    },
    /// What a model is; loads nothing.
    Describe {
        /// Who runs it.
        service: Service,
        /// Name or path.
        model: String,
    },
    /// Load a model now instead of with its first call.
    Load {
        /// Who runs it; absent for every part of the file that is run by somebody.
        service: Option<Service>,
        /// Name or path.
        model: String,
    },
    /// Forget all parts of a model, and weights of that name; the next call loads them anew.
    Unload {
        /// Name or path.
        model: String,
        /// Whether weights go that somebody has attached.
        force: Force,
    },
    /// List a model that the client has loaded itself, until its session ends.
    Register(RegisteredModel),
    /// Map the tensors of a file or of a published set.
    Attach(AttachRequest),
    /// Hand tensors to the broker for others.
    Publish(PublishRequest),
    /// The draft is filled, and mapped by this client no more.
    PublishFilled {
        /// The draft.
        draft: DraftId,
    },
    /// Whether an attachment of the session's is still good.
    CheckAttached {
        /// The attachment.
        attachment: AttachmentId,
    },
    /// A place in a lane, without work: the client does that itself.
    Permit {
        /// Whose lane.
        service: Service,
        /// Working memory that the client is going to use, in bytes.
        bytes: u64,
    },
    /// Which tensors a file or a published set has; loads nothing.
    Header {
        /// Name or path.
        name: String,
    },
    /// Compare what weights contain with what they should.
    Verify {
        /// Name or path.
        name: String,
    },
    /// Models loaded and models found in the configured folders.
    Models,
    /// Everything about sessions, models and lanes.
    Status,
    /// Counts and sizes, for monitoring.
    Metrics,
}

/// What happens to weights that somebody has attached when they are unloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Force {
    /// They stay, and the request is refused.
    No,
    /// They are given up: who has them attached is told at the next call, and keeps them readable until then and after.
    Yes,
}

/// A model that a client has loaded itself, as it is to be listed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisteredModel {
    /// Name to list it by.
    pub name: String,
    /// What it does.
    pub service: Service,
    /// Architecture, in the client's words; may be empty.
    pub family: String,
    /// Bytes that it takes.
    pub bytes: u64,
    /// Where, in the client's words.
    pub device: String,
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
    /// The memory that the result goes to.
    pub result: SlotPlace,
}

/// One step of a UNet with its tensors. Those that cross inline lie behind the frame one after the other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnetRequest {
    /// What the step is of.
    pub subject: StepSubject,
    /// The tensors.
    pub input: StepInput<TensorSource>,
    /// The memory that the result goes to.
    pub result: SlotPlace,
}

/// What a step is of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum StepSubject {
    /// A model by itself.
    Model {
        /// Name or path.
        name: String,
        /// Adapters of this step.
        adapters: AdapterStack,
    },
    /// A run of the session's.
    Run {
        /// The run.
        run: RunId,
        /// The conditionings that share the step's rows evenly, by numbers that the client chose.
        conds: Vec<u32>,
    },
}

/// A wish for a sampling run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OpenRun {
    /// Name or path of the model.
    pub model: String,
    /// What stays the same.
    pub settings: RunSettings,
}

/// Which of a session's memories a slot is wanted in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SlotPlace {
    /// Host memory.
    Host,
    /// The GPU memory that an opening shares.
    Gpu(GpuTarget),
    /// Host memory that tensors of an opening's GPU pass through and nobody's tensor stays in. The opening shares no GPU
    /// memory, and the session's host rung is `shm`.
    Staging(GpuTarget),
}

/// Where a tensor is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum TensorSource {
    /// In a slot that the session holds.
    Leased(Descriptor),
    /// In the bytes behind this frame.
    Inline(TensorMeta),
}

impl TensorSource {
    /// Element type, shape and strides.
    #[must_use]
    pub fn meta(&self) -> TensorMeta {
        match self {
            Self::Leased(descriptor) => descriptor.meta,
            Self::Inline(meta) => *meta,
        }
    }

    /// Where it is, if it lies in a slot.
    #[must_use]
    pub fn leased(&self) -> Option<&Descriptor> {
        match self {
            Self::Leased(descriptor) => Some(descriptor),
            Self::Inline(_) => None,
        }
    }
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
    /// What it is made of, and for.
    pub place: ArenaPlace,
}

/// What an arena is made of, and for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ArenaPlace {
    /// Host memory.
    Host,
    /// GPU memory, opened by this GPU of the client's.
    Gpu(GpuUuid),
    /// Host memory of [`SlotPlace::Staging`], first needed for this GPU of the client's. Either side locks its pages
    /// where it can.
    Staging(GpuUuid),
}

/// How an arena is handed over.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ArenaHandle {
    /// By the next handle attached to the frame.
    Attached,
    /// By the name of a shared segment.
    Named(String),
    /// By a `cudaIpcMemHandle`.
    CudaIpc(Vec<u8>),
    /// By the next handle attached to the frame, which stands for GPU memory.
    CudaVmm,
}

impl std::fmt::Debug for ArenaHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Names and handles are capabilities and do not belong in logs.
        f.write_str(match self {
            Self::Attached => "Attached",
            Self::Named(_) => "Named(…)",
            Self::CudaIpc(_) => "CudaIpc(…)",
            Self::CudaVmm => "CudaVmm",
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
        how: How,
    },
    /// A tensor in the bytes behind this frame.
    InlineTensor {
        /// Element type, shape and strides.
        meta: TensorMeta,
        /// How it was computed.
        how: How,
    },
    /// A run, now open.
    Run {
        /// What to call it in steps.
        run: RunId,
        /// What the model took up of each adapter.
        adapters: Vec<AdapterTaken>,
    },
    /// Adapters are put together: what the model took up of each.
    Adapters(Vec<AdapterTaken>),
    /// An encoded prompt, in slots now leased to the session or in the bytes behind this frame.
    Encoded(Box<EncodedPrompt>),
    /// The next step towards a GPU's rung.
    Gpu(Box<GpuAnswer>),
    /// Weights, now attached. Their table is in the bytes behind this frame.
    Attached(Box<AttachedWeights>),
    /// The weights are being loaded: ask again.
    Loading {
        /// Bytes in place.
        done: u64,
        /// Bytes of the set.
        total: u64,
    },
    /// Memory for what is published. The table is in the bytes behind this frame.
    Draft(Box<DraftOffer>),
    /// The lane is the client's until it gives the permit back.
    Permitted {
        /// What to give back.
        permit: PermitId,
    },
    /// The tensors. Their table is in the bytes behind this frame.
    Header,
    /// What was found.
    Verified(Vec<VerifyReport>),
    /// One model.
    Model(ModelReport),
    /// All models.
    Models(Vec<ModelReport>),
    /// Everything.
    Status(Box<Status>),
    /// Counts and sizes, in the text format of OpenMetrics.
    Metrics(String),
}

impl Outcome {
    /// The tensors that lie in slots which the answer leases to the session.
    pub fn leased(&self) -> impl Iterator<Item = &Descriptor> {
        let (one, other) = match self {
            Self::Tensor { descriptor, .. } | Self::Allocated { descriptor } => (Some(descriptor), None),
            Self::Encoded(encoded) => (encoded.cond.leased(), encoded.pooled.leased()),
            _ => (None, None),
        };
        one.into_iter().chain(other)
    }
}

impl Descriptor {
    /// A descriptor of `length` raw bytes.
    #[must_use]
    pub fn bytes(epoch: Epoch, lease: LeaseRef, offset: u64, length: u64) -> Self {
        let meta = TensorMeta::contiguous(DType::U8, Dims::of([length]));
        Self { epoch, lease, offset, sequence: 0, meta }
    }
}
