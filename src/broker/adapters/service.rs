use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam_channel::{Sender, TrySendError, bounded};
use parking_lot::Mutex;

use super::super::entry::AdapterPlace;
use super::super::state::State;
use super::super::usage::InUse;
use super::files::{Files, ReadAdapter};
use super::table::{StackKey, Stacks};
use super::work::{Work, work};
use crate::error::{Error, ErrorKind, Fault, Result};
use crate::id::{ContentDigest, ModelId, RequestId, SessionId, WeightSetId};
use crate::model::{ModelError, ReadyStack};
use crate::protocol::StackReport;
use crate::service::{AdapterMode, AdapterStack, AdapterTaken, AdapterUse};

/// Threads that read adapters and put them together: one that waits for a slow disk holds up one other at most.
const THREADS: usize = 2;
/// Adapters of one request.
const MAX_ADAPTERS: usize = 64;
/// Steps after which a stack whose mode is left open is asked for often enough for private copies of weights: a few pictures.
const HOT_STEPS: u64 = 64;
/// Different stacks that are waited for at a time, and as many that are to be merged.
const MAX_WISHES: usize = 256;

/// Adapters put together for a model.
#[derive(Debug)]
pub(in crate::broker) struct Stacked {
    pub(in crate::broker) stack: ReadyStack,
    /// What users call the model.
    pub(super) model: String,
    /// As they were first asked for.
    pub(super) adapters: Vec<AdapterUse>,
    pub(in crate::broker) taken: Vec<AdapterTaken>,
    pub(super) heat: Heat,
}

/// How often a stack was run with, and what came of that.
#[derive(Debug, Default)]
pub(in crate::broker) struct Heat {
    steps: AtomicU64,
    /// Private copies of weights are being made for it, or were.
    is_merging: AtomicBool,
    /// It is what was made then.
    pub(super) is_merged: bool,
}

impl Stacked {
    /// A step ran with it.
    pub(in crate::broker) fn note_step(&self) {
        self.heat.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether it is to be merged from now on: asked once for each.
    fn turns_hot(&self, mode: AdapterMode) -> bool {
        let Heat { steps, is_merging, is_merged } = &self.heat;
        mode == AdapterMode::Auto
            && !is_merged
            && steps.load(Ordering::Relaxed) >= HOT_STEPS
            && !is_merging.swap(true, Ordering::Relaxed)
    }

    /// It could not be merged now: it may be once it was run with as often again.
    pub(super) fn cool_down(&self) {
        self.heat.steps.store(0, Ordering::Relaxed);
        self.heat.is_merging.store(false, Ordering::Relaxed);
    }
}

/// A stack that is asked for.
#[derive(Debug, Clone)]
pub(in crate::broker) struct Wish {
    pub(super) model: InUse,
    pub(super) adapters: Vec<WishedAdapter>,
    pub(super) mode: AdapterMode,
}

#[derive(Debug, Clone)]
pub(super) struct WishedAdapter {
    pub(super) name: String,
    pub(super) place: AdapterPlace,
    pub(super) strength: f64,
}

impl Wish {
    /// What a request asks for, its adapters found on the disk.
    ///
    /// # Errors
    /// [`ErrorKind::ModelNotFound`] for an adapter that is not there, [`ErrorKind::Configuration`] for a strength that is
    /// no number or for too many adapters.
    pub(in crate::broker) fn new(state: &State, model: &InUse, stack: AdapterStack) -> Result<Self> {
        let AdapterStack { adapters, mode } = stack;
        if adapters.len() > MAX_ADAPTERS {
            let message = format!("{} adapters at once; at most {MAX_ADAPTERS} are taken", adapters.len());
            return Err(Error::new(ErrorKind::Configuration, message, "leave some out, or merge them into one file"));
        }
        let find = |AdapterUse { name, strength }: AdapterUse| {
            let place = state.registry.locate_adapter(&name)?;
            if !strength.is_finite() {
                return Err(ModelError::AdapterStrength { path: name.into(), strength });
            }
            Ok(WishedAdapter { name, place, strength })
        };
        let adapters = adapters.into_iter().map(find).collect::<Result<_, _>>()?;
        Ok(Self { model: model.clone(), adapters, mode })
    }

    fn key(&self) -> WishKey {
        let adapters = self.adapters.iter().map(|adapter| (PlaceKey::of(&adapter.place), adapter.strength.to_bits()));
        WishKey { model: self.model.id(), adapters: adapters.collect(), mode: self.mode }
    }

    /// The stack's key, by what each adapter contains.
    pub(super) fn stack_key(&self, contents: impl Iterator<Item = ContentDigest>) -> StackKey {
        let adapters = contents.zip(&self.adapters);
        let adapters = adapters.map(|(content, wished)| (content, wished.strength.to_bits())).collect();
        StackKey { model: self.model.id(), adapters, mode: self.mode }
    }
}

/// What two requests must have in common to wait for one stack.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct WishKey {
    model: ModelId,
    adapters: Vec<(PlaceKey, u64)>,
    mode: AdapterMode,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum PlaceKey {
    File(PathBuf),
    Published(WeightSetId),
}

impl PlaceKey {
    fn of(place: &AdapterPlace) -> Self {
        match place {
            AdapterPlace::File(path) => Self::File(path.clone()),
            AdapterPlace::Published(set) => Self::Published(set.id()),
        }
    }
}

/// A request that goes on once its adapters are there.
pub(in crate::broker) struct Waiting {
    pub(in crate::broker) session: SessionId,
    pub(in crate::broker) request: RequestId,
    /// Called once, on any thread.
    pub(in crate::broker) go_on: Box<dyn FnOnce(Result<Arc<Stacked>>) + Send>,
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { session, request, .. } = self;
        f.debug_struct("Waiting").field("session", session).field("request", request).finish_non_exhaustive()
    }
}

/// All stacks of a broker, and the threads that put them together. Those end with the value.
#[derive(Debug)]
pub(in crate::broker) struct Adapters {
    inner: Mutex<Inner>,
    work: Sender<Work>,
    budget: u64,
}

#[derive(Debug, Default)]
struct Inner {
    files: Files,
    stacks: Stacks,
    waiting: HashMap<WishKey, Vec<Waiting>>,
}

impl Adapters {
    /// No stacks, which may take `budget` bytes.
    ///
    /// # Errors
    /// The operating system's, where it cannot start a thread.
    pub(in crate::broker) fn start(budget: u64) -> std::io::Result<Self> {
        let (sender, receiver) = bounded(2 * MAX_WISHES);
        for number in 0..THREADS {
            let receiver = receiver.clone();
            let thread = std::thread::Builder::new().name(format!("luna-adapters-{number}"));
            thread.spawn(move || work(&receiver))?;
        }
        Ok(Self { inner: Mutex::default(), work: sender, budget })
    }

    /// Goes on with the stack, now where it is there, else when it has been put together. Looks at the adapters' files.
    pub(in crate::broker) fn obtain(&self, state: &Arc<State>, wish: Wish, waiting: Waiting) {
        if let Some(stacked) = self.find(&wish) {
            let turns_hot = stacked.turns_hot(wish.mode).then(|| Arc::downgrade(&stacked));
            (waiting.go_on)(Ok(stacked));
            if let Some(hot) = turns_hot {
                self.queue(Work::merge(state, wish, hot));
            }
            return;
        }
        let key = wish.key();
        let mut inner = self.inner.lock();
        if let Some(others) = inner.waiting.get_mut(&key) {
            others.push(waiting);
            return;
        }
        if inner.waiting.len() >= MAX_WISHES {
            drop(inner);
            let message = format!("{MAX_WISHES} stacks of adapters are being put together; this one was not begun");
            return (waiting.go_on)(Err(Error::new(ErrorKind::Busy, message, "send it again after a pause")));
        }
        inner.waiting.insert(key, vec![waiting]);
        drop(inner);
        self.queue(Work::new(state, wish));
    }

    pub(super) fn queue(&self, work: Work) {
        let (unsent, error) = match self.work.try_send(work) {
            Ok(()) => return,
            Err(TrySendError::Full(work)) => {
                let message = "too many adapters are being put together; these were not begun";
                (work, Error::new(ErrorKind::Busy, message, "send the request again after a pause"))
            }
            Err(TrySendError::Disconnected(work)) => {
                let message = "the threads that read adapters are gone";
                (work, Error::new(ErrorKind::Internal, message, "see the broker's log"))
            }
        };
        unsent.fail(error.into_fault());
    }

    /// The stack, where it is there and its adapters are what they were.
    fn find(&self, wish: &Wish) -> Option<Arc<Stacked>> {
        let contents = wish.adapters.iter().map(|adapter| match &adapter.place {
            AdapterPlace::File(path) => self.known(path).map(|read| read.content),
            AdapterPlace::Published(set) => Some(set.content()),
        });
        let contents = contents.collect::<Option<Vec<_>>>()?;
        self.inner.lock().stacks.get(&wish.stack_key(contents.into_iter()))
    }

    /// The adapter at `path`, where it was read and has not changed since.
    pub(super) fn known(&self, path: &Path) -> Option<ReadAdapter> {
        let read = self.inner.lock().files.get(path)?;
        read.is_current().then_some(read)
    }

    pub(super) fn learn(&self, path: &Path, read: &ReadAdapter) {
        self.inner.lock().files.add(path, read.clone());
    }

    pub(super) fn kept(&self, key: &StackKey) -> Option<Arc<Stacked>> {
        self.inner.lock().stacks.get(key)
    }

    /// Keeps a stack that was made; whichever is kept under its key.
    pub(super) fn keep(&self, key: StackKey, stacked: Stacked) -> Result<Arc<Stacked>> {
        let kept = self.inner.lock().stacks.keep(key, Arc::new(stacked), self.budget);
        // What gave way is dropped here, without the lock.
        kept.map(|(stacked, _given_way)| stacked)
    }

    /// From now on a stack that turned hot is the merged one, where there is room for that.
    pub(super) fn heat(&self, key: &StackKey, merged: Stacked) {
        let replaced = self.inner.lock().stacks.replace(key, Arc::new(merged), self.budget);
        drop(replaced);
    }

    /// Whether anybody still waits for it.
    pub(super) fn is_awaited(&self, wish: &Wish) -> bool {
        self.inner.lock().waiting.contains_key(&wish.key())
    }

    /// Everybody who waits for it goes on.
    pub(super) fn settle(&self, wish: &Wish, made: Result<Arc<Stacked>, Fault>) {
        let mut waiting = self.inner.lock().waiting.remove(&wish.key()).unwrap_or_default();
        let last = waiting.pop();
        for one in waiting {
            (one.go_on)(made.clone().map_err(Error::from));
        }
        if let Some(one) = last {
            // Not a copy, so that nothing is in use here that nobody else uses.
            (one.go_on)(made.map_err(Error::from));
        }
    }

    /// Takes a waiting request back.
    pub(in crate::broker) fn cancel(&self, session: SessionId, request: RequestId) {
        self.take_back(|one| (one.session, one.request) == (session, request), "the request was cancelled");
    }

    /// Takes back all of a session that is over.
    pub(in crate::broker) fn end_session(&self, session: SessionId) {
        self.take_back(|one| one.session == session, "the session ended");
    }

    fn take_back(&self, is_meant: impl Fn(&Waiting) -> bool, why: &str) {
        let mut taken = Vec::new();
        self.inner.lock().waiting.retain(|_, waiting| {
            let (meant, others): (Vec<_>, Vec<_>) = waiting.drain(..).partition(&is_meant);
            taken.extend(meant);
            *waiting = others;
            !waiting.is_empty()
        });
        for one in taken {
            let message = format!("{why} while its adapters were put together");
            (one.go_on)(Err(Error::new(ErrorKind::Cancelled, message, "")));
        }
    }

    /// Everybody who waits is told that the broker stops.
    pub(in crate::broker) fn shut_down(&self) {
        let waiting = std::mem::take(&mut self.inner.lock().waiting);
        for one in waiting.into_values().flatten() {
            let message = "the broker is stopping; the request was not run";
            let fault = Error::new(ErrorKind::ShuttingDown, message, "send it again once the broker is back");
            (one.go_on)(Err(fault));
        }
    }

    /// Drops what was made for a model that is unloaded.
    pub(in crate::broker) fn forget(&self, model: ModelId) {
        let forgotten = self.inner.lock().stacks.forget(model);
        drop(forgotten);
    }

    /// Bytes that stacks may still take where all give way that nobody uses.
    pub(super) fn room_bytes(&self) -> u64 {
        self.budget.saturating_sub(self.inner.lock().stacks.used_bytes())
    }

    /// Bytes of all stacks.
    pub(in crate::broker) fn bytes(&self) -> u64 {
        self.inner.lock().stacks.bytes()
    }

    pub(in crate::broker) fn reports(&self) -> Vec<StackReport> {
        let inner = self.inner.lock();
        let report = |(key, stacked, users): (&StackKey, &Stacked, usize)| StackReport {
            model: stacked.model.clone(),
            adapters: stacked.adapters.clone(),
            mode: key.mode,
            merged: stacked.heat.is_merged,
            bytes: stacked.stack.size_bytes(),
            users: users as u64,
        };
        inner.stacks.all().into_iter().map(report).collect()
    }
}
