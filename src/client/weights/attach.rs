use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::connect::{Client, resolve_locally};
use super::super::input::unexpected_outcome;
use super::super::link::Link;
use super::super::open_gpu::LinkGpu;
use super::super::options::CallOptions;
use super::super::router::Answer;
use super::attached::Weights;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{AttachmentId, GpuUuid};
use crate::protocol::{AttachRequest, AttachedWeights, Operation, Outcome, Rung, WeightEntry, decode_table};
use crate::tensor::{CastRule, MAX_PREFIXES};
use crate::transport::Attachment;

/// How weights are wanted, and how the call waits.
#[derive(Clone, Default)]
pub struct AttachOptions<'a> {
    /// Element types. Default: as they are stored.
    pub rule: CastRule,
    /// The GPU in whose memory they are wanted; host memory otherwise.
    pub gpu: Option<GpuUuid>,
    /// How long they may take; `None`: as long as it takes.
    pub timeout: Option<Duration>,
    /// Asked about ten times a second while waiting; `true` takes the request back.
    pub interrupted: Option<&'a dyn Fn() -> bool>,
    /// Told a few times a second how many bytes are loaded, and of how many. Not called for weights that are there.
    pub progress: Option<&'a dyn Fn(u64, u64)>,
}

impl fmt::Debug for AttachOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rule, gpu, timeout, .. } = self;
        f.debug_struct("AttachOptions")
            .field("rule", rule)
            .field("gpu", gpu)
            .field("timeout", timeout)
            .finish_non_exhaustive()
    }
}

/// Weights as they were handed over, not yet mapped.
pub(super) struct Handed {
    pub(super) link: Arc<Link>,
    pub(super) weights: AttachedWeights,
    pub(super) entries: Vec<WeightEntry>,
    pub(super) handle: Option<Attachment>,
    pub(super) gpu: Option<Arc<LinkGpu>>,
}

impl Client {
    /// All tensors of a safetensors file, or of a set that some client published, as views on the broker's memory. The
    /// broker loads a file with the first request for it.
    ///
    /// # Errors
    /// [`ErrorKind::ModelNotFound`], [`ErrorKind::InvalidModel`], [`ErrorKind::OutOfMemory`] beyond the broker's bytes for
    /// weights, [`ErrorKind::Unsupported`] where no memory is shared with the broker, [`ErrorKind::Stale`] while weights of
    /// that name are held that were unloaded by force.
    pub fn attach(&self, name: &str) -> Result<Weights> {
        let timeout = self.default_options().timeout;
        self.attach_with(name, &AttachOptions { timeout, ..AttachOptions::default() })
    }

    /// As [`Client::attach`], in element types and to a place as `options` say.
    ///
    /// # Errors
    /// As [`Client::attach`]; [`ErrorKind::Unsupported`] for an element type that nothing is converted to.
    pub fn attach_with(&self, name: &str, options: &AttachOptions<'_>) -> Result<Weights> {
        let name = resolve_locally(name);
        self.with_shared_link(|link| Weights::open(self, hand(link, &name, options, None)?, &name, options))
    }
}

/// Asks for weights until they are there.
pub(super) fn hand(
    link: Arc<Link>,
    name: &str,
    options: &AttachOptions<'_>,
    replaces: Option<AttachmentId>,
) -> Result<Handed> {
    if options.rule.entries().len() > MAX_PREFIXES {
        let message = format!("a rule speaks of {MAX_PREFIXES} beginnings of keys at the most");
        return Err(Error::new(ErrorKind::Unsupported, message, "attach fewer element types at a time"));
    }
    let started = Instant::now();
    let call = |left| CallOptions { timeout: left, interrupted: options.interrupted, ..CallOptions::default() };
    let gpu = options.gpu.map(|gpu| link.open_gpu(gpu, &call(options.timeout))).transpose()?;
    if let Some(gpu) = gpu.as_ref().filter(|gpu| !gpu.is_shared()) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("tensors of {} cross on the rung {}, which shares no memory of it", gpu.gpu, gpu.rung.rung),
            "attach the weights in host memory",
        ));
    }
    if let Some(gpu) = gpu.as_ref().filter(|gpu| gpu.rung.rung == Rung::Peer) {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{} is not the broker's GPU; computing with weights across GPUs would read them in each step",
                gpu.gpu
            ),
            "run the worker on the broker's GPU, or attach the weights in host memory",
        ));
    }
    let target = gpu.as_ref().map(|gpu| gpu.target);
    let request = AttachRequest { name: name.to_owned(), rule: options.rule.clone(), gpu: target, replaces };
    loop {
        let left = options.timeout.map(|timeout| timeout.saturating_sub(started.elapsed()));
        let answer = link.call(Operation::Attach(request.clone()), &[], &call(left))?;
        match answer.reply.outcome {
            Outcome::Loading { done, total } => {
                if let Some(progress) = options.progress {
                    progress(done, total);
                }
            }
            _ => return take(link, answer, gpu),
        }
    }
}

/// Takes the weights out of an answer.
///
/// # Errors
/// [`ErrorKind::Protocol`] for an answer that hands none over.
pub(super) fn take(link: Arc<Link>, answer: Answer, gpu: Option<Arc<LinkGpu>>) -> Result<Handed> {
    let Outcome::Attached(weights) = answer.reply.outcome else { return Err(unexpected_outcome()) };
    let table = answer.payload.as_ref().map(super::super::tensor::PooledBytes::received).unwrap_or_default();
    let entries = decode_table(table).inspect_err(|_| link.detach(weights.attachment))?;
    let handle = answer.handles.into_iter().next();
    Ok(Handed { link, weights: *weights, entries, handle, gpu })
}
