//! The server's life: bind, load, serve, drain. Routes, and what every response goes through.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router};
use bantam_text::{Chat, ConstraintEngine};
use serde_json::json;
use tokio::sync::oneshot;

use crate::auth::{check_host, check_key};
use crate::config::{ServeConfig, ServedModel};
use crate::error::{ApiError, ServeError};
use crate::ids;
use crate::openai::{chat, models};
use crate::worker::Worker;

/// What the handlers share.
pub(crate) struct App {
    pub(crate) models: Vec<Arc<Model>>,
    config: ServeConfig,
}

/// A model with its engine running.
pub(crate) struct Model {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) owned_by: String,
    pub(crate) chat: Arc<Chat>,
    pub(crate) constraints: ConstraintEngine,
    pub(crate) default_temperature: f32,
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
                created: model.created,
                owned_by: model.owned_by,
                chat: model.chat,
                constraints: model.constraints,
                default_temperature: model.default_temperature,
                worker,
            }));
        }
        let app = Arc::new(App {
            models: loaded,
            config,
        });
        let (stop, stopped) = oneshot::channel();
        let (ending, ended) = oneshot::channel();
        let http = std::thread::Builder::new()
            .name("http".to_string())
            .spawn(move || {
                let result = serve(app, listener, stopped);
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
    if models.is_empty() {
        return Err(ServeError::Models("there is no model to serve".to_string()));
    }
    for (idx, model) in models.iter().enumerate() {
        if models[..idx].iter().any(|other| other.id == model.id) {
            return Err(ServeError::Models(format!(
                "two models are called `{}`",
                model.id
            )));
        }
    }
    Ok(())
}

/// The HTTP thread.
fn serve(
    app: Arc<App>,
    listener: TcpListener,
    stopped: oneshot::Receiver<()>,
) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(4)
        .enable_all()
        .build()?;
    let grace = app.config.shutdown_grace;
    let router = router(app);
    let result = runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        // A chunk of a stream is small and should leave at once.
        let listener = listener.tap_io(|socket| drop(socket.set_nodelay(true)));
        let (draining, drain) = oneshot::channel::<()>();
        let serving = axum::serve(listener, router).with_graceful_shutdown(async move {
            // A dropped sender means stop, too.
            let _ = stopped.await;
            drop(draining);
        });
        let deadline = async {
            let _ = drain.await;
            tokio::time::sleep(grace).await;
        };
        tokio::select! {
            result = serving.into_future() => result,
            () = deadline => Ok(()),
        }
    });
    // Connections past the deadline are dropped with the runtime, and with them the last handles
    // on the engines, whose threads then end.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    Ok(result?)
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/v1/chat/completions", post(chat::create))
        .fallback(async || ApiError::no_route())
        .method_not_allowed_fallback(async || ApiError::wrong_method())
        .layer(from_fn_with_state(Arc::clone(&app), observe))
        .with_state(app)
}

/// Around every request: checks the key, names the request, logs its end. Bodies, keys and
/// unknown paths are never logged.
async fn observe(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = ids::random("req_");
    let method = request.method().clone();
    let route = match request.uri().path() {
        "/health" => "/health",
        "/v1/models" => "/v1/models",
        "/v1/chat/completions" => "/v1/chat/completions",
        path if path.starts_with("/v1/models/") => "/v1/models/{id}",
        _ => "other",
    };
    let allowed = check_host(&app.config.api_keys, request.headers()).and_then(|()| {
        if route == "/health" {
            Ok(())
        } else {
            check_key(&app.config.api_keys, request.headers())
        }
    });
    let mut response = match allowed {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        response
            .headers_mut()
            .insert(HeaderName::from_static("x-request-id"), value);
    }
    let status = response.status().as_u16();
    let ms = began.elapsed().as_millis() as u64;
    // A method is a token of the client's choosing.
    let method = if method.as_str().len() <= 8 {
        method.as_str()
    } else {
        "other"
    };
    tracing::info!(id, method, route, status, ms, "answered");
    response
}

/// `GET /health`: whether the engines run, and how much they have to do. Needs no key.
async fn health(State(app): State<Arc<App>>) -> Response {
    let stopped = |m: &Arc<Model>| m.worker.load.stopped.load(Ordering::Relaxed);
    let models: Vec<_> = app
        .models
        .iter()
        .map(|model| {
            let load = &model.worker.load;
            json!({
                "id": model.id,
                "status": if stopped(model) { "stopped" } else { "ok" },
                "running": load.running.load(Ordering::Relaxed),
                "queue_depth": load.waiting.load(Ordering::Relaxed),
                "capacity": model.worker.info.capacity,
                "max_context": model.worker.info.max_context,
            })
        })
        .collect();
    let is_ok = !app.models.iter().any(stopped);
    let status = if is_ok {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let word = if is_ok { "ok" } else { "stopped" };
    let version = env!("CARGO_PKG_VERSION");
    (
        status,
        Json(json!({"status": word, "version": version, "models": models})),
    )
        .into_response()
}

impl App {
    pub(crate) fn model(&self, id: &str) -> Result<&Arc<Model>, ApiError> {
        self.models
            .iter()
            .find(|model| model.id == id)
            .ok_or_else(|| ApiError::no_model(id))
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
        let reading = axum::body::to_bytes(request.into_body(), limit);
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
