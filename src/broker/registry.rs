use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::loader::{CPU, Placement};
use crate::id::ModelId;
use crate::model::clip::{ClipFacts, TextEncoders, text_encoders};
use crate::model::{HandOff, ModelError, ModelFile, UnetFacts, VaeFacts, unet_facts, vae_facts};
use crate::protocol::{ClipReport, EncoderReport, MAX_ENCODER_FILES, ModelReport, UnetReport};
use crate::service::Service;

/// More models than anybody keeps in a model folder; bounds a listing's length.
const MAX_LISTED: usize = 1000;

/// More files than anybody keeps in a model folder; bounds what a listing opens.
const MAX_FILES: usize = 20_000;

/// More names than anybody asks by; bounds what a client that makes up spellings of one path can fill.
const MAX_NAMES: usize = 2000;

/// A model that can be asked for: recognised, perhaps loaded.
#[derive(Debug)]
pub(super) struct ModelEntry {
    id: ModelId,
    name: String,
    source: Source,
    facts: Facts,
    /// What it runs on, as users are told.
    device: String,
    loaded: AtomicBool,
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
}

impl Facts {
    fn service(&self) -> Service {
        match self {
            Self::Vae(_) => Service::Vae,
            Self::Unet(..) => Service::Unet,
            Self::Clip(_) => Service::Clip,
        }
    }

    fn family(&self) -> &'static str {
        match self {
            Self::Vae(facts) => facts.family,
            Self::Unet(facts, _) => facts.family,
            Self::Clip(set) => set.family(),
        }
    }

    fn weight_bytes(&self) -> u64 {
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
    /// One file, or several that are used together, by path.
    Files(Vec<Arc<ModelFile>>),
}

impl Source {
    /// The files it is in; none for a built-in model.
    pub(super) fn files(&self) -> &[Arc<ModelFile>] {
        match self {
            Self::HandOff => &[],
            Self::Files(files) => files,
        }
    }

    fn path(&self) -> Option<&Path> {
        self.files().first().map(|file| file.path())
    }

    fn is_same(&self, other: &Self) -> bool {
        let (one, two) = (self.files(), other.files());
        one.len() == two.len() && !one.is_empty() && one.iter().zip(two).all(|(one, two)| one.path() == two.path())
    }

    /// Whether the model is no longer what was recognised.
    fn is_outdated(&self) -> bool {
        self.files().iter().any(|file| file.check_unchanged().is_err())
    }

    /// What users see: the files' names, or the name of a built-in model.
    fn shown(&self, asked_for: &str) -> String {
        let name = |file: &Arc<ModelFile>| Some(file.path().file_name()?.to_string_lossy().into_owned());
        let names: Option<Vec<String>> = self.files().iter().map(name).collect();
        names.filter(|names| !names.is_empty()).map_or_else(|| asked_for.to_owned(), |names| names.join(" + "))
    }
}

impl ModelEntry {
    pub(super) fn id(&self) -> ModelId {
        self.id
    }

    pub(super) fn source(&self) -> &Source {
        &self.source
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

    fn is_no(&self, part: &'static str) -> ModelError {
        ModelError::MissingPart { path: PathBuf::from(&self.name), part, found: self.facts.service().name().to_owned() }
    }

    fn is_loaded(&self) -> bool {
        self.loaded.load(Ordering::Relaxed)
    }

    /// The error for a request that was accepted for a model which has been given up since.
    pub(super) fn changed(&self) -> ModelError {
        ModelError::Changed { path: self.source.path().map_or_else(|| PathBuf::from(&self.name), Path::to_owned) }
    }

    pub(super) fn report(&self) -> ModelReport {
        let path = self.source.path().map_or_else(String::new, |path| path.to_string_lossy().into_owned());
        let (latent_channels, ratio, unet, clip) = match &self.facts {
            Facts::Vae(facts) => (facts.latent_channels, facts.ratio, None, None),
            Facts::Unet(facts, _) => (facts.out_channels, 0, Some(unet_report(facts)), None),
            Facts::Clip(set) => (0, 0, None, Some(clip_report(set, self.source.files()))),
        };
        ModelReport {
            name: self.name.clone(),
            path,
            service: self.facts.service(),
            family: self.facts.family().to_owned(),
            loaded: self.is_loaded(),
            bytes: self.facts.weight_bytes(),
            device: self.device.clone(),
            latent_channels,
            ratio,
            unet,
            clip,
        }
    }
}

fn clip_report(set: &TextEncoders, files: &[Arc<ModelFile>]) -> ClipReport {
    let encoder = |facts: &ClipFacts| EncoderReport {
        kind: facts.kind,
        width: facts.width,
        layers: facts.trained_layers(),
        tokens: facts.tokens,
        projection: facts.projection,
    };
    ClipReport {
        files: files.iter().map(|file| file.path().to_string_lossy().into_owned()).collect(),
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

/// Models by name.
#[derive(Debug)]
pub(super) struct Registry {
    folders: Vec<PathBuf>,
    bench_models: bool,
    placement: Placement,
    next: AtomicU64,
    /// By every name under which somebody asked for them. Only what is in here is kept loaded: nobody could unload
    /// the rest.
    known: Mutex<Known>,
}

/// Models by what they were asked for by.
type Known = HashMap<Asked, Arc<ModelEntry>>;

/// What a model is asked for by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Asked {
    service: Service,
    name: String,
    /// Further files of the same set; the names are in order.
    beside: Vec<String>,
}

impl Asked {
    fn names(&self) -> impl Iterator<Item = &str> {
        [&self.name].into_iter().chain(&self.beside).map(String::as_str)
    }
}

impl Registry {
    pub(super) fn new(folders: Vec<PathBuf>, bench_models: bool, placement: Placement) -> Self {
        Self { folders, bench_models, placement, next: AtomicU64::new(1), known: Mutex::default() }
    }

    /// What models run on: `cpu`, or a GPU by a name that means the same in every process.
    pub(super) fn device(&self) -> &str {
        &self.placement.device
    }

    /// The model of a service of that name or path. Reads the header of a file that was not asked for before, or that
    /// changed while it was not loaded; loads nothing.
    ///
    /// # Errors
    /// [`ModelError`]: not found, not a model, not one with a part for this service.
    pub(super) fn resolve(&self, service: Service, name: &str) -> Result<Arc<ModelEntry>, ModelError> {
        self.find(Asked { service, name: name.to_owned(), beside: Vec::new() })
    }

    /// The text encoders in the files of these names or paths as one set, in whatever order they are named.
    ///
    /// # Errors
    /// As [`Registry::resolve`]; [`ModelError::Unsupported`] for encoders that do not go together.
    pub(super) fn resolve_set(&self, names: &[String]) -> Result<Arc<ModelEntry>, ModelError> {
        if names.len() > MAX_ENCODER_FILES {
            let what = format!("text encoding with {} files", names.len());
            return Err(ModelError::Unsupported { path: PathBuf::new(), what });
        }
        let mut names = names.to_vec();
        names.sort();
        names.dedup();
        let mut names = names.into_iter();
        // None at all is a name that nothing has.
        let name = names.next().unwrap_or_default();
        self.find(Asked { service: Service::Clip, name, beside: names.collect() })
    }

    fn find(&self, asked: Asked) -> Result<Arc<ModelEntry>, ModelError> {
        let known = self.known.lock().get(&asked).cloned();
        if let Some(entry) = known {
            // A loaded one looks at its file itself, in each call.
            if entry.is_loaded() || !entry.source.is_outdated() || !self.give_up(&entry) {
                return Ok(entry);
            }
        }
        let builtin = HandOff::facts(&asked.name).filter(|_| self.bench_models && asked.service == Service::Vae);
        if let Some(facts) = builtin {
            return Ok(self.add(asked, Source::HandOff, Facts::Vae(facts)));
        }
        let mut paths = asked.names().map(|name| self.locate(name)).collect::<Result<Vec<_>, _>>()?;
        paths.sort();
        // Two names of one file.
        paths.dedup();
        let files = paths.iter().map(|path| Ok(Arc::new(ModelFile::open(path)?)));
        let files = files.collect::<Result<Vec<_>, ModelError>>()?;
        let facts = self.recognise(asked.service, &files)?;
        Ok(self.add(asked, Source::Files(files), facts))
    }

    /// What a service finds in files; text encoders alone may be in several.
    fn recognise(&self, service: Service, files: &[Arc<ModelFile>]) -> Result<Facts, ModelError> {
        let first =
            files.first().ok_or_else(|| ModelError::NotFound { name: String::new(), searched: self.places() })?;
        Ok(match service {
            Service::Vae => Facts::Vae(self.placement.facts(vae_facts(first)?)),
            Service::Unet => {
                let facts = unet_facts(first)?;
                let sizes = UnetSizes { weight_bytes: facts.weight_bytes(self.placement.unet_precision(&facts)) };
                Facts::Unet(facts, sizes)
            }
            Service::Clip => Facts::Clip(text_encoders(&files.iter().map(AsRef::as_ref).collect::<Vec<_>>())?),
        })
    }

    /// Every part of the file of that name or path that a service runs.
    ///
    /// # Errors
    /// As [`Registry::resolve`], of the service that came closest.
    pub(super) fn parts(&self, name: &str) -> Result<Vec<Arc<ModelEntry>>, ModelError> {
        let mut parts = Vec::new();
        let mut refused = None;
        for service in Service::ALL {
            match self.resolve(service, name) {
                Ok(entry) => parts.push(entry),
                // A part that is there and cannot be run says more than one that is not there.
                Err(error @ ModelError::MissingPart { .. }) => _ = refused.get_or_insert(error),
                Err(error) => refused = Some(error),
            }
        }
        match refused {
            Some(error) if parts.is_empty() => Err(error),
            _ => Ok(parts),
        }
    }

    /// As [`Registry::parts`], with the sets that the file is a part of.
    ///
    /// # Errors
    /// As [`Registry::parts`], where it is not a part of any set either.
    pub(super) fn holding(&self, name: &str) -> Result<Vec<Arc<ModelEntry>>, ModelError> {
        let path = self.locate(name).ok();
        let holds = |asked: &Asked, entry: &ModelEntry| {
            let mut files = entry.source.files().iter();
            asked.names().any(|one| one == name) || files.any(|file| Some(file.path()) == path.as_deref())
        };
        let known = self.known.lock();
        let in_sets = known.iter().filter(|(asked, entry)| entry.source.files().len() > 1 && holds(asked, entry));
        let mut sets: Vec<_> = in_sets.map(|(_, entry)| Arc::clone(entry)).collect();
        drop(known);
        sets.sort_by_key(|entry| entry.id);
        sets.dedup_by_key(|entry| entry.id);
        match self.parts(name) {
            Ok(parts) => Ok(parts.into_iter().chain(sets).collect()),
            Err(_) if !sets.is_empty() => Ok(sets),
            Err(error) => Err(error),
        }
    }

    /// Remembers a model by what it was asked for by. Two names of one file are one model, and so are two requests at
    /// once.
    fn add(&self, key: Asked, source: Source, facts: Facts) -> Arc<ModelEntry> {
        let mut known = self.known.lock();
        if known.len() >= MAX_NAMES {
            purge(&mut known);
        }
        // Known by another name, and replaced since.
        known.retain(|_, entry| entry.is_loaded() || !entry.source.is_same(&source) || !entry.source.is_outdated());
        let is_same = |entry: &&Arc<ModelEntry>| entry.facts.service() == key.service && entry.source.is_same(&source);
        if let Some(entry) = known.values().find(is_same).cloned() {
            if known.len() < MAX_NAMES {
                known.insert(key, Arc::clone(&entry));
            }
            return entry;
        }
        let id = ModelId(self.next.fetch_add(1, Ordering::Relaxed));
        let device = match source {
            Source::HandOff => CPU.to_owned(),
            Source::Files(_) => self.placement.device.clone(),
        };
        let entry =
            ModelEntry { id, name: source.shown(&key.name), source, facts, device, loaded: AtomicBool::new(false) };
        tracing::info!(
            model = entry.name,
            service = key.service.name(),
            family = entry.facts.family(),
            bytes = entry.facts.weight_bytes(),
            "model recognised"
        );
        let entry = Arc::new(entry);
        known.insert(key, Arc::clone(&entry));
        entry
    }

    /// Forgets a model unless it has been loaded meanwhile; whether it did. The next request looks at the file anew.
    fn give_up(&self, model: &ModelEntry) -> bool {
        let mut known = self.known.lock();
        if model.is_loaded() {
            return false;
        }
        known.retain(|_, entry| entry.id != model.id);
        true
    }

    /// Whether requests still find this model.
    pub(super) fn knows(&self, model: &ModelEntry) -> bool {
        self.known.lock().values().any(|entry| entry.id == model.id)
    }

    /// Marks a model as loaded; `false` where it was given up meanwhile, and its weights must not be kept.
    pub(super) fn keep_loaded(&self, model: &ModelEntry) -> bool {
        let known = self.known.lock();
        let is_known = known.values().any(|entry| entry.id == model.id);
        model.loaded.store(is_known, Ordering::Relaxed);
        is_known
    }

    /// A model whose weights are gone keeps its file open only as long as that is the one at its path.
    pub(super) fn unloaded(&self, model: &ModelEntry) {
        model.loaded.store(false, Ordering::Relaxed);
        if model.source.is_outdated() {
            self.give_up(model);
        }
    }

    /// The file of that name or path, whatever it holds.
    ///
    /// # Errors
    /// [`ModelError::NotFound`].
    pub(super) fn locate(&self, name: &str) -> Result<PathBuf, ModelError> {
        let given = Path::new(name);
        let not_found = || ModelError::NotFound { name: name.to_owned(), searched: self.places() };
        if given.is_absolute() {
            // Missing files are the opener's to report: it knows the reason.
            return Ok(std::fs::canonicalize(given).unwrap_or_else(|_| given.to_owned()));
        }
        // A name must stay inside the folders.
        let plain = given.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        if !plain || name.is_empty() {
            return Err(not_found());
        }
        let with_extension = format!("{name}.safetensors");
        let candidates = self.folders.iter().flat_map(|folder| [folder.join(given), folder.join(&with_extension)]);
        let found = candidates.into_iter().find(|path| path.is_file()).ok_or_else(not_found)?;
        Ok(std::fs::canonicalize(&found).unwrap_or(found))
    }

    fn places(&self) -> String {
        let mut places: Vec<String> = self.folders.iter().map(|folder| folder.display().to_string()).collect();
        if places.is_empty() {
            places.push("no folder, as none was named with --models".to_owned());
        }
        places.join(", ")
    }

    /// Every model that was asked for, the do-nothing one where it is served, and everything that can be run of the files
    /// in the model folders.
    pub(super) fn list(&self) -> Vec<ModelReport> {
        let mut listed = 0;
        if self.bench_models {
            // Served whether or not somebody has asked for it.
            _ = self.resolve(Service::Vae, HandOff::NAME);
        }
        for path in self.files() {
            let name = self.relative_name(&path);
            match self.parts(&name) {
                Ok(_) if listed >= MAX_LISTED => {
                    tracing::warn!(limit = MAX_LISTED, "the model folders hold more models than are listed");
                    break;
                }
                Ok(parts) => listed += parts.len(),
                Err(error) => tracing::debug!(%name, %error, "not listed"),
            }
        }
        self.known_reports()
    }

    /// Every model that was asked for.
    pub(super) fn known_reports(&self) -> Vec<ModelReport> {
        let known = self.known.lock();
        let mut entries: Vec<&Arc<ModelEntry>> = known.values().collect();
        entries.sort_by_key(|entry| entry.id);
        entries.dedup_by_key(|entry| entry.id);
        entries.into_iter().map(|entry| entry.report()).collect()
    }

    fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut folders = self.folders.clone();
        while let Some(folder) = folders.pop() {
            let Ok(entries) = std::fs::read_dir(&folder) else { continue };
            for entry in entries.flatten() {
                // Links to folders are not followed: a circle would never end.
                let path = entry.path();
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    folders.push(path);
                } else if path.extension().is_some_and(|extension| extension == "safetensors") {
                    if files.len() == MAX_FILES {
                        tracing::warn!(
                            limit = MAX_FILES,
                            "the model folders hold more files than are looked at for a listing"
                        );
                        folders.clear();
                        break;
                    }
                    files.push(path);
                }
            }
        }
        files.sort();
        files
    }

    fn relative_name(&self, path: &Path) -> String {
        let relative = self.folders.iter().find_map(|folder| path.strip_prefix(folder).ok());
        relative.unwrap_or(path).to_string_lossy().into_owned()
    }
}

/// Forgets every model that is neither loaded nor waited for.
fn purge(known: &mut Known) {
    let mut names: HashMap<ModelId, usize> = HashMap::new();
    for entry in known.values() {
        *names.entry(entry.id).or_default() += 1;
    }
    // Whoever is given an entry is given it under the lock: no other owner can come up meanwhile.
    known.retain(|_, entry| {
        entry.is_loaded() || Arc::strong_count(entry) > names.get(&entry.id).copied().unwrap_or_default()
    });
}
