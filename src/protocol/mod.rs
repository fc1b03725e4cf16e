//! What client and broker say to each other. Pure: no sockets, no clock, no threads.
//!
//! A frame is a message in MessagePack plus, on the `inline` rung only, raw bytes behind it. The framing itself is
//! the transport's; here bytes become types ([`codec`]) and types are checked against the order in which they may
//! come ([`SessionMachine`]).

mod clip;
pub mod codec;
mod gpu;
mod ladder;
mod message;
mod negotiate;
mod report;
mod session;
mod weights;

pub use crate::service::Rung;
pub use clip::{ClipReport, ClipRequest, EncodedPrompt, EncoderReport, EncodersTask, MAX_ENCODER_FILES};
pub use codec::CodecError;
pub use gpu::{
    FenceOffer, GpuAnswer, GpuFindings, GpuOffer, GpuProbeOutcome, GpuProbed, GpuTarget, MarkedFindings, OpenGpu,
};
pub use ladder::{GpuNonces, GpuSituation, gpu_reason, judge_gpu};
pub use message::{
    ArenaHandle, ArenaOffer, ArenaPlace, ClientMessage, Descriptor, Force, OpenRun, Operation, Outcome,
    RegisteredModel, Release, Reply, Request, ServerMessage, SlotPlace, StepSubject, TensorSource, Times, UnetRequest,
    VaeRequest,
};
pub(crate) use negotiate::presentable;
pub use negotiate::{
    Accepted, DeviceRung, FailureCode, Features, Hello, NONCE_BYTES, PROTOCOL_VERSION, ProbeAnswer, ProbeOffer,
    ProbeOutcome, Reason, RungFailure, Welcome, negotiate, settle,
};
pub use report::{
    HolderReport, LaneReport, ModelReport, RunStatus, SessionReport, StackReport, Status, UnetReport, WeightReport,
    WeightState,
};
pub use session::{Action, Phase, ProtocolError, SessionMachine};
pub use weights::{
    AttachRequest, AttachedWeights, DraftOffer, MAX_TABLE_BYTES, MAX_TABLE_ENTRIES, PublishRequest, VerifyReport,
    WeightEntry, decode_table, encode_table,
};
