//! Stored completions: those that were asked for with `store: true`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, Request, State};
use bantam_store::Object;
use serde_json::{Value, json};

use super::chat::Kept;
use super::fields::Fields;
use super::objects::Kind;
use super::response::ChatCompletion;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::query::{self, Id};
use crate::server::App;

const KIND: Kind = Kind {
    name: "chat.completion",
    noun: "stored completion",
};

/// Keeps a completion.
pub(crate) fn keep(
    app: &App,
    caller: &Caller,
    completion: &ChatCompletion,
    kept: Kept,
) -> Result<(), ApiError> {
    let mut body = serde_json::to_value(completion)
        .map_err(|_| ApiError::internal("the answer cannot be kept"))?;
    body["metadata"] = Value::Object(kept.metadata.clone());
    let object = Object {
        kind: KIND.name.to_string(),
        parent: String::new(),
        id: completion.head.id.clone(),
        owner: caller.owner.clone(),
        created: completion.head.created,
        label: completion.head.model.clone(),
        expires: None,
        metadata: kept.metadata,
        body,
        extra: Value::Array(kept.messages),
    };
    app.store_now().insert(&object).map_err(ApiError::store)
}

/// `GET /v1/chat/completions`
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = Caller::of(&request)?;
    let query = query::list(raw.as_deref(), Some("model"), true, true)?;
    KIND.list(&app, caller.owner, query).await
}

/// `GET /v1/chat/completions/{id}`
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Id(id): Id,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    query::none(raw.as_deref())?;
    let object = KIND.find(&app, &Caller::of(&request)?.owner, &id).await?;
    Ok(Json(object.body))
}

/// `POST /v1/chat/completions/{id}`: replaces the metadata.
pub(crate) async fn update(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = Caller::of(&request)?;
    let body = app.read_json(request).await?;
    let mut fields = Fields::of_body(&body)?;
    let metadata = fields.metadata()?.unwrap_or_default();
    fields.finish(&[])?;
    let mut object = KIND.find(&app, &caller.owner, &id).await?;
    object.body["metadata"] = Value::Object(metadata.clone());
    object.metadata = metadata;
    let shown = object.body.clone();
    app.store(move |store| store.update(&object)).await?;
    Ok(Json(shown))
}

/// `DELETE /v1/chat/completions/{id}`
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    KIND.delete(&app, owner, &id).await?;
    Ok(Json(
        json!({"id": id, "object": "chat.completion.deleted", "deleted": true}),
    ))
}

/// `GET /v1/chat/completions/{id}/messages`: what was asked.
pub(crate) async fn messages(
    State(app): State<Arc<App>>,
    Id(id): Id,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let query = query::list(raw.as_deref(), None, false, true)?;
    let object = KIND.find(&app, &Caller::of(&request)?.owner, &id).await?;
    let messages = object.extra.as_array().cloned().unwrap_or_default();
    let shown = messages.into_iter().enumerate();
    let shown = shown.map(|(i, message)| show(&id, i, message)).collect();
    query::slice(shown, &query).map(Json)
}

fn show(completion: &str, i: usize, mut message: Value) -> Value {
    let parts = message["content"].as_array().cloned();
    message["id"] = json!(format!("{completion}-{i}"));
    match parts {
        Some(parts) => {
            let texts = parts.iter().filter_map(|part| part["text"].as_str());
            message["content"] = json!(texts.collect::<String>());
            message["content_parts"] = Value::Array(parts);
        }
        None => message["content_parts"] = Value::Null,
    }
    message
}
