//! `POST /v1/chat/completions`: from bytes to a request that can be run, or an error that names the field.

use bantam_text::Message;
use serde_json::{Map, Value};

use super::ask::Ask;
use super::fields::{Fields, Neutral};
use super::format::constraint;
use super::messages::messages;
use super::tools::ToolUse;
use crate::error::ApiError;

/// Fields of OpenAI's that are taken only with the value that asks for nothing.
const NEUTRAL: &[Neutral] = &[
    (
        "service_tier",
        &["\"auto\"", "\"default\""],
        "there is one tier",
    ),
    ("modalities", &["[\"text\"]"], "answers are text"),
    (
        "reasoning_effort",
        &["\"none\""],
        "models here do not reason apart from the answer",
    ),
    (
        "verbosity",
        &["\"medium\""],
        "the length of answers cannot be set in words",
    ),
    ("functions", &["[]"], "they are `tools` now"),
    (
        "function_call",
        &["\"none\"", "\"auto\""],
        "it is `tool_choice` now",
    ),
    ("audio", &[], "answers are text"),
    ("moderation", &[], "nothing is moderated"),
    ("web_search_options", &[], "the web is not searched"),
];

/// A request that has been checked as far as it can be without a model.
pub(crate) struct ChatRequest {
    pub(crate) model: String,
    pub(crate) ask: Ask,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Is the answer to be kept?
    pub(crate) store: bool,
    pub(crate) metadata: Option<Map<String, Value>>,
    /// The messages as they came, for an answer that is kept.
    pub(crate) input: Vec<Value>,
}

impl ChatRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let items = fields
            .items("messages")?
            .ok_or_else(|| ApiError::missing("messages"))?;
        let model = fields.need("model")?;
        let store = fields.take("store")?.unwrap_or(false);
        let input = if store {
            items.iter().map(|(_, value)| value.clone()).collect()
        } else {
            Vec::new()
        };
        let messages = messages(items)?;
        let (stream, include_usage) = fields.stream()?;
        let request = Self {
            model,
            ask: ask(&mut fields, messages)?,
            stream,
            include_usage,
            store,
            metadata: fields.metadata()?,
            input,
        };
        fields.finish(NEUTRAL)?;
        Ok(request)
    }
}

fn ask(fields: &mut Fields, messages: Vec<Message>) -> Result<Ask, ApiError> {
    let max_tokens = fields.whole("max_tokens", 1, u64::MAX)?;
    let max_completion = fields.whole("max_completion_tokens", 1, u64::MAX)?;
    if let (Some(old), Some(new)) = (max_tokens, max_completion)
        && old != new
    {
        let message = "`max_tokens` and `max_completion_tokens` differ";
        return Err(ApiError::invalid("max_tokens", message));
    }
    let with_logprobs = fields.take("logprobs")?.unwrap_or(false);
    let top = fields.whole("top_logprobs", 0, 20)?;
    if top.is_some() && !with_logprobs {
        let message = "`top_logprobs` goes with `logprobs: true` only";
        return Err(ApiError::invalid("top_logprobs", message));
    }
    let wanted = constraint(fields)?;
    let tools = ToolUse::take(fields, false)?;
    if let (Some((param, _)), true) = (&wanted, tools.is_some())
        && param.starts_with("guided")
    {
        let message = format!("`{param}` cannot be combined with tools that may be called");
        return Err(ApiError::invalid(&**param, message));
    }
    Ok(Ask {
        messages,
        tools,
        n: fields.whole("n", 1, 128)?.unwrap_or(1),
        stop: fields.stops()?,
        max_tokens: max_completion.or(max_tokens),
        temperature: fields.ranged("temperature", 0.0, 2.0)?,
        sampling: fields.sampling()?,
        seed: fields.take("seed")?,
        logprobs: with_logprobs.then_some(top.unwrap_or(0)),
        wanted,
        prediction: prediction(fields)?,
    })
}

/// `prediction`: text that the answer is expected to repeat.
fn prediction(fields: &mut Fields) -> Result<Option<String>, ApiError> {
    let Some(mut prediction) = fields.object("prediction")? else {
        return Ok(None);
    };
    let kind: String = prediction.need("type")?;
    if kind != "content" {
        let message = "`prediction.type` must be `content`";
        return Err(ApiError::invalid("prediction.type", message));
    }
    let text = match prediction.take::<Value>("content")? {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            let mut text = String::new();
            for (i, part) in parts.into_iter().enumerate() {
                let mut part = Fields::of(format!("prediction.content[{i}]"), part)?;
                let kind: String = part.need("type")?;
                if kind != "text" {
                    let path = part.path("type");
                    return Err(ApiError::unsupported(
                        &*path,
                        format!("`{path}` must be `text`"),
                    ));
                }
                text.push_str(&part.need::<String>("text")?);
                part.finish(&[])?;
            }
            text
        }
        _ => {
            let message = "`prediction.content` must be a string or an array of text parts";
            return Err(ApiError::invalid("prediction.content", message));
        }
    };
    prediction.finish(&[])?;
    Ok(Some(text))
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
