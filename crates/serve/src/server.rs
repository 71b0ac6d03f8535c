//! The server's life: bind, load, serve, drain; and what its handlers share.

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use bantam_engine::Embedder;
use bantam_store::{Store, StoreError};
use bantam_text::{Chat, ConstraintEngine};
use tokio::sync::oneshot;

use crate::caller::Door;
use crate::config::{ServeConfig, ServedEmbedder, ServedModel};
use crate::error::{ApiError, ServeError};
use crate::ids;
use crate::listen::{self, Limits, Tls};
use crate::metrics::Metrics;
use crate::once::{self, Running};
use crate::openai::batch_run;
use crate::router::router;
use crate::worker::Worker;

/// What the handlers share.
pub(crate) struct App {
    models: RwLock<Vec<Arc<Model>>>,
    pub(crate) config: ServeConfig,
    pub(crate) door: Door,
    pub(crate) metrics: Metrics,
    pub(crate) once: Running,
    pub(crate) batches: batch_run::Running,
    /// Held by the request whose texts are being turned into vectors.
    pub(crate) embedding: tokio::sync::Semaphore,
    store: Arc<Store>,
}

/// A model with its engine running.
pub(crate) struct Model {
    pub(crate) id: String,
    /// Other names that requests may ask for it by.
    pub(crate) aliases: Vec<String>,
    pub(crate) created: u64,
    pub(crate) owned_by: String,
    /// Was it trained here, so that it may be taken away by a request?
    pub(crate) tuned: bool,
    pub(crate) chat: Arc<Chat>,
    pub(crate) constraints: ConstraintEngine,
    pub(crate) default_temperature: f32,
    pub(crate) embedder: Option<Arc<dyn Embedder>>,
    pub(crate) worker: Worker,
}

/// A running server.
pub struct Server {
    addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    ended: Option<oneshot::Receiver<()>>,
    http: Option<JoinHandle<Result<(), ServeError>>>,
    engines: Vec<JoinHandle<()>>,
}

impl Server {
    /// Binds the address, loads the models, and serves on threads of its own.
    pub fn start(config: ServeConfig, models: Vec<ServedModel>) -> Result<Self, ServeError> {
        config.check()?;
        if models.is_empty() && config.embedders.is_empty() {
            return Err(ServeError::Models("there is no model to serve".to_string()));
        }
        check_models(&models)?;
        let wanted = SocketAddr::new(config.host, config.port);
        let bind_error = |source| ServeError::Bind {
            addr: wanted,
            source,
        };
        let listener = TcpListener::bind(wanted).map_err(bind_error)?;
        listener.set_nonblocking(true).map_err(bind_error)?;
        let addr = listener.local_addr().map_err(bind_error)?;
        let mut engines = Vec::new();
        let mut loaded = Vec::new();
        for model in models {
            let (worker, thread) = Worker::start(&model.id, model.engine)?;
            engines.push(thread);
            loaded.push(Arc::new(Model {
                id: model.id,
                aliases: model.aliases,
                created: model.created,
                owned_by: model.owned_by,
                tuned: model.tuned,
                chat: model.chat,
                constraints: model.constraints,
                default_temperature: model.default_temperature,
                embedder: model.embedder,
                worker,
            }));
        }
        let store = match &config.store {
            Some(store) => Arc::clone(store),
            None => Arc::new(Store::in_memory()?),
        };
        store.sweep()?;
        let app = Arc::new(App {
            models: RwLock::new(loaded),
            door: Door::new(config.api_keys.clone(), config.keys.clone()),
            metrics: Metrics::default(),
            once: Running::default(),
            batches: batch_run::Running::default(),
            embedding: tokio::sync::Semaphore::new(1),
            store,
            config,
        });
        let tls = app.config.tls.as_ref().map(Tls::acceptor).transpose()?;
        let (stop, stopped) = oneshot::channel();
        let (ending, ended) = oneshot::channel();
        let http = std::thread::Builder::new()
            .name("http".to_string())
            .spawn(move || {
                let result = serve(app, listener, tls, stopped);
                let _ = ending.send(());
                result
            })?;
        Ok(Self {
            addr,
            stop: Some(stop),
            ended: Some(ended),
            http: Some(http),
            engines,
        })
    }

    /// The address that is listened on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Takes no more requests, lets those that run finish within
    /// [`ServeConfig::shutdown_grace`], and returns when all is quiet.
    pub fn stop(mut self) -> Result<(), ServeError> {
        self.begin_stop();
        self.join()
    }

    fn begin_stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    fn join(&mut self) -> Result<(), ServeError> {
        let panicked = || ServeError::System(std::io::Error::other("the HTTP thread panicked"));
        let result = match self.http.take() {
            Some(http) => http.join().map_err(|_| panicked())?,
            None => Ok(()),
        };
        for engine in self.engines.drain(..) {
            let _ = engine.join();
        }
        result
    }
}

/// Serves until SIGINT or SIGTERM, then finishes what runs, within
/// [`ServeConfig::shutdown_grace`]. A second signal ends it at once. `on_ready` is called when
/// requests are being taken.
pub fn run(
    config: ServeConfig,
    models: Vec<ServedModel>,
    on_ready: &mut dyn FnMut(SocketAddr),
) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut server = Server::start(config, models)?;
    let mut ended = server.ended.take();
    let is_forced = runtime.block_on(async {
        let mut signals = Signals::new()?;
        on_ready(server.addr);
        let ended = async {
            match ended.as_mut() {
                Some(ended) => drop(ended.await),
                None => std::future::pending().await,
            }
        };
        tokio::pin!(ended);
        tokio::select! {
            () = signals.next() => {}
            () = &mut ended => return Ok::<_, std::io::Error>(false),
        }
        tracing::info!("stopping; a second signal does not wait for running requests");
        server.begin_stop();
        tokio::select! {
            () = signals.next() => Ok(true),
            () = &mut ended => Ok(false),
        }
    })?;
    if is_forced { Ok(()) } else { server.join() }
}

/// SIGINT and, where there is one, SIGTERM.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    #[cfg(unix)]
    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    #[cfg(not(unix))]
    fn new() -> std::io::Result<Self> {
        Ok(Self {})
    }

    #[cfg(not(unix))]
    async fn next(&mut self) {
        let _ = tokio::signal::ctrl_c().await;
    }
}

fn check_models(models: &[ServedModel]) -> Result<(), ServeError> {
    for (idx, model) in models.iter().enumerate() {
        let names = std::iter::once(&model.id).chain(&model.aliases);
        for (i, name) in names.enumerate() {
            let before = models[..idx].iter();
            let taken = before.flat_map(|m| std::iter::once(&m.id).chain(&m.aliases));
            let own = std::iter::once(&model.id).chain(&model.aliases).take(i);
            if taken.chain(own).any(|other| other == name) {
                return Err(ServeError::Models(format!(
                    "two models are called `{name}`"
                )));
            }
        }
    }
    Ok(())
}

/// The HTTP thread.
fn serve(
    app: Arc<App>,
    listener: TcpListener,
    tls: Option<tokio_rustls::TlsAcceptor>,
    stopped: oneshot::Receiver<()>,
) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(8)
        .enable_all()
        .build()?;
    let limits = Limits {
        connections: app.config.connections_max,
        head_timeout: app.config.head_timeout,
        head_bytes: app.config.head_bytes_max,
        grace: app.config.shutdown_grace,
    };
    let result = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let chores = tokio::spawn(chores(Arc::clone(&app)));
        batch_run::resume(&app).await;
        listen::serve(listener, tls, router(app), limits, stopped).await;
        chores.abort();
        Ok(())
    });
    // Connections past the deadline are dropped with the runtime, and with them the last handles
    // on the engines, whose threads then end.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    result
}

/// What is to be done from time to time: forgetting what has expired.
async fn chores(app: Arc<App>) {
    let mut every = tokio::time::interval(std::time::Duration::from_secs(60));
    loop {
        every.tick().await;
        let done = app
            .store(|store| {
                let now = ids::now();
                store.forget_expired(now)?;
                store.forget_remembered(now.saturating_sub(once::KEPT))
            })
            .await;
        if let Err(error) = done {
            tracing::warn!(message = error.message, "old entries were not forgotten");
        }
    }
}

impl App {
    /// The model of this name.
    pub(crate) fn model(&self, id: &str) -> Result<Arc<Model>, ApiError> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        let is_it = |model: &&Arc<Model>| model.id == id || model.aliases.iter().any(|a| a == id);
        models
            .iter()
            .find(is_it)
            .cloned()
            .ok_or_else(|| ApiError::no_model(id))
    }

    /// The model of this name that turns texts into vectors, and its own name.
    pub(crate) fn embedder(&self, id: &str) -> Result<(String, Arc<dyn Embedder>), ApiError> {
        let is_it =
            |one: &&Arc<ServedEmbedder>| one.id == id || one.aliases.iter().any(|a| a == id);
        if let Some(found) = self.config.embedders.iter().find(is_it) {
            return Ok((found.id.clone(), Arc::clone(&found.embedder)));
        }
        let model = self.model(id)?;
        match &model.embedder {
            Some(embedder) => Ok((model.id.clone(), Arc::clone(embedder))),
            None => {
                let message = format!("the model `{id}` makes no embeddings");
                Err(ApiError::unsupported("model", message))
            }
        }
    }

    /// All models, in the order they were given.
    pub(crate) fn models(&self) -> Vec<Arc<Model>> {
        let models = self.models.read().unwrap_or_else(PoisonError::into_inner);
        models.clone()
    }

    /// Serves a model no more. What runs on it ends first.
    pub(crate) fn unload(&self, id: &str) {
        let mut models = self.models.write().unwrap_or_else(PoisonError::into_inner);
        models.retain(|model| model.id != id);
    }

    /// Works with the database where that delays no connection.
    pub(crate) async fn store<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let store = Arc::clone(&self.store);
        let done = tokio::task::spawn_blocking(move || work(&store)).await;
        done.map_err(|_| ApiError::internal("the database failed"))?
            .map_err(ApiError::store)
    }

    /// The database, for work that is over in no time.
    pub(crate) fn store_now(&self) -> &Store {
        &self.store
    }

    /// A request's body, within the limits, if it is declared as JSON. A page of another origin
    /// cannot declare that without asking first.
    pub(crate) async fn read_json(&self, request: Request) -> Result<Bytes, ApiError> {
        let headers = request.headers();
        let kind = headers
            .get(CONTENT_TYPE)
            .and_then(|v| v.to_str().ok())
            .unwrap_or_default();
        let kind = kind.split(';').next().unwrap_or_default().trim();
        if !kind.eq_ignore_ascii_case("application/json") {
            return Err(ApiError::not_json());
        }
        let limit = self.config.body_bytes_max;
        let length = headers.get(CONTENT_LENGTH).and_then(|v| v.to_str().ok());
        if length
            .and_then(|v| v.parse::<u64>().ok())
            .is_some_and(|n| n > limit as u64)
        {
            return Err(ApiError::body_too_large(limit));
        }
        self.read(request.into_body()).await
    }

    /// A body, within the limits.
    pub(crate) async fn read(&self, body: Body) -> Result<Bytes, ApiError> {
        let limit = self.config.body_bytes_max;
        let reading = axum::body::to_bytes(body, limit);
        match tokio::time::timeout(self.config.body_timeout, reading).await {
            Err(_) => Err(ApiError::body_slow()),
            Ok(Ok(body)) => Ok(body),
            Ok(Err(error)) => {
                // The limit's error is the cause of axum's own.
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                let is_limit = cause.is_some_and(|c| c.contains("length limit"));
                Err(if is_limit {
                    ApiError::body_too_large(limit)
                } else {
                    ApiError::body_broken()
                })
            }
        }
    }
}
