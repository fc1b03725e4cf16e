use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::brokers::Addresses;
use super::clip::Clip;
use super::gpu;
use super::input::{allocate, unexpected_outcome};
use super::link::Link;
use super::memory::Home;
use super::opener::Opener;
use super::options::CallOptions;
use super::session::SessionInfo;
use super::tensor::{Storage, Tensor};
use super::unet::Unet;
use super::vae::Vae;
use crate::config::{ADDRESS_VARIABLE, ClientConfig, rung_from_environment};
use crate::device::StreamRef;
use crate::error::{Error, ErrorKind, Result, Retry};
use crate::id::GpuUuid;
use crate::protocol::{
    DeviceRung, EncodersTask, Force, ModelReport, Operation, Outcome, RegisteredModel, Rung, Status, VerifyReport,
};
use crate::service::Service;
use crate::tensor::TensorMeta;
use crate::transport::{Connection, LocalConnection, default_address};

type Connector = Box<dyn Fn() -> Result<Arc<dyn Connection>> + Send + Sync>;

/// A connection to a broker, for any number of threads. It comes back by itself after a restart of the broker.
///
/// It is of the process that connected: in a forked child each call is [`ErrorKind::ConnectionLost`], and the child
/// connects for itself.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    connector: Connector,
    address: String,
    config: ClientConfig,
    link: Mutex<Arc<Link>>,
    closed: AtomicBool,
    opener: Opener,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("address", &self.inner.address).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the broker at `address`; `None` for `$LUNA_BROKER`, else this user's default socket.
    ///
    /// # Errors
    /// [`ErrorKind::ConnectionLost`] where nobody listens, [`ErrorKind::Refused`], [`ErrorKind::Timeout`],
    /// [`ErrorKind::Configuration`] for a rung in `LUNA_BROKER_TRANSPORT` that does not exist, and where the brokers of several
    /// addresses are named: [`Brokers`](super::Brokers) connects to those.
    pub fn connect(address: Option<&str>) -> Result<Self> {
        Self::connect_with(address, ClientConfig::default())
    }

    /// As [`Client::connect`], with settings.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub fn connect_with(address: Option<&str>, mut config: ClientConfig) -> Result<Self> {
        if config.rung.is_none() {
            config.rung = rung_from_environment()?;
        }
        let address = address.map_or_else(address_from_environment, str::to_owned);
        let address = Addresses::parse(&address)?.into_one()?;
        let target = address.clone();
        let connector = move || Ok(Arc::new(LocalConnection::connect(&target)?) as Arc<dyn Connection>);
        Self::start(address, config, Box::new(connector))
    }

    /// A client over connections that `connector` makes; called again after a connection is lost.
    ///
    /// # Errors
    /// As [`Client::connect`], and what `connector` returns.
    pub fn over<C: Connection + 'static>(
        config: ClientConfig,
        connector: impl Fn() -> Result<C> + Send + Sync + 'static,
    ) -> Result<Self> {
        let connector = move || connector().map(|connection| Arc::new(connection) as Arc<dyn Connection>);
        Self::start("in-process".to_owned(), config, Box::new(connector))
    }

    fn start(address: String, config: ClientConfig, connector: Connector) -> Result<Self> {
        let link = Mutex::new(Link::open(connector()?, &address, &config)?);
        let closed = AtomicBool::new(false);
        Ok(Self { inner: Arc::new(Inner { connector, address, config, link, closed, opener: Opener::this() }) })
    }

    /// What negotiation settled: rung per device and why, broker version, name.
    #[must_use]
    pub fn session(&self) -> SessionInfo {
        let link = Arc::clone(&self.inner.link.lock());
        let mut session = link.session.clone();
        session.rungs.extend(link.gpu_rungs());
        session
    }

    /// Finds out how tensors of a GPU of this process cross, instead of with the first of them. `cuda:0`, or the UUID.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where this process cannot use the GPU, [`ErrorKind::Refused`] for a forced rung that
    /// cannot be had, [`ErrorKind::ConnectionLost`], [`ErrorKind::Timeout`].
    pub fn open_gpu(&self, name: &str) -> Result<DeviceRung> {
        let gpu = gpu_named(name)?;
        let options = self.default_options();
        self.with_link(|link| Ok(link.open_gpu(gpu, &options)?.rung.clone()))
    }

    /// As [`Client::open_gpu`]; where tensors of the GPU pass through the host's memory, that memory is made now too, and
    /// the rung says whether its pages are locked.
    ///
    /// # Errors
    /// As [`Client::open_gpu`]; [`ErrorKind::OutOfMemory`].
    pub fn prepare_gpu(&self, name: &str) -> Result<DeviceRung> {
        let gpu = gpu_named(name)?;
        let options = self.default_options();
        self.with_link(|link| {
            let gpu = link.open_gpu(gpu, &options)?;
            if !gpu.is_shared() && link.has_staging() {
                drop(allocate(link, Home::Staging(&gpu), 1, false, &options)?);
            }
            Ok(link.told(&gpu))
        })
    }

    /// As [`Client::empty`], in memory of a GPU of this process.
    ///
    /// # Errors
    /// As [`Client::open_gpu`]; [`ErrorKind::Unsupported`] where the GPU's rung shares no memory of it,
    /// [`ErrorKind::OutOfMemory`].
    pub fn empty_on_gpu(&self, meta: TensorMeta, name: &str) -> Result<Tensor> {
        let gpu = gpu_named(name)?;
        let options = self.default_options();
        let length = meta.span_bytes()?.max(1);
        self.with_link(|link| {
            let gpu = link.open_gpu(gpu, &options)?;
            if !gpu.is_shared() {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!("tensors of {} cross on the rung {}, which shares no memory of it", gpu.gpu, gpu.rung.rung),
                    "build the tensor in your own memory and pass it",
                ));
            }
            let lease = allocate(link, Home::Gpu(&gpu), length, false, &options)?;
            Ok(Tensor::new(meta, Storage::Leased(lease)))
        })
    }

    /// Whether both are one client.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// The client's settings.
    #[must_use]
    pub fn config(&self) -> &ClientConfig {
        &self.inner.config
    }

    /// The options calls have when given none.
    #[must_use]
    pub fn default_options(&self) -> CallOptions<'static> {
        CallOptions { timeout: self.inner.config.timeout, ..CallOptions::default() }
    }

    /// An empty round trip, and how long it took.
    ///
    /// # Errors
    /// [`ErrorKind::ConnectionLost`], [`ErrorKind::Timeout`].
    pub fn ping(&self) -> Result<Duration> {
        self.ping_with(&self.default_options())
    }

    /// As [`Client::ping`], waiting as `options` say.
    ///
    /// # Errors
    /// As [`Client::ping`].
    pub fn ping_with(&self, options: &CallOptions<'_>) -> Result<Duration> {
        let started = Instant::now();
        self.ask(Operation::Ping, options)?;
        Ok(started.elapsed())
    }

    /// The VAE of that name or path. Looks at the file; its weights are loaded with the first call.
    ///
    /// # Errors
    /// [`ErrorKind::ModelNotFound`], [`ErrorKind::InvalidModel`], [`ErrorKind::Unsupported`].
    pub fn vae(&self, model: &str) -> Result<Vae> {
        let name = resolve_locally(model);
        let info = self.describe(Service::Vae, &name)?;
        Ok(Vae::new(self.clone(), name, info))
    }

    /// The UNet of that name or path. Looks at the file; its weights are loaded with the first call.
    ///
    /// # Errors
    /// As [`Client::vae`].
    pub fn unet(&self, model: &str) -> Result<Unet> {
        let name = resolve_locally(model);
        let info = self.describe(Service::Unet, &name)?;
        Ok(Unet::new(self.clone(), name, info))
    }

    /// The text encoders in the files of these names or paths, as one set: a checkpoint, or separate files in any order.
    /// Looks at the files; weights are loaded with the first call.
    ///
    /// # Errors
    /// As [`Client::vae`].
    pub fn clip(&self, models: &[impl AsRef<str>]) -> Result<Clip> {
        let names: Vec<String> = models.iter().map(|model| resolve_locally(model.as_ref())).collect();
        let operation = Operation::Encoders { models: names.clone(), task: EncodersTask::Describe };
        match self.ask(operation, &self.default_options())? {
            Outcome::Model(info) => Ok(Clip::new(self.clone(), names, info)),
            _ => Err(unexpected_outcome()),
        }
    }

    /// Loads text encoders now instead of with their first call; waits as `options` say.
    ///
    /// # Errors
    /// As [`Client::load`].
    pub fn load_clip(&self, models: &[impl AsRef<str>], options: &CallOptions<'_>) -> Result<Vec<ModelReport>> {
        let models = models.iter().map(|model| resolve_locally(model.as_ref())).collect();
        match self.ask(Operation::Encoders { models, task: EncodersTask::Load }, options)? {
            Outcome::Models(infos) => Ok(infos),
            _ => Err(unexpected_outcome()),
        }
    }

    fn describe(&self, service: Service, model: &str) -> Result<ModelReport> {
        let model = model.to_owned();
        match self.ask(Operation::Describe { service, model }, &self.default_options())? {
            Outcome::Model(info) => Ok(info),
            _ => Err(unexpected_outcome()),
        }
    }

    /// Memory shared with the broker for a tensor that is built in place; sending it copies nothing.
    /// Its content is undetermined.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] on the rung `inline`, which shares no memory; [`ErrorKind::OutOfMemory`].
    pub fn empty(&self, meta: TensorMeta) -> Result<Tensor> {
        let options = self.default_options();
        let length = meta.span_bytes()?.max(1);
        self.with_link(|link| {
            if link.session.host_rung() == Rung::Inline {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "this session shares no memory with the broker: its tensors cross as bytes",
                    "build the tensor in your own memory and pass it",
                ));
            }
            let lease = allocate(link, Home::Host, length, false, &options)?;
            Ok(Tensor::new(meta, Storage::Leased(lease)))
        })
    }

    /// Everything about the broker at this moment.
    ///
    /// # Errors
    /// [`ErrorKind::ConnectionLost`], [`ErrorKind::Timeout`].
    pub fn status(&self) -> Result<Status> {
        match self.ask(Operation::Status, &self.default_options())? {
            Outcome::Status(status) => Ok(*status),
            _ => Err(unexpected_outcome()),
        }
    }

    /// The broker's counts and sizes as Prometheus reads them, in the text format of OpenMetrics.
    ///
    /// # Errors
    /// [`ErrorKind::ConnectionLost`], [`ErrorKind::Timeout`].
    pub fn metrics(&self) -> Result<String> {
        match self.ask(Operation::Metrics, &self.default_options())? {
            Outcome::Metrics(text) => Ok(text),
            _ => Err(unexpected_outcome()),
        }
    }

    /// Models that were asked for, and those in the broker's model folders.
    ///
    /// # Errors
    /// [`ErrorKind::ConnectionLost`], [`ErrorKind::Timeout`].
    pub fn models(&self) -> Result<Vec<ModelReport>> {
        match self.ask(Operation::Models, &self.default_options())? {
            Outcome::Models(models) => Ok(models),
            _ => Err(unexpected_outcome()),
        }
    }

    /// Loads every part of a model that the broker runs now, instead of with its first call.
    ///
    /// # Errors
    /// As [`Client::vae`], and what loading runs into.
    pub fn load(&self, model: &str) -> Result<Vec<ModelReport>> {
        self.load_with(None, model, &self.default_options())
    }

    /// As [`Client::load`], or the part for one service alone, waiting as `options` say.
    ///
    /// # Errors
    /// As [`Client::load`].
    pub fn load_with(
        &self,
        service: Option<Service>,
        model: &str,
        options: &CallOptions<'_>,
    ) -> Result<Vec<ModelReport>> {
        match self.ask(Operation::Load { service, model: resolve_locally(model) }, options)? {
            Outcome::Models(infos) => Ok(infos),
            _ => Err(unexpected_outcome()),
        }
    }

    /// Forgets a model and weights of that name; their memory is free once the calls before this one are done. The next
    /// call loads them anew.
    ///
    /// # Errors
    /// As [`Client::vae`]; [`ErrorKind::InUse`] for weights that somebody has attached.
    pub fn unload(&self, model: &str) -> Result<()> {
        self.unload_with(model, Force::No)
    }

    /// As [`Client::unload`]; by force, weights go that somebody has attached. They stay readable for those who have.
    ///
    /// # Errors
    /// As [`Client::unload`].
    pub fn unload_with(&self, model: &str, force: Force) -> Result<()> {
        self.ask(Operation::Unload { model: resolve_locally(model), force }, &self.default_options()).map(|_| ())
    }

    /// Has a model listed that this process has loaded itself: for others to see, in `models` and `status`, where memory goes.
    /// The broker does nothing else with it. It is listed until the session ends; a session that comes after a restart of
    /// the broker tells of it anew.
    ///
    /// # Errors
    /// [`ErrorKind::Configuration`] for a name that cannot be shown, [`ErrorKind::Busy`] for more models than a session may
    /// tell of.
    pub fn register(&self, model: RegisteredModel) -> Result<()> {
        self.ask(Operation::Register(model), &self.default_options()).map(|_| ())
    }

    /// Compares what weights contain with what they contained when they were loaded or published.
    ///
    /// # Errors
    /// [`ErrorKind::ModelNotFound`] for weights that nobody has attached since the broker started.
    pub fn verify(&self, name: &str) -> Result<Vec<VerifyReport>> {
        match self.ask(Operation::Verify { name: resolve_locally(name) }, &self.default_options())? {
            Outcome::Verified(reports) => Ok(reports),
            _ => Err(unexpected_outcome()),
        }
    }

    /// Ends the session. Tensors already received stay readable; further calls fail. Repeating it is harmless.
    pub fn close(&self) {
        self.inner.closed.store(true, Ordering::Release);
        self.inner.end();
    }

    pub(super) fn ask(&self, operation: Operation, options: &CallOptions<'_>) -> Result<Outcome> {
        self.with_link(|link| Ok(link.call(operation.clone(), &[], options)?.reply.outcome))
    }

    /// Runs a call that may be repeated: once more, over a new connection, where the first one was lost.
    pub(super) fn with_link<T>(&self, call: impl Fn(&Link) -> Result<T>) -> Result<T> {
        self.with_shared_link(|link| call(&link))
    }

    /// As [`Client::with_link`], for what keeps the link.
    pub(super) fn with_shared_link<T>(&self, call: impl Fn(Arc<Link>) -> Result<T>) -> Result<T> {
        match call(self.inner.live_link()?) {
            Err(error) if error.retry() == Retry::Reconnect && !self.inner.is_closed() => {
                match self.inner.live_link() {
                    Ok(link) => call(link),
                    Err(_) => Err(error),
                }
            }
            done => done,
        }
    }
}

impl Inner {
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// The current session, or a new one where it is over.
    ///
    /// # Errors
    /// As [`Link::open`] and [`Opener::check`]; [`ErrorKind::ConnectionLost`] where the client is closed.
    fn live_link(&self) -> Result<Arc<Link>> {
        self.opener.check()?;
        let mut link = self.link.lock();
        // Under the lock that `close` takes after it has set the mark: a closed client opens no new session.
        if self.is_closed() {
            return Err(Error::new(ErrorKind::ConnectionLost, "the client is closed", "connect again"));
        }
        if link.is_over() {
            let fresh = Link::open((self.connector)()?, &self.address, &self.config)?;
            tracing::info!(address = self.address, session = %fresh.session.id, "connected anew");
            link.close();
            *link = fresh;
        }
        Ok(Arc::clone(&link))
    }

    fn end(&self) {
        if self.opener.is_here() {
            self.link.lock().close();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.end();
    }
}

/// The GPU of that name in this process: `cuda:0`, `cuda` for the first, or the UUID.
///
/// # Errors
/// [`ErrorKind::Unsupported`] without a driver, [`ErrorKind::Configuration`] for a name of no GPU.
pub fn gpu_named(name: &str) -> Result<GpuUuid> {
    Ok(gpu::gpu_named(name)?)
}

/// Blocks until the legacy default stream of a GPU has run everything this process has enqueued there.
///
/// # Errors
/// As [`gpu_named`]; [`ErrorKind::Io`] where the GPU failed.
pub fn synchronize_default_stream(name: &str) -> Result<()> {
    Ok(gpu::GpuDevice::open(gpu_named(name)?)?.synchronize_stream(StreamRef::DEFAULT)?)
}

/// The address to use when the caller names none: `$LUNA_BROKER`, else this user's default.
#[must_use]
pub fn address_from_environment() -> String {
    match std::env::var(ADDRESS_VARIABLE) {
        Ok(address) if !address.is_empty() => address,
        _ => default_address(),
    }
}

/// A file the caller can see is named by its full path: the broker has another working directory. A folder is not: it is
/// no model, and beside one that is called as published weights are, those are meant.
pub(super) fn resolve_locally(model: &str) -> String {
    let path = std::path::Path::new(model);
    if path.is_absolute() || model.starts_with("builtin:") || !path.is_file() {
        return model.to_owned();
    }
    std::path::absolute(path).map_or_else(|_| model.to_owned(), |path| path.to_string_lossy().into_owned())
}
