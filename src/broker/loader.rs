use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
#[cfg(feature = "torch")]
use std::sync::{OnceLock, atomic::Ordering};
#[cfg(feature = "torch")]
use std::time::Instant;

use super::entry::ModelEntry;
use crate::config::BrokerConfig;
use crate::device::CopyStream;
use crate::error::Error;
use crate::model::clip::Clip;
use crate::model::{Capability, HandOff, ModelError, Unet, UnetFacts, Vae, VaeFacts, WeightStorage};
use crate::service::{Precision, Service};
#[cfg(feature = "torch")]
use crate::{
    device::HostDevice,
    model::ModelFile,
    model::torch::{self, LoadOptions, Target, TorchCuda, load_clip, load_unet, load_vae},
};

/// The setting for models on the CPU, and what it is called to users.
pub(super) const CPU: &str = "cpu";

/// What models run on, as far as it shows in what is told of them.
#[derive(Debug, Clone)]
pub(super) struct Placement {
    /// `cpu`, or the GPU by a name that means the same in every process.
    pub(super) device: String,
    gpu: Option<Gpu>,
    precision: Option<Precision>,
}

/// The GPU that models run on.
#[derive(Debug, Clone, Copy)]
struct Gpu {
    #[cfg_attr(not(feature = "torch"), expect(dead_code, reason = "only executors open it"))]
    ordinal: i32,
    /// `None` where the driver does not say: models are then taken to need what they need in float32.
    capability: Option<Capability>,
}

impl Placement {
    /// What `config` asks for, for the models of a service.
    ///
    /// # Errors
    /// A name that is no device's, or a GPU that this process does not see.
    pub(super) fn new(config: &BrokerConfig, service: Service) -> Result<Self, Error> {
        let wanted = config.device_of(service);
        let (device, gpu) = match wanted.eq_ignore_ascii_case(CPU) {
            true => (CPU.to_owned(), None),
            false => find(wanted).map(|(device, gpu)| (device, Some(gpu)))?,
        };
        let precision = config.vae_precision.filter(|_| service == Service::Vae);
        Ok(Self { device, gpu, precision })
    }

    /// The element type that a UNet computes in here.
    pub(super) fn unet_precision(&self, facts: &UnetFacts) -> Precision {
        facts.precision(self.gpu.and_then(|gpu| gpu.capability))
    }

    /// The facts of a VAE as it runs here.
    pub(super) fn facts(&self, facts: VaeFacts) -> VaeFacts {
        let suited = facts.precision(self.gpu.and_then(|gpu| gpu.capability));
        let asked_for = self.precision.filter(|_| self.gpu.is_some());
        facts.in_precision(asked_for.unwrap_or(suited))
    }
}

/// What the models of each service run on.
#[derive(Debug, Clone)]
pub(super) struct Placements(BTreeMap<Service, Placement>);

impl Placements {
    /// What `config` asks for, for each service that it names.
    ///
    /// # Errors
    /// As [`Placement::new`].
    pub(super) fn new(config: &BrokerConfig) -> Result<Self, Error> {
        let each = config.services.iter().map(|service| Ok((*service, Placement::new(config, *service)?)));
        Ok(Self(each.collect::<Result<_, Error>>()?))
    }

    /// Absent for a service that is not served here.
    pub(super) fn of(&self, service: Service) -> Option<&Placement> {
        self.0.get(&service)
    }

    /// What is served here.
    pub(super) fn services(&self) -> impl Iterator<Item = Service> {
        self.0.keys().copied()
    }
}

/// The GPU of that name, and what to call it.
#[cfg(all(feature = "cuda", unix))]
fn find(name: &str) -> Result<(String, Gpu), Error> {
    let driver = crate::device::cuda::Driver::get()?;
    let gpu = driver.named(name)?;
    let capability = driver.compute_capability(gpu.uuid).and_then(|(major, minor)| {
        Some(Capability { major: i32::try_from(major).ok()?, minor: i32::try_from(minor).ok()? })
    });
    Ok((gpu.uuid.to_string(), Gpu { ordinal: gpu.ordinal, capability }))
}

/// The same by ordinal alone: without the driver's layer nobody knows the GPUs' identities.
#[cfg(not(all(feature = "cuda", unix)))]
fn find(name: &str) -> Result<(String, Gpu), Error> {
    let ordinal = name.strip_prefix("cuda").and_then(|rest| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(':')?.parse().ok(),
    });
    let refused = || {
        let reason = format!("{name:?} is not a device this build knows; use cpu, cuda or cuda:N");
        crate::config::ConfigError { setting: "device", reason }
    };
    let ordinal = ordinal.ok_or_else(refused)?;
    Ok((format!("cuda:{ordinal}"), Gpu { ordinal, capability: None }))
}

#[cfg(not(feature = "torch"))]
fn without_executors(files: &[Arc<crate::model::ModelFile>], what: &str) -> ModelError {
    let what = format!("running {what} in a broker that was built without the feature torch");
    let path = files.first().map(|file| file.path().to_owned()).unwrap_or_default();
    ModelError::Unsupported { path, what }
}

/// The file of a model that is in one.
#[cfg(feature = "torch")]
fn only(files: &[Arc<ModelFile>]) -> Result<Arc<ModelFile>, ModelError> {
    match files {
        [file] => Ok(Arc::clone(file)),
        _ => Err(ModelError::Executor { what: "loading", cause: format!("the model is in {} files", files.len()) }),
    }
}

/// Turns an entry into something that runs, on the lane's thread.
#[derive(Debug)]
#[cfg_attr(not(feature = "torch"), expect(dead_code, reason = "only executors look at the settings"))]
pub(super) struct Loader {
    storage: WeightStorage,
    threads: usize,
    /// Absent for a service that is not served here.
    placement: Option<Placement>,
    /// Bytes of the model being loaded that are in place.
    loading: Arc<AtomicU64>,
    /// Where the do-nothing VAE of the lane enqueues its copies within GPU memory.
    queue: Option<Arc<dyn CopyStream>>,
    /// Made with the first model: until then a GPU serves tensors alone, which needs nothing of libtorch's.
    #[cfg(feature = "torch")]
    target: OnceLock<Target>,
}

impl Loader {
    pub(super) fn new(
        config: &BrokerConfig,
        placement: Option<Placement>,
        loading: Arc<AtomicU64>,
        queue: Option<Arc<dyn CopyStream>>,
    ) -> Self {
        Self {
            storage: if config.copy_weights { WeightStorage::Copied } else { WeightStorage::Mapped },
            threads: config.threads,
            placement,
            loading,
            queue,
            #[cfg(feature = "torch")]
            target: OnceLock::new(),
        }
    }

    pub(super) fn prepare_thread(&self) {
        #[cfg(feature = "torch")]
        if self.threads > 0 {
            torch::set_threads(self.threads);
        }
    }

    /// # Errors
    /// [`ModelError`]; [`ModelError::Cuda`] where the GPU cannot run models; [`ModelError::Unsupported`] for a file in a
    /// build without executors.
    pub(super) fn load_vae(&self, model: &ModelEntry) -> Result<Box<dyn Vae>, ModelError> {
        match model.source().open()? {
            None => Ok(Box::new(self.queue.clone().map_or_else(HandOff::default, HandOff::on))),
            #[cfg(feature = "torch")]
            Some(files) => self.load_files(&files, |files, options| load_vae(only(files)?, options)),
            #[cfg(not(feature = "torch"))]
            Some(files) => Err(without_executors(&files, "a VAE")),
        }
    }

    /// # Errors
    /// As [`Loader::load_vae`].
    pub(super) fn load_unet(&self, model: &ModelEntry) -> Result<Box<dyn Unet>, ModelError> {
        match model.source().open()? {
            None => Err(model.changed()),
            #[cfg(feature = "torch")]
            Some(files) => self
                .load_files(&files, |files, options| Ok(Box::new(load_unet(only(files)?, options)?) as Box<dyn Unet>)),
            #[cfg(not(feature = "torch"))]
            Some(files) => Err(without_executors(&files, "a UNet")),
        }
    }

    /// # Errors
    /// As [`Loader::load_vae`].
    pub(super) fn load_clip(&self, model: &ModelEntry) -> Result<Box<dyn Clip>, ModelError> {
        match model.source().open()? {
            None => Err(model.changed()),
            #[cfg(feature = "torch")]
            Some(files) => {
                self.load_files(&files, |files, options| Ok(Box::new(load_clip(files, options)?) as Box<dyn Clip>))
            }
            #[cfg(not(feature = "torch"))]
            Some(files) => Err(without_executors(&files, "text encoders")),
        }
    }

    #[cfg(feature = "torch")]
    fn load_files<M: ?Sized>(
        &self,
        files: &[Arc<ModelFile>],
        load: impl FnOnce(&[Arc<ModelFile>], LoadOptions<'_>) -> Result<Box<M>, ModelError>,
    ) -> Result<Box<M>, ModelError> {
        let started = Instant::now();
        let progress = |done: u64, _total: u64| self.loading.store(done, Ordering::Relaxed);
        let memory = HostDevice::default();
        let options =
            LoadOptions { target: self.target()?, storage: self.storage, memory: &memory, progress: &progress };
        let loaded = load(files, options);
        self.loading.store(0, Ordering::Relaxed);
        if loaded.is_ok() {
            let models: Vec<_> = files.iter().map(|file| file.path().display().to_string()).collect();
            let models = models.join(", ");
            tracing::info!(model = models, seconds = started.elapsed().as_secs_f64(), "model loaded");
        }
        loaded
    }

    /// What models run on. A GPU that cannot be opened is tried again with the next model.
    #[cfg(feature = "torch")]
    fn target(&self) -> Result<&Target, ModelError> {
        if let Some(target) = self.target.get() {
            return Ok(target);
        }
        let on_gpu = self.placement.as_ref().and_then(|placement| Some((placement.gpu?, placement.precision)));
        let target = match on_gpu {
            None => Target::Cpu,
            Some((gpu, precision)) => Target::Cuda { lane: TorchCuda::open(gpu.ordinal)?, precision },
        };
        Ok(self.target.get_or_init(|| target))
    }
}
