use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendError, Sender, unbounded};
use parking_lot::Mutex;

use super::super::responder::Responder;
use super::super::state::State;
use super::handing::{Grant, Waiter};
use super::memory::{MemoryEnd, WeightDraft, WeightPlace};
use super::publish::{Drafts, Filled};
use super::set::{WeightSet, wire_table};
use super::table::{Table, Unloaded, gone};
use super::wanted::{Wanted, check_published};
use crate::error::{Error, ErrorKind, Fault, Result};
use crate::id::{AttachmentId, GpuUuid, RequestId, SessionId, WeightSetId};
use crate::model::ModelError;
use crate::model::weights::{Loaded, digest_file, digest_region, load};
use crate::protocol::{AttachRequest, Force, Outcome, VerifyReport};

/// How long who waits for weights goes without hearing how far they are.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// More sets than anybody waits for at once. Bounds what clients can have laid out that take their requests back.
const MAX_LOADS: usize = 256;

/// More looks at weights than anybody asks for at once.
const MAX_VERIFIES: usize = 64;

/// All weights of a broker, and the thread that loads them.
#[derive(Debug)]
pub(in crate::broker) struct Weights {
    pub(super) inner: Mutex<Inner>,
    jobs: Sender<Job>,
    /// Looks at weights that wait or are under way.
    verifies: AtomicUsize,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) table: Table,
    loads: Vec<Load>,
    pub(super) drafts: Drafts,
}

/// A set that is being loaded, or is about to be.
#[derive(Debug)]
struct Load {
    wanted: Wanted,
    waiters: Vec<Waiter>,
    done: u64,
    told: Instant,
}

/// What takes its time.
#[derive(Debug)]
pub(super) enum Job {
    Load { state: Arc<State>, wanted: Wanted },
    Publish(Filled),
    Verify { state: Arc<State>, name: String, responder: Responder },
}

impl Load {
    fn is_of(&self, wanted: &Wanted) -> bool {
        let (one, other) = (&self.wanted, wanted);
        one.place == other.place && one.file.path() == other.file.path() && one.plan == other.plan
    }
}

impl Weights {
    /// Holds up to `limit` bytes of weights. The thread ends with the value.
    ///
    /// # Errors
    /// The operating system's, where it cannot start a thread.
    pub(in crate::broker) fn start(limit: u64) -> std::io::Result<Self> {
        let (jobs, taken) = unbounded();
        std::thread::Builder::new().name("luna-weights".to_owned()).spawn(move || work(&taken))?;
        let inner = Inner { table: Table::new(limit), loads: Vec::new(), drafts: Drafts::default() };
        Ok(Self { inner: Mutex::new(inner), jobs, verifies: AtomicUsize::new(0) })
    }

    /// Answers with the weights, now or when they are there.
    pub(in crate::broker) fn attach(
        &self,
        state: &Arc<State>,
        responder: Responder,
        request: AttachRequest,
        gpu: Option<GpuUuid>,
    ) {
        let place = gpu.map_or(WeightPlace::Host, WeightPlace::Gpu);
        match self.find(state, &responder, &request, place) {
            Err(error) => responder.fail(error),
            Ok(Found::Set(grant)) => self.hand_over(grant, responder),
            Ok(Found::File(wanted)) => self.load(state, wanted, Waiter { responder, name: request.name }),
        }
    }

    fn find(&self, state: &State, asker: &Responder, request: &AttachRequest, place: WeightPlace) -> Result<Found> {
        let name = &request.name;
        let path = state.registry.locate(name).ok();
        let published = {
            let inner = self.inner.lock();
            let session = asker.session();
            if !request.replaces.is_some_and(|old| inner.table.holds(session, old)) {
                inner.table.check(session, Some((name, path.as_deref())))?;
            }
            inner.table.published(name).map(|known| Arc::clone(&known.set))
        };
        if let Some(set) = published {
            // Looks at every key of the set, without the lock.
            check_published(&set, name, &request.rule)?;
            if set.place != place {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("{name} was published on {}", set.place.name()),
                    "attach it there",
                ));
            }
            let mut inner = self.inner.lock();
            let is_there = inner.table.published(name).is_some_and(|known| known.set.id == set.id);
            return if is_there { Ok(Found::Set(inner.grant(set.id, asker, name)?)) } else { Err(gone(name)) };
        }
        // The header is read without the lock: others go on meanwhile.
        let wanted = Wanted::of_file(&state.registry, request, place)?;
        let mut inner = self.inner.lock();
        match inner.table.of_file(&wanted) {
            Some(id) => Ok(Found::Set(inner.grant(id, asker, name)?)),
            None => Ok(Found::File(wanted)),
        }
    }

    fn load(&self, state: &Arc<State>, wanted: Wanted, waiter: Waiter) {
        let mut inner = self.inner.lock();
        // Between the look for the set and now it may have come.
        if let Some(id) = inner.table.of_file(&wanted) {
            let granted = inner.grant(id, &waiter.responder, &waiter.name);
            drop(inner);
            return self.answer(granted, waiter.responder);
        }
        if let Some(load) = inner.loads.iter_mut().find(|load| load.is_of(&wanted)) {
            load.waiters.push(waiter);
            return;
        }
        let room = if inner.loads.len() < MAX_LOADS {
            inner.table.reserve(wanted.plan.size_bytes, &wanted.file.path().display().to_string())
        } else {
            let message = format!("{MAX_LOADS} sets of weights wait to be loaded already");
            Err(Error::new(ErrorKind::Busy, message, "ask again in a while"))
        };
        if let Err(error) = room {
            drop(inner);
            return waiter.responder.fail(error);
        }
        let job = Job::Load { state: Arc::clone(state), wanted: wanted.clone() };
        inner.loads.push(Load { wanted, waiters: vec![waiter], done: 0, told: Instant::now() });
        drop(inner);
        self.send(job);
    }

    pub(super) fn send(&self, job: Job) {
        if let Err(SendError(lost)) = self.jobs.send(job) {
            tracing::error!("the thread that loads weights is gone");
            lost.give_up();
        }
    }

    /// A request is taken back, if it waits for weights.
    pub(in crate::broker) fn cancel(&self, session: SessionId, request: RequestId) {
        let mut inner = self.inner.lock();
        let is_meant =
            |waiter: &mut Waiter| waiter.responder.session() == session && waiter.responder.request() == request;
        let taken: Vec<Waiter> =
            inner.loads.iter_mut().flat_map(|load| load.waiters.extract_if(.., is_meant)).collect();
        drop(inner);
        for waiter in taken {
            let message = "the request was cancelled while the weights were loaded; loading goes on for others";
            waiter.responder.fail(Fault::new(ErrorKind::Cancelled, message, ""));
        }
    }

    /// The client has given up a request that may have been answered with weights or a draft meanwhile.
    pub(in crate::broker) fn recall(&self, session: SessionId, request: RequestId) {
        let mut inner = self.inner.lock();
        let Inner { table, drafts, .. } = &mut *inner;
        table.recall(session, request);
        drafts.recall(session, request, table);
    }

    pub(in crate::broker) fn detach(&self, session: SessionId, attachments: &[AttachmentId]) {
        let mut inner = self.inner.lock();
        for attachment in attachments {
            inner.table.detach(session, *attachment);
        }
    }

    /// Everything of the session's is given back, except memory that must be kept until its process is gone.
    pub(in crate::broker) fn end_session(&self, session: SessionId) {
        let mut inner = self.inner.lock();
        inner.table.end_session(session, MemoryEnd::Counted);
        let Inner { table, drafts, .. } = &mut *inner;
        drafts.end_session(session, table);
        let is_meant = |waiter: &mut Waiter| waiter.responder.session() == session;
        let taken: Vec<Waiter> =
            inner.loads.iter_mut().flat_map(|load| load.waiters.extract_if(.., is_meant)).collect();
        drop(inner);
        drop(taken);
    }

    /// Whether the session holds memory that must be kept until its process is gone.
    pub(in crate::broker) fn must_outlive(&self, session: SessionId) -> bool {
        self.inner.lock().table.holds_owned(session)
    }

    /// The session's process is gone.
    pub(in crate::broker) fn process_gone(&self, session: SessionId) {
        self.inner.lock().table.end_session(session, MemoryEnd::Owned);
    }

    /// # Errors
    /// [`ErrorKind::Stale`] where weights that the session holds were unloaded by force.
    pub(in crate::broker) fn check(&self, session: SessionId) -> Result<()> {
        self.inner.lock().table.check(session, None)
    }

    /// # Errors
    /// [`ErrorKind::InUse`] for weights that somebody holds.
    pub(in crate::broker) fn unload(&self, state: &State, name: &str, force: Force) -> Result<Unloaded> {
        let path = state.registry.locate(name).ok();
        self.inner.lock().table.unload(name, path.as_deref(), force)
    }

    /// Takes a load up; `false` where nobody waits for it any more, and it is not done.
    fn begin(&self, wanted: &Wanted) -> bool {
        let mut inner = self.inner.lock();
        let Some(at) = inner.loads.iter().position(|load| load.is_of(wanted)) else { return false };
        let is_wanted = inner.loads.get(at).is_some_and(|load| !load.waiters.is_empty());
        if !is_wanted {
            inner.loads.swap_remove(at);
            inner.table.unreserve(wanted.plan.size_bytes);
        }
        is_wanted
    }

    pub(in crate::broker) fn verify(&self, state: &Arc<State>, responder: Responder, name: String) {
        if self.verifies.fetch_add(1, Ordering::Relaxed) >= MAX_VERIFIES {
            self.verifies.fetch_sub(1, Ordering::Relaxed);
            let message = format!("{MAX_VERIFIES} looks at weights are waited for already");
            return responder.fail(Error::new(ErrorKind::Busy, message, "ask again in a while"));
        }
        self.send(Job::Verify { state: Arc::clone(state), name, responder });
    }

    /// How far a load is; those who wait for it are told now and then, and ask again.
    fn tell(&self, wanted: &Wanted, done: u64) {
        let mut inner = self.inner.lock();
        let Some(load) = inner.loads.iter_mut().find(|load| load.is_of(wanted)) else { return };
        load.done = done;
        if load.told.elapsed() < TELL_EVERY {
            return;
        }
        load.told = Instant::now();
        let waiters = std::mem::take(&mut load.waiters);
        let total = load.wanted.plan.size_bytes;
        drop(inner);
        for waiter in waiters {
            waiter.responder.answer(Outcome::Loading { done, total });
        }
    }

    /// Ends a load: whoever waits for it gets the set, or what became of it.
    fn finish(&self, wanted: &Wanted, result: Result<Result<WeightSetId, WeightSet>, Fault>) {
        let mut inner = self.inner.lock();
        inner.table.unreserve(wanted.plan.size_bytes);
        let id = result.map(|loaded| {
            let id = loaded.unwrap_or_else(|set| {
                // Two files may hold the same.
                let same = inner.table.of_content(set.content, set.place);
                same.unwrap_or_else(|| inner.table.insert(set))
            });
            inner.table.add_file(id, &wanted.file);
            id
        });
        let at = inner.loads.iter().position(|load| load.is_of(wanted));
        let waiters = at.map(|at| inner.loads.swap_remove(at).waiters).unwrap_or_default();
        // Before anybody else can have the new set give way.
        let mut grant = |waiter: Waiter| {
            let granted = id.clone().map_err(Error::from);
            let granted = granted.and_then(|id| inner.grant(id, &waiter.responder, &waiter.name));
            (granted, waiter.responder)
        };
        let answers: Vec<_> = waiters.into_iter().map(&mut grant).collect();
        drop(inner);
        for (granted, responder) in answers {
            self.answer(granted, responder);
        }
    }

    /// What is being loaded: name, device, bytes in place and bytes of the set.
    pub(super) fn loads(inner: &Inner) -> impl Iterator<Item = (&Wanted, u64)> {
        inner.loads.iter().map(|load| (&load.wanted, load.done))
    }
}

enum Found {
    Set(Grant),
    File(Wanted),
}

impl Job {
    fn run(self) {
        match self {
            Self::Load { state, wanted } => {
                if state.weights.begin(&wanted) {
                    let loaded = caught(|| obtain(&state, &wanted));
                    state.weights.finish(&wanted, loaded.map_err(Error::into_fault));
                }
            }
            Self::Publish(filled) => filled.complete(),
            Self::Verify { state, name, responder } => {
                // Nobody hears it whose session is over.
                if !responder.is_over() {
                    responder.settle(caught(|| verify(&state, &name)).map(Outcome::Verified));
                }
                state.weights.verifies.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Nobody will run it.
    fn give_up(self) {
        let gone = || Error::new(ErrorKind::Internal, "the thread that loads weights is gone", "see the broker's log");
        match self {
            Self::Load { state, wanted } => state.weights.finish(&wanted, Err(gone().into_fault())),
            Self::Publish(filled) => filled.give_up(gone()),
            Self::Verify { responder, .. } => responder.fail(gone()),
        }
    }
}

/// Works jobs off, one after the other: a load by itself uses several cores and all of the disk.
fn work(jobs: &Receiver<Job>) {
    jobs.iter().for_each(Job::run);
}

/// Does what may meet anything that a file or a peer holds: a panic in there is an error of that one job.
pub(super) fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Internal, "the thread that loads weights panicked", "see the broker's log"))
    })
}

/// The set that is wanted: one that is there already and contains the same, or a new one.
fn obtain(state: &Arc<State>, wanted: &Wanted) -> Result<Result<WeightSetId, WeightSet>> {
    let Wanted { file, plan, place } = wanted;
    let weights = &state.weights;
    let stop = || state.stopping.load(Ordering::Acquire);
    let is_alike = weights.inner.lock().table.has_likeness(plan, *place);
    if is_alike {
        let source =
            digest_file(file, &|done, _| weights.tell(wanted, done), &stop).map_err(|why| ended(why, &stop))?;
        if let Some(id) = weights.inner.lock().table.of_source(source, plan, *place) {
            return Ok(Ok(id));
        }
    }
    let started = Instant::now();
    let table = wire_table(plan)?;
    let size_bytes = usize::try_from(plan.size_bytes).unwrap_or(usize::MAX);
    let draft = WeightDraft::allocate(*place, state.gpu.as_ref(), size_bytes)?;
    let progress = |done: u64, _total: u64| weights.tell(wanted, done);
    let Loaded { source, content } =
        load(file, plan, &draft.region(), &progress, &stop).map_err(|why| ended(why, &stop))?;
    let memory = draft.seal()?;
    let seconds = started.elapsed().as_secs_f64();
    tracing::info!(file = %file.path().display(), device = place.name(), bytes = plan.size_bytes, seconds, "weights loaded");
    let id = weights.inner.lock().table.new_id();
    Ok(Err(WeightSet { id, place: *place, plan: plan.clone(), table, source, content, memory }))
}

/// Loading stops by itself only with the broker.
fn ended(why: ModelError, stop: &dyn Fn() -> bool) -> Error {
    match why {
        ModelError::Cancelled if stop() => Error::new(
            ErrorKind::ShuttingDown,
            "the broker is stopping; the weights were not loaded",
            "attach them again",
        ),
        why => why.into(),
    }
}

fn verify(state: &Arc<State>, name: &str) -> Result<Vec<VerifyReport>> {
    let path = state.registry.locate(name);
    let sets = state.weights.inner.lock().table.named(name, path.as_deref().ok());
    if sets.is_empty() {
        let found = path.map(|_| ()).map_err(Error::from);
        let absent =
            || Error::new(ErrorKind::ModelNotFound, format!("{name} is attached by nobody"), "attach it first");
        return Err(found.map_or_else(|error| error, |()| absent()));
    }
    let report = |(name, set): (String, Arc<WeightSet>)| {
        let found = digest_region(&set.plan, &set.memory.region, &|| state.stopping.load(Ordering::Acquire))?;
        let bytes = set.plan.size_bytes;
        Ok(VerifyReport { name, device: set.place.name(), bytes, expected: set.content, found })
    };
    sets.into_iter().map(report).collect()
}
