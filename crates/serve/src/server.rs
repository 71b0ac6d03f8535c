//! The server's life: bind, load, serve, drain; and what its handlers share.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use bantam_store::{Store, StoreError};
use tokio::sync::oneshot;

use crate::caller::Door;
use crate::config::ServeConfig;
use crate::error::{ApiError, ServeError};
use crate::hooks;
use crate::ids;
use crate::listen::{self, Limits, Tls};
use crate::metrics::Metrics;
use crate::models::{Model, Models};
use crate::once::{self, Running};
use crate::openai::fine_tuning::run::{self as jobs, Jobs};
use crate::openai::{background, batch_run, evals, running};
use crate::router::router;

/// What the handlers share.
pub(crate) struct App {
    pub(crate) models: Arc<Models>,
    pub(crate) config: ServeConfig,
    pub(crate) door: Door,
    pub(crate) metrics: Metrics,
    pub(crate) once: Running,
    pub(crate) batches: running::Running,
    pub(crate) evals: running::Running,
    /// Held by each grader's program that runs.
    pub(crate) programs: tokio::sync::Semaphore,
    pub(crate) background: background::Running,
    pub(crate) jobs: Jobs,
    /// There is something to tell.
    pub(crate) told: tokio::sync::Notify,
    /// Held by the request whose texts are being turned into vectors.
    pub(crate) embedding: tokio::sync::Semaphore,
    store: Arc<Store>,
}

/// A running server.
pub struct Server {
    addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    ended: Option<oneshot::Receiver<()>>,
    http: Option<JoinHandle<Result<(), ServeError>>>,
    models: Arc<Models>,
}

impl Server {
    /// Binds the address and serves on threads of its own. Models may be added and removed while it runs.
    pub fn start(config: ServeConfig, models: Arc<Models>) -> Result<Self, ServeError> {
        config.check()?;
        if models.listed().is_empty() && models.embedders().is_empty() {
            return Err(ServeError::Models("there is no model to serve".to_string()));
        }
        let wanted = SocketAddr::new(config.host, config.port);
        let bind_error = |source| ServeError::Bind {
            addr: wanted,
            source,
        };
        let listener = TcpListener::bind(wanted).map_err(bind_error)?;
        listener.set_nonblocking(true).map_err(bind_error)?;
        let addr = listener.local_addr().map_err(bind_error)?;
        let store = match &config.store {
            Some(store) => Arc::clone(store),
            None => Arc::new(Store::in_memory()?),
        };
        store.sweep()?;
        let app = Arc::new(App {
            models: Arc::clone(&models),
            door: Door::new(config.api_keys.clone(), config.keys.clone()),
            metrics: Metrics::default(),
            once: Running::default(),
            batches: running::Running::default(),
            evals: running::Running::default(),
            programs: tokio::sync::Semaphore::new(evals::work::PROGRAMS),
            background: background::Running::default(),
            jobs: Jobs::default(),
            told: tokio::sync::Notify::new(),
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
            models,
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
        self.models.close();
        result
    }
}

/// Serves until SIGINT or SIGTERM, then finishes what runs, within
/// [`ServeConfig::shutdown_grace`]. A second signal ends it at once. `on_ready` is called when
/// requests are being taken, `on_reload` for each SIGHUP.
pub fn run(
    config: ServeConfig,
    models: Arc<Models>,
    on_ready: &mut dyn FnMut(SocketAddr),
    on_reload: &mut dyn FnMut(),
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
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signal::Stop => break,
                    Signal::Reload => on_reload(),
                },
                () = &mut ended => return Ok::<_, std::io::Error>(false),
            }
        }
        tracing::info!("stopping; a second signal does not wait for running requests");
        server.begin_stop();
        loop {
            tokio::select! {
                signal = signals.next() => if signal == Signal::Stop {
                    return Ok(true);
                },
                () = &mut ended => return Ok(false),
            }
        }
    })?;
    if is_forced { Ok(()) } else { server.join() }
}

/// What a signal asks for.
#[derive(PartialEq, Eq)]
enum Signal {
    Stop,
    Reload,
}

/// SIGINT and, where there are such, SIGTERM and SIGHUP.
struct Signals {
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
    #[cfg(unix)]
    hangup: tokio::signal::unix::Signal,
}

impl Signals {
    #[cfg(unix)]
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    #[cfg(unix)]
    async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::Stop,
            _ = self.interrupt.recv() => Signal::Stop,
            _ = self.hangup.recv() => Signal::Reload,
        }
    }

    #[cfg(not(unix))]
    fn new() -> std::io::Result<Self> {
        Ok(Self {})
    }

    #[cfg(not(unix))]
    async fn next(&mut self) -> Signal {
        let _ = tokio::signal::ctrl_c().await;
        Signal::Stop
    }
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
        write_timeout: app.config.write_timeout,
        slow_clients: Arc::clone(&app.metrics.slow_clients),
        grace: app.config.shutdown_grace,
    };
    let result = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let chores = tokio::spawn(chores(Arc::clone(&app)));
        background::settle(&app).await;
        batch_run::resume(&app).await;
        evals::work::resume(&app).await;
        let router = router(Arc::clone(&app));
        let quiet = async { app.background.idle().await };
        jobs::restore(&app).await;
        let work = tokio::spawn(jobs::work(Arc::clone(&app)));
        let telling = tokio::spawn(hooks::work(Arc::clone(&app)));
        listen::serve(listener, tls, router, limits, stopped, quiet).await;
        chores.abort();
        work.abort();
        telling.abort();
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
        self.models.find(id)
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
