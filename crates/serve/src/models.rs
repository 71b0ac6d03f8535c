//! The models of a server, which come and go while requests run.
//!
//! A base has an engine on a thread of its own; adapters over it share that engine, its batches and its weights. A
//! request holds the model that it was given: one that is replaced or removed answers those that have begun.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;

use bantam_engine::Embedder;
use bantam_text::{Chat, ConstraintEngine};

use crate::error::{ApiError, ServeError};
use crate::residents::{Resident, Residents, Source};
use crate::served::{ServedAdapter, ServedEmbedder, ServedModel};
use crate::worker::Worker;

/// The memory for adapters, unless it is given.
pub const ADAPTER_BYTES: usize = 1 << 30;

/// A model that may be asked for.
pub(crate) struct Model {
    pub(crate) id: String,
    /// Other names that requests may ask for it by.
    pub(crate) aliases: Vec<String>,
    /// For its adapters alone.
    hidden: bool,
    pub(crate) created: u64,
    pub(crate) owned_by: String,
    /// Was it trained here, so that it may be taken away by a request?
    pub(crate) tuned: bool,
    pub(crate) chat: Arc<Chat>,
    pub(crate) constraints: ConstraintEngine,
    pub(crate) default_temperature: f32,
    embedder: Option<Arc<dyn Embedder>>,
    /// What log-likelihoods are divided by, if that was fitted.
    pub(crate) calibration: Option<f64>,
    pub(crate) worker: Arc<Worker>,
    /// The base's name and where the adapter comes from, if it is one over a base.
    adapter: Option<(String, Source)>,
}

impl Model {
    fn is_called(&self, name: &str) -> bool {
        self.id == name || self.aliases.iter().any(|alias| alias == name)
    }

    /// The base that it is an adapter over.
    pub(crate) fn base(&self) -> Option<&str> {
        self.adapter.as_ref().map(|(base, _)| base.as_str())
    }
}

/// The models of a server. The server and whoever trains for it hold the same.
pub struct Models {
    models: RwLock<Vec<Arc<Model>>>,
    embedders: RwLock<Vec<Arc<ServedEmbedder>>>,
    residents: Residents,
    /// Held by the request whose adapter, or model of vectors, is being read: the others wait where that costs no
    /// thread.
    reading: tokio::sync::Semaphore,
    fetching: tokio::sync::Semaphore,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Held while models are added or removed, so that a name is given once.
    change: Mutex<()>,
}

impl Default for Models {
    fn default() -> Self {
        Self::new(ADAPTER_BYTES)
    }
}

impl Models {
    /// None yet, and at most so many bytes of adapters in memory.
    pub fn new(adapter_bytes_max: usize) -> Self {
        Self {
            models: RwLock::default(),
            embedders: RwLock::default(),
            residents: Residents::new(adapter_bytes_max),
            reading: tokio::sync::Semaphore::new(1),
            fetching: tokio::sync::Semaphore::new(1),
            threads: Mutex::default(),
            change: Mutex::default(),
        }
    }

    /// Adds a base and starts its engine.
    pub fn add(&self, model: ServedModel) -> Result<(), ServeError> {
        let _change = self.changing();
        let names = || std::iter::once(&model.id).chain(&model.aliases);
        self.check_names(names(), None)?;
        let (worker, thread) = Worker::start(&model.id, model.engine, model.fits)?;
        self.threads().push(thread);
        self.place(Model {
            id: model.id,
            aliases: model.aliases,
            hidden: model.hidden,
            created: model.created,
            owned_by: model.owned_by,
            tuned: model.tuned,
            chat: model.chat,
            constraints: model.constraints,
            default_temperature: model.default_temperature,
            embedder: model.embedder,
            calibration: model.calibration,
            worker: Arc::new(worker),
            adapter: None,
        });
        Ok(())
    }

    /// Adds an adapter over a base that is served, or replaces the adapter of that name, which then answers only what
    /// it has begun. The adapter is read at once, so that one that cannot be read is told of here; the base and its
    /// running requests do not notice.
    pub fn add_adapter(&self, adapter: ServedAdapter) -> Result<(), ServeError> {
        let _change = self.changing();
        let failed = |reason: String| ServeError::Load {
            id: adapter.id.clone(),
            reason,
        };
        let base = self.all().into_iter().find(|m| m.id == adapter.base);
        let base = base
            .filter(|base| base.adapter.is_none())
            .ok_or_else(|| failed(format!("its base `{}` is not served", adapter.base)))?;
        let names = std::iter::once(&adapter.id).chain(&adapter.aliases);
        self.check_names(names, Some(&adapter.id))?;
        let source = Source::new(&adapter.id, Arc::clone(&base.worker), adapter.load);
        match self.residents.get(&source) {
            Ok(_) => {}
            // Others fill the memory for now: it is read when it is asked for.
            Err(error) if error == ApiError::busy() => {}
            Err(_) => {
                return Err(ServeError::Load {
                    id: adapter.id,
                    reason: "its adapter cannot be used; the log says why".to_string(),
                });
            }
        }
        self.place(Model {
            id: adapter.id,
            aliases: adapter.aliases,
            hidden: false,
            created: adapter.created,
            owned_by: adapter.owned_by,
            tuned: true,
            chat: Arc::clone(&base.chat),
            constraints: base.constraints.clone(),
            default_temperature: adapter.default_temperature,
            embedder: None,
            calibration: adapter.calibration,
            worker: Arc::clone(&base.worker),
            adapter: Some((adapter.base, source)),
        });
        Ok(())
    }

    /// Adds a model that only makes vectors.
    pub fn add_embedder(&self, embedder: ServedEmbedder) -> Result<(), ServeError> {
        let _change = self.changing();
        let names = std::iter::once(&embedder.id).chain(&embedder.aliases);
        self.check_names(names, None)?;
        let mut embedders = (self.embedders.write()).unwrap_or_else(PoisonError::into_inner);
        embedders.push(Arc::new(embedder));
        Ok(())
    }

    /// Serves a model no more; `false` if there was none of this name, or it is a base that adapters are over. What
    /// runs on it ends first.
    pub fn remove(&self, id: &str) -> bool {
        let _change = self.changing();
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        if models.iter().any(|model| model.base() == Some(id)) {
            return false;
        }
        let at = models.iter().position(|model| model.id == id);
        let gone = at.map(|at| models.remove(at));
        drop(models);
        if let Some((_, source)) = gone.as_ref().and_then(|model| model.adapter.as_ref()) {
            self.residents.forget(source);
        }
        gone.is_some()
    }

    /// The names of the models that may be asked for an answer, in the order they were added.
    pub fn ids(&self) -> Vec<String> {
        self.listed().iter().map(|model| model.id.clone()).collect()
    }

    /// Whether something is called so: a model, a hidden base, a model of vectors, or another name of one.
    pub fn has(&self, name: &str) -> bool {
        self.all().iter().any(|model| model.is_called(name))
            || self.embedders().iter().any(|one| one.is_called(name))
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Each name must be free, or of the model that is to be replaced.
    fn check_names<'a>(
        &self,
        names: impl Iterator<Item = &'a String>,
        replaced: Option<&str>,
    ) -> Result<(), ServeError> {
        let (models, embedders) = (self.all(), self.embedders());
        let mut own: Vec<&String> = Vec::new();
        for name in names {
            let mut others =
                (models.iter()).filter(|m| Some(m.id.as_str()) != replaced || m.adapter.is_none());
            let is_taken = others.any(|model| model.is_called(name))
                || embedders.iter().any(|one| one.is_called(name))
                || own.contains(&name);
            if is_taken {
                return Err(ServeError::Models(format!(
                    "two models are called `{name}`"
                )));
            }
            own.push(name);
        }
        Ok(())
    }

    /// Puts a model in the place of the one of its name, or at the end.
    fn place(&self, model: Model) {
        let model = Arc::new(model);
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        let before = match models.iter_mut().find(|other| other.id == model.id) {
            Some(other) => Some(std::mem::replace(other, model)),
            None => {
                models.push(model);
                None
            }
        };
        drop(models);
        if let Some((_, source)) = before.as_ref().and_then(|model| model.adapter.as_ref()) {
            self.residents.forget(source);
        }
    }

    /// The model that a request asks for.
    pub(crate) fn find(&self, name: &str) -> Result<Arc<Model>, ApiError> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let found = models.iter().find(|m| !m.hidden && m.is_called(name));
        found.cloned().ok_or_else(|| ApiError::no_model(name))
    }

    /// All models that may be asked for, in the order they were added.
    pub(crate) fn listed(&self) -> Vec<Arc<Model>> {
        let mut all = self.all();
        all.retain(|model| !model.hidden);
        all
    }

    /// The models with an engine of their own.
    pub(crate) fn bases(&self) -> Vec<Arc<Model>> {
        let mut all = self.all();
        all.retain(|model| model.adapter.is_none());
        all
    }

    fn all(&self) -> Vec<Arc<Model>> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models.clone()
    }

    pub(crate) fn embedders(&self) -> Vec<Arc<ServedEmbedder>> {
        let embedders = (self.embedders.read()).unwrap_or_else(PoisonError::into_inner);
        embedders.clone()
    }

    /// What requests to this model run with besides its base: in memory from now until it is let go of.
    pub(crate) async fn resident(
        self: &Arc<Self>,
        model: &Arc<Model>,
    ) -> Result<Option<Arc<Resident>>, ApiError> {
        let Some((_, source)) = &model.adapter else {
            return Ok(None);
        };
        if let Some(found) = self.residents.find(source) {
            return Ok(Some(found));
        }
        let _turn = self.reading.acquire().await;
        let (models, model) = (Arc::clone(self), Arc::clone(model));
        let reading = tokio::task::spawn_blocking(move || match &model.adapter {
            Some((_, source)) => models.residents.get(source).map(Some),
            None => Ok(None),
        });
        (reading.await).map_err(|_| ApiError::internal("the adapter could not be read"))?
    }

    /// Whether the model could begin to answer without reading a file.
    pub(crate) fn is_in_memory(&self, model: &Model) -> bool {
        model
            .adapter
            .as_ref()
            .is_none_or(|(_, source)| self.residents.has(source))
    }

    /// How many adapters are in memory, and their bytes.
    pub(crate) fn resident_size(&self) -> (usize, usize) {
        self.residents.size()
    }

    /// What turns texts into vectors under this name, its own name, and what is to be held meanwhile.
    pub(crate) async fn embedder(self: &Arc<Self>, name: &str) -> Result<Vectors, ApiError> {
        if let Some(one) = self.embedders().into_iter().find(|one| one.is_called(name)) {
            let id = one.id.clone();
            if let Some(embedder) = one.if_loaded() {
                return Ok(Vectors {
                    id,
                    embedder,
                    _resident: None,
                });
            }
            let _turn = self.fetching.acquire().await;
            let loading = tokio::task::spawn_blocking(move || one.get()).await;
            let loaded = loading.unwrap_or_else(|_| Err("it panicked".to_string()));
            let embedder = loaded.map_err(|reason| {
                tracing::error!(model = id, reason, "a model could not be loaded");
                ApiError::not_loaded(&id)
            })?;
            return Ok(Vectors {
                id,
                embedder,
                _resident: None,
            });
        }
        let model = self.find(name)?;
        let resident = self.resident(&model).await?;
        let embedder = match &resident {
            Some(resident) => resident.embedder.clone(),
            None => model.embedder.clone(),
        };
        let embedder = embedder.ok_or_else(|| {
            ApiError::unsupported("model", format!("the model `{name}` makes no embeddings"))
        })?;
        Ok(Vectors {
            id: model.id.clone(),
            embedder,
            _resident: resident,
        })
    }

    /// Lets go of all models and waits for their engines to end.
    pub(crate) fn close(&self) {
        let _change = self.changing();
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        let gone = std::mem::take(&mut *models);
        drop(models);
        self.residents.clear();
        drop(gone);
        let threads = std::mem::take(&mut *self.threads());
        for thread in threads {
            // A panic of an engine was seen when it stopped.
            let _ = thread.join();
        }
    }
}

/// A model that turns texts into vectors, while it is held.
pub(crate) struct Vectors {
    pub(crate) id: String,
    pub(crate) embedder: Arc<dyn Embedder>,
    _resident: Option<Arc<Resident>>,
}
