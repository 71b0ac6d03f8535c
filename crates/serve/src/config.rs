//! What to serve, where, and to whom.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bantam_engine::{Embedder, Engine, LanguageModel};
use bantam_store::Store;
use bantam_text::{Chat, ConstraintEngine};

use crate::ServeError;
use crate::auth::ApiKey;
use crate::listen::Tls;
use crate::worker::Generator;

/// Where and how to listen.
#[derive(Clone)]
pub struct ServeConfig {
    /// The address to listen on. One that other machines can reach needs an API key.
    pub host: IpAddr,
    /// The port; 0 lets the system choose.
    pub port: u16,
    /// Any of these opens the API, all of it; without any keys, it is open to this machine.
    pub api_keys: Vec<ApiKey>,
    /// The keys of a database, with their scopes and limits; one that holds none yet opens to no one.
    pub keys: Option<Arc<Store>>,
    /// Where answers, files and batches are kept; in memory, if absent.
    pub store: Option<Arc<Store>>,
    /// Encrypts every connection.
    pub tls: Option<Tls>,
    /// Models that only turn texts into vectors.
    pub embedders: Vec<Arc<ServedEmbedder>>,
    /// The longest request body.
    pub body_bytes_max: usize,
    /// How long a request's body may take to arrive.
    pub body_timeout: Duration,
    /// How long a request's head may take to arrive, and a connection may be idle.
    pub head_timeout: Duration,
    /// The longest head of a request.
    pub head_bytes_max: usize,
    /// The longest file.
    pub file_bytes_max: u64,
    /// How long an answer may take, from the first token to the last.
    pub answer_timeout: Duration,
    /// The most open connections.
    pub connections_max: usize,
    /// How long running requests may take to finish once the server is told to stop.
    pub shutdown_grace: Duration,
}

impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            host: IpAddr::from([127, 0, 0, 1]),
            port: 8080,
            api_keys: Vec::new(),
            keys: None,
            store: None,
            tls: None,
            embedders: Vec::new(),
            body_bytes_max: 4 << 20,
            body_timeout: Duration::from_secs(30),
            head_timeout: Duration::from_secs(60),
            head_bytes_max: 64 << 10,
            file_bytes_max: 512 << 20,
            answer_timeout: Duration::from_secs(600),
            connections_max: 4096,
            shutdown_grace: Duration::from_secs(30),
        }
    }
}

impl ServeConfig {
    /// Refuses to be open to other machines without a key.
    pub(crate) fn check(&self) -> Result<(), ServeError> {
        if self.api_keys.is_empty() && self.keys.is_none() && !self.host.is_loopback() {
            return Err(ServeError::KeyNeeded { host: self.host });
        }
        Ok(())
    }
}

/// Builds the engine, on the thread that will run it.
pub(crate) type EngineFactory = Box<dyn FnOnce() -> Result<Box<dyn Generator>, String> + Send>;

/// A model with what it takes to talk to it.
pub struct ServedModel {
    /// The name that requests ask for.
    pub id: String,
    /// Other names for it.
    pub aliases: Vec<String>,
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
    pub(crate) engine: EngineFactory,
}

/// A model that only turns texts into vectors.
pub struct ServedEmbedder {
    /// The name that requests ask for.
    pub id: String,
    /// Other names for it.
    pub aliases: Vec<String>,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The model.
    pub embedder: Arc<dyn Embedder>,
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
        E: std::fmt::Display,
    {
        Self {
            id: id.into(),
            aliases: Vec::new(),
            tuned: false,
            created: 0,
            owned_by: "bantam".to_string(),
            chat,
            constraints,
            default_temperature: 1.0,
            embedder: None,
            engine: Box::new(move || match engine() {
                Ok(engine) => Ok(Box::new(engine)),
                Err(error) => Err(error.to_string()),
            }),
        }
    }
}
