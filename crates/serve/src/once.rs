//! `Idempotency-Key`: a request that is sent twice is answered once.
//!
//! The first answer is kept for a day under the caller and the name they chose, and given again for the same
//! request. Answers that say "try again" are not kept.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use bantam_store::Remembered;
use sha2::{Digest, Sha256};

use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::server::App;

/// How long answers are kept, in seconds.
pub(crate) const KEPT: u64 = 24 * 60 * 60;

const HEADER: &str = "idempotency-key";

/// Requests that are being answered: caller and name.
pub(crate) type Running = Mutex<HashSet<(String, String)>>;

pub(crate) async fn once(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if request.method() != Method::POST || !request.headers().contains_key(HEADER) {
        return next.run(request).await;
    }
    match answer(&app, request, next).await {
        Ok(response) => response,
        Err(error) => error.into_response(),
    }
}

async fn answer(app: &Arc<App>, request: Request, next: Next) -> Result<Response, ApiError> {
    let name = request.headers().get(HEADER);
    let name = name.and_then(|v| v.to_str().ok()).unwrap_or_default();
    if name.is_empty() || name.len() > 255 {
        let message = "`Idempotency-Key` must be 1 to 255 visible characters";
        return Err(ApiError::invalid("Idempotency-Key", message));
    }
    let name = name.to_string();
    let owner = Caller::of(&request)?.owner;
    let (parts, body) = request.into_parts();
    let kind = parts.headers.get(CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"multipart/")) {
        let message = "`Idempotency-Key` does not go with uploads";
        return Err(ApiError::unsupported("Idempotency-Key", message));
    }
    let body = app.read(body).await?;
    let digest: [u8; 32] = Sha256::new()
        .chain_update(parts.uri.to_string())
        .chain_update([0])
        .chain_update(&body)
        .finalize()
        .into();
    let running = Mark::new(app, (owner.clone(), name.clone()))?;
    let (who, what) = (owner.clone(), name.clone());
    let since = ids::now().saturating_sub(KEPT);
    let known = app
        .store(move |store| store.remembered(&who, &what, since))
        .await?;
    if let Some(known) = known {
        if known.digest != digest {
            let message = "this `Idempotency-Key` was used for another request";
            return Err(ApiError::conflict("idempotency_key_reused", message));
        }
        return Ok(again(known));
    }
    let response = next.run(Request::from_parts(parts, Body::from(body))).await;
    let (mut parts, body) = response.into_parts();
    let kind = parts.headers.get(CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"text/event-stream")) {
        let message = "`Idempotency-Key` goes with answers that are not streamed";
        return Err(ApiError::unsupported("Idempotency-Key", message));
    }
    let body = axum::body::to_bytes(body, usize::MAX)
        .await
        .map_err(|_| ApiError::internal("the answer broke off"))?;
    let status = parts.status;
    if status.is_success() || (status.is_client_error() && !is_temporary(status)) {
        let answer = Remembered {
            digest,
            status: status.as_u16(),
            body: body.to_vec(),
        };
        app.store(move |store| store.remember(&owner, &name, ids::now(), &answer))
            .await?;
    }
    drop(running);
    parts.headers.remove(axum::http::header::CONTENT_LENGTH);
    Ok(Response::from_parts(parts, Body::from(body)))
}

fn is_temporary(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::REQUEST_TIMEOUT | StatusCode::CONFLICT | StatusCode::TOO_MANY_REQUESTS
    )
}

fn again(known: Remembered) -> Response {
    let status = StatusCode::from_u16(known.status).unwrap_or(StatusCode::OK);
    let mut response = (status, Bytes::from(known.body)).into_response();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert("idempotent-replayed", HeaderValue::from_static("true"));
    response
}

/// Marks a request as being answered.
struct Mark {
    app: Arc<App>,
    key: (String, String),
}

impl Mark {
    fn new(app: &Arc<App>, key: (String, String)) -> Result<Self, ApiError> {
        let mut running = app.once.lock().unwrap_or_else(PoisonError::into_inner);
        if !running.insert(key.clone()) {
            return Err(ApiError::in_progress());
        }
        Ok(Self {
            app: Arc::clone(app),
            key,
        })
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        let mut running = self.app.once.lock().unwrap_or_else(PoisonError::into_inner);
        running.remove(&self.key);
    }
}
