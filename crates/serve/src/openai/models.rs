//! `GET /v1/models` and `GET /v1/models/{id}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use serde::Serialize;

use crate::error::ApiError;
use crate::server::{App, Model};

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

pub(crate) async fn list(State(app): State<Arc<App>>) -> Json<ModelList> {
    Json(ModelList {
        object: "list",
        data: app.models.iter().map(|model| body(model)).collect(),
    })
}

pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelBody>, ApiError> {
    // A name that is not even text is the name of no model.
    let Path(id) = path.map_err(|_| ApiError::no_model("?"))?;
    app.model(&id).map(|model| Json(body(model)))
}
