use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendError, Sender, unbounded};
use parking_lot::{Mutex, MutexGuard};

use super::super::responder::Responder;
use super::super::state::State;
use super::handing::{Grant, Waiter};
use super::making::obtain;
use super::memory::{MemoryEnd, WeightPlace};
use super::publish::{Drafts, Filled};
use super::set::WeightSet;
use super::table::{Table, Unloaded, gone};
use super::wanted::{Origin, Wanted};
use crate::error::{Error, ErrorKind, Fault, Result};
use crate::id::{AttachmentId, GpuUuid, RequestId, SessionId, WeightSetId};
use crate::model::weights::digest_region;
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
    inner: Mutex<Inner>,
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

/// [`Inner`], locked. Memory that was given up meanwhile goes when the lock has been released.
#[derive(Debug)]
pub(super) struct Locked<'a>(MutexGuard<'a, Inner>);

impl Deref for Locked<'_> {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.0
    }
}

impl DerefMut for Locked<'_> {
    fn deref_mut(&mut self) -> &mut Inner {
        &mut self.0
    }
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let forsaken = self.0.table.take_forsaken();
        if !forsaken.is_empty() {
            MutexGuard::unlocked(&mut self.0, || drop(forsaken));
        }
    }
}

/// A set that is being loaded, or is about to be.
#[derive(Debug)]
struct Load {
    wanted: Wanted,
    /// Room is set aside for the set: none is where one that is there already may turn out to be the same.
    has_room: bool,
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
        one.place == other.place && one.origin.is(&other.origin) && one.plan == other.plan
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

    pub(super) fn lock(&self) -> Locked<'_> {
        Locked(self.inner.lock())
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
            Ok(Found::Wanted(wanted)) => self.load(state, wanted, Waiter { responder, name: request.name }),
        }
    }

    fn find(&self, state: &State, asker: &Responder, request: &AttachRequest, place: WeightPlace) -> Result<Found> {
        let name = &request.name;
        let path = state.registry.locate(name).ok();
        let (variants, published, has_variants) = {
            let inner = self.lock();
            let session = asker.session();
            if !request.replaces.is_some_and(|old| inner.table.holds(session, old)) {
                inner.table.check(session, Some((name, path.as_deref())))?;
            }
            let published = inner.table.published(name).map(|known| Arc::clone(&known.set));
            (inner.table.variants(name, place), published, inner.table.has_variants(name))
        };
        // Every key of the set is looked at, or the file's header read, without the lock: others go on meanwhile.
        if let Some((id, _)) = variants.into_iter().find(|(_, plan)| plan.follows(&request.rule)) {
            let mut inner = self.lock();
            let is_there = inner.table.variants(name, place).iter().any(|(known, _)| *known == id);
            return if is_there { Ok(Found::Set(inner.grant(id, asker, name)?)) } else { Err(gone(name)) };
        }
        let wanted = match published {
            Some(set) => Wanted::of_published(set, request, place)?,
            None => Wanted::of_file(&state.registry, request, place).map_err(|error| match has_variants {
                true => only_variants(name),
                false => error,
            })?,
        };
        let mut inner = self.lock();
        match inner.table.of_origin(&wanted) {
            Some(id) => Ok(Found::Set(inner.grant(id, asker, name)?)),
            None => Ok(Found::Wanted(wanted)),
        }
    }

    fn load(&self, state: &Arc<State>, wanted: Wanted, waiter: Waiter) {
        let mut inner = self.lock();
        // Between the look for the set and now it may have come.
        if let Some(id) = inner.table.of_origin(&wanted) {
            let granted = inner.grant(id, &waiter.responder, &waiter.name);
            drop(inner);
            return self.answer(granted, waiter.responder);
        }
        if let Some(load) = inner.loads.iter_mut().find(|load| load.is_of(&wanted)) {
            load.waiters.push(waiter);
            return;
        }
        let may_be_there =
            matches!(wanted.origin, Origin::File(_)) && inner.table.has_likeness(&wanted.plan, wanted.place);
        let room = if inner.loads.len() >= MAX_LOADS {
            let message = format!("{MAX_LOADS} sets of weights wait to be loaded already");
            Err(Error::new(ErrorKind::Busy, message, "ask again in a while"))
        } else if may_be_there {
            Ok(false)
        } else {
            inner.table.reserve(wanted.plan.size_bytes, &wanted.origin.shown()).map(|()| true)
        };
        let has_room = match room {
            Ok(has_room) => has_room,
            Err(error) => {
                drop(inner);
                return waiter.responder.fail(error);
            }
        };
        let job = Job::Load { state: Arc::clone(state), wanted: wanted.clone() };
        inner.loads.push(Load { wanted, has_room, waiters: vec![waiter], done: 0, told: Instant::now() });
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
        let mut inner = self.lock();
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
        let mut inner = self.lock();
        let Inner { table, drafts, .. } = &mut *inner;
        table.recall(session, request);
        drafts.recall(session, request, table);
    }

    pub(in crate::broker) fn detach(&self, session: SessionId, attachments: &[AttachmentId]) {
        let mut inner = self.lock();
        for attachment in attachments {
            inner.table.detach(session, *attachment);
        }
    }

    /// Everything of the session's is given back, except memory that must be kept until its process is gone.
    pub(in crate::broker) fn end_session(&self, session: SessionId) {
        let mut inner = self.lock();
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
        self.lock().table.holds_owned(session)
    }

    /// The session's process is gone.
    pub(in crate::broker) fn process_gone(&self, session: SessionId) {
        self.lock().table.end_session(session, MemoryEnd::Owned);
    }

    /// # Errors
    /// [`ErrorKind::Stale`] where weights that the session holds were unloaded by force.
    pub(in crate::broker) fn check(&self, session: SessionId) -> Result<()> {
        self.lock().table.check(session, None)
    }

    /// # Errors
    /// [`ErrorKind::InUse`] for weights that somebody holds.
    pub(in crate::broker) fn unload(&self, state: &State, name: &str, force: Force) -> Result<Unloaded> {
        let path = state.registry.locate(name).ok();
        self.lock().table.unload(name, path.as_deref(), force)
    }

    /// Takes a load up; `false` where nobody waits for it any more, and it is not done.
    fn begin(&self, wanted: &Wanted) -> bool {
        let mut inner = self.lock();
        let Some(at) = inner.loads.iter().position(|load| load.is_of(wanted)) else { return false };
        let is_wanted = inner.loads.get(at).is_some_and(|load| !load.waiters.is_empty());
        if !is_wanted {
            let load = inner.loads.swap_remove(at);
            inner.give_room_back(&load);
        }
        is_wanted
    }

    /// Sets room aside for a load that turned out to need it.
    ///
    /// # Errors
    /// As [`Table::reserve`].
    pub(super) fn make_room(&self, wanted: &Wanted) -> Result<()> {
        let mut inner = self.lock();
        let Inner { table, loads, .. } = &mut *inner;
        match loads.iter_mut().find(|load| load.is_of(wanted)) {
            Some(load) if !load.has_room => {
                table.reserve(wanted.plan.size_bytes, &wanted.origin.shown())?;
                load.has_room = true;
                Ok(())
            }
            _ => Ok(()),
        }
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
    pub(super) fn tell(&self, wanted: &Wanted, done: u64, total: u64) {
        let mut inner = self.lock();
        let Some(load) = inner.loads.iter_mut().find(|load| load.is_of(wanted)) else { return };
        load.done = done;
        if load.told.elapsed() < TELL_EVERY {
            return;
        }
        load.told = Instant::now();
        let waiters = std::mem::take(&mut load.waiters);
        drop(inner);
        for waiter in waiters {
            waiter.responder.answer(Outcome::Loading { done, total });
        }
    }

    /// Ends a load: whoever waits for it gets the set, or what became of it.
    fn finish(&self, wanted: &Wanted, result: Result<Result<WeightSetId, WeightSet>, Fault>) {
        let mut inner = self.lock();
        let at = inner.loads.iter().position(|load| load.is_of(wanted));
        let load = at.map(|at| inner.loads.swap_remove(at));
        load.iter().for_each(|load| inner.give_room_back(load));
        let waiters = load.map(|load| load.waiters).unwrap_or_default();
        let id = result.map(|loaded| {
            let id = loaded.unwrap_or_else(|set| {
                // Two files may hold the same.
                let same = inner.table.of_content(set.content, set.place);
                same.unwrap_or_else(|| inner.table.insert(set))
            });
            match &wanted.origin {
                Origin::File(file) => inner.table.add_file(id, file),
                // The name may mean something else by now: then the set goes with those who have asked for it.
                Origin::Published { set, name } => {
                    if inner.table.published(name).is_none_or(|known| known.set.content == set.content) {
                        inner.table.add_variant(id, name, set.content, &wanted.plan);
                    }
                }
            }
            id
        });
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
    Wanted(Wanted),
}

/// What was published gave way, and what was made of it is not what is asked for.
fn only_variants(name: &str) -> Error {
    Error::new(
        ErrorKind::ModelNotFound,
        format!("what was published as {name} gave way to others; only what it was converted to for somebody is there"),
        "attach it as they did, or publish it again",
    )
}

impl Inner {
    fn give_room_back(&mut self, load: &Load) {
        if load.has_room {
            self.table.unreserve(load.wanted.plan.size_bytes);
        }
    }
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

fn verify(state: &Arc<State>, name: &str) -> Result<Vec<VerifyReport>> {
    let path = state.registry.locate(name);
    let sets = state.weights.lock().table.named(name, path.as_deref().ok());
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
