//! `GET /v1/models`, and `GET` and `DELETE /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use bantam_store::Scope;
use serde::Serialize;

use crate::caller::Caller;
use crate::error::ApiError;
use crate::models::Model;
use crate::openai::fine_tuning;
use crate::served::ServedEmbedder;
use crate::server::App;

#[derive(Serialize)]
pub(crate) struct ModelBody {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: String,
}

#[derive(Serialize)]
pub(crate) struct ModelList {
    object: &'static str,
    data: Vec<ModelBody>,
}

fn body(model: &Model) -> ModelBody {
    ModelBody {
        id: model.id.clone(),
        object: "model",
        created: model.created,
        owned_by: model.owned_by.clone(),
    }
}

fn embedder(one: &ServedEmbedder) -> ModelBody {
    ModelBody {
        id: one.id.clone(),
        object: "model",
        created: one.created,
        owned_by: "bantam".to_string(),
    }
}

pub(crate) async fn list(State(app): State<Arc<App>>) -> Json<ModelList> {
    let mut data: Vec<ModelBody> = app
        .models
        .listed()
        .iter()
        .map(|model| body(model))
        .collect();
    data.extend(app.models.embedders().iter().map(|one| embedder(one)));
    Json(ModelList {
        object: "list",
        data,
    })
}

pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelBody>, ApiError> {
    // A name that is not even text is the name of no model.
    let Path(id) = path.map_err(|_| ApiError::no_model("?"))?;
    if let Some(one) = app.models.embedders().iter().find(|one| one.is_called(&id)) {
        return Ok(Json(embedder(one)));
    }
    app.model(&id).map(|model| Json(body(&model)))
}

/// Serves a tuned model no more. Its files stay: what was trained for hours is not lost by one request.
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<Json<serde_json::Value>, ApiError> {
    Caller::with(&request, Scope::Admin)?;
    let Path(id) = path.map_err(|_| ApiError::no_model("?"))?;
    let model = app.model(&id)?;
    if !model.tuned {
        let message = format!("`{id}` is a base model; only tuned models can be deleted");
        return Err(ApiError::protected(message));
    }
    if !app.models.remove(&model.id) {
        // Another request was faster, or adapters are over it.
        let message = format!("`{id}` cannot be deleted while other models are over it");
        return Err(ApiError::protected(message));
    }
    fine_tuning::run::forget_model(&app, &model.id).await;
    Ok(Json(
        serde_json::json!({"id": model.id, "object": "model", "deleted": true}),
    ))
}
