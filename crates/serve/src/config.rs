//! What to serve, where, and to whom.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bantam_engine::{Engine, LanguageModel};
use bantam_text::{Chat, ConstraintEngine};

use crate::ServeError;
use crate::auth::ApiKey;
use crate::worker::Generator;

/// Where and how to listen.
#[derive(Clone)]
pub struct ServeConfig {
    /// The address to listen on. One that other machines can reach needs an API key.
    pub host: IpAddr,
    /// The port; 0 lets the system choose.
    pub port: u16,
    /// Any of these opens the API; without any, it is open to this machine.
    pub api_keys: Vec<ApiKey>,
    /// The longest request body.
    pub body_bytes_max: usize,
    /// How long a request's body may take to arrive.
    pub body_timeout: Duration,
    /// How long running requests may take to finish once the server is told to stop.
    pub shutdown_grace: Duration,
}

impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            host: IpAddr::from([127, 0, 0, 1]),
            port: 8080,
            api_keys: Vec::new(),
            body_bytes_max: 4 << 20,
            body_timeout: Duration::from_secs(30),
            shutdown_grace: Duration::from_secs(30),
        }
    }
}

impl ServeConfig {
    /// Refuses to be open to other machines without a key.
    pub(crate) fn check(&self) -> Result<(), ServeError> {
        if self.api_keys.is_empty() && !self.host.is_loopback() {
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
    pub(crate) engine: EngineFactory,
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
            created: 0,
            owned_by: "bantam".to_string(),
            chat,
            constraints,
            default_temperature: 1.0,
            engine: Box::new(move || match engine() {
                Ok(engine) => Ok(Box::new(engine)),
                Err(error) => Err(error.to_string()),
            }),
        }
    }
}
