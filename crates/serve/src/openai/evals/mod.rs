//! `/v1/evals`: what is judged and by which graders. [`runs`] judges.
//!
//! Beyond OpenAI: `data_source_config.group_by` names a field of the items (or items have a field `group`); rows of one
//! group hang together, and every interval says so.

mod asking;
pub(crate) mod criteria;
pub(crate) mod grade;
pub(crate) mod graders;
mod prompt;
mod report;
mod rows;
pub(crate) mod runs;
pub(crate) mod work;

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, Request, State};
use bantam_store::Object;
use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::objects::Kind;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::query::{self, Id};
use crate::server::App;

pub(crate) const KIND: Kind = Kind {
    name: "eval",
    noun: "eval",
};

/// The longest name, in characters.
const NAME_MAX: usize = 256;

/// `POST /v1/evals`
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&http)?.owner;
    let body = app.read_json(http).await?;
    let mut fields = Fields::of_body(&body)?;
    let config = fields
        .object("data_source_config")?
        .ok_or_else(|| ApiError::missing("data_source_config"))?;
    let config = Config::read(config)?;
    let items = fields.items("testing_criteria")?;
    let items = items.ok_or_else(|| ApiError::missing("testing_criteria"))?;
    let criteria = criteria::criteria(items)?;
    criteria::check_places(&criteria, config.item_schema.as_ref(), config.has_sample)?;
    let metadata = fields.metadata()?.unwrap_or_default();
    let name = name(&mut fields)?;
    fields.finish(&[])?;
    let created = ids::now();
    let id = ids::random("eval_");
    let shown: Vec<&Value> = criteria.iter().map(|one| &one.shown).collect();
    let body = json!({
        "id": id, "object": "eval", "name": name.unwrap_or_default(), "created_at": created,
        "data_source_config": config.shown, "testing_criteria": shown, "metadata": metadata,
    });
    let object = Object {
        kind: KIND.name.to_string(),
        id,
        owner,
        parent: String::new(),
        created,
        label: config.kind.to_string(),
        expires: None,
        metadata,
        body: body.clone(),
        extra: json!({
            "item_schema": config.item_schema, "group_by": config.group_by,
            "stored": config.stored, "updated": created,
        }),
    };
    app.store(move |store| store.insert(&object)).await?;
    Ok(Json(body))
}

fn name(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let name: Option<String> = fields.take("name")?;
    if name
        .as_ref()
        .is_some_and(|name| name.chars().count() > NAME_MAX)
    {
        let message = format!("`name` must be at most {NAME_MAX} characters");
        return Err(ApiError::invalid("name", message));
    }
    Ok(name)
}

/// What rows look like.
struct Config {
    kind: &'static str,
    item_schema: Option<Value>,
    /// Will there be a `sample` that graders can read?
    has_sample: bool,
    group_by: Option<String>,
    /// Which answers that were kept are meant.
    stored: Value,
    shown: Value,
}

impl Config {
    fn read(mut fields: Fields) -> Result<Config, ApiError> {
        let kind: String = fields.need("type")?;
        let group_path = fields.path("group_by");
        let group_by: Option<String> = fields.take("group_by")?;
        if group_by
            .as_ref()
            .is_some_and(|by| by.is_empty() || by.len() > 200)
        {
            let message = format!("`{group_path}` must be the path of an item's field");
            return Err(ApiError::invalid(group_path, message));
        }
        let sample = json!({
            "type": "object",
            "properties": {
                "output_text": {"type": "string"}, "output_json": {}, "output_tools": {"type": "array"},
                "choices": {"type": "array"}, "model": {"type": "string"}, "finish_reason": {"type": "string"},
            },
        });
        let mut config = match kind.as_str() {
            "custom" => {
                let path = fields.path("item_schema");
                let schema: Value = fields.need("item_schema")?;
                prompt::schema(&path, &schema)?;
                let has_sample = fields.take("include_sample_schema")?.unwrap_or(false);
                let mut properties = json!({"item": schema});
                if has_sample {
                    properties["sample"] = sample;
                }
                let names: Vec<&String> = properties
                    .as_object()
                    .into_iter()
                    .flat_map(Map::keys)
                    .collect();
                let whole = json!({"type": "object", "properties": properties, "required": names});
                Config {
                    kind: "custom",
                    item_schema: Some(schema),
                    has_sample,
                    group_by: None,
                    stored: Value::Null,
                    shown: json!({"type": "custom", "schema": whole}),
                }
            }
            "logs" | "stored_completions" => {
                let metadata = fields.metadata()?.unwrap_or_default();
                let item = json!({
                    "type": "object",
                    "properties": {
                        "input": {"type": "array"}, "model": {"type": "string"},
                        "metadata": {"type": "object"}, "id": {"type": "string"},
                    },
                });
                let whole = json!({
                    "type": "object", "properties": {"item": item, "sample": sample}, "required": ["item", "sample"],
                });
                Config {
                    kind: if kind == "logs" {
                        "logs"
                    } else {
                        "stored_completions"
                    },
                    item_schema: None,
                    has_sample: true,
                    group_by: None,
                    stored: json!(metadata),
                    shown: json!({"type": kind, "schema": whole, "metadata": metadata}),
                }
            }
            _ => {
                let path = fields.path("type");
                let message = format!("`{path}` must be `custom`, `logs` or `stored_completions`");
                return Err(ApiError::invalid(path, message));
            }
        };
        if let Some(by) = &group_by {
            config.shown["group_by"] = json!(by);
        }
        config.group_by = group_by;
        fields.finish(&[])?;
        Ok(config)
    }
}

/// `GET /v1/evals`
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let (by, rest): (Vec<_>, Vec<_>) = query::pairs(raw.as_deref())
        .into_iter()
        .partition(|(name, _)| name == "order_by");
    let by = by.into_iter().next_back().map(|(_, value)| value);
    let mut query = query::list_of_pairs(rest, None, true, true)?;
    match by.as_deref() {
        None | Some("created_at") => KIND.list(&app, owner, query).await,
        Some("updated_at") => {
            let asked = std::mem::replace(&mut query.limit, usize::MAX >> 1);
            let mut wanted = query.clone();
            (wanted.limit, query.after, query.ascending) = (asked, None, true);
            let page = app
                .store(move |store| store.list(KIND.name, &owner, &query))
                .await?;
            let mut all = page.map(|page| page.objects).unwrap_or_default();
            all.sort_by_key(|eval| eval.extra["updated"].as_u64());
            query::slice(all.into_iter().map(|eval| eval.body).collect(), &wanted).map(Json)
        }
        Some(_) => {
            let message = "`order_by` must be `created_at` or `updated_at`";
            Err(ApiError::invalid("order_by", message))
        }
    }
}

/// `GET /v1/evals/{id}`
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    Ok(Json(KIND.find(&app, &owner, &id).await?.body))
}

/// `POST /v1/evals/{id}`: another name, other metadata.
pub(crate) async fn update(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let body = app.read_json(request).await?;
    let mut fields = Fields::of_body(&body)?;
    let (name, metadata) = (name(&mut fields)?, fields.metadata()?);
    fields.finish(&[])?;
    let mut eval = KIND.find(&app, &owner, &id).await?;
    if let Some(name) = name {
        eval.body["name"] = json!(name);
    }
    if let Some(metadata) = metadata {
        eval.body["metadata"] = json!(metadata);
        eval.metadata = metadata;
    }
    eval.extra["updated"] = json!(ids::now());
    let shown = eval.body.clone();
    app.store(move |store| store.update(&eval)).await?;
    Ok(Json(shown))
}

/// `DELETE /v1/evals/{id}`: with its runs; those that run are stopped.
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    KIND.find(&app, &owner, &id).await?;
    runs::stop_all(&app, &owner, &id).await?;
    KIND.delete(&app, owner, &id).await?;
    Ok(Json(
        json!({"eval_id": id, "object": "eval.deleted", "deleted": true}),
    ))
}
