use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{SendError, Sender, unbounded};
use parking_lot::{Mutex, MutexGuard};

use super::super::responder::Responder;
use super::super::state::State;
use super::handing::{Grant, Waiter};
use super::looks::{Look, Looks};
use super::making::Obtained;
use super::memory::{MemoryEnd, WeightLimits, WeightPlace};
use super::publish::Drafts;
use super::set::{PublishedPlan, WeightSet, has_changed};
use super::table::{Table, Unloaded, gone};
use super::wanted::{Origin, Wanted};
use super::work::{Job, work};
use crate::error::{Error, ErrorKind, Fault, Result};
use crate::id::{AttachmentId, GpuUuid, RequestId, SessionId, WeightSetId};
use crate::model::FileState;
use crate::protocol::{AttachRequest, Force, Outcome};

/// How long who waits for weights goes without hearing how far they are.
const TELL_EVERY: Duration = Duration::from_millis(200);

/// More sets than anybody waits for at once. Bounds what clients can have laid out that take their requests back.
const MAX_LOADS: usize = 256;

/// How often what is asked for is looked for anew, because it became another meanwhile.
const MAX_TRIES: usize = 3;

/// All weights of a broker, and the thread that loads them.
#[derive(Debug)]
pub(in crate::broker) struct Weights {
    inner: Mutex<Inner>,
    jobs: Sender<Job>,
    look_jobs: Sender<Look>,
    pub(super) looks: Mutex<Looks>,
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
    /// Room is set aside for the set: none is where there is too little, and one that is there may be the same.
    has_room: bool,
    waiters: Vec<Waiter>,
    told: Instant,
}

impl Load {
    fn is_of(&self, wanted: &Wanted) -> bool {
        let (one, other) = (&self.wanted, wanted);
        one.place == other.place && one.origin.is(&other.origin) && one.plan == other.plan
    }
}

impl Weights {
    /// No weights, of which there may be so many. The thread ends with the value.
    ///
    /// # Errors
    /// The operating system's, where it cannot start a thread.
    pub(in crate::broker) fn start(limits: WeightLimits) -> std::io::Result<Self> {
        let (jobs, taken) = unbounded();
        let (look_jobs, taken_looks) = unbounded();
        std::thread::Builder::new().name("luna-weights".to_owned()).spawn(move || work(&taken, &taken_looks))?;
        let inner = Inner { table: Table::new(limits), loads: Vec::new(), drafts: Drafts::default() };
        Ok(Self { inner: Mutex::new(inner), jobs, look_jobs, looks: Mutex::default() })
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
        for _ in 0..MAX_TRIES {
            if let Some(found) = self.look_for(state, asker, request, place)? {
                return Ok(found);
            }
        }
        Err(gone(&request.name))
    }

    /// What is there of what is asked for, or what it is to be made of; `None` where it became another meanwhile.
    fn look_for(
        &self,
        state: &State,
        asker: &Responder,
        request: &AttachRequest,
        place: WeightPlace,
    ) -> Result<Option<Found>> {
        let name = &request.name;
        let path = state.registry.locate(name).ok();
        let Seen { variants, published, has_variants, files } = {
            let inner = self.lock();
            let session = asker.session();
            if !request.replaces.is_some_and(|old| inner.table.holds(session, old)) {
                inner.table.check(session, Some((name, path.as_deref())))?;
            }
            let published = inner.table.published(name).map(|known| Arc::clone(&known.set));
            Seen {
                variants: inner.table.variants(name, place),
                published,
                has_variants: inner.table.has_variants(name),
                files: path.map(|path| inner.table.files_of(&path)).unwrap_or_default(),
            }
        };
        // Every key of the set is looked at, or the file's header read, without the lock: others go on meanwhile.
        if let Some((id, _)) = variants.into_iter().find(|(_, plan)| plan.follows(&request.rule)) {
            let mut inner = self.lock();
            let is_there = inner.table.variants(name, place).iter().any(|(known, _)| *known == id);
            return if is_there { inner.grant(id, asker, name).map(Found::Set).map(Some) } else { Ok(None) };
        }
        let wanted = match published {
            Some(set) => Wanted::of_published(set, request, place)?,
            None => Wanted::of_file(&state.registry, request, place).map_err(|error| match has_variants {
                true => only_variants(name),
                false => error,
            })?,
        };
        let changed: Vec<FileState> = files.into_iter().filter(has_changed).collect();
        let mut inner = self.lock();
        match inner.table.of_origin(&wanted, &changed) {
            Ok(Some(id)) => inner.grant(id, asker, name).map(Found::Set).map(Some),
            Ok(None) => Ok(Some(Found::Wanted(wanted))),
            Err(_) => Ok(None),
        }
    }

    fn load(&self, state: &Arc<State>, wanted: Wanted, waiter: Waiter) {
        let mut inner = self.lock();
        // Between the look for the set and now it may have come.
        let there = inner.table.of_origin(&wanted, &[]);
        if let Some(id) = there.transpose() {
            let granted = id.and_then(|id| inner.grant(id, &waiter.responder, &waiter.name));
            drop(inner);
            return self.answer(granted, waiter.responder);
        }
        if let Some(load) = inner.loads.iter_mut().find(|load| load.is_of(&wanted)) {
            load.waiters.push(waiter);
            return;
        }
        // Before room is made: what it is to be made of must not give way to it.
        if let Origin::Published { set, .. } = &wanted.origin {
            inner.table.pin(set.id);
        }
        let may_be_there =
            matches!(wanted.origin, Origin::File(_)) && inner.table.has_likeness(&wanted.plan, wanted.place);
        let room = if inner.loads.len() >= MAX_LOADS {
            let message = format!("{MAX_LOADS} sets of weights wait to be loaded already");
            Err(Error::new(ErrorKind::Busy, message, "ask again in a while"))
        } else {
            inner.table.reserve(wanted.place, wanted.booked_bytes, &wanted.origin.shown())
        };
        let has_room = room.is_ok();
        if let Err(error) = room
            && !(error.kind() == ErrorKind::OutOfMemory && may_be_there)
        {
            if let Origin::Published { set, .. } = &wanted.origin {
                inner.table.unpin(set.id);
            }
            drop(inner);
            return waiter.responder.fail(error);
        }
        let job = Job::Load { state: Arc::clone(state), wanted: wanted.clone() };
        inner.loads.push(Load { wanted, has_room, waiters: vec![waiter], told: Instant::now() });
        drop(inner);
        self.send(job);
    }

    pub(super) fn send(&self, job: Job) {
        if let Err(SendError(lost)) = self.jobs.send(job) {
            tracing::error!("the thread that loads weights is gone");
            lost.give_up();
        }
    }

    pub(super) fn send_look(&self, look: Look) -> std::result::Result<(), SendError<Look>> {
        self.look_jobs.send(look)
    }

    /// A request is taken back, if it waits for weights.
    pub(in crate::broker) fn cancel(&self, session: SessionId, request: RequestId) {
        self.cancel_look(session, request);
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
        drop(self.looks.lock().remove(&session));
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
    /// [`ErrorKind::Stale`] where any weights that the session holds were unloaded by force.
    pub(in crate::broker) fn check(&self, session: SessionId) -> Result<()> {
        self.lock().table.check(session, None)
    }

    /// # Errors
    /// [`ErrorKind::Stale`] where the weights of this attachment were unloaded by force.
    pub(in crate::broker) fn check_attachment(&self, session: SessionId, attachment: AttachmentId) -> Result<()> {
        self.lock().table.check_attachment(session, attachment)
    }

    /// # Errors
    /// [`ErrorKind::InUse`] for weights that somebody holds.
    pub(in crate::broker) fn unload(&self, state: &State, name: &str, force: Force) -> Result<Unloaded> {
        let path = state.registry.locate(name).ok();
        let files = self.lock().table.files_meant(name, path.as_deref());
        let gone: Vec<FileState> = files.into_iter().filter(has_changed).collect();
        self.lock().table.unload(name, path.as_deref(), &gone, force)
    }

    /// Takes a load up; `false` where nobody waits for it any more, and it is not done.
    pub(super) fn begin(&self, wanted: &Wanted) -> bool {
        let mut inner = self.lock();
        let Some(at) = inner.loads.iter().position(|load| load.is_of(wanted)) else { return false };
        let is_wanted = inner.loads.get(at).is_some_and(|load| !load.waiters.is_empty());
        if !is_wanted {
            let load = inner.loads.swap_remove(at);
            inner.end_load(&load);
        }
        is_wanted
    }

    /// Whether room is set aside for a load.
    pub(super) fn has_room(&self, wanted: &Wanted) -> bool {
        self.lock().loads.iter().any(|load| load.is_of(wanted) && load.has_room)
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
                table.reserve(wanted.place, wanted.booked_bytes, &wanted.origin.shown())?;
                load.has_room = true;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// How far a load is; those who wait for it are told now and then, and ask again.
    pub(super) fn tell(&self, wanted: &Wanted, done: u64, total: u64) {
        let mut inner = self.lock();
        let Some(load) = inner.loads.iter_mut().find(|load| load.is_of(wanted)) else { return };
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
    pub(super) fn finish(&self, wanted: &Wanted, result: Result<Obtained, Fault>) {
        let mut inner = self.lock();
        let at = inner.loads.iter().position(|load| load.is_of(wanted));
        let load = at.map(|at| inner.loads.swap_remove(at));
        let id = result.map(|obtained| {
            let id = match obtained {
                Obtained::There(id) => id,
                // Two files may hold the same.
                Obtained::New(set) => inner.table.insert_once(set),
            };
            match &wanted.origin {
                Origin::File(file) => inner.table.add_file(id, file),
                // By whichever of its names it was asked for. One that means something else by now is none: a set without
                // names goes with those who have asked for it.
                Origin::Published { set, name } => {
                    let asked = load.iter().flat_map(|load| &load.waiters).map(|waiter| waiter.name.as_str());
                    for name in asked.chain([name.as_str()]) {
                        inner.table.add_variant(id, name, set.content, &wanted.plan);
                    }
                }
            }
            id
        });
        load.iter().for_each(|load| inner.end_load(load));
        let waiters = load.map(|load| load.waiters).unwrap_or_default();
        // Before anybody else can have the new set give way.
        let mut grant = |waiter: Waiter| {
            let granted = id.clone().map_err(Error::from);
            let granted = granted.and_then(|id| inner.grant(id, &waiter.responder, &waiter.name));
            (granted, waiter.responder)
        };
        let answers: Vec<_> = waiters.into_iter().map(&mut grant).collect();
        inner.table.drop_forsaken();
        drop(inner);
        for (granted, responder) in answers {
            self.answer(granted, responder);
        }
    }

    /// What is being loaded.
    pub(super) fn loads(inner: &Inner) -> impl Iterator<Item = &Wanted> {
        inner.loads.iter().map(|load| &load.wanted)
    }
}

enum Found {
    Set(Grant),
    Wanted(Wanted),
}

/// What one look at the table gives, to be judged without the lock.
struct Seen {
    variants: Vec<(WeightSetId, PublishedPlan)>,
    published: Option<Arc<WeightSet>>,
    has_variants: bool,
    files: Vec<FileState>,
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
    /// Gives back what a load needed.
    fn end_load(&mut self, load: &Load) {
        if load.has_room {
            self.table.unreserve(load.wanted.place, load.wanted.booked_bytes);
        }
        if let Origin::Published { set, .. } = &load.wanted.origin {
            self.table.unpin(set.id);
        }
    }
}
