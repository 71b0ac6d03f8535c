//! What may be served: a base with an engine, an adapter over a base, a model that only makes vectors.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bantam_engine::{Embedder, Engine, LanguageModel};
use bantam_text::{Chat, ConstraintEngine};

use crate::worker::Generator;

/// Builds the engine, on the thread that will run it.
pub(crate) type EngineFactory = Box<dyn FnOnce() -> Result<Box<dyn Generator>, String> + Send>;

/// A base model with what it takes to talk to it. It has an engine of its own, which its adapters share.
pub struct ServedModel {
    /// The name that requests and adapters ask for.
    pub id: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// Is it here for its adapters alone, so that no request may ask for it?
    pub hidden: bool,
    /// Was it trained here? Only then may a request take it away.
    pub tuned: bool,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Whose it is.
    pub owned_by: String,
    /// Renders prompts, knows where an answer ends.
    pub chat: Arc<Chat>,
    /// Compiles `response_format` and the `guided_*` fields.
    pub constraints: ConstraintEngine,
    /// The temperature of a request that names none; OpenAI's is 1.
    pub default_temperature: f32,
    /// Turns texts into vectors; without it `/v1/embeddings` refuses this model.
    pub embedder: Option<Arc<dyn Embedder>>,
    /// What `/v1/decisions` divides log-likelihoods by, if that was fitted for this model.
    pub calibration: Option<f64>,
    pub(crate) engine: EngineFactory,
    /// Whether something is an adapter of this kind of model.
    pub(crate) fits: fn(&dyn Any) -> bool,
}

impl ServedModel {
    /// A model; `engine` is called once, on the thread that the engine will live on.
    pub fn new<M, E>(
        id: impl Into<String>,
        chat: Arc<Chat>,
        constraints: ConstraintEngine,
        engine: impl FnOnce() -> Result<Engine<M>, E> + Send + 'static,
    ) -> Self
    where
        M: LanguageModel + 'static,
        M::Adapter: Sized + Send + Sync + 'static,
        E: fmt::Display,
    {
        Self {
            id: id.into(),
            aliases: Vec::new(),
            hidden: false,
            tuned: false,
            created: 0,
            owned_by: "bantam".to_string(),
            chat,
            constraints,
            default_temperature: 1.0,
            embedder: None,
            calibration: None,
            engine: Box::new(move || match engine() {
                Ok(engine) => Ok(Box::new(engine)),
                Err(error) => Err(error.to_string()),
            }),
            fits: |adapter| adapter.is::<M::Adapter>(),
        }
    }
}

/// Reads an adapter; called on a thread that may block, as often as the adapter is needed again.
pub(crate) type LoadAdapter = Box<dyn Fn() -> Result<LoadedAdapter, String> + Send + Sync>;

/// An adapter over a served base: a model of its own to those who ask. It is in memory while it is used, and for as
/// long after that as the memory for adapters allows.
pub struct ServedAdapter {
    /// The name that requests ask for.
    pub id: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// [`ServedModel::id`] of the base.
    pub base: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// Whose it is.
    pub owned_by: String,
    /// The temperature of a request that names none.
    pub default_temperature: f32,
    /// What `/v1/decisions` divides log-likelihoods by, if that was fitted for this adapter.
    pub calibration: Option<f64>,
    pub(crate) load: LoadAdapter,
}

impl ServedAdapter {
    /// An adapter over `base`. A specialised model was judged on its likeliest answers, so that is what a plain request
    /// gets.
    pub fn new(
        id: impl Into<String>,
        base: impl Into<String>,
        load: impl Fn() -> Result<LoadedAdapter, String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            id: id.into(),
            aliases: Vec::new(),
            base: base.into(),
            created: 0,
            owned_by: "bantam".to_string(),
            default_temperature: 0.0,
            calibration: None,
            load: Box::new(load),
        }
    }
}

/// An adapter in memory.
pub struct LoadedAdapter {
    pub(crate) adapter: Arc<dyn Any + Send + Sync>,
    pub(crate) bytes: usize,
    pub(crate) embedder: Option<Arc<dyn Embedder>>,
}

impl LoadedAdapter {
    /// An adapter of so many bytes, of the kind that the base's [`LanguageModel`] takes.
    pub fn new<A: Send + Sync + 'static>(adapter: Arc<A>, bytes: usize) -> Self {
        Self {
            adapter,
            bytes,
            embedder: None,
        }
    }

    /// Turns texts into vectors with the adapter over its base.
    pub fn with_embedder(mut self, embedder: Arc<dyn Embedder>) -> Self {
        self.embedder = Some(embedder);
        self
    }
}

/// A model that only turns texts into vectors.
pub struct ServedEmbedder {
    /// The name that requests ask for.
    pub id: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    load: Box<dyn Fn() -> Result<Arc<dyn Embedder>, String> + Send + Sync>,
    loaded: Mutex<Option<Arc<dyn Embedder>>>,
}

impl ServedEmbedder {
    /// A model that is there.
    pub fn new(id: impl Into<String>, embedder: Arc<dyn Embedder>) -> Self {
        Self::on_first_use(id, move || Ok(Arc::clone(&embedder)))
    }

    /// A model that is loaded, and fetched if need be, when it is first asked for. What failed is tried again by the
    /// next request.
    pub fn on_first_use(
        id: impl Into<String>,
        load: impl Fn() -> Result<Arc<dyn Embedder>, String> + Send + Sync + 'static,
    ) -> Self {
        Self {
            id: id.into(),
            aliases: Vec::new(),
            created: 0,
            load: Box::new(load),
            loaded: Mutex::new(None),
        }
    }

    /// The model. Whoever comes while it is being loaded waits, which may take a while.
    pub(crate) fn get(&self) -> Result<Arc<dyn Embedder>, String> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(embedder) = &*loaded {
            return Ok(Arc::clone(embedder));
        }
        let embedder = (self.load)()?;
        *loaded = Some(Arc::clone(&embedder));
        Ok(embedder)
    }

    /// The model, if it is there.
    pub(crate) fn if_loaded(&self) -> Option<Arc<dyn Embedder>> {
        self.loaded.try_lock().ok()?.clone()
    }

    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.id == name || self.aliases.iter().any(|alias| alias == name)
    }
}
