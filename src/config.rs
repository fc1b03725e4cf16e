//! Settings of broker and client: unit, default, bound and cost of each.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, ErrorKind};
use crate::service::{GpuOrder, Precision, Rung, Service};

/// Why a configuration cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{setting}: {reason}")]
pub struct ConfigError {
    /// The setting.
    pub setting: &'static str,
    /// What is wrong with it.
    pub reason: String,
}

/// Settings of a broker.
#[derive(Debug, Clone)]
pub struct BrokerConfig {
    /// Folders in which model names are looked up. None by default: models are then named by path.
    pub model_folders: Vec<PathBuf>,
    /// Folders in which names of adapters (LoRA and its kin) are looked up. None by default: adapters are then named by path.
    pub adapter_folders: Vec<PathBuf>,
    /// Folders with embeddings (textual inversions) that prompts name by `embedding:name`; folders below them count too.
    /// None by default.
    pub embedding_folders: Vec<PathBuf>,
    /// Whether the do-nothing VAE `builtin:hand-off` is served. Off by default.
    pub bench_models: bool,
    /// Requests that may wait for their turn in one lane; more are refused as busy. Default 64. Those that had their turn and
    /// wait for their input are bounded by [`session_in_flight`](Self::session_in_flight) alone.
    pub lane_capacity: usize,
    /// Requests one session may have in flight; more are refused as busy. Default 32.
    pub session_in_flight: usize,
    /// Connections served at once; more are refused as busy. Default 256. Each costs a thread.
    pub max_sessions: usize,
    /// Bytes of one session's first arena, and the least a further one has. Default 64 MiB.
    ///
    /// Address space only: a page costs memory once it is used.
    pub arena_bytes: u64,
    /// Bytes of tensors one session may hold. Default 4 GiB. A request beyond it is refused as out of memory. As many
    /// again may be on their way to and from GPUs through the host's memory.
    pub session_bytes: u64,
    /// Working memory one VAE call may use before it is cut into tiles, in bytes. Default 4 GiB.
    pub vae_budget_bytes: u64,
    /// Whether the weights of a model are copied into memory of the broker's own instead of used from the mapped
    /// file. Off by default: a copy costs its size once, and survives whatever happens to the file.
    pub copy_weights: bool,
    /// The element type VAEs compute in on a GPU. Default `None`: what suits model and GPU, see
    /// [`VaeFacts::precision`](crate::model::VaeFacts::precision).
    pub vae_precision: Option<Precision>,
    /// Threads a lane computes with on the CPU. Default 0: as many as libtorch chooses.
    pub threads: usize,
    /// How long a new connection may take to negotiate. Default 5 s.
    pub negotiation_timeout: Duration,
    /// How long a client may pause in the middle of a tensor that crosses as bytes before its session ends.
    /// Default 30 s.
    pub payload_patience: Duration,
    /// How long a VAE call may wait for the client's GPU work that writes its input before it is refused as timed out.
    /// Default 30 s. Calls whose input is there go first meanwhile.
    pub input_patience: Duration,
    /// Whether named segments are used where sealed memory could be. Off by default.
    pub named_segments: bool,
    /// What is served. Default: every service. Requests for another are refused as unsupported.
    pub services: Vec<Service>,
    /// Where models run: `cpu`, `cuda:0` or the UUID of a GPU. Default `cpu`.
    pub device: String,
    /// Where the models of a service run instead. Default: none elsewhere.
    ///
    /// Tensors are shared in the memory of one GPU, see [`BrokerConfig::tensor_device`]. A service that runs on another takes
    /// and gives tensors in host memory.
    pub service_devices: BTreeMap<Service, String>,
    /// Bytes of the first tensor arena on the GPU, and the least a further one has. Default 32 MiB: GPU memory is
    /// used up as soon as it is allocated. The driver allocates multiples of 2 MiB.
    pub gpu_arena_bytes: u64,
    /// Bytes of all tensor arenas on the GPU together. Default 2 GiB. A tensor beyond it is refused as out of memory.
    pub gpu_bytes: u64,
    /// Bytes of host memory that the broker has page-locked at once, for tensors of all sessions that pass through it to and
    /// from GPUs. Default 1 GiB. Beyond it such memory stays pageable: copies are slower, and `pages` of the rung says why.
    pub pinned_bytes: u64,
    /// How GPU work of broker and clients is kept in order. Default: by events.
    pub gpu_order: GpuOrder,
    /// Bytes of weights held for clients to attach, with what describes them, in the host's memory and as many again on
    /// the GPU. Default `None`: three quarters of the host's memory, and all of the GPU's. Sets that nobody holds give way
    /// to others; what is beyond it then is refused as out of memory.
    pub weight_bytes: Option<u64>,
    /// Bytes of adapters that are put together for models, all of them together. Default 4 GiB. Those that no request and no
    /// run uses give way to others; what is beyond it then is refused as out of memory.
    pub adapter_bytes: u64,
    /// Requests of a UNet that run as one batch where they wait anyway and are alike. Default `None`: as many as were found
    /// to take no longer at once than one after the other, by size of the latent; up to 8. 1 never puts any together.
    pub max_batch: Option<usize>,
    /// Bytes of weights of models that the lanes hold, on each device. Default `None`: no bound. Before a model is loaded
    /// beyond it, the longest unused ones that no request waits for or runs on are unloaded; where those do not suffice, it
    /// is refused as out of memory. What is used from the mapped file counts too, although it takes no memory but the
    /// system's cache of the file.
    pub model_bytes: Option<u64>,
    /// How long a model that no request waits for or runs on is kept loaded. Default `None`: until it is unloaded. The next
    /// request for it loads it again.
    pub model_idle: Option<Duration>,
    /// How long a client may keep a permit before the lane goes on without it. Default 10 min.
    pub permit_patience: Duration,
}

impl Default for BrokerConfig {
    fn default() -> Self {
        Self {
            model_folders: Vec::new(),
            adapter_folders: Vec::new(),
            embedding_folders: Vec::new(),
            bench_models: false,
            lane_capacity: 64,
            session_in_flight: 32,
            max_sessions: 256,
            arena_bytes: 64 << 20,
            session_bytes: 4 << 30,
            vae_budget_bytes: 4 << 30,
            copy_weights: false,
            vae_precision: None,
            threads: 0,
            negotiation_timeout: Duration::from_secs(5),
            payload_patience: Duration::from_secs(30),
            input_patience: Duration::from_secs(30),
            named_segments: false,
            services: Service::ALL.to_vec(),
            device: "cpu".to_owned(),
            service_devices: BTreeMap::new(),
            gpu_arena_bytes: 32 << 20,
            gpu_bytes: 2 << 30,
            pinned_bytes: 1 << 30,
            gpu_order: GpuOrder::Events,
            weight_bytes: None,
            adapter_bytes: 4 << 30,
            max_batch: None,
            model_bytes: None,
            model_idle: None,
            permit_patience: Duration::from_secs(600),
        }
    }
}

impl BrokerConfig {
    /// Where the models of `service` run.
    #[must_use]
    pub fn device_of(&self, service: Service) -> &str {
        self.service_devices.get(&service).unwrap_or(&self.device).trim()
    }

    /// The device in whose memory tensors are shared: where models run by default, or else the first GPU that a service runs
    /// on.
    #[must_use]
    pub fn tensor_device(&self) -> &str {
        let of_services = self.services.iter().map(|service| self.device_of(*service));
        let mut devices = std::iter::once(self.device.trim()).chain(of_services);
        devices.find(|device| !device.eq_ignore_ascii_case("cpu")).unwrap_or("cpu")
    }

    /// Checks bounds and relations.
    ///
    /// # Errors
    /// The first setting that is out of bounds, and why.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |setting, reason: &str| Err(ConfigError { setting, reason: reason.to_owned() });
        if self.lane_capacity == 0 {
            return refuse("lane capacity", "at least one request must be able to wait");
        }
        if self.session_in_flight == 0 {
            return refuse("requests in flight", "at least one request must be possible");
        }
        if self.max_sessions == 0 {
            return refuse("sessions", "at least one client must be able to connect");
        }
        if self.arena_bytes == 0 || self.arena_bytes > self.session_bytes {
            return refuse("arena size", "it must be positive and at most the session's bytes");
        }
        if self.gpu_arena_bytes == 0 || self.gpu_arena_bytes > self.gpu_bytes {
            return refuse("GPU arena size", "it must be positive and at most the bytes of all arenas");
        }
        if self.max_batch == Some(0) {
            return refuse("requests in a batch", "at least one must run");
        }
        if self.input_patience.is_zero() {
            return refuse("input patience", "an input needs some time to be written");
        }
        if self.model_idle.is_some_and(|idle| idle.is_zero()) {
            return refuse("model idle time", "a model that is unloaded at once is loaded for every request");
        }
        if self.services.is_empty() {
            return refuse("services", "a broker that serves none is of no use");
        }
        if self.permit_patience.is_zero() {
            return refuse("permit patience", "a permit that has ended before it begins is of no use");
        }
        Ok(())
    }
}

/// Settings of a client.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// What the client calls itself in `status` and logs. Default: program name and process id.
    pub name: String,
    /// How long a call may take before it is cancelled; `None` for as long as it takes. Default 10 minutes.
    pub timeout: Option<Duration>,
    /// How long connecting and negotiating may take. Default 5 s.
    pub connect_timeout: Duration,
    /// The only rung to use. Default: `LUNA_BROKER_TRANSPORT`, else the best that passes the probe.
    pub rung: Option<Rung>,
    /// Bytes of input slots kept for the next call. Default 64 MiB.
    pub idle_input_bytes: u64,
    /// How GPU work of broker and client is kept in order. Default: `LUNA_BROKER_GPU_ORDER`, else by events.
    pub gpu_order: GpuOrder,
}

impl Default for ClientConfig {
    fn default() -> Self {
        let program = std::env::current_exe().ok();
        let program = program.as_deref().and_then(|path| path.file_name()).map(|name| name.to_string_lossy());
        Self {
            name: format!("{}-{}", program.as_deref().unwrap_or("client"), std::process::id()),
            timeout: Some(Duration::from_secs(600)),
            connect_timeout: Duration::from_secs(5),
            rung: None,
            idle_input_bytes: 64 << 20,
            gpu_order: gpu_order_from_environment(),
        }
    }
}

/// Environment variable that names the broker's socket.
pub const ADDRESS_VARIABLE: &str = "LUNA_BROKER";

/// Environment variable that forces a rung.
pub const TRANSPORT_VARIABLE: &str = "LUNA_BROKER_TRANSPORT";

/// Environment variable that makes GPU work be waited for on the host, where it says `host`.
pub const GPU_ORDER_VARIABLE: &str = "LUNA_BROKER_GPU_ORDER";

fn gpu_order_from_environment() -> GpuOrder {
    match std::env::var(GPU_ORDER_VARIABLE) {
        Ok(order) if order == "host" => GpuOrder::Host,
        _ => GpuOrder::Events,
    }
}

/// The rung that `LUNA_BROKER_TRANSPORT` forces.
///
/// # Errors
/// [`ConfigError`] where it names no rung.
pub fn rung_from_environment() -> Result<Option<Rung>, ConfigError> {
    match std::env::var(TRANSPORT_VARIABLE) {
        Ok(name) if !name.is_empty() => match Rung::from_name(&name) {
            Some(rung) => Ok(Some(rung)),
            None => {
                let reason = format!("{name:?} is not a rung; use {}", Rung::ALL.map(Rung::name).join(", "));
                Err(ConfigError { setting: TRANSPORT_VARIABLE, reason })
            }
        },
        _ => Ok(None),
    }
}

impl From<ConfigError> for Error {
    fn from(error: ConfigError) -> Self {
        Self::caused(ErrorKind::Configuration, "correct the setting", error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_would_refuse_everything_is_refused_itself() {
        let config = BrokerConfig::default;
        assert_eq!(config().validate(), Ok(()));
        let broken = [
            ("lane capacity", BrokerConfig { lane_capacity: 0, ..config() }),
            ("requests in flight", BrokerConfig { session_in_flight: 0, ..config() }),
            ("sessions", BrokerConfig { max_sessions: 0, ..config() }),
            ("input patience", BrokerConfig { input_patience: Duration::ZERO, ..config() }),
            ("model idle time", BrokerConfig { model_idle: Some(Duration::ZERO), ..config() }),
            ("services", BrokerConfig { services: Vec::new(), ..config() }),
            ("permit patience", BrokerConfig { permit_patience: Duration::ZERO, ..config() }),
        ];
        for (setting, config) in broken {
            assert_eq!(config.validate().unwrap_err().setting, setting);
        }
    }

    #[test]
    fn each_service_runs_where_it_is_told_and_tensors_are_shared_on_the_first_gpu() {
        let with = |device: &str, of_vae: &str| BrokerConfig {
            device: device.to_owned(),
            service_devices: BTreeMap::from([(Service::Vae, of_vae.to_owned())]),
            ..BrokerConfig::default()
        };
        let devices = |config: &BrokerConfig| {
            [config.device_of(Service::Unet), config.device_of(Service::Vae), config.tensor_device()].map(str::to_owned)
        };
        assert_eq!(devices(&BrokerConfig::default()), ["cpu", "cpu", "cpu"]);
        assert_eq!(devices(&with("cuda:0", "cpu")), ["cuda:0", "cpu", "cuda:0"]);
        assert_eq!(devices(&with("CPU", "cuda:1")), ["CPU", "cuda:1", "cuda:1"]);
        assert_eq!(devices(&with("cuda:0", "cuda:1")), ["cuda:0", "cuda:1", "cuda:0"]);
        let unserved = BrokerConfig { services: vec![Service::Unet], ..with("cpu", "cuda:1") };
        assert_eq!(unserved.tensor_device(), "cpu", "nothing runs there");
    }
}
