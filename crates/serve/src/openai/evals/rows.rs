//! The rows of a run: given in the request, lines of a file, or answers that were kept.

use std::sync::Arc;

use bantam_store::{ListQuery, Object};
use serde_json::{Map, Value, json};

use super::criteria::sample_of;
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::openai::files::{self, Lines};
use crate::server::App;

/// The most rows of a run.
pub(crate) const ROWS_MAX: usize = 50_000;
/// The most kept answers that a run reads, if it does not say.
const STORED_DEFAULT: usize = 10_000;

/// A row: what is asked about, and an answer, if there is one already.
pub(crate) struct Row {
    pub(crate) item: Value,
    pub(crate) sample: Option<Value>,
}

/// Where rows come from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Source {
    Content(Vec<Value>),
    File(String),
    /// Kept chat completions, by name.
    Completions(Vec<String>),
    /// Kept responses, by name.
    Responses(Vec<String>),
}

impl Source {
    /// Are the rows answers that were kept here?
    pub(crate) fn is_kept(&self) -> bool {
        matches!(self, Source::Completions(_) | Source::Responses(_))
    }

    /// Reads `source`; kept answers are looked up, so that a run's rows do not change while it runs.
    pub(crate) async fn read(
        app: &App,
        owner: &str,
        mut fields: Fields,
        kept: &str,
    ) -> Result<Source, ApiError> {
        let kind: String = fields.need("type")?;
        let path = fields.path("type");
        match kind.as_str() {
            "file_content" => {
                let path = fields.path("content");
                let rows: Vec<Value> = fields.need("content")?;
                fields.finish(&[])?;
                if rows.is_empty() || rows.len() > ROWS_MAX {
                    let message = format!("`{path}` must be 1 to {ROWS_MAX} rows");
                    return Err(ApiError::invalid(path, message));
                }
                for (i, row) in rows.iter().enumerate() {
                    let place = format!("{path}[{i}]");
                    check_row(&place, row).map_err(|why| ApiError::invalid(&*place, why))?;
                }
                Ok(Source::Content(rows))
            }
            "file_id" => {
                let path = fields.path("id");
                let id: String = fields.need("id")?;
                fields.finish(&[])?;
                let file = files::KIND.find(app, owner, &id).await.map_err(|_| {
                    ApiError::invalid(&*path, format!("no file `{id:.80}` was found"))
                })?;
                if file.label != "evals" {
                    let message = format!("`{path}` must be a file whose `purpose` is `evals`");
                    return Err(ApiError::invalid(path, message));
                }
                Ok(Source::File(id))
            }
            "stored_completions" if kept == "stored_completions" => {
                let ids = stored(app, owner, "chat.completion", fields).await?;
                Ok(Source::Completions(ids))
            }
            "responses" if kept == "responses" => {
                let ids = stored(app, owner, "response", fields).await?;
                Ok(Source::Responses(ids))
            }
            _ => {
                let more = if kept.is_empty() {
                    String::new()
                } else {
                    format!(" or `{kept}`")
                };
                let message = format!("`{path}` must be `file_content`, `file_id`{more}");
                Err(ApiError::invalid(path, message))
            }
        }
    }

    /// What the run keeps of it.
    pub(crate) fn to_kept(&self) -> Value {
        match self {
            // It stands in what the run shows.
            Source::Content(_) => json!({"content": true}),
            Source::File(id) => json!({"file": id}),
            Source::Completions(ids) => json!({"completions": ids}),
            Source::Responses(ids) => json!({"responses": ids}),
        }
    }

    /// The source of a run that was kept.
    pub(crate) fn of_kept(kept: &Value, shown: &Value) -> Source {
        let ids = |value: &Value| -> Vec<String> {
            let ids = value.as_array().into_iter().flatten();
            ids.filter_map(Value::as_str).map(str::to_string).collect()
        };
        if let Some(id) = kept["file"].as_str() {
            Source::File(id.to_string())
        } else if kept["completions"].is_array() {
            Source::Completions(ids(&kept["completions"]))
        } else if kept["responses"].is_array() {
            Source::Responses(ids(&kept["responses"]))
        } else {
            let rows = shown["source"]["content"].as_array();
            Source::Content(rows.cloned().unwrap_or_default())
        }
    }
}

/// What is wrong with a row's form, if something is.
fn check_row(place: &str, row: &Value) -> Result<(), String> {
    if !row["item"].is_object() {
        return Err(format!("`{place}.item` must be an object"));
    }
    if !(row["sample"].is_null() || row["sample"].is_object()) {
        return Err(format!("`{place}.sample` must be an object"));
    }
    let stray = row.as_object().into_iter().flatten();
    match stray
        .map(|(name, _)| name)
        .find(|name| !matches!(name.as_str(), "item" | "sample"))
    {
        Some(name) => Err(format!(
            "`{place}.{name:.40}` is unknown: a row has `item` and `sample`"
        )),
        None => Ok(()),
    }
}

/// The names of kept answers that fit, oldest first.
async fn stored(
    app: &App,
    owner: &str,
    kind: &'static str,
    mut fields: Fields,
) -> Result<Vec<String>, ApiError> {
    let path = fields.path("type");
    let model: Option<String> = fields.take("model")?;
    let metadata = fields.metadata()?.unwrap_or_default();
    let after: u64 = fields.take("created_after")?.unwrap_or(0);
    let before: u64 = fields.take("created_before")?.unwrap_or(u64::MAX);
    let limit = fields.whole("limit", 1, ROWS_MAX as u64)?;
    fields.finish(&[
        (
            "instructions_search",
            &[],
            "responses are found by model, metadata and time",
        ),
        (
            "reasoning_effort",
            &[],
            "models here do not reason apart from the answer",
        ),
        (
            "temperature",
            &[],
            "responses are found by model, metadata and time",
        ),
        (
            "top_p",
            &[],
            "responses are found by model, metadata and time",
        ),
        (
            "tools",
            &[],
            "responses are found by model, metadata and time",
        ),
        (
            "users",
            &[],
            "responses are found by model, metadata and time",
        ),
    ])?;
    let limit = limit.unwrap_or(STORED_DEFAULT);
    let pairs = metadata.into_iter().map(|(key, value)| {
        let value = value.as_str().unwrap_or_default().to_string();
        (key, value)
    });
    let mut query = ListQuery {
        limit: 200,
        ascending: true,
        // Completions are kept by model, responses by state.
        label: if kind == "response" {
            Some("completed".to_string())
        } else {
            model.clone()
        },
        metadata: pairs.collect(),
        ..ListQuery::default()
    };
    let mut ids = Vec::new();
    loop {
        let (asked, owner) = (query.clone(), owner.to_string());
        let page = app
            .store(move |store| store.list(kind, &owner, &asked))
            .await?;
        let Some(page) = page else { break };
        query.after = page.objects.last().map(|object| object.id.clone());
        let fits = page.objects.into_iter().filter(|object| {
            let of_model = model
                .as_ref()
                .is_none_or(|model| object.body["model"] == model.as_str());
            of_model && (after..=before).contains(&object.created)
        });
        ids.extend(fits.map(|object| object.id));
        if !page.has_more || ids.len() >= limit {
            break;
        }
    }
    ids.truncate(limit);
    if ids.is_empty() {
        let message = "nothing that was kept fits; ask with `store: true` to keep answers";
        return Err(ApiError::invalid(path, message));
    }
    Ok(ids)
}

/// A kept chat completion as a row.
fn of_completion(object: &Object) -> Row {
    let choice = &object.body["choices"][0];
    let item = json!({
        "input": object.extra, "model": object.body["model"],
        "metadata": Value::Object(object.metadata.clone()), "id": object.id,
    });
    Row {
        item,
        sample: Some(of_message(
            &choice["message"],
            choice["finish_reason"].as_str().unwrap_or_default(),
            &object.body["model"],
        )),
    }
}

/// A kept response as a row.
fn of_response(object: &Object) -> Row {
    let mut messages = object.extra["context"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    // What was answered stands at the end of the conversation.
    while messages
        .last()
        .is_some_and(|last| last["role"] == "assistant")
    {
        messages.pop();
    }
    if let Some(instructions) = object.body["instructions"].as_str() {
        messages.insert(0, json!({"role": "system", "content": instructions}));
    }
    let output = object.body["output"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let texts = output.iter().flat_map(|item| {
        let parts = item["content"].as_array().into_iter().flatten();
        parts.filter_map(|part| part["text"].as_str())
    });
    let text: String = texts.collect();
    let calls: Vec<Value> = output
        .iter()
        .filter(|item| item["type"] == "function_call")
        .map(|item| {
            json!({"id": item["call_id"], "type": "function",
                "function": {"name": item["name"], "arguments": item["arguments"]}})
        })
        .collect();
    let message = json!({"role": "assistant", "content": text, "tool_calls": calls});
    Row {
        item: json!({
            "input": messages, "model": object.body["model"],
            "metadata": Value::Object(object.metadata.clone()), "id": object.id,
        }),
        sample: Some(of_message(&message, "stop", &object.body["model"])),
    }
}

/// A model's message as graders read it.
pub(crate) fn of_message(message: &Value, finish_reason: &str, model: &Value) -> Value {
    let calls = match &message["tool_calls"] {
        Value::Array(calls) => Value::Array(calls.clone()),
        _ => json!([]),
    };
    sample_of(
        message["content"].as_str().unwrap_or_default(),
        json!({
            "output_tools": calls, "model": model, "finish_reason": finish_reason,
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        }),
    )
}

/// Reads rows one after the other.
pub(crate) struct Rows {
    app: Arc<App>,
    owner: String,
    source: Source,
    lines: Option<Lines>,
    at: usize,
    line: usize,
}

impl Rows {
    pub(crate) fn new(app: &Arc<App>, owner: &str, source: Source) -> Self {
        let lines = match &source {
            Source::File(id) => Some(Lines::new(app, id)),
            _ => None,
        };
        Self {
            app: Arc::clone(app),
            owner: owner.to_string(),
            source,
            lines,
            at: 0,
            line: 0,
        }
    }

    /// Where the last row stood, for an error.
    pub(crate) fn place(&self) -> String {
        match &self.source {
            Source::File(id) => format!("line {} of `{id}`", self.line),
            Source::Content(_) => format!("data_source.source.content[{}]", self.at - 1),
            Source::Completions(ids) | Source::Responses(ids) => format!("`{}`", ids[self.at - 1]),
        }
    }

    /// The next row; `None` after the last.
    pub(crate) async fn next(&mut self) -> Result<Option<Row>, ApiError> {
        if let Some(lines) = &mut self.lines {
            return loop {
                let Some(line) = lines.next().await? else {
                    break Ok(None);
                };
                self.line += 1;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                self.at += 1;
                let row: Value = serde_json::from_slice(&line)
                    .map_err(|e| ApiError::bad_file(format!("line {}: {e}", self.line)))?;
                let place = format!("line {}", self.line);
                check_row(&place, &row).map_err(ApiError::bad_file)?;
                break Ok(Some(given(row)));
            };
        }
        let at = self.at;
        self.at += 1;
        let (kind, ids, read): (_, _, fn(&Object) -> Row) = match &self.source {
            Source::Content(rows) => return Ok(rows.get(at).cloned().map(given)),
            Source::Completions(ids) => ("chat.completion", ids, of_completion),
            Source::Responses(ids) => ("response", ids, of_response),
            Source::File(_) => return Ok(None),
        };
        let Some(id) = ids.get(at).cloned() else {
            return Ok(None);
        };
        let (owner, wanted) = (self.owner.clone(), id.clone());
        let found = self
            .app
            .store(move |store| store.get(kind, &owner, &wanted))
            .await?;
        match found {
            Some(object) => Ok(Some(read(&object))),
            None => Err(ApiError::bad_file(format!("`{id}` was deleted meanwhile"))),
        }
    }
}

fn given(mut row: Value) -> Row {
    let item = row["item"].take();
    let sample = match row["sample"].take() {
        Value::Object(sample) => Some(completed(sample)),
        _ => None,
    };
    Row { item, sample }
}

/// A given answer, with what can be read out of its text.
fn completed(sample: Map<String, Value>) -> Value {
    let text = sample
        .get("output_text")
        .and_then(Value::as_str)
        .map(str::to_string);
    match text {
        Some(text) => sample_of(&text, Value::Object(sample)),
        None => Value::Object(sample),
    }
}
