//! Where to serve, and to whom.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bantam_store::Store;

use crate::ServeError;
use crate::auth::ApiKey;
use crate::cors::Origin;
use crate::hooks::Hooks;
use crate::listen::Tls;
use crate::openai::CheckRows;
use crate::outside::{Providers, Sandbox};
use crate::training::TrainingConfig;

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
    /// Judges the lines of files for training; without it they need only be JSON objects.
    pub training_rows: Option<CheckRows>,
    /// Who trains, and where; without it, jobs are refused.
    pub training: Option<TrainingConfig>,
    /// Models of other servers that evals may ask; without them, evals ask only what is served here.
    pub providers: Option<Arc<dyn Providers>>,
    /// Where graders' programs run; without it, they are refused.
    pub sandbox: Option<Arc<dyn Sandbox>>,
    /// Who is told when something is over.
    pub hooks: Option<Hooks>,
    /// Origins whose pages may call the API; without any, browsers let none.
    pub cors_origins: Vec<Origin>,
    /// Encrypts every connection.
    pub tls: Option<Tls>,
    /// The longest request body.
    pub body_bytes_max: usize,
    /// How long a request's body may take to arrive.
    pub body_timeout: Duration,
    /// How long a request's head may take to arrive, and a connection may be idle.
    pub head_timeout: Duration,
    /// The longest head of a request.
    pub head_bytes_max: usize,
    /// How long a client may read nothing of its answer before it is taken to be gone.
    pub write_timeout: Duration,
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
            training_rows: None,
            training: None,
            providers: None,
            sandbox: None,
            hooks: None,
            cors_origins: Vec::new(),
            tls: None,
            body_bytes_max: 4 << 20,
            body_timeout: Duration::from_secs(30),
            head_timeout: Duration::from_secs(60),
            head_bytes_max: 64 << 10,
            write_timeout: Duration::from_secs(60),
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
