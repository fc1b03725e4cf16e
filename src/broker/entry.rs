use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::usage::Usage;
use super::weights::PublishedModel;
use crate::id::ModelId;
use crate::model::clip::{ClipFacts, TextEncoders};
use crate::model::{ModelError, ModelFile, StackMaker, UnetFacts, VaeFacts};
use crate::protocol::{ClipReport, EncoderReport, ModelReport, UnetReport};
use crate::service::{Precision, Service};

/// A model that can be asked for: recognised, perhaps loaded.
#[derive(Debug)]
pub(super) struct ModelEntry {
    pub(super) id: ModelId,
    pub(super) name: String,
    pub(super) source: Source,
    pub(super) facts: Facts,
    /// What it runs on, as users are told.
    pub(super) device: String,
    pub(super) loaded: AtomicBool,
    /// What puts adapters together for it; only while it is loaded.
    pub(super) stack_maker: Mutex<Option<Arc<dyn StackMaker>>>,
    pub(super) usage: Usage,
}

/// What is known of a model before it is loaded.
#[derive(Debug)]
pub(super) enum Facts {
    Vae(VaeFacts),
    Unet(UnetFacts, UnetSizes),
    Clip(TextEncoders),
}

/// What a UNet takes in the element type that it computes in here.
#[derive(Debug, Clone, Copy)]
pub(super) struct UnetSizes {
    pub(super) weight_bytes: u64,
    pub(super) precision: Precision,
}

impl Facts {
    pub(super) fn service(&self) -> Service {
        match self {
            Self::Vae(_) => Service::Vae,
            Self::Unet(..) => Service::Unet,
            Self::Clip(_) => Service::Clip,
        }
    }

    pub(super) fn family(&self) -> &'static str {
        match self {
            Self::Vae(facts) => facts.family,
            Self::Unet(facts, _) => facts.family,
            Self::Clip(set) => set.family(),
        }
    }

    pub(super) fn weight_bytes(&self) -> u64 {
        match self {
            Self::Vae(facts) => facts.weight_bytes,
            Self::Unet(_, sizes) => sizes.weight_bytes,
            Self::Clip(set) => set.weight_bytes(),
        }
    }
}

/// Where a model comes from.
#[derive(Debug)]
pub(super) enum Source {
    HandOff,
    /// One, or several that are used together, in the order of their names.
    Parts(Vec<Part>),
}

/// A file, or a set of tensors that a client published.
#[derive(Debug)]
pub(super) enum Part {
    File(Arc<ModelFile>),
    Published(PublishedModel),
}

/// Where an adapter is.
#[derive(Debug, Clone)]
pub(super) enum AdapterPlace {
    File(PathBuf),
    Published(PublishedModel),
}

impl Part {
    /// The path of a file, or the name that a set was published under.
    pub(super) fn place(&self) -> &Path {
        match self {
            Self::File(file) => file.path(),
            Self::Published(set) => Path::new(set.name()),
        }
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(one), Self::File(two)) => one.path() == two.path(),
            (Self::Published(one), Self::Published(two)) => one.is_same(two),
            (Self::File(_), Self::Published(_)) | (Self::Published(_), Self::File(_)) => false,
        }
    }

    /// Its tensors. A published set is held from here on until the value goes.
    ///
    /// # Errors
    /// As [`PublishedModel::open`].
    pub(super) fn open(&self) -> Result<Arc<ModelFile>, ModelError> {
        match self {
            Self::File(file) => Ok(Arc::clone(file)),
            Self::Published(set) => set.open(),
        }
    }

    fn is_outdated(&self) -> bool {
        match self {
            Self::File(file) => file.check_unchanged().is_err(),
            Self::Published(set) => set.is_outdated(),
        }
    }

    fn path(&self) -> Option<&Path> {
        match self {
            Self::File(file) => Some(file.path()),
            Self::Published(_) => None,
        }
    }

    fn shown(&self) -> Option<String> {
        match self {
            Self::File(file) => Some(file.path().file_name()?.to_string_lossy().into_owned()),
            Self::Published(set) => Some(set.name().to_owned()),
        }
    }
}

impl Source {
    /// What it is put together from; nothing for a built-in model.
    pub(super) fn parts(&self) -> &[Part] {
        match self {
            Self::HandOff => &[],
            Self::Parts(parts) => parts,
        }
    }

    /// The paths of what of it is in files.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.parts().iter().filter_map(Part::path)
    }

    pub(super) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Parts(one), Self::Parts(two)) => {
                one.len() == two.len() && one.iter().zip(two).all(|(one, two)| one.is_same(two))
            }
            _ => false,
        }
    }

    /// The tensors, by part; none of a built-in model. Published sets are held from here on until the value goes.
    ///
    /// # Errors
    /// As [`PublishedModel::open`].
    pub(super) fn open(&self) -> Result<Option<Vec<Arc<ModelFile>>>, ModelError> {
        match self {
            Self::HandOff => Ok(None),
            Self::Parts(parts) => parts.iter().map(Part::open).collect::<Result<_, _>>().map(Some),
        }
    }

    /// Whether the model is no longer what was recognised.
    pub(super) fn is_outdated(&self) -> bool {
        self.parts().iter().any(Part::is_outdated)
    }

    /// What users see: the names of files and published sets, or the name of a built-in model.
    pub(super) fn shown(&self, asked_for: &str) -> String {
        let names: Option<Vec<String>> = self.parts().iter().map(Part::shown).collect();
        names.filter(|names| !names.is_empty()).map_or_else(|| asked_for.to_owned(), |names| names.join(" + "))
    }
}

impl ModelEntry {
    pub(super) fn id(&self) -> ModelId {
        self.id
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn device(&self) -> &str {
        &self.device
    }

    pub(super) fn source(&self) -> &Source {
        &self.source
    }

    pub(super) fn usage(&self) -> &Usage {
        &self.usage
    }

    pub(super) fn weight_bytes(&self) -> u64 {
        self.facts.weight_bytes()
    }

    pub(super) fn service(&self) -> Service {
        self.facts.service()
    }

    /// What is known of a VAE.
    ///
    /// # Errors
    /// [`ModelError::MissingPart`] for a model of another service, which requests for a VAE do not find.
    pub(super) fn vae(&self) -> Result<&VaeFacts, ModelError> {
        match &self.facts {
            Facts::Vae(facts) => Ok(facts),
            Facts::Unet(..) | Facts::Clip(_) => Err(self.is_no("VAE")),
        }
    }

    /// As [`ModelEntry::vae`], of a UNet.
    ///
    /// # Errors
    /// As [`ModelEntry::vae`].
    pub(super) fn unet(&self) -> Result<&UnetFacts, ModelError> {
        match &self.facts {
            Facts::Unet(facts, _) => Ok(facts),
            Facts::Vae(_) | Facts::Clip(_) => Err(self.is_no("UNet")),
        }
    }

    /// As [`ModelEntry::vae`], of text encoders.
    ///
    /// # Errors
    /// As [`ModelEntry::vae`].
    pub(super) fn clip(&self) -> Result<&TextEncoders, ModelError> {
        match &self.facts {
            Facts::Clip(set) => Ok(set),
            Facts::Vae(_) | Facts::Unet(..) => Err(self.is_no("CLIP text encoder")),
        }
    }

    /// The element type that a UNet computes in here.
    pub(super) fn unet_precision(&self) -> Precision {
        match &self.facts {
            Facts::Unet(_, sizes) => sizes.precision,
            Facts::Vae(_) | Facts::Clip(_) => Precision::F32,
        }
    }

    /// What puts adapters together for it, where it is loaded.
    pub(super) fn stack_maker(&self) -> Option<Arc<dyn StackMaker>> {
        self.stack_maker.lock().clone()
    }

    /// The model is loaded: who puts adapters together for it may use its weights.
    pub(super) fn lend(&self, make: impl FnOnce() -> Arc<dyn StackMaker>) {
        let mut lent = self.stack_maker.lock();
        if lent.is_none() {
            *lent = Some(make());
        }
    }

    fn is_no(&self, part: &'static str) -> ModelError {
        ModelError::MissingPart { path: PathBuf::from(&self.name), part, found: self.facts.service().name().to_owned() }
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.loaded.load(Ordering::Relaxed)
    }

    /// The error for a request that was accepted for a model which has been given up since.
    pub(super) fn changed(&self) -> ModelError {
        let first = self.source.parts().first();
        ModelError::Changed { path: first.map_or_else(|| PathBuf::from(&self.name), |part| part.place().to_owned()) }
    }

    pub(super) fn report(&self) -> ModelReport {
        let path = self.source.paths().next().map_or_else(String::new, |path| path.to_string_lossy().into_owned());
        let (latent_channels, ratio, unet, clip) = match &self.facts {
            Facts::Vae(facts) => (facts.latent_channels, facts.ratio, None, None),
            Facts::Unet(facts, _) => (facts.out_channels, 0, Some(unet_report(facts)), None),
            Facts::Clip(set) => (0, 0, None, Some(clip_report(set, &self.source))),
        };
        ModelReport {
            name: self.name.clone(),
            path,
            service: self.facts.service(),
            family: self.facts.family().to_owned(),
            loaded: self.is_loaded(),
            bytes: self.facts.weight_bytes(),
            device: self.device.clone(),
            users: self.usage.users() as u64,
            idle_s: self.usage.idle().map(|idle| idle.as_secs_f64()),
            latent_channels,
            ratio,
            unet,
            clip,
            registered_by: None,
        }
    }
}

fn clip_report(set: &TextEncoders, source: &Source) -> ClipReport {
    let encoder = |facts: &ClipFacts| EncoderReport {
        kind: facts.kind,
        width: facts.width,
        layers: facts.trained_layers(),
        tokens: facts.tokens,
        projection: facts.projection,
    };
    ClipReport {
        files: source.paths().map(|path| path.to_string_lossy().into_owned()).collect(),
        encoders: set.encoders().iter().map(encoder).collect(),
    }
}

fn unet_report(facts: &UnetFacts) -> UnetReport {
    UnetReport {
        variant: facts.variant.name().to_owned(),
        prediction: facts.prediction.name().to_owned(),
        zero_terminal_snr: facts.zero_terminal_snr,
        in_channels: facts.in_channels,
        context_width: facts.context_width,
        vector_width: facts.vector_width,
    }
}
