use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::adapters::Adapters;
use super::clock::Clock;
use super::gpu::BrokerGpu;
use super::jobs::{ClipExecutor, UnetExecutor, VaeExecutor};
use super::loader::{Loader, Placements};
use super::permits::Permits;
use super::prompts::Prompts;
use super::registry::Registry;
use super::session::Session;
use super::state::{Sessions, State};
use super::weights::{WeightLimits, Weights};
use crate::config::BrokerConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::id::Epoch;
use crate::lane::{Lane, Policy, Queue};
use crate::metrics::Metrics;
use crate::protocol::{ModelReport, ServerMessage, Status};
use crate::service::Service;
use crate::transport::{Connection, Listener, LocalListener, MemoryConnection, MemoryListener};

/// How long an orderly shutdown waits for clients to take their last replies.
const FAREWELL: Duration = Duration::from_secs(2);

/// Settings of a broker that is not running yet.
#[derive(Debug, Clone, Default)]
pub struct BrokerBuilder {
    config: BrokerConfig,
    address: Option<String>,
}

impl BrokerBuilder {
    /// Uses these settings.
    #[must_use]
    pub fn config(mut self, config: BrokerConfig) -> Self {
        self.config = config;
        self
    }

    /// Listens at this local socket (a path; on Windows the name of a pipe). Default: none, only
    /// [`Broker::connect_local`] reaches the broker then.
    #[must_use]
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.address = Some(address.into());
        self
    }

    /// Starts the broker: its lanes, and a thread that accepts connections.
    ///
    /// # Errors
    /// A setting out of bounds, an address that is taken, a thread that cannot be started.
    pub fn start(self) -> Result<Broker> {
        let Self { config, address } = self;
        config.validate()?;
        let local = match &address {
            Some(address) => Some(Arc::new(LocalListener::bind(address)?)),
            None => None,
        };
        let memory = Arc::new(MemoryListener::new());
        let shown = local.as_ref().map_or_else(|| memory.address(), |listener| listener.address());
        let state = Arc::new(make_state(config, shown)?);
        let mut listeners: Vec<Arc<dyn Listener>> = vec![Arc::clone(&memory) as Arc<dyn Listener>];
        listeners.extend(local.map(|listener| listener as Arc<dyn Listener>));
        let mut threads = Vec::new();
        for listener in &listeners {
            let (listener, state) = (Arc::clone(listener), Arc::clone(&state));
            let thread = std::thread::Builder::new().name("luna-accept".to_owned());
            threads.push(thread.spawn(move || accept(&state, &*listener)).map_err(no_thread)?);
        }
        tracing::info!(address = state.address, "broker started");
        let listeners = Mutex::new(listeners);
        Ok(Broker { state, listeners, memory, threads: Mutex::new(threads), stopped: AtomicBool::new(false) })
    }
}

fn no_thread(error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, format!("a thread could not be started: {error}"), "raise the limit of processes")
}

fn make_state(config: BrokerConfig, address: String) -> Result<State> {
    let mut epoch = [0; 8];
    getrandom::fill(&mut epoch).map_err(|error| Error::new(ErrorKind::Internal, error.to_string(), ""))?;
    let loading = Arc::new(AtomicU64::new(0));
    let placements = Placements::new(&config)?;
    let metrics = Metrics::default();
    let arena_ids = Arc::new(AtomicU32::new(0));
    let gpu = BrokerGpu::open(&config, &arena_ids)?;
    let limits = WeightLimits::new(config.weight_bytes, gpu.as_ref());
    let weights = Arc::new(Weights::start(limits).map_err(no_thread)?);
    let adapters = Arc::new(Adapters::start(config.adapter_bytes).map_err(no_thread)?);
    let evictions = metrics.evictions.clone();
    let registry = Registry::new(&config, placements.clone(), evictions, Arc::clone(&weights), Arc::clone(&adapters));
    let registry = Arc::new(registry);
    let queue = gpu.as_ref().map(BrokerGpu::queue).transpose()?;
    // Each lane's libtorch is a stream of its own: a loader opens it on the lane's thread.
    let unet_loader = Loader::new(&config, placements.of(Service::Unet).cloned(), Arc::clone(&loading), None);
    let clip_loader = Loader::new(&config, placements.of(Service::Clip).cloned(), Arc::clone(&loading), None);
    let loader = Loader::new(&config, placements.of(Service::Vae).cloned(), Arc::clone(&loading), queue);
    let lane_registry = Arc::clone(&registry);
    let queue = Queue::new(Policy::Fifo, config.lane_capacity).patience(config.input_patience);
    let vae_lane =
        Lane::spawn("luna-vae", queue, move || VaeExecutor::new(loader, lane_registry)).map_err(no_thread)?;
    let lane_registry = Arc::clone(&registry);
    let max_batch = config.max_batch;
    let queue = Queue::new(Policy::FairBySession, config.lane_capacity).patience(config.input_patience);
    let unet_lane = Lane::spawn("luna-unet", queue, move || UnetExecutor::new(unet_loader, lane_registry, max_batch))
        .map_err(no_thread)?;
    let lane_registry = Arc::clone(&registry);
    let queue = Queue::new(Policy::Fifo, config.lane_capacity);
    let clip_lane =
        Lane::spawn("luna-clip", queue, move || ClipExecutor::new(clip_loader, lane_registry)).map_err(no_thread)?;
    registry.residents().wake_by(vec![
        Box::new(vae_lane.waker()),
        Box::new(unet_lane.waker()),
        Box::new(clip_lane.waker()),
    ]);
    let prompts = Prompts::new(config.embedding_folders.clone());
    Ok(State {
        config,
        address,
        epoch: Epoch(u64::from_le_bytes(epoch)),
        clock: Clock::start(),
        registry,
        vae_lane,
        unet_lane,
        clip_lane,
        prompts,
        permits: Arc::new(Permits::default()),
        weights,
        adapters,
        loading,
        sessions: Arc::new(Sessions::default()),
        metrics,
        arena_ids,
        gpu,
        stopping: AtomicBool::new(false),
    })
}

fn accept(state: &Arc<State>, listener: &dyn Listener) {
    loop {
        match listener.accept() {
            Ok(None) => return,
            Ok(Some(connection)) => serve(state, connection),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                // Out of descriptors, most likely: trying again at once would only burn a core.
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }
}

fn serve(state: &Arc<State>, connection: Arc<dyn Connection>) {
    if state.stopping.load(Ordering::Acquire) {
        return connection.close();
    }
    let session = Session::new(state, Arc::clone(&connection));
    let id = session.id();
    let thread = std::thread::Builder::new().name("luna-session".to_owned());
    let sessions = Arc::clone(&state.sessions);
    let serve = move || {
        session.serve();
        sessions.remove(id);
    };
    if let Err(error) = thread.spawn(serve) {
        tracing::error!(%error, "no thread for a new session");
        Session::abandon(state, id, &*connection);
    }
}

/// A running broker. Dropping it stops it.
#[derive(Debug)]
pub struct Broker {
    state: Arc<State>,
    /// Empty once the broker stops.
    listeners: Mutex<Vec<Arc<dyn Listener>>>,
    memory: Arc<MemoryListener>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    stopped: AtomicBool,
}

impl Broker {
    /// Settings to start a broker with.
    #[must_use]
    pub fn builder() -> BrokerBuilder {
        BrokerBuilder::default()
    }

    /// Where clients find the broker.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.state.address
    }

    /// A connection from inside this process; [`crate::client::Client::over`] makes a client of it, on the rung `local`.
    ///
    /// # Errors
    /// [`ErrorKind::ConnectionLost`] once the broker is stopped.
    pub fn connect_local(&self) -> Result<MemoryConnection> {
        Ok(self.memory.connect()?)
    }

    /// Everything about the broker at this moment.
    #[must_use]
    pub fn status(&self) -> Status {
        self.state.status()
    }

    /// Counts and sizes as Prometheus reads them, in the text format of OpenMetrics.
    #[must_use]
    pub fn metrics(&self) -> String {
        self.state.metrics_text()
    }

    /// Recognises the part of a model, by name or path, that a service runs, without loading it.
    ///
    /// # Errors
    /// [`ErrorKind::ModelNotFound`], [`ErrorKind::InvalidModel`], [`ErrorKind::Unsupported`].
    pub fn describe(&self, service: Service, model: &str) -> Result<ModelReport> {
        Ok(self.state.registry.resolve(service, model)?.report())
    }

    /// Recognises the text encoders in files, by name or path, as one set, without loading it.
    ///
    /// # Errors
    /// As [`Broker::describe`].
    pub fn describe_encoders(&self, models: &[String]) -> Result<ModelReport> {
        Ok(self.state.registry.resolve_set(models)?.report())
    }

    /// Bytes of weights of the model being loaded that are in place.
    #[must_use]
    pub fn loading_bytes(&self) -> u64 {
        self.state.loading.load(Ordering::Relaxed)
    }

    /// Stops in order: no new connections, the running jobs finish, everything that waits is answered, sessions end.
    /// Repeating it is harmless.
    pub fn shut_down(&self) {
        if self.stopped.swap(true, Ordering::AcqRel) {
            return;
        }
        self.state.stopping.store(true, Ordering::Release);
        let listeners = std::mem::take(&mut *self.listeners.lock());
        for listener in &listeners {
            listener.close();
        }
        for thread in self.threads.lock().drain(..) {
            if thread.join().is_err() {
                tracing::error!("an accepting thread panicked");
            }
        }
        // The address goes before the running job is done: who tries again meanwhile is told at once that nobody is there.
        drop(listeners);
        let sessions = self.state.sessions.all();
        for link in &sessions {
            link.outbox.post(None, |_| ServerMessage::Closing);
        }
        self.state.permits.end_all();
        self.state.adapters.shut_down();
        self.state.vae_lane.shut_down();
        self.state.unet_lane.shut_down();
        self.state.clip_lane.shut_down();
        let deadline = Instant::now() + FAREWELL;
        for link in &sessions {
            link.outbox.flush(deadline);
            link.outbox.hang_up();
        }
        self.state.sessions.wait_empty(FAREWELL);
        tracing::info!("broker stopped");
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.shut_down();
    }
}
