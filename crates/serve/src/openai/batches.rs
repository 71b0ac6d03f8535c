//! `/v1/batches`: making, looking up, cancelling.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, Request, State};
use bantam_store::Object;
use serde_json::{Value, json};

use super::fields::Fields;
use super::objects::Kind;
use super::{batch_run, files};
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::query::{self, Id};
use crate::server::App;

pub(crate) const KIND: Kind = Kind {
    name: "batch",
    noun: "batch",
};

/// Seconds that a batch may take.
const WINDOW: u64 = 24 * 60 * 60;

/// `POST /v1/batches`
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&http)?.owner;
    let body = app.read_json(http).await?;
    let mut fields = Fields::of_body(&body)?;
    let input: String = fields.need("input_file_id")?;
    let endpoint: String = fields.need("endpoint")?;
    if !batch_run::ENDPOINTS.contains(&endpoint.as_str()) {
        let known = batch_run::ENDPOINTS.join(", ");
        let message = format!("`endpoint` must be one of {known}");
        return Err(ApiError::invalid("endpoint", message));
    }
    if fields.need::<String>("completion_window")? != "24h" {
        let message = "`completion_window` must be `24h`";
        return Err(ApiError::invalid("completion_window", message));
    }
    let metadata = fields.metadata()?.unwrap_or_default();
    let life = files::life_of(fields.object("output_expires_after")?, "batch_output")?;
    fields.finish(&[])?;
    let file = files::KIND.find(&app, &owner, &input).await?;
    if file.label != "batch" {
        let message = "`input_file_id` must be a file whose `purpose` is `batch`";
        return Err(ApiError::invalid("input_file_id", message));
    }
    let created = ids::now();
    let body = json!({
        "id": ids::random("batch_"), "object": "batch", "endpoint": endpoint, "errors": null,
        "input_file_id": input, "completion_window": "24h", "status": "validating",
        "output_file_id": null, "error_file_id": null, "created_at": created,
        "in_progress_at": null, "expires_at": created + WINDOW, "finalizing_at": null,
        "completed_at": null, "failed_at": null, "expired_at": null, "cancelling_at": null,
        "cancelled_at": null, "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": metadata,
    });
    let object = Object {
        kind: KIND.name.to_string(),
        parent: String::new(),
        id: body["id"].as_str().unwrap_or_default().to_string(),
        owner,
        created,
        label: "validating".to_string(),
        expires: None,
        metadata,
        body: body.clone(),
        extra: json!({"life": life}),
    };
    let kept = object.clone();
    app.store(move |store| store.insert(&kept)).await?;
    batch_run::start(&app, object);
    Ok(Json(body))
}

/// `GET /v1/batches`
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let query = query::list(raw.as_deref(), None, false, false)?;
    KIND.list(&app, owner, query).await
}

/// `GET /v1/batches/{id}`
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    Ok(Json(KIND.find(&app, &owner, &id).await?.body))
}

/// `POST /v1/batches/{id}/cancel`: what is being answered is finished, nothing more is begun.
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let batch = KIND.find(&app, &owner, &id).await?;
    if !matches!(
        batch.label.as_str(),
        "validating" | "in_progress" | "cancelling"
    ) {
        let message = format!("the batch is `{}` and cannot be cancelled", batch.label);
        return Err(ApiError::conflict("not_cancellable", message));
    }
    let mut body = batch.body;
    if app.batches.cancel(&id) {
        body["status"] = json!("cancelling");
        body["cancelling_at"] = json!(ids::now());
    }
    Ok(Json(body))
}
