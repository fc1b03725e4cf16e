use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::adapters::Adapters;
use super::entry::{AdapterPlace, Facts, ModelEntry, Part, Source, UnetSizes};
use super::folders::Folders;
use super::loader::{CPU, Placement, Placements};
use super::registered::Registered;
use super::residents::Residents;
use super::usage::Usage;
use super::weights::{PublishedModel, Weights};
use crate::config::BrokerConfig;
use crate::id::{ModelId, SessionId};
use crate::metrics::Evictions;
use crate::model::clip::text_encoders;
use crate::model::{HandOff, ModelError, ModelFile, unet_facts, vae_facts};
use crate::protocol::{MAX_ENCODER_FILES, ModelReport};
use crate::service::Service;

/// More models than anybody keeps in a model folder; bounds a listing's length.
const MAX_LISTED: usize = 1000;

/// More names than anybody asks by; bounds what a client that makes up spellings of one path can fill.
const MAX_NAMES: usize = 2000;

/// Models by name.
#[derive(Debug)]
pub(super) struct Registry {
    models: Folders,
    adapters: Folders,
    weights: Arc<Weights>,
    stacks: Arc<Adapters>,
    bench_models: bool,
    placements: Placements,
    residents: Residents,
    registered: Registered,
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
    pub(super) fn new(
        config: &BrokerConfig,
        placements: Placements,
        evictions: Evictions,
        weights: Arc<Weights>,
        stacks: Arc<Adapters>,
    ) -> Self {
        Self {
            models: Folders::of_models(config.model_folders.clone()),
            adapters: Folders::of_adapters(config.adapter_folders.clone()),
            weights,
            stacks,
            bench_models: config.bench_models,
            placements,
            residents: Residents::new(config.model_bytes, config.model_idle, evictions),
            registered: Registered::default(),
            next: AtomicU64::new(1),
            known: Mutex::default(),
        }
    }

    /// What the models of a service run on: `cpu`, or a GPU by a name that means the same in every process. Absent for one
    /// that is not served here.
    pub(super) fn device(&self, service: Service) -> Option<&str> {
        self.placements.of(service).map(|placement| placement.device.as_str())
    }

    /// What the models of a service run on.
    ///
    /// # Errors
    /// [`ModelError::NotServed`].
    pub(super) fn placement(&self, service: Service) -> Result<&Placement, ModelError> {
        self.placements.of(service).ok_or_else(|| ModelError::NotServed {
            service: service.name(),
            served: self.placements.services().map(Service::name).collect::<Vec<_>>().join(", "),
        })
    }

    /// The models that the lanes hold.
    pub(super) fn residents(&self) -> &Residents {
        &self.residents
    }

    /// The models that sessions hold themselves.
    pub(super) fn registered(&self) -> &Registered {
        &self.registered
    }

    /// A session that is over uses no model any more.
    pub(super) fn end_session(&self, session: SessionId) {
        self.registered.end_session(session);
        self.known.lock().values().for_each(|model| model.usage.forget_user(session));
    }

    /// The model of a service of that name or path. Reads the header of a file that was not asked for before, or that
    /// changed while it was not loaded; loads nothing.
    ///
    /// # Errors
    /// [`ModelError`]: not found, not a model, not one with a part for this service.
    pub(super) fn resolve(&self, service: Service, name: &str) -> Result<Arc<ModelEntry>, ModelError> {
        self.find(Asked { service, name: name.to_owned(), beside: Vec::new() })
    }

    /// The text encoders in the files and published sets of these names or paths as one set, in whatever order they are named.
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
        self.placement(asked.service)?;
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
        if let ([], name) = (asked.beside.as_slice(), asked.name.as_str()) {
            let paths = self.models.all(name);
            // A file goes before a set of its name, which could not be published while the file was there.
            if let Some(set) = self.published(&paths, name) {
                return self.put_together(asked, vec![Part::Published(set)]);
            }
            let mut refused = None;
            for path in paths {
                let part = Part::File(Arc::new(ModelFile::open(&path)?));
                match self.put_together(asked.clone(), vec![part]) {
                    // Folders by kind may each have a file of this name, with a part of their kind in it.
                    Err(error @ ModelError::MissingPart { .. }) => _ = refused.get_or_insert(error),
                    found => return found,
                }
            }
            return Err(refused.unwrap_or_else(|| self.models.not_found(name)));
        }
        let mut parts = asked.names().map(|name| self.part(name)).collect::<Result<Vec<_>, _>>()?;
        parts.sort_by(|one, other| one.place().cmp(other.place()));
        // Two names of one file.
        parts.dedup_by(|one, other| one.is_same(other));
        self.put_together(asked, parts)
    }

    /// What is run under a name as part of a set: the first file of that name, or else what was published under it.
    fn part(&self, name: &str) -> Result<Part, ModelError> {
        let paths = self.models.all(name);
        if let Some(set) = self.published(&paths, name) {
            return Ok(Part::Published(set));
        }
        let path = paths.first().ok_or_else(|| self.models.not_found(name))?;
        Ok(Part::File(Arc::new(ModelFile::open(path)?)))
    }

    /// Recognises a model in its parts, and remembers it.
    fn put_together(&self, asked: Asked, parts: Vec<Part>) -> Result<Arc<ModelEntry>, ModelError> {
        let files = parts.iter().map(Part::open).collect::<Result<Vec<_>, _>>()?;
        let facts = self.recognise(asked.service, &files)?;
        Ok(self.add(asked, Source::Parts(parts), facts))
    }

    /// The set published under a name that no file has.
    fn published(&self, files: &[PathBuf], name: &str) -> Option<PublishedModel> {
        let is_file = files.iter().any(|path| path.is_file());
        if is_file { None } else { self.weights.published_model(name) }
    }

    /// What a service finds in files; text encoders alone may be in several.
    ///
    /// # Errors
    /// [`ModelError`]: no such part, or none that can be run.
    fn recognise(&self, service: Service, files: &[Arc<ModelFile>]) -> Result<Facts, ModelError> {
        let first = files.first().ok_or_else(|| self.models.not_found(""))?;
        let placement = self.placement(service)?;
        Ok(match service {
            Service::Vae => Facts::Vae(placement.facts(vae_facts(first)?)),
            Service::Unet => {
                let facts = unet_facts(first)?;
                let precision = placement.unet_precision(&facts);
                let sizes = UnetSizes { weight_bytes: facts.weight_bytes(precision), precision };
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
        for service in self.placements.services() {
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
            asked.names().any(|one| one == name) || entry.source.paths().any(|own| Some(own) == path.as_deref())
        };
        let known = self.known.lock();
        let in_sets = known.iter().filter(|(asked, entry)| entry.source.parts().len() > 1 && holds(asked, entry));
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
            Source::Parts(_) => self.device(key.service).unwrap_or(CPU).to_owned(),
        };
        let entry = ModelEntry {
            id,
            name: source.shown(&key.name),
            source,
            facts,
            device,
            loaded: AtomicBool::new(false),
            stack_maker: Mutex::default(),
            usage: Usage::default(),
        };
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

    /// What adapters made of a model goes with its weights. It keeps its file open only as long as that is the one at its
    /// path.
    pub(super) fn unloaded(&self, model: &ModelEntry) {
        model.loaded.store(false, Ordering::Relaxed);
        let lent = model.stack_maker.lock().take();
        drop(lent);
        model.usage.forget_users();
        self.residents.forget(model.id);
        self.stacks.forget(model.id);
        if model.source.is_outdated() {
            self.give_up(model);
        }
    }

    /// The file of that name or path, whatever it holds.
    ///
    /// # Errors
    /// [`ModelError::NotFound`].
    pub(super) fn locate(&self, name: &str) -> Result<PathBuf, ModelError> {
        self.models.first(name)
    }

    /// The adapter of that name or path, or the set of tensors that was published under that name.
    ///
    /// # Errors
    /// [`ModelError::NotFound`].
    pub(super) fn locate_adapter(&self, name: &str) -> Result<AdapterPlace, ModelError> {
        let paths = self.adapters.all(name);
        if let Some(set) = self.published(&paths, name) {
            return Ok(AdapterPlace::Published(set));
        }
        paths.into_iter().next().map(AdapterPlace::File).ok_or_else(|| self.adapters.not_found(name))
    }

    /// Every model that was asked for, the do-nothing one where it is served, and everything that can be run of the files
    /// in the model folders.
    pub(super) fn list(&self) -> Vec<ModelReport> {
        let mut listed = 0;
        if self.bench_models && self.placement(Service::Vae).is_ok() {
            // Served whether or not somebody has asked for it.
            _ = self.resolve(Service::Vae, HandOff::NAME);
        }
        for path in self.models.files() {
            let name = self.models.relative_name(&path);
            match self.parts(&name) {
                Ok(_) if listed >= MAX_LISTED => {
                    tracing::warn!(limit = MAX_LISTED, "the model folders hold more models than are listed");
                    break;
                }
                Ok(parts) => listed += parts.len(),
                Err(error) => tracing::debug!(%name, %error, "not listed"),
            }
        }
        self.reports()
    }

    /// Every model that was asked for, and those that sessions hold themselves.
    pub(super) fn reports(&self) -> Vec<ModelReport> {
        let mut reports = self.known_reports();
        reports.extend(self.registered.reports());
        reports
    }

    /// Every model that was asked for.
    pub(super) fn known_reports(&self) -> Vec<ModelReport> {
        let known = self.known.lock();
        let mut entries: Vec<&Arc<ModelEntry>> = known.values().collect();
        entries.sort_by_key(|entry| entry.id);
        entries.dedup_by_key(|entry| entry.id);
        entries.into_iter().map(|entry| entry.report()).collect()
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
