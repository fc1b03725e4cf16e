use std::fmt;

use serde::{Deserialize, Serialize};

use super::message::ArenaOffer;
use crate::error::{ErrorKind, Fault};
use crate::id::{Epoch, GpuUuid, SessionId};
use crate::service::{GpuOrder, Pages, Rung};

/// The version this crate speaks. Raised by every change of a message, an added field too: once the version is agreed
/// on, fields are told apart by their place alone. What is said until then carries names, so that a peer of
/// another version can read why it is refused.
pub const PROTOCOL_VERSION: u32 = 5;

/// Abilities of one side, as bits so that an unknown one is carried and ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Features(pub u32);

impl Features {
    /// File descriptors can be attached to frames.
    pub const HANDLES: Self = Self(1);
    /// Named shared segments can be opened.
    pub const NAMED_SEGMENTS: Self = Self(1 << 1);
    /// Both ends are in one process.
    pub const SAME_PROCESS: Self = Self(1 << 2);

    /// Whether all of `other` are among these.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Those that both sides have.
    #[must_use]
    pub const fn intersection(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Those that either side has.
    #[must_use]
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Why a rung was chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Both ends share an address space.
    SameProcess,
    /// Sealed memory was mapped and both sides read what the other wrote.
    SealedMemoryProbed,
    /// A named segment was mapped and both sides read what the other wrote.
    NamedSegmentProbed,
    /// `LUNA_BROKER_TRANSPORT`, or the client's configuration, asked for it.
    Forced,
    /// The probe of shared memory failed; this is what the client saw.
    ProbeFailed(String),
    /// The connection cannot carry what shared memory needs.
    NoSharedMemory,
    /// Memory of the GPU was opened and both sides read what the other wrote.
    GpuMemoryProbed,
    /// The broker has no memory on this GPU or any that reaches it; why.
    NoSharedGpu(String),
    /// Better rungs were tried and failed.
    Failed(Vec<RungFailure>),
}

/// A rung that was tried and could not be had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RungFailure {
    /// The rung.
    pub rung: Rung,
    /// What stopped it.
    pub code: FailureCode,
    /// The words of whoever found it.
    pub detail: String,
}

/// What stops a rung. Programs may rely on the names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureCode {
    /// The driver makes no handle for the memory.
    Export,
    /// The handle does not open in the client's process.
    Open,
    /// One side read something else than the other wrote.
    NonceMismatch,
    /// It worked once and then no more.
    Demoted,
}

impl FailureCode {
    /// The name in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Export => "export",
            Self::Open => "open",
            Self::NonceMismatch => "nonce_mismatch",
            Self::Demoted => "demoted",
        }
    }
}

impl Reason {
    /// The name in metrics, and that of the variant in a `status` for programs.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::SameProcess => "same_process",
            Self::SealedMemoryProbed => "sealed_memory_probed",
            Self::NamedSegmentProbed => "named_segment_probed",
            Self::Forced => "forced",
            Self::ProbeFailed(_) => "probe_failed",
            Self::NoSharedMemory => "no_shared_memory",
            Self::GpuMemoryProbed => "gpu_memory_probed",
            Self::NoSharedGpu(_) => "no_shared_gpu",
            Self::Failed(_) => "failed",
        }
    }
}

impl fmt::Display for RungFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.rung, self.code.name(), self.detail)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SameProcess => f.write_str("client and broker share a process"),
            Self::SealedMemoryProbed => f.write_str("sealed memory passed the probe"),
            Self::NamedSegmentProbed => f.write_str("a named segment passed the probe"),
            Self::Forced => f.write_str("forced by the client"),
            Self::ProbeFailed(what) => write!(f, "shared memory failed the probe: {what}"),
            Self::NoSharedMemory => f.write_str("the connection carries no shared memory"),
            Self::GpuMemoryProbed => f.write_str("GPU memory passed the probe"),
            Self::NoSharedGpu(why) => write!(f, "no GPU memory is shared: {why}"),
            Self::Failed(failures) => {
                f.write_str("better rungs failed:")?;
                failures.iter().try_for_each(|failure| write!(f, " [{failure}]"))
            }
        }
    }
}

/// The rung in use for one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRung {
    /// The client's device: `cpu`, or the UUID of a GPU.
    pub device: String,
    /// The rung.
    pub rung: Rung,
    /// Why this one.
    pub reason: Reason,
    /// How long opening GPU memory took, in microseconds.
    #[serde(default)]
    pub open_us: Option<u32>,
    /// How GPU work is kept in order; absent where no GPU memory is shared.
    #[serde(default)]
    pub order: Option<GpuOrder>,
    /// How the side that says so holds the host memory through which tensors of a GPU cross; absent before the first
    /// of them, and where GPU memory is shared.
    #[serde(default)]
    pub pages: Option<Pages>,
}

impl DeviceRung {
    /// The rung for host memory.
    #[must_use]
    pub fn host(rung: Rung, reason: Reason) -> Self {
        Self::new("cpu".to_owned(), rung, reason)
    }

    /// A rung on which no GPU memory is shared.
    #[must_use]
    pub const fn new(device: String, rung: Rung, reason: Reason) -> Self {
        Self { device, rung, reason, open_us: None, order: None, pages: None }
    }

    /// The reason, and how the host memory is held that tensors pass through, as a sentence.
    #[must_use]
    pub fn why(&self) -> String {
        match &self.pages {
            Some(pages) => format!("{}; {pages}", self.reason),
            None => self.reason.to_string(),
        }
    }
}

/// A client's first message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Protocol version of the client.
    pub version: u32,
    /// What it can do.
    pub features: Features,
    /// What it calls itself, for `status` and logs.
    pub name: String,
    /// Its process id as it sees it.
    pub pid: u32,
    /// GPUs it can reach.
    #[serde(default)]
    pub gpus: Vec<GpuUuid>,
    /// The only rung it wants.
    #[serde(default)]
    pub forced: Option<Rung>,
}

/// The broker's answer to an acceptable [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Protocol version in use.
    pub version: u32,
    /// Crate version of the broker.
    pub broker: String,
    /// The broker's life.
    pub epoch: Epoch,
    /// The new session.
    pub session: SessionId,
    /// Features both sides have.
    pub features: Features,
    /// An arena to probe; absent where the rung is settled without one.
    pub probe: Option<ProbeOffer>,
}

/// Bytes of a nonce: too many to be read by accident from zeroed or stale memory.
pub const NONCE_BYTES: usize = 32;

/// An arena in which each side writes a nonce for the other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeOffer {
    /// The session's first arena.
    pub arena: ArenaOffer,
    /// Where the broker's nonce is, in bytes from the start of the arena.
    pub read_at: u64,
    /// Where the client's goes.
    pub write_at: u64,
}

/// What the client found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeAnswer {
    /// What came of it.
    pub outcome: ProbeOutcome,
}

/// Result of mapping and reading the probed arena.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProbeOutcome {
    /// The arena was mapped.
    Mapped {
        /// What the client read where the broker had written.
        read: [u8; NONCE_BYTES],
        /// What it wrote for the broker to read.
        wrote: [u8; NONCE_BYTES],
    },
    /// The arena could not be mapped, and why.
    Failed(String),
}

/// The end of negotiation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accepted {
    /// The rung per device.
    pub rungs: Vec<DeviceRung>,
}

/// The longest client name kept; longer ones are cut.
const MAX_NAME_BYTES: usize = 128;

/// The longest reason kept: it is repeated in every `status`.
const MAX_REASON_BYTES: usize = 200;

/// Checks a [`Hello`] against this broker: what both can do and the rung to probe for host tensors.
///
/// # Errors
/// A [`ErrorKind::Refused`] fault for another protocol version, or a forced rung that cannot be had.
pub fn negotiate(hello: &mut Hello, ours: Features) -> Result<(Features, Rung, Reason), Fault> {
    if hello.version != PROTOCOL_VERSION {
        return Err(Fault::new(
            ErrorKind::Refused,
            format!("the client speaks protocol version {}, this broker speaks {PROTOCOL_VERSION}", hello.version),
            "install the same version of luna-broker on both sides",
        ));
    }
    hello.name = cut(&hello.name, MAX_NAME_BYTES);
    let features = hello.features.intersection(ours);
    let best = if features.contains(Features::SAME_PROCESS) {
        (Rung::Local, Reason::SameProcess)
    } else if features.contains(Features::HANDLES) {
        (Rung::Shm, Reason::SealedMemoryProbed)
    } else if features.contains(Features::NAMED_SEGMENTS) {
        (Rung::Shm, Reason::NamedSegmentProbed)
    } else {
        (Rung::Inline, Reason::NoSharedMemory)
    };
    let (rung, reason) = match hello.forced {
        None => best,
        Some(Rung::Inline) => (Rung::Inline, Reason::Forced),
        Some(forced) if forced == best.0 => best,
        Some(forced) => {
            return Err(Fault::new(
                ErrorKind::Refused,
                format!("rung {forced} was forced, but between this client and this broker {} is the best", best.0),
                "unset LUNA_BROKER_TRANSPORT or force another rung",
            ));
        }
    };
    Ok((features, rung, reason))
}

/// A peer's words as they may be shown: cut to `limit` bytes, without anything a terminal would obey.
fn cut(words: &str, limit: usize) -> String {
    let words: String = words.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut end = words.len().min(limit);
    while !words.is_char_boundary(end) {
        end -= 1;
    }
    words[..end].to_owned()
}

/// What a peer says went wrong, as it may be shown.
pub(crate) fn presentable(words: &str) -> String {
    cut(words, MAX_REASON_BYTES)
}

/// The rung after a probe: `planned` where each side read what the other wrote, else `inline` with what went wrong.
#[must_use]
pub fn settle(
    planned: (Rung, Reason),
    ours: &[u8; NONCE_BYTES],
    answer: &ProbeOutcome,
    found: &[u8; NONCE_BYTES],
) -> (Rung, Reason) {
    let failed = |what: &str| (Rung::Inline, Reason::ProbeFailed(presentable(what)));
    match answer {
        ProbeOutcome::Failed(what) => failed(what),
        ProbeOutcome::Mapped { read, .. } if read != ours => failed("the client read something else"),
        ProbeOutcome::Mapped { wrote, .. } if wrote != found => failed("the broker read something else"),
        ProbeOutcome::Mapped { wrote, .. } if wrote == ours => failed("the client did not write a nonce of its own"),
        ProbeOutcome::Mapped { .. } => planned,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(features: Features) -> Hello {
        Hello { version: PROTOCOL_VERSION, features, name: "worker".into(), pid: 1, gpus: Vec::new(), forced: None }
    }

    const ALL: Features = Features(7);

    #[test]
    fn the_best_rung_that_both_sides_can_do_is_planned() {
        let rung = |features| negotiate(&mut hello(features), ALL).unwrap().1;
        assert_eq!(rung(ALL), Rung::Local);
        assert_eq!(rung(Features::HANDLES), Rung::Shm);
        assert_eq!(rung(Features::NAMED_SEGMENTS), Rung::Shm);
        assert_eq!(rung(Features(0)), Rung::Inline);
        assert_eq!(negotiate(&mut hello(ALL), Features(0)).unwrap().2, Reason::NoSharedMemory);
    }

    #[test]
    fn a_version_from_the_future_is_refused_with_both_versions_named() {
        let mut future = hello(ALL);
        future.version = 99;
        let fault = negotiate(&mut future, ALL).unwrap_err();
        assert_eq!(fault.kind, ErrorKind::Refused);
        let ours = format!("speaks {PROTOCOL_VERSION}");
        assert!(fault.message.contains("version 99") && fault.message.contains(&ours), "{fault}");
    }

    #[test]
    fn a_forced_rung_is_taken_or_refused_but_never_replaced() {
        let mut forced = hello(Features::HANDLES);
        forced.forced = Some(Rung::Inline);
        assert_eq!(negotiate(&mut forced, ALL).unwrap().1, Rung::Inline);
        forced.forced = Some(Rung::Local);
        assert_eq!(negotiate(&mut forced, ALL).unwrap_err().kind, ErrorKind::Refused);
    }

    #[test]
    fn what_a_terminal_would_obey_is_taken_out_of_names_and_reasons() {
        let mut hostile = hello(ALL);
        hostile.name = "a\u{1b}[2Jb\n".into();
        negotiate(&mut hostile, ALL).unwrap();
        assert_eq!(hostile.name, "a [2Jb ");
        let answer = ProbeOutcome::Failed("x\u{7}".repeat(1000));
        let (_, reason) =
            settle((Rung::Shm, Reason::SealedMemoryProbed), &[1; NONCE_BYTES], &answer, &[2; NONCE_BYTES]);
        let Reason::ProbeFailed(what) = reason else { panic!("the probe failed") };
        assert!(what.len() <= 200 && !what.contains('\u{7}'));
    }

    #[test]
    fn a_reason_has_the_same_name_for_metrics_as_for_programs() {
        let reasons = [
            Reason::SameProcess,
            Reason::SealedMemoryProbed,
            Reason::NamedSegmentProbed,
            Reason::Forced,
            Reason::ProbeFailed("mmap: no".into()),
            Reason::NoSharedMemory,
            Reason::GpuMemoryProbed,
            Reason::NoSharedGpu("no GPU".into()),
            Reason::Failed(Vec::new()),
        ];
        for reason in reasons {
            let told = serde_json::to_value(&reason).unwrap();
            let variant = told.as_object().and_then(|variant| variant.keys().next().map(String::as_str));
            assert_eq!(variant.or(told.as_str()), Some(reason.name()));
        }
    }

    #[test]
    fn a_long_name_is_cut_at_a_character() {
        let mut long = hello(ALL);
        long.name = "é".repeat(100);
        negotiate(&mut long, ALL).unwrap();
        assert_eq!(long.name, "é".repeat(64));
    }

    #[test]
    fn a_probe_settles_only_when_each_side_read_the_other() {
        let (ours, theirs) = ([1; NONCE_BYTES], [2; NONCE_BYTES]);
        let planned = || (Rung::Shm, Reason::SealedMemoryProbed);
        let mapped = |read, wrote| ProbeOutcome::Mapped { read, wrote };
        assert_eq!(settle(planned(), &ours, &mapped(ours, theirs), &theirs).0, Rung::Shm);
        assert_eq!(settle(planned(), &ours, &mapped(theirs, theirs), &theirs).0, Rung::Inline);
        assert_eq!(settle(planned(), &ours, &mapped(ours, theirs), &ours).0, Rung::Inline);
        assert_eq!(settle(planned(), &ours, &mapped(ours, ours), &ours).0, Rung::Inline);
        let failed = settle(planned(), &ours, &ProbeOutcome::Failed("mmap: no".into()), &theirs);
        assert_eq!(failed, (Rung::Inline, Reason::ProbeFailed("mmap: no".into())));
    }
}
