//! The routes, and what every request and response goes through.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;
use tokio::task::JoinHandle;

use crate::auth::check_host;
use crate::caller::Caller;
use crate::cors;
use crate::error::ApiError;
use crate::ids;
use crate::metrics::Gauge;
use crate::models::Model;
use crate::once::once;
use crate::openai::{
    batches, chat, completions, decisions, embeddings, evals, files, fine_tuning, models,
    responses, stored, tokens, uploads,
};
use crate::openapi;
use crate::server::App;

/// Every route of the API, with the methods it takes. [`crate`]'s documentation and `/openapi.json` list the same.
pub(crate) fn router(app: Arc<App>) -> Router {
    let cors = cors::layer(&app.config.cors_origins);
    let router = Router::new()
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi::json))
        .route("/docs", get(openapi::page))
        .route("/v1/models", get(models::list))
        .route(
            "/v1/models/{*id}",
            get(models::retrieve).delete(models::delete),
        )
        .route("/v1/chat/completions", post(chat::create).get(stored::list))
        .route(
            "/v1/chat/completions/{id}",
            get(stored::retrieve)
                .post(stored::update)
                .delete(stored::delete),
        )
        .route("/v1/chat/completions/{id}/messages", get(stored::messages))
        .route("/v1/completions", post(completions::create))
        .route("/v1/embeddings", post(embeddings::create))
        .route("/v1/decisions", post(decisions::create))
        .route("/v1/rerank", post(decisions::rerank))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/input_tokens", post(responses::input_tokens))
        .route(
            "/v1/responses/{id}",
            get(responses::retrieve).delete(responses::delete),
        )
        .route("/v1/responses/{id}/cancel", post(responses::cancel))
        .route(
            "/v1/responses/{id}/input_items",
            get(responses::input_items),
        )
        .route(
            "/v1/files",
            // The limit of files is their own.
            post(files::create)
                .get(files::list)
                .layer(DefaultBodyLimit::disable()),
        )
        .route("/v1/files/{id}", get(files::retrieve).delete(files::delete))
        .route("/v1/files/{id}/content", get(files::content))
        .route("/v1/uploads", post(uploads::create))
        .route(
            "/v1/uploads/{id}/parts",
            post(uploads::add_part).layer(DefaultBodyLimit::disable()),
        )
        .route("/v1/uploads/{id}/complete", post(uploads::complete))
        .route("/v1/uploads/{id}/cancel", post(uploads::cancel))
        .route("/v1/batches", post(batches::create).get(batches::list))
        .route("/v1/batches/{id}", get(batches::retrieve))
        .route("/v1/batches/{id}/cancel", post(batches::cancel))
        .route(
            "/v1/fine_tuning/jobs",
            post(fine_tuning::create).get(fine_tuning::list),
        )
        .route("/v1/fine_tuning/jobs/{id}", get(fine_tuning::retrieve))
        .route(
            "/v1/fine_tuning/jobs/{id}/cancel",
            post(fine_tuning::cancel),
        )
        .route("/v1/fine_tuning/jobs/{id}/pause", post(fine_tuning::pause))
        .route(
            "/v1/fine_tuning/jobs/{id}/resume",
            post(fine_tuning::resume),
        )
        .route(
            "/v1/fine_tuning/jobs/{id}/events",
            get(fine_tuning::events::list),
        )
        .route(
            "/v1/fine_tuning/jobs/{id}/checkpoints",
            get(fine_tuning::events::checkpoints),
        )
        .route(
            "/v1/fine_tuning/checkpoints/{id}/permissions",
            get(fine_tuning::permissions).post(fine_tuning::permit),
        )
        .route(
            "/v1/fine_tuning/alpha/graders/run",
            post(evals::graders::run),
        )
        .route(
            "/v1/fine_tuning/alpha/graders/validate",
            post(evals::graders::validate),
        )
        .route("/v1/evals", post(evals::create).get(evals::list))
        .route(
            "/v1/evals/{id}",
            get(evals::retrieve)
                .post(evals::update)
                .delete(evals::delete),
        )
        .route(
            "/v1/evals/{id}/runs",
            post(evals::runs::create).get(evals::runs::list),
        )
        .route(
            "/v1/evals/{id}/runs/{run}",
            get(evals::runs::retrieve)
                .post(evals::runs::cancel)
                .delete(evals::runs::delete),
        )
        .route(
            "/v1/evals/{id}/runs/{run}/cancel",
            post(evals::runs::cancel),
        )
        .route(
            "/v1/evals/{id}/runs/{run}/output_items",
            get(evals::runs::items),
        )
        .route(
            "/v1/evals/{id}/runs/{run}/output_items/{item}",
            get(evals::runs::item),
        )
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/tokenizer_info", get(tokens::info))
        .fallback(async || ApiError::no_route())
        .method_not_allowed_fallback(async || ApiError::wrong_method())
        .layer(from_fn_with_state(Arc::clone(&app), once))
        .layer(from_fn_with_state(Arc::clone(&app), observe))
        .with_state(app);
    match cors {
        // Outside of all else: a browser asks whether it may call before it sends a key.
        Some(cors) => router.layer(cors),
        None => router,
    }
}

/// Around every request: names it, checks the key, survives a panic, logs and counts its end. Bodies, keys and
/// unknown paths are never logged.
async fn observe(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = ids::random("req_");
    let method = request.method().clone();
    let path = request.uri().path();
    let route = ROUTES
        .iter()
        .find(|route| matches(route, path))
        .map_or("other", |route| *route);
    let caller = check_host(app.door.is_locked(), request.headers()).and_then(|()| {
        if matches!(route, "/health" | "/ready" | "/openapi.json" | "/docs") {
            Ok(Caller::anyone())
        } else {
            app.door.enter(request.headers())
        }
    });
    let mut left = Vec::new();
    let mut owner = String::new();
    let mut response = match caller {
        Ok(caller) => {
            owner.clone_from(&caller.owner);
            request.extensions_mut().insert(caller.clone());
            // A task of its own: a panic ends it and nothing else. It ends with the client, too.
            let response = match Guarded(tokio::spawn(next.run(request))).await {
                Ok(response) => response,
                Err(_) => {
                    tracing::error!(id, route, "a request panicked");
                    ApiError::internal("the request failed").into_response()
                }
            };
            left = caller.left();
            response
        }
        Err(error) => error.into_response(),
    };
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert(HeaderName::from_static("x-request-id"), value);
    }
    for (name, value) in left {
        headers.insert(HeaderName::from_static(name), HeaderValue::from(value));
    }
    let status = response.status().as_u16();
    app.metrics.request(route, status, began.elapsed());
    let ms = began.elapsed().as_millis() as u64;
    // A method is a token of the client's choosing.
    let method = if method.as_str().len() <= 8 {
        method.as_str()
    } else {
        "other"
    };
    tracing::info!(id, method, route, status, ms, key = owner, "answered");
    response
}

/// The routes as they are logged and counted; `{id}` and its like stand for one part of a path, `{*id}` for all that is left.
pub(crate) const ROUTES: &[&str] = &[
    "/health",
    "/ready",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/v1/models",
    "/v1/models/{*id}",
    "/v1/chat/completions",
    "/v1/chat/completions/{id}",
    "/v1/chat/completions/{id}/messages",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/decisions",
    "/v1/rerank",
    "/v1/responses",
    "/v1/responses/input_tokens",
    "/v1/responses/{id}",
    "/v1/responses/{id}/cancel",
    "/v1/responses/{id}/input_items",
    "/v1/files",
    "/v1/files/{id}",
    "/v1/files/{id}/content",
    "/v1/uploads",
    "/v1/uploads/{id}/parts",
    "/v1/uploads/{id}/complete",
    "/v1/uploads/{id}/cancel",
    "/v1/batches",
    "/v1/batches/{id}",
    "/v1/batches/{id}/cancel",
    "/v1/fine_tuning/jobs",
    "/v1/fine_tuning/jobs/{id}",
    "/v1/fine_tuning/jobs/{id}/cancel",
    "/v1/fine_tuning/jobs/{id}/pause",
    "/v1/fine_tuning/jobs/{id}/resume",
    "/v1/fine_tuning/jobs/{id}/events",
    "/v1/fine_tuning/jobs/{id}/checkpoints",
    "/v1/fine_tuning/checkpoints/{id}/permissions",
    "/v1/fine_tuning/alpha/graders/run",
    "/v1/fine_tuning/alpha/graders/validate",
    "/v1/evals",
    "/v1/evals/{id}",
    "/v1/evals/{id}/runs",
    "/v1/evals/{id}/runs/{run}",
    "/v1/evals/{id}/runs/{run}/cancel",
    "/v1/evals/{id}/runs/{run}/output_items",
    "/v1/evals/{id}/runs/{run}/output_items/{item}",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
];

fn matches(route: &str, path: &str) -> bool {
    let mut parts = path.split('/');
    for want in route.split('/') {
        match (want, parts.next()) {
            ("{*id}", Some(_)) => return true,
            (want, Some(part)) if want.starts_with('{') && !part.is_empty() => {}
            (want, Some(part)) if want == part => {}
            _ => return false,
        }
    }
    parts.next().is_none()
}

/// A task that ends when nobody waits for it.
struct Guarded(JoinHandle<Response>);

impl Future for Guarded {
    type Output = Result<Response, tokio::task::JoinError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn is_stopped(model: &Arc<Model>) -> bool {
    model.worker.load.stopped.load(Ordering::Relaxed)
}

/// `GET /health`: whether the engines run, and how much they have to do. Needs no key.
async fn health(State(app): State<Arc<App>>) -> Response {
    let all = app.models.listed();
    let models: Vec<_> = all
        .iter()
        .map(|model| {
            let load = &model.worker.load;
            let mut one = json!({
                "id": model.id,
                "status": if is_stopped(model) { "stopped" } else { "ok" },
                "running": load.running.load(Ordering::Relaxed),
                "queue_depth": load.waiting.load(Ordering::Relaxed),
                "capacity": model.worker.info.capacity,
                "max_context": model.worker.info.max_context,
            });
            // What runs and waits is then that of all adapters over the base.
            if let Some(base) = model.base() {
                one["base"] = json!(base);
                one["in_memory"] = json!(app.models.is_in_memory(model));
            }
            one
        })
        .collect();
    let is_ok = !all.iter().any(is_stopped);
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

/// `GET /ready`: whether a request would find a place. Needs no key.
async fn ready(State(app): State<Arc<App>>) -> Response {
    let all = app.models.bases();
    let is_ready = !all.iter().any(is_stopped) && all.iter().all(|model| model.worker.has_room());
    let (status, word) = if is_ready {
        (StatusCode::OK, "ready")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "busy")
    };
    (status, Json(json!({"status": word}))).into_response()
}

/// `GET /metrics`.
async fn metrics(State(app): State<Arc<App>>) -> Response {
    let gauges: Vec<Gauge> = app
        .models
        .bases()
        .iter()
        .map(|model| Gauge {
            model: model.id.clone(),
            running: model.worker.load.running.load(Ordering::Relaxed),
            waiting: model.worker.load.waiting.load(Ordering::Relaxed),
            capacity: model.worker.info.capacity,
        })
        .collect();
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    let page = app.metrics.page(&gauges, app.models.resident_size());
    ([(CONTENT_TYPE, kind)], page).into_response()
}
