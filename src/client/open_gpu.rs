use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::gpu::GpuDevice;
use super::input::unexpected_outcome;
use super::link::Link;
use super::memory::ArenaKind;
use super::options::CallOptions;
use crate::device::{CopyStream, Device, DeviceError, HostDevice, Order, Region, RegionHandle, Span, StreamRef};
use crate::error::{Error, ErrorKind, Result};
use crate::id::GpuUuid;
use crate::protocol::{
    ArenaHandle, DeviceRung, FailureCode, FenceOffer, GpuAnswer, GpuFindings, GpuOffer, GpuProbeOutcome, GpuProbed,
    GpuTarget, MarkedFindings, NONCE_BYTES, OpenGpu, Operation, Outcome, RungFailure,
};
use crate::service::GpuOrder;
use crate::transport::Attachment;

/// How much later the marked nonce is written: long enough that a broker that does not wait reads the old bytes.
const PROBE_DELAY: Duration = Duration::from_millis(5);

/// A GPU of this process in one session: how its tensors cross.
#[derive(Debug)]
pub(super) struct LinkGpu {
    pub(super) gpu: GpuUuid,
    pub(super) rung: DeviceRung,
    pub(super) device: GpuDevice,
    /// For work that belongs to no stream of the caller's.
    pub(super) queue: Arc<dyn CopyStream>,
    /// Absent where each side waits for its GPU work on the host, and where no GPU memory is shared.
    pub(super) order: Option<Arc<dyn Order>>,
    /// What this opening is called in requests.
    pub(super) target: GpuTarget,
    /// The broker is gone, and with it what its events and memory mean.
    owner_gone: AtomicBool,
}

impl LinkGpu {
    /// The broker went away: nothing waits for its marks or reads its memory any more.
    pub(super) fn lose_owner(&self) {
        self.owner_gone.store(true, Ordering::Release);
    }

    fn check_owner(&self) -> Result<(), DeviceError> {
        if self.owner_gone.load(Ordering::Acquire) { Err(DeviceError::OwnerGone) } else { Ok(()) }
    }

    /// Whether tensors cross in GPU memory.
    pub(super) fn is_shared(&self) -> bool {
        self.rung.order.is_some()
    }

    /// Marks what is enqueued on `stream`, or waits for it; the number for the broker.
    pub(super) fn publish(&self, stream: StreamRef) -> Result<u64, DeviceError> {
        self.check_owner()?;
        match &self.order {
            Some(order) => order.record(stream),
            None => self.device.synchronize_stream(stream).map(|()| 0),
        }
    }

    /// Work enqueued on `stream` from now on comes behind the broker's mark.
    pub(super) fn wait(&self, sequence: u64, stream: StreamRef) -> Result<(), DeviceError> {
        self.check_owner()?;
        match &self.order {
            Some(order) => order.wait(sequence, stream),
            None => Ok(()),
        }
    }

    /// Blocks until the broker's mark has passed.
    pub(super) fn synchronize(&self, sequence: u64) -> Result<(), DeviceError> {
        self.check_owner()?;
        match &self.order {
            Some(order) => order.synchronize_peers(sequence),
            None => Ok(()),
        }
    }
}

/// Finds the best rung for `gpu` that passes a probe; `failed` is one that worked and does no more.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where this process cannot use the GPU, [`ErrorKind::Refused`] for a forced rung that cannot
/// be had, or as [`Link::call`].
pub(super) fn open_gpu(
    link: &Link,
    gpu: GpuUuid,
    wanted: GpuOrder,
    failed: Option<RungFailure>,
    options: &CallOptions<'_>,
) -> Result<LinkGpu> {
    let device = GpuDevice::open(gpu)?;
    let queue = device.queue()?;
    let mut operation = Operation::OpenGpu(OpenGpu { gpu, forced: link.forced, failed });
    let mut order = None;
    loop {
        let answer = link.call(operation, &[], options)?;
        let Outcome::Gpu(step) = answer.reply.outcome else { return Err(unexpected_outcome()) };
        let offer = match *step {
            GpuAnswer::Settled { rung, target } => {
                let order = order.filter(|_| rung.order == Some(GpuOrder::Events));
                tracing::info!(%gpu, rung = %rung.rung, reason = %rung.reason, "GPU opened");
                return Ok(LinkGpu { gpu, rung, device, queue, order, target, owner_gone: AtomicBool::new(false) });
            }
            GpuAnswer::Probe(offer) => offer,
            GpuAnswer::Marked { .. } => return Err(unexpected_outcome()),
        };
        let probe = Probe { link, device: &device, queue: &*queue, offer: &offer, wanted, options };
        let outcome = match probe.run(answer.handles) {
            Ok((findings, marks)) => {
                order = marks;
                GpuProbeOutcome::Opened(findings)
            }
            Err(error) => GpuProbeOutcome::Failed(error.to_string()),
        };
        operation = Operation::GpuProbed(GpuProbed { gpu, outcome });
    }
}

/// What an offer's GPU memory is asked, by the path that tensors take.
struct Probe<'a> {
    link: &'a Link,
    device: &'a GpuDevice,
    queue: &'a dyn CopyStream,
    offer: &'a GpuOffer,
    wanted: GpuOrder,
    options: &'a CallOptions<'a>,
}

impl Probe<'_> {
    fn run(&self, handles: Vec<Attachment>) -> Result<(GpuFindings, Option<Arc<dyn Order>>)> {
        let mut handles = handles.into_iter();
        let started = Instant::now();
        let region = match &self.offer.arena {
            Some(arena) => {
                let attachment = if travels_beside(&arena.handle) { handles.next() } else { None };
                self.link.memory.import(arena, attachment, Some(self.device))?
            }
            None => self.link.memory.arena(self.offer.lease.arena, ArenaKind::Gpu(self.offer.gpu))?,
        };
        let open_us = u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX);
        let mut read = [0; NONCE_BYTES];
        self.place(&region, 0)?.read(&mut read)?;
        let wrote = nonce()?;
        self.place(&region, 1)?.write(&wrote)?;
        // Not tried where the caller wants the host to wait: the broker then waits too.
        let marked = self.offer.fence.as_ref().filter(|_| self.wanted == GpuOrder::Events).and_then(|fence| {
            let exchanged = self.exchange_marked(&region, fence, handles.next());
            exchanged.inspect_err(|error| tracing::warn!(%error, "GPU work cannot be ordered by events")).ok()
        });
        let (marked, order) = marked.unzip();
        Ok((GpuFindings { open_us, read, wrote, marked }, order))
    }

    /// Reads behind the broker's mark, and writes behind one of this side's.
    fn exchange_marked(
        &self,
        region: &Arc<dyn Region>,
        fence: &FenceOffer,
        page: Option<Attachment>,
    ) -> Result<(MarkedFindings, Arc<dyn Order>)> {
        let page = map_page(fence, page)?;
        let order = self.device.order(page, &fence.events)?;
        let (marked, scratch) = (self.place(region, 2)?, self.place(region, 4)?);
        // From here on nothing takes long: who does not wait reads what was there before.
        let answer = self.link.call(Operation::GpuReady { gpu: self.offer.gpu }, &[], self.options)?;
        let Outcome::Gpu(step) = answer.reply.outcome else { return Err(unexpected_outcome()) };
        let GpuAnswer::Marked { sequence } = *step else { return Err(unexpected_outcome()) };
        // The broker's scratch is free once its marked copy has run, which is what is waited for.
        order.wait(sequence, self.queue.handle())?;
        self.queue.copy(&marked, &scratch)?;
        self.queue.synchronize()?;
        let mut read = [0; NONCE_BYTES];
        scratch.read(&mut read)?;
        let wrote = nonce()?;
        scratch.write(&wrote)?;
        self.device.delay(self.queue.handle(), PROBE_DELAY)?;
        self.queue.copy(&scratch, &self.place(region, 3)?)?;
        let sequence = order.record(self.queue.handle())?;
        Ok((MarkedFindings { read, wrote, sequence }, order))
    }

    fn place(&self, region: &Arc<dyn Region>, at: usize) -> Result<Span, DeviceError> {
        let start = usize::try_from(self.offer.offset).unwrap_or(usize::MAX);
        Span::new(Arc::clone(region), start.saturating_add(at * NONCE_BYTES), NONCE_BYTES)
    }
}

fn nonce() -> Result<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(|error| Error::new(ErrorKind::Internal, error.to_string(), ""))?;
    Ok(nonce)
}

/// Whether something is attached to the message for this handle.
pub(super) fn travels_beside(handle: &ArenaHandle) -> bool {
    matches!(handle, ArenaHandle::Attached | ArenaHandle::CudaVmm)
}

/// Maps the page in which marks are counted.
fn map_page(fence: &FenceOffer, page: Option<Attachment>) -> Result<Arc<dyn Region>> {
    let size_bytes = usize::try_from(fence.page_bytes).unwrap_or(usize::MAX);
    let handle = match (&fence.page, page) {
        (ArenaHandle::Named(name), _) => RegionHandle::Name(name.clone()),
        #[cfg(unix)]
        (ArenaHandle::Attached, Some(Attachment::Fd(fd))) => RegionHandle::Fd(fd),
        _ => return Err(Error::new(ErrorKind::Protocol, "the broker did not hand over the page of its marks", "")),
    };
    Ok(HostDevice::default().import(handle, size_bytes)?)
}

/// What is said of a rung that worked and does no more.
pub(super) fn demoted(gpu: &LinkGpu, error: &Error) -> RungFailure {
    RungFailure { rung: gpu.rung.rung, code: FailureCode::Demoted, detail: error.to_string() }
}
