use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};
use luna_broker::client::address_from_environment;
use luna_broker::config::{BrokerConfig, ClientConfig};
use luna_broker::service::{GpuOrder, Precision, Service};
use luna_broker::{Error, ErrorKind};
use tracing_subscriber::EnvFilter;

use crate::folders::Folders;

const AFTER_HELP: &str = "\
Examples:
  luna-broker serve --vae vae.safetensors       hold one VAE for every worker of this machine
  luna-broker serve --models ~/ComfyUI/models/vae
  luna-broker serve --comfyui-paths ~/ComfyUI/extra_model_paths.yaml
  luna-broker status                            who is connected, on which rung, with which models
  luna-broker status --metrics                  the same as numbers, for Prometheus
  luna-broker doctor                            why something is slow or refused
  luna-broker serve --bench-models & luna-broker bench

Exit codes:
  0  done
  1  something failed that is not listed here
  2  a setting or a request that this build cannot serve
  3  no broker answers, or it went away
  4  the broker refused the connection
  5  no such model, or not a model
  6  busy, out of memory or out of time: the same command may succeed later
doctor ends with 0 where a client could work, through host memory at least.";

/// One process holds the diffusion models; every worker on the machine uses them through shared memory.
#[derive(Debug, Parser)]
#[command(version, about, after_help = AFTER_HELP)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,

    /// Say more: -v for every session and model, -vv for every fault. $LUNA_BROKER_LOG takes a filter instead.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    verbose: u8,

    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Args {
    pub(crate) fn start_logging(&self) {
        let default = match (self.verbose, &self.command) {
            (0, Command::Serve(_)) => "info",
            (0, _) => "warn",
            (1, _) => "info",
            _ => "debug",
        };
        let filter = EnvFilter::try_from_env("LUNA_BROKER_LOG").unwrap_or_else(|_| EnvFilter::new(default));
        let colours = std::io::stderr().is_terminal();
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(colours)
            .with_writer(std::io::stderr)
            .with_target(false)
            .init();
    }
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ConnectionArgs {
    /// The broker's socket: a path, on Windows the name of a pipe. Default: luna-broker.sock in $XDG_RUNTIME_DIR, else
    /// in a folder of this user's in the temporary folder.
    #[arg(long, env = "LUNA_BROKER", global = true, value_name = "PATH")]
    pub(crate) socket: Option<String>,

    /// How long a request may take, in seconds.
    #[arg(long, default_value_t = 600.0, global = true, value_name = "SECONDS")]
    timeout: f64,
}

impl ConnectionArgs {
    pub(crate) fn address(&self) -> String {
        self.socket.clone().unwrap_or_else(address_from_environment)
    }

    pub(crate) fn timeout(&self) -> Result<Duration, Error> {
        seconds("--timeout", self.timeout)
    }

    pub(crate) fn client_config(&self) -> Result<ClientConfig, Error> {
        Ok(ClientConfig { timeout: Some(self.timeout()?), ..ClientConfig::default() })
    }
}

/// The value of a flag that takes seconds.
fn seconds(flag: &str, value: f64) -> Result<Duration, Error> {
    Duration::try_from_secs_f64(value).map_err(|error| {
        Error::new(ErrorKind::Configuration, format!("{flag} {value}: {error}"), "give seconds above 0")
    })
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Hold models and serve them until stopped with Ctrl-C or SIGTERM.
    Serve(Box<ServeArgs>),
    /// Show sessions with their rung and why, models with their bytes, and lanes.
    Status {
        /// As JSON, for programs.
        #[arg(long)]
        json: bool,

        /// As metrics in the text format of Prometheus, for a file that node_exporter's textfile collector reads.
        #[arg(long, conflicts_with = "json")]
        metrics: bool,
    },
    /// List models: loaded ones, and those found in the broker's model folders.
    Models {
        /// As JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Load a model now instead of with its first use.
    Load {
        /// Name in a model folder, or path.
        model: String,
    },
    /// Give the memory of a model and of weights of that name back; the next use loads them again.
    Unload {
        /// Name in a model folder, or path.
        model: String,
        /// Give up weights that clients have attached, too: those keep them readable, and get an error with their next
        /// call.
        #[arg(long)]
        force: bool,
    },
    /// Compare what weights in memory contain with what they contained when they were loaded or published.
    Verify {
        /// Name in a model folder, path, or name of a published set.
        name: String,
        /// As JSON, for programs.
        #[arg(long)]
        json: bool,
    },
    /// Measure the round trip to a broker that serves --bench-models.
    Bench(BenchArgs),
    /// Say what this process finds (driver, GPUs, broker, how tensors would cross and why) and what to do about the rest.
    ///
    /// No step takes longer than 30 s, or than --timeout where that is less.
    Doctor {
        /// As JSON, for programs: a list of check, verdict (ok, note, fail), found, remedy.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, ClapArgs)]
pub(crate) struct ServeArgs {
    /// A VAE, or a checkpoint that holds one, to load at once. May be given several times.
    #[arg(long, value_name = "FILE")]
    pub(crate) vae: Vec<PathBuf>,

    /// A UNet, or a checkpoint that holds one, to load at once. May be given several times.
    #[arg(long, value_name = "FILE")]
    pub(crate) unet: Vec<PathBuf>,

    /// Text encoders to load at once: a checkpoint that holds them, or their separate files with commas between them. May be
    /// given several times.
    #[arg(long, value_name = "FILE[,FILE]", value_parser = files)]
    pub(crate) clip: Vec<Files>,

    /// A folder of models that clients may name without a path. May be given several times.
    #[arg(long, value_name = "DIR")]
    pub(crate) models: Vec<PathBuf>,

    /// A folder of adapters (LoRA and its kin) that clients may name without a path. May be given several times.
    #[arg(long, value_name = "DIR")]
    pub(crate) loras: Vec<PathBuf>,

    /// A folder of embeddings that prompts name by `embedding:name`. May be given several times.
    #[arg(long, value_name = "DIR")]
    pub(crate) embeddings: Vec<PathBuf>,

    /// ComfyUI's extra_model_paths.yaml, whose folders of models, adapters and embeddings are added. May be given several
    /// times.
    #[arg(long, value_name = "FILE")]
    pub(crate) comfyui_paths: Vec<PathBuf>,

    /// What is served, separated by commas: vae, unet, clip. Default: everything.
    #[arg(long, value_delimiter = ',', value_parser = service, value_name = "SERVICES")]
    services: Vec<Service>,

    /// Where models run: cpu, cuda (the first GPU), cuda:N, or a GPU's UUID as `nvidia-smi -L` prints it.
    #[arg(long, default_value = "cpu")]
    device: String,

    /// Where VAEs run instead. GPU tensors are shared on one GPU, that of --device or else the first named: a service elsewhere
    /// takes and gives tensors in host memory.
    #[arg(long, value_name = "DEVICE")]
    vae_device: Option<String>,

    /// Where UNets run instead, as --vae-device.
    #[arg(long, value_name = "DEVICE")]
    unet_device: Option<String>,

    /// Where text encoders run instead, as --vae-device.
    #[arg(long, value_name = "DEVICE")]
    clip_device: Option<String>,

    /// Element type that VAEs compute in on a GPU. f16 makes some pictures of full VAEs black.
    #[arg(long, value_enum, default_value_t = VaePrecision::Auto)]
    vae_precision: VaePrecision,

    /// Where weights live on the CPU; on a GPU they are a copy in its memory.
    #[arg(long, value_enum, default_value_t = Weights::Mapped)]
    weights: Weights,

    /// Working memory one VAE call may take before it is cut into tiles; accepts K, M, G.
    #[arg(long, default_value = "4G", value_parser = bytes, value_name = "BYTES")]
    vae_budget: u64,

    /// Bytes of tensors one session may hold, and as many on their way to and from GPUs; accepts K, M, G.
    #[arg(long, default_value = "4G", value_parser = bytes, value_name = "BYTES")]
    session_bytes: u64,

    /// Bytes of GPU memory for the tensors of all sessions; accepts K, M, G. Taken as they are needed.
    #[arg(long, default_value = "2G", value_parser = bytes, value_name = "BYTES")]
    gpu_bytes: u64,

    /// Bytes of page-locked host memory that tensors of all sessions pass through to and from GPUs; accepts K, M, G. Beyond
    /// it copies are slower.
    #[arg(long, default_value = "1G", value_parser = bytes, value_name = "BYTES")]
    pinned_bytes: u64,

    /// Bytes of weights held for clients to attach, in the host's memory and as much again on the GPU; accepts K, M, G.
    /// Default: three quarters of the host's memory, and all of the GPU's. Weights that nobody holds give way to others.
    #[arg(long, value_parser = bytes, value_name = "BYTES")]
    weight_bytes: Option<u64>,

    /// Bytes of adapters (LoRA and its kin) that are put together for models; accepts K, M, G. Those that nobody uses give
    /// way to others.
    #[arg(long, default_value = "4G", value_parser = bytes, value_name = "BYTES")]
    adapter_bytes: u64,

    /// Requests of a UNet that run as one batch where they wait anyway and are alike. Default: as many as were found to take
    /// no longer at once than one after the other, up to 8.
    #[arg(long, value_name = "N")]
    max_batch: Option<usize>,

    /// Bytes of the models that are loaded, on each device; accepts K, M, G. Those unused for longest give way to others.
    /// Default: no bound.
    #[arg(long, value_parser = bytes, value_name = "BYTES")]
    model_bytes: Option<u64>,

    /// Unload models that nobody has used for so long, in seconds; the next request loads them again. Default: never.
    #[arg(long, value_name = "SECONDS")]
    model_idle: Option<f64>,

    /// How long a client may keep a permit before the lane goes on without it.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    permit_seconds: u64,

    /// How GPU work of broker and clients is kept in order.
    #[arg(long, value_enum, default_value_t = Order::Events)]
    gpu_order: Order,

    /// Requests that may wait for their turn in the VAE lane; more are refused as busy.
    #[arg(long, default_value_t = 64, value_name = "N")]
    lane_capacity: usize,

    /// How long a VAE call may wait for the client's GPU work that writes its input, in seconds. Others go first meanwhile.
    #[arg(long, default_value_t = 30.0, value_name = "SECONDS")]
    input_patience: f64,

    /// Requests one session may have in flight; more are refused as busy.
    #[arg(long, default_value_t = 32, value_name = "N")]
    session_in_flight: usize,

    /// Connections served at once; more are refused as busy.
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_sessions: usize,

    /// Threads to compute with; 0 for as many as libtorch chooses.
    #[arg(long, default_value_t = 0, value_name = "N")]
    threads: usize,

    /// Also serve the do-nothing model builtin:hand-off, for measuring.
    #[arg(long)]
    bench_models: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Weights {
    /// The mapped file itself where its element type allows; nothing is copied. Replace model files by renaming.
    Mapped,
    /// A copy in memory of the broker's own.
    Copy,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Order {
    /// By events: a result crosses before the work on it is done, and streams wait.
    Events,
    /// Each side waits for its GPU work before it tells the other.
    Host,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum VaePrecision {
    /// What suits model and GPU: bf16 where the GPU has it, else f32.
    Auto,
    F32,
    Bf16,
    F16,
}

impl From<VaePrecision> for Option<Precision> {
    fn from(precision: VaePrecision) -> Self {
        match precision {
            VaePrecision::Auto => None,
            VaePrecision::F32 => Some(Precision::F32),
            VaePrecision::Bf16 => Some(Precision::Bf16),
            VaePrecision::F16 => Some(Precision::F16),
        }
    }
}

impl TryFrom<&ServeArgs> for BrokerConfig {
    type Error = Error;

    fn try_from(args: &ServeArgs) -> Result<Self, Error> {
        let Folders { models, adapters, embeddings } = Folders::of(args)?;
        let services = if args.services.is_empty() { Service::ALL.to_vec() } else { args.services.clone() };
        check_served(&services, [(Service::Vae, &args.vae), (Service::Unet, &args.unet)])?;
        let devices =
            [(Service::Vae, &args.vae_device), (Service::Unet, &args.unet_device), (Service::Clip, &args.clip_device)];
        let devices = devices.into_iter().filter_map(|(service, device)| Some((service, device.clone()?)));
        let config = Self {
            model_folders: models,
            adapter_folders: adapters,
            embedding_folders: embeddings,
            bench_models: args.bench_models,
            lane_capacity: args.lane_capacity,
            input_patience: seconds("--input-patience", args.input_patience)?,
            session_in_flight: args.session_in_flight,
            max_sessions: args.max_sessions,
            session_bytes: args.session_bytes,
            arena_bytes: Self::default().arena_bytes.min(args.session_bytes),
            vae_budget_bytes: args.vae_budget,
            copy_weights: matches!(args.weights, Weights::Copy),
            threads: args.threads,
            services,
            device: args.device.clone(),
            service_devices: devices.collect(),
            gpu_bytes: args.gpu_bytes,
            pinned_bytes: args.pinned_bytes,
            gpu_arena_bytes: Self::default().gpu_arena_bytes.min(args.gpu_bytes),
            gpu_order: match args.gpu_order {
                Order::Events => GpuOrder::Events,
                Order::Host => GpuOrder::Host,
            },
            vae_precision: args.vae_precision.into(),
            weight_bytes: args.weight_bytes,
            adapter_bytes: args.adapter_bytes,
            max_batch: args.max_batch,
            model_bytes: args.model_bytes,
            model_idle: args.model_idle.map(|idle| seconds("--model-idle", idle)).transpose()?,
            permit_patience: Duration::from_secs(args.permit_seconds),
            ..Self::default()
        };
        config.validate()?;
        Ok(config)
    }
}

/// That what is to be loaded at once is of a service that is served.
fn check_served<const N: usize>(services: &[Service], files: [(Service, &Vec<PathBuf>); N]) -> Result<(), Error> {
    let unserved = files.into_iter().find(|(service, files)| !files.is_empty() && !services.contains(service));
    let Some((service, _)) = unserved else { return Ok(()) };
    let message = format!("--{0} names a model, and --services leaves {0} out", service.name());
    Err(Error::new(ErrorKind::Configuration, message, format!("add {} to --services", service.name())))
}

fn service(name: &str) -> Result<Service, String> {
    let names = Service::ALL.map(Service::name).join(", ");
    Service::from_name(name.trim()).ok_or_else(|| format!("{name:?} is no service; there are {names}"))
}

#[derive(Debug, ClapArgs)]
pub(crate) struct BenchArgs {
    /// As JSON, for programs.
    #[arg(long)]
    pub(crate) json: bool,

    /// Measured round trips per figure.
    #[arg(long, default_value_t = 2000, value_name = "N")]
    pub(crate) iterations: usize,

    /// Round trips before measuring.
    #[arg(long, default_value_t = 200, value_name = "N")]
    pub(crate) warm_up: usize,

    /// Size of a latent to hand off, as HEIGHTxWIDTH; the image has 8 times the sides. May be given several times.
    #[arg(long, value_name = "HxW", value_parser = latent)]
    pub(crate) latent: Vec<(u64, u64)>,

    /// Run on this core only.
    #[arg(long, value_name = "CORE")]
    pub(crate) core: Option<usize>,
}

/// Files that are used together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Files(pub(crate) Vec<PathBuf>);

fn files(text: &str) -> Result<Files, String> {
    // A comma may be part of a file's name.
    if std::path::Path::new(text).is_file() {
        return Ok(Files(vec![text.into()]));
    }
    let files: Vec<PathBuf> = text.split(',').map(PathBuf::from).collect();
    if files.iter().any(|file| file.as_os_str().is_empty()) {
        return Err(format!("{text:?} names a file without a name"));
    }
    Ok(Files(files))
}

fn bytes(text: &str) -> Result<u64, String> {
    let (number, unit) = match text.trim().to_ascii_uppercase() {
        text if text.ends_with('K') => (text.trim_end_matches('K').to_owned(), 1u64 << 10),
        text if text.ends_with('M') => (text.trim_end_matches('M').to_owned(), 1 << 20),
        text if text.ends_with('G') => (text.trim_end_matches('G').to_owned(), 1 << 30),
        text => (text, 1),
    };
    let number: u64 = number.parse().map_err(|_| format!("{text:?} is not a number of bytes such as 512M or 4G"))?;
    number.checked_mul(unit).ok_or_else(|| format!("{text:?} is more than any machine has"))
}

fn latent(text: &str) -> Result<(u64, u64), String> {
    let sides = text.split_once('x').and_then(|(height, width)| Some((height.parse().ok()?, width.parse().ok()?)));
    sides.filter(|(height, width)| *height > 0 && *width > 0).ok_or_else(|| format!("{text:?} is not HEIGHTxWIDTH"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn files_that_are_used_together_are_told_apart_by_commas() {
        assert_eq!(files("a.safetensors"), Ok(Files(vec!["a.safetensors".into()])));
        assert_eq!(files("a,b c"), Ok(Files(vec!["a".into(), "b c".into()])));
        assert!(files("a,").is_err() && files("").is_err());
    }

    #[test]
    fn byte_counts_take_units_and_refuse_nonsense() {
        assert_eq!(bytes("512"), Ok(512));
        assert_eq!(bytes("2k"), Ok(2048));
        assert_eq!(bytes("4G"), Ok(4 << 30));
        assert!(bytes("4 bananas").is_err());
        assert!(bytes("99999999999G").is_err());
    }
}
