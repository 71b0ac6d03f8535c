//! `/v1/responses`: create, stream, look up, forget; one response goes on from another.

pub(crate) mod background;
mod build;
mod request;

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, Request, State};
use axum::response::{IntoResponse, Response};
use bantam_store::Object;
use serde_json::{Map, Value, json};

use super::answers::{Answers, Piece};
use super::sse::{self, Writer};
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::query::{self, Id};
use crate::server::App;
use build::Builder;
use request::{ITEM, KIND, ResponseRequest};

pub(crate) use request::add as add_item;

const ROUTE: &str = "/v1/responses";

/// `POST /v1/responses`
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Response, ApiError> {
    let caller = Caller::of(&http)?;
    let body = app.read_json(http).await?;
    let request = ResponseRequest::parse(&body, app.store_now(), &caller.owner)?;
    drop(body);
    if request.background {
        let (answers, work) = start(&app, &caller, request, false).await?;
        return Ok(Json(background::start(&app, answers, work)?).into_response());
    }
    if !request.stream {
        return Ok(Json(whole(&app, &caller, request).await?).into_response());
    }
    let (answers, job) = start(&app, &caller, request, true).await?;
    Ok(sse::response(answers, Box::new(job)))
}

/// Reads a body of nobody's; what comes of it is dropped.
pub(crate) fn parse(body: &[u8], store: &bantam_store::Store) -> Result<(), ApiError> {
    ResponseRequest::parse(body, store, "").map(|_| ())
}

/// The whole response to a body.
pub(crate) async fn answer(
    app: &Arc<App>,
    caller: &Caller,
    body: &[u8],
) -> Result<Value, ApiError> {
    let request = ResponseRequest::parse(body, app.store_now(), &caller.owner)?;
    if request.stream {
        let message = "a batch's answers are not streamed";
        return Err(ApiError::unsupported("stream", message));
    }
    if request.background {
        let message = "a batch is in the background as it is";
        return Err(ApiError::unsupported("background", message));
    }
    whole(app, caller, request).await
}

async fn whole(
    app: &Arc<App>,
    caller: &Caller,
    request: ResponseRequest,
) -> Result<Value, ApiError> {
    let (mut answers, mut job) = start(app, caller, request, false).await?;
    while let Some(next) = answers.next().await {
        job.builder.piece(next?.1);
    }
    job.keep()?;
    Ok(job.builder.response())
}

/// A response on its way, and what is kept with it.
struct Work {
    builder: Builder,
    app: Arc<App>,
    caller: Caller,
    id: String,
    created: u64,
    store: bool,
    background: bool,
    metadata: Map<String, Value>,
    context: Vec<Value>,
    input: Vec<Value>,
}

async fn start(
    app: &Arc<App>,
    caller: &Caller,
    request: ResponseRequest,
    streamed: bool,
) -> Result<(Answers, Work), ApiError> {
    let model = app.model(&request.model)?;
    let (id, created) = (ids::random("resp_"), ids::now());
    let mut head = Map::new();
    for (name, value) in [
        ("id", json!(id)),
        ("object", json!("response")),
        ("created_at", json!(created)),
        ("model", json!(model.id)),
        ("background", json!(request.background)),
        ("metadata", Value::Object(request.metadata.clone())),
        ("reasoning", json!({"effort": null, "summary": null})),
        ("service_tier", json!("default")),
        ("store", json!(request.store)),
        ("truncation", json!("disabled")),
    ] {
        head.insert(name.to_string(), value);
    }
    let temperature = request.ask.temperature;
    head.extend(request.echo);
    head["temperature"] = json!(temperature.unwrap_or(model.default_temperature));
    let work = Work {
        builder: Builder::new(head, streamed),
        app: Arc::clone(app),
        caller: caller.clone(),
        id,
        created,
        store: request.store,
        background: request.background,
        metadata: request.metadata,
        context: request.context,
        input: request.input,
    };
    let answers = Answers::start(app, caller, &model, ROUTE, request.ask).await?;
    Ok((answers, work))
}

impl Work {
    /// An object that is kept with the response.
    fn object(&self, kind: &str, id: &str, label: &str, body: Value, extra: Value) -> Object {
        Object {
            kind: kind.to_string(),
            parent: String::new(),
            id: id.to_string(),
            owner: self.caller.owner.clone(),
            created: self.created,
            label: label.to_string(),
            expires: None,
            metadata: Map::new(),
            body,
            extra,
        }
    }

    /// The response as it stands, with the conversation up to its end, if it has one.
    fn kept(&self, context: Value) -> Object {
        let body = self.builder.response();
        let status = body["status"].as_str().unwrap_or_default().to_string();
        let extra = json!({"context": context, "input": self.input});
        let mut kept = self.object(KIND.name, &self.id, &status, body, extra);
        kept.metadata = self.metadata.clone();
        kept
    }

    /// Keeps a response that has only begun.
    fn begin(&self) -> Result<(), ApiError> {
        let kept = self.app.store_now().insert(&self.kept(Value::Null));
        kept.map_err(ApiError::store)
    }

    /// Notes how a response that was begun stands. Its caller may have deleted it.
    fn save(&self) {
        if let Err(error) = self.app.store_now().update(&self.kept(Value::Null)) {
            tracing::error!(%error, "the state of a response was not kept");
        }
    }

    /// Keeps the response, and its items by their own names.
    fn keep(&mut self) -> Result<(), ApiError> {
        if !self.store {
            return Ok(());
        }
        let mut context = std::mem::take(&mut self.context);
        let store = self.app.store_now();
        for item in self.builder.output() {
            request::add("output", item.clone(), &mut context)?;
            let id = item["id"].as_str().unwrap_or_default();
            let kept = self.object(ITEM, id, "", item.clone(), Value::Null);
            store.insert(&kept).map_err(ApiError::store)?;
        }
        let kept = self.kept(Value::Array(context));
        // One in the background is there already.
        let done = if self.background {
            store.update(&kept).map(|_| ())
        } else {
            store.insert(&kept)
        };
        done.map_err(ApiError::store)
    }
}

/// Writes a status into a kept response.
fn spell(object: &mut Object, status: &str, error: Value) {
    object.label = status.to_string();
    object.body["status"] = json!(status);
    object.body["error"] = error;
}

impl Writer for Work {
    fn opening(&mut self) -> String {
        self.builder.begin();
        self.builder.events()
    }

    fn piece(&mut self, _idx: usize, piece: Piece) -> String {
        let is_end = matches!(piece, Piece::Done { .. });
        self.builder.piece(piece);
        if is_end && let Err(error) = self.keep() {
            return self.failure(&error);
        }
        self.builder.events()
    }

    fn failure(&mut self, error: &ApiError) -> String {
        self.builder.fail(error);
        self.builder.events()
    }
}

/// `GET /v1/responses/{id}`
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Id(id): Id,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    for (name, value) in query::pairs(raw.as_deref()) {
        match (name.as_str(), value.as_str()) {
            ("stream", "false") | ("include[]" | "include", "message.output_text.logprobs") => {}
            ("stream" | "starting_after" | "include" | "include[]" | "include_obfuscation", _) => {
                let message =
                    format!("`{name}` is not supported: a response is whole when it is kept");
                return Err(ApiError::unsupported(name, message));
            }
            _ => return Err(ApiError::unknown(&name)),
        }
    }
    let object = KIND.find(&app, &Caller::of(&request)?.owner, &id).await?;
    Ok(Json(object.body))
}

/// `DELETE /v1/responses/{id}`
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = Caller::of(&request)?;
    let object = KIND.find(&app, &caller.owner, &id).await?;
    background::stop(&app, &id);
    let items = object.body["output"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    app.store(move |store| {
        for item in items {
            let item = item["id"].as_str().unwrap_or_default();
            store.delete(ITEM, &caller.owner, item)?;
        }
        store.delete(KIND.name, &caller.owner, &object.id)
    })
    .await?;
    Ok(Json(
        json!({"id": id, "object": "response", "deleted": true}),
    ))
}

/// `POST /v1/responses/{id}/cancel`: ends one in the background. One that has ended stays as it is.
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let object = KIND.find(&app, &Caller::of(&request)?.owner, &id).await?;
    if object.body["background"] != true {
        let message = "only responses in the background can be cancelled; hang up on the others";
        return Err(ApiError::conflict("not_cancellable", message));
    }
    Ok(Json(background::cancel(&app, object)?.body))
}

/// `GET /v1/responses/{id}/input_items`
pub(crate) async fn input_items(
    State(app): State<Arc<App>>,
    Id(id): Id,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let query = query::list(raw.as_deref(), None, false, false)?;
    let object = KIND.find(&app, &Caller::of(&request)?.owner, &id).await?;
    let items = object.extra["input"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    query::slice(items, &query).map(Json)
}

/// `POST /v1/responses/input_tokens`: how long the prompt would be.
pub(crate) async fn input_tokens(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = Caller::of(&http)?;
    let body = app.read_json(http).await?;
    let request = ResponseRequest::parse(&body, app.store_now(), &caller.owner)?;
    let model = app.model(&request.model)?;
    let counting = tokio::task::spawn_blocking(move || request.ask.prepare(&model));
    let job = counting
        .await
        .map_err(|_| ApiError::internal("the request failed"))??;
    let n = job
        .requests
        .first()
        .map_or(0, |request| request.prompt.len());
    Ok(Json(
        json!({"object": "response.input_tokens", "input_tokens": n}),
    ))
}
