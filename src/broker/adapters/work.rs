use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::time::Instant;

use crossbeam_channel::Receiver;

use super::super::entry::AdapterPlace;
use super::super::jobs::{ClipWork, PrepareJob, UnetWork};
use super::super::state::State;
use super::files::ReadAdapter;
use super::service::{Heat, Stacked, Wish, WishedAdapter};
use crate::error::{Error, ErrorKind, Fault, Result};
use crate::id::{RequestId, SessionId};
use crate::lane::Entry;
use crate::model::{Adapter, AdapterReport, StackMaker};
use crate::service::{AdapterMode, AdapterTaken, AdapterUse, Service};

/// The session of what the broker asks of its own lanes; clients' begin at 1.
const BROKER: SessionId = SessionId(0);

/// A stack to be put together.
#[derive(Debug)]
pub(super) struct Work {
    state: Arc<State>,
    wish: Wish,
    aim: Aim,
}

/// What it is put together for.
#[derive(Debug)]
enum Aim {
    /// Requests wait for it.
    Requests,
    /// It is there, and asked for so often that private copies of weights pay.
    Merging(Weak<Stacked>),
}

/// What came of trying.
enum Tried {
    Made(Arc<Stacked>),
    /// The model is not loaded.
    NeedsModel,
}

impl Work {
    pub(super) fn new(state: &Arc<State>, wish: Wish) -> Self {
        Self { state: Arc::clone(state), wish, aim: Aim::Requests }
    }

    pub(super) fn merge(state: &Arc<State>, wish: Wish, hot: Weak<Stacked>) -> Self {
        Self { state: Arc::clone(state), wish, aim: Aim::Merging(hot) }
    }

    fn run(self) {
        if let Aim::Merging(hot) = &self.aim {
            let merged = catch_unwind(AssertUnwindSafe(|| self.try_to_merge()));
            // Whoever asks for the stack has the one that is there.
            if let Ok(Err(error)) = merged {
                tracing::debug!(%error, "adapters that are asked for often are not merged");
                if let Some(hot) = hot.upgrade() {
                    hot.cool_down();
                }
            }
            return;
        }
        // Everybody took it back, or the broker stops.
        if !self.state.adapters.is_awaited(&self.wish) {
            return;
        }
        let tried = catch_unwind(AssertUnwindSafe(|| self.try_to_make())).unwrap_or_else(|_| {
            Err(Error::new(ErrorKind::Internal, "putting adapters together panicked", "see the broker's log"))
        });
        match tried {
            Ok(Tried::Made(stacked)) => self.state.adapters.settle(&self.wish, Ok(stacked)),
            Ok(Tried::NeedsModel) => self.load_model(),
            Err(error) => self.fail(error.into_fault()),
        }
    }

    pub(super) fn fail(self, fault: Fault) {
        if let Aim::Merging(hot) = &self.aim {
            if let Some(hot) = hot.upgrade() {
                hot.cool_down();
            }
            return;
        }
        self.state.adapters.settle(&self.wish, Err(fault));
    }

    fn try_to_make(&self) -> Result<Tried> {
        let Self { state, wish, .. } = self;
        let mut read = Vec::new();
        for adapter in &wish.adapters {
            read.push(self.read(&adapter.place)?);
        }
        let key = wish.stack_key(read.iter().map(|read| read.content));
        if let Some(stacked) = state.adapters.kept(&key) {
            return Ok(Tried::Made(stacked));
        }
        let Some(maker) = wish.model.stack_maker() else { return Ok(Tried::NeedsModel) };
        let stacked = make(&*maker, wish, wish.mode, &read)?;
        state.adapters.keep(key, stacked).map(Tried::Made)
    }

    fn try_to_merge(&self) -> Result<()> {
        let Self { state, wish, .. } = self;
        let Some(maker) = wish.model.stack_maker() else { return Ok(()) };
        let read = wish.adapters.iter().map(|adapter| self.read(&adapter.place)).collect::<Result<Vec<_>>>()?;
        // Found out before any of it is made.
        let (bytes, room) = (maker.merged_bytes(&with_strengths(wish, &read))?, state.adapters.room_bytes());
        if bytes > room {
            let message =
                format!("copies of the weights that they change take {bytes} bytes, and there is room for {room}");
            return Err(Error::new(ErrorKind::OutOfMemory, message, "raise --adapter-bytes"));
        }
        let mut merged = make(&*maker, wish, AdapterMode::Merged, &read)?;
        merged.heat.is_merged = true;
        state.adapters.heat(&wish.stack_key(read.iter().map(|read| read.content)), merged);
        Ok(())
    }

    fn read(&self, place: &AdapterPlace) -> Result<ReadAdapter> {
        let adapters = &self.state.adapters;
        let path = match place {
            // Not remembered: as long as it is open, its memory is in use.
            AdapterPlace::Published(set) => return Ok(ReadAdapter::published(set)?),
            AdapterPlace::File(path) => path,
        };
        if let Some(known) = adapters.known(path) {
            return Ok(known);
        }
        let new = ReadAdapter::read(path)?;
        adapters.learn(path, &new);
        Ok(new)
    }

    /// Has the model's lane load it, and goes on then.
    fn load_model(self) {
        let (state, model) = (Arc::clone(&self.state), Arc::clone(self.wish.model.entry()));
        let done = move |loaded: Result<()>| match loaded {
            Ok(()) => Arc::clone(&self.state).adapters.queue(self),
            Err(error) => self.fail(error.into_fault()),
        };
        let (session, request, deadline) = (BROKER, RequestId(0), None);
        let service = model.service();
        let job = PrepareJob::new(model, done);
        match service {
            Service::Clip => {
                state.clip_lane.submit(Entry { session, request, deadline, job: ClipWork::Prepare(job) });
            }
            // Nobody asks for adapters of a VAE.
            Service::Unet | Service::Vae => {
                state.unet_lane.submit(Entry { session, request, deadline, job: UnetWork::Prepare(job) });
            }
        }
    }
}

/// Works off what there is, until nobody is left who could ask for more.
pub(super) fn work(wishes: &Receiver<Work>) {
    for work in wishes {
        work.run();
    }
}

fn make(maker: &dyn StackMaker, wish: &Wish, mode: AdapterMode, read: &[ReadAdapter]) -> Result<Stacked> {
    let began = Instant::now();
    let (stack, reports) = maker.make(&with_strengths(wish, read), mode)?;
    let report = wish.model.report();
    tracing::info!(
        model = report.name,
        adapters = wish.adapters.len(),
        bytes = stack.size_bytes(),
        seconds = began.elapsed().as_secs_f64(),
        "adapters put together"
    );
    let taken = wish.adapters.iter().zip(reports).map(|(wished, report)| taken(wished.name.clone(), report));
    let used = |wished: &WishedAdapter| AdapterUse { name: wished.name.clone(), strength: wished.strength };
    Ok(Stacked {
        stack,
        model: report.name,
        adapters: wish.adapters.iter().map(used).collect(),
        taken: taken.collect(),
        heat: Heat::default(),
    })
}

fn with_strengths<'a>(wish: &Wish, read: &'a [ReadAdapter]) -> Vec<Adapter<'a>> {
    let adapters = read.iter().zip(&wish.adapters);
    adapters.map(|(read, WishedAdapter { strength, .. })| Adapter { file: &read.file, strength: *strength }).collect()
}

fn taken(name: String, report: AdapterReport) -> AdapterTaken {
    let AdapterReport { layers, kinds, unknown, text_encoder_keys, unet_keys } = report;
    AdapterTaken {
        name,
        layers: layers as u64,
        kinds: kinds.into_iter().map(|(kind, count)| (kind.name().to_owned(), count as u64)).collect(),
        unknown_keys: unknown.count as u64,
        unknown: unknown.first,
        other_keys: (text_encoder_keys + unet_keys) as u64,
    }
}
