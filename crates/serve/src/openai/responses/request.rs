//! A request of the Responses API: from bytes to what is to be generated.

use bantam_store::Store;
use serde_json::{Map, Value, json};

use super::super::ask::Ask;
use super::super::fields::{Fields, Neutral};
use super::super::format::{Wanted, format};
use super::super::messages::messages;
use super::super::objects::Kind;
use super::super::tools::ToolUse;
use crate::error::ApiError;
use crate::ids;

/// Fields of OpenAI's that are taken only with the value that asks for nothing.
const NEUTRAL: &[Neutral] = &[
    ("conversation", &[], "use `previous_response_id`"),
    ("context_management", &[], "contexts are not compacted"),
    ("moderation", &[], "nothing is moderated"),
    ("prompt", &[], "prompts are not kept here"),
    (
        "service_tier",
        &["\"auto\"", "\"default\""],
        "there is one tier",
    ),
    (
        "truncation",
        &["\"disabled\""],
        "a conversation is never cut",
    ),
    (
        "reasoning",
        &["{}", "{\"effort\":\"none\"}"],
        "models here do not reason apart from the answer",
    ),
];

/// The names under which the object and its context are kept.
pub(super) const KIND: Kind = Kind {
    name: "response",
    noun: "response",
};
pub(super) const ITEM: &str = "response.item";

/// A checked request.
pub(crate) struct ResponseRequest {
    pub(crate) model: String,
    pub(crate) ask: Ask,
    pub(crate) stream: bool,
    pub(crate) store: bool,
    pub(crate) background: bool,
    pub(crate) metadata: Map<String, Value>,
    /// The conversation in chat's shapes, without the instructions: what a next response goes on from.
    pub(crate) context: Vec<Value>,
    /// The items as they came, each with a name.
    pub(crate) input: Vec<Value>,
    /// Fields that the response repeats.
    pub(crate) echo: Map<String, Value>,
}

impl ResponseRequest {
    /// Reads and checks a body; earlier responses and items are looked up for `owner`.
    pub(crate) fn parse(body: &[u8], store: &Store, owner: &str) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let raw: Map<String, Value> = serde_json::from_slice(body).unwrap_or_default();
        let model: String = fields.need("model")?;
        let stream = fields.take("stream")?.unwrap_or(false);
        if let Some(mut options) = fields.object("stream_options")? {
            if options.take("include_obfuscation")? == Some(true) {
                let param = "stream_options.include_obfuscation";
                return Err(ApiError::unsupported(param, "chunks are not padded"));
            }
            options.finish(&[])?;
        }
        let keep = fields.take("store")?.unwrap_or(true);
        let background = fields.take("background")?.unwrap_or(false);
        if background && stream {
            let message = "a response in the background is asked for later, not streamed";
            return Err(ApiError::unsupported("stream", message));
        }
        if background && !keep {
            let message = "`background` goes with `store: true` only";
            return Err(ApiError::invalid("background", message));
        }
        let metadata = fields.metadata()?.unwrap_or_default();
        let previous: Option<String> = fields.take("previous_response_id")?;
        let mut context = match &previous {
            None => Vec::new(),
            Some(id) => {
                let found = store.get(KIND.name, owner, id).map_err(ApiError::store)?;
                let Some(found) = found else {
                    let message =
                        format!("`previous_response_id`: no response `{id:.80}` was found");
                    return Err(ApiError::invalid("previous_response_id", message));
                };
                let Some(context) = found.extra["context"].as_array() else {
                    let message = format!(
                        "`previous_response_id`: the response is `{}` and cannot be gone on from",
                        found.label
                    );
                    return Err(ApiError::invalid("previous_response_id", message));
                };
                context.clone()
            }
        };
        let n_before = context.len();
        let input = fields.need::<Value>("input")?;
        let input = items(input, store, owner, &mut context)?;
        let instructions: Option<String> = fields.take("instructions")?;
        let mut conversation: Vec<(String, Value)> = Vec::new();
        if let Some(text) = &instructions {
            let message = json!({"role": "system", "content": text});
            conversation.push(("instructions".to_string(), message));
        }
        for (i, message) in context.iter().enumerate() {
            let path = match i.checked_sub(n_before) {
                Some(i) => format!("input[{i}]"),
                None => "previous_response_id".to_string(),
            };
            conversation.push((path, message.clone()));
        }
        let messages = messages(conversation)?;
        let wanted = text(&mut fields)?;
        let tools = ToolUse::take(&mut fields, true)?;
        let logprobs = logprobs(&mut fields)?;
        // It limits calls of hosted tools, and there are none.
        fields.whole("max_tool_calls", 1, u64::MAX)?;
        let ask = Ask {
            messages,
            tools,
            n: 1,
            stop: Vec::new(),
            max_tokens: fields.whole("max_output_tokens", 1, u64::MAX)?,
            temperature: fields.ranged("temperature", 0.0, 2.0)?,
            sampling: fields.sampling()?,
            seed: fields.take("seed")?,
            logprobs,
            wanted,
            prediction: None,
        };
        fields.finish(NEUTRAL)?;
        Ok(Self {
            model,
            ask,
            stream,
            store: keep,
            background,
            metadata,
            context,
            input,
            echo: echo(raw),
        })
    }
}

/// What the response says of the request.
fn echo(mut raw: Map<String, Value>) -> Map<String, Value> {
    let mut echo = Map::new();
    for (name, default) in [
        ("instructions", Value::Null),
        ("max_output_tokens", Value::Null),
        ("max_tool_calls", Value::Null),
        ("parallel_tool_calls", json!(true)),
        ("previous_response_id", Value::Null),
        ("safety_identifier", Value::Null),
        ("temperature", Value::Null),
        ("text", json!({"format": {"type": "text"}})),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("top_logprobs", json!(0)),
        ("top_p", json!(1.0)),
        ("user", Value::Null),
    ] {
        let given = raw.shift_remove(name).filter(|value| !value.is_null());
        echo.insert(name.to_string(), given.unwrap_or(default));
    }
    echo
}

/// `text`: `format`, and `verbosity`, which asks for nothing.
fn text(fields: &mut Fields) -> Result<Option<Wanted>, ApiError> {
    let Some(mut text) = fields.object("text")? else {
        return Ok(None);
    };
    let wanted = match text.object("format")? {
        Some(inner) => format(inner, true)?,
        None => None,
    };
    text.finish(&[(
        "verbosity",
        &["\"medium\""],
        "the length of answers cannot be set in words",
    )])?;
    Ok(wanted)
}

/// `top_logprobs`, and `include`, which can ask for log-probabilities and for nothing else.
fn logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let top = fields.whole("top_logprobs", 0, 20)?;
    let include: Vec<String> = fields.take("include")?.unwrap_or_default();
    let known = "message.output_text.logprobs";
    if let Some((i, other)) = include.iter().enumerate().find(|(_, name)| *name != known) {
        let message = format!("`{other:.80}` cannot be included, only `{known}`");
        return Err(ApiError::unsupported(format!("include[{i}]"), message));
    }
    Ok(top.or((!include.is_empty()).then_some(0)))
}

/// Reads `input`: adds it to the conversation in chat's shapes, and returns the items with names.
fn items(
    input: Value,
    store: &Store,
    owner: &str,
    context: &mut Vec<Value>,
) -> Result<Vec<Value>, ApiError> {
    let items = match input {
        Value::String(text) => vec![json!({"role": "user", "content": text})],
        Value::Array(items) => items,
        _ => {
            let message = "`input` must be a string or an array of items";
            return Err(ApiError::invalid("input", message));
        }
    };
    let mut named = Vec::with_capacity(items.len());
    for (i, mut item) in items.into_iter().enumerate() {
        let path = format!("input[{i}]");
        if item["type"] == "item_reference" {
            let id = item["id"].as_str().unwrap_or_default().to_string();
            let found = store.get(ITEM, owner, &id).map_err(ApiError::store)?;
            item = match found {
                Some(found) => found.body,
                None => {
                    let message = format!("`{path}`: no item `{id:.80}` was found");
                    return Err(ApiError::invalid(format!("{path}.id"), message));
                }
            };
        }
        add(&path, item.clone(), context)?;
        if let Some(fields) = item.as_object_mut() {
            fields.entry("type").or_insert(json!("message"));
            fields
                .entry("id")
                .or_insert_with(|| json!(ids::random("msg_")));
        }
        named.push(item);
    }
    Ok(named)
}

/// Adds an item to the conversation.
pub(crate) fn add(path: &str, item: Value, context: &mut Vec<Value>) -> Result<(), ApiError> {
    let mut fields = Fields::of(path, item)?;
    let kind: Option<String> = fields.take("type")?;
    let _: Option<Value> = fields.take("id")?;
    let _: Option<Value> = fields.take("status")?;
    match kind.as_deref().unwrap_or("message") {
        "message" => {
            let role: String = fields.need("role")?;
            let content = match fields.need::<Value>("content")? {
                Value::Array(parts) => {
                    let mut texts = Vec::new();
                    for (i, part) in parts.into_iter().enumerate() {
                        let text = part_text(&format!("{path}.content[{i}]"), part)?;
                        texts.push(json!({"type": "text", "text": text}));
                    }
                    Value::Array(texts)
                }
                other => other,
            };
            let _: Option<Value> = fields.take("phase")?;
            context.push(json!({"role": role, "content": content}));
        }
        "function_call" => {
            let (call_id, name): (String, String) = (fields.need("call_id")?, fields.need("name")?);
            let arguments: String = fields.need("arguments")?;
            let function = json!({"name": name, "arguments": arguments});
            call(
                json!({"id": call_id, "type": "function", "function": function}),
                context,
            );
        }
        "custom_tool_call" => {
            let (call_id, name): (String, String) = (fields.need("call_id")?, fields.need("name")?);
            let input: String = fields.need("input")?;
            let custom = json!({"name": name, "input": input});
            call(
                json!({"id": call_id, "type": "custom", "custom": custom}),
                context,
            );
        }
        "function_call_output" | "custom_tool_call_output" => {
            let call_id: String = fields.need("call_id")?;
            let output = match fields.need::<Value>("output")? {
                Value::String(text) => text,
                Value::Array(parts) => {
                    let mut text = String::new();
                    for (i, part) in parts.into_iter().enumerate() {
                        text.push_str(&part_text(&format!("{path}.output[{i}]"), part)?);
                    }
                    text
                }
                _ => {
                    let param = format!("{path}.output");
                    let message = format!("`{param}` must be a string or an array of text parts");
                    return Err(ApiError::invalid(param, message));
                }
            };
            context.push(json!({"role": "tool", "tool_call_id": call_id, "content": output}));
        }
        other => {
            let message = format!("items of type `{other:.80}` are not supported");
            return Err(ApiError::unsupported(format!("{path}.type"), message));
        }
    }
    fields.finish(&[])
}

/// Adds a call to the assistant's turn that it belongs to.
fn call(call: Value, context: &mut Vec<Value>) {
    if let Some(last) = context
        .last_mut()
        .filter(|last| last["role"] == "assistant")
    {
        match last["tool_calls"].as_array_mut() {
            Some(calls) => calls.push(call),
            None => last["tool_calls"] = json!([call]),
        }
        return;
    }
    context.push(json!({"role": "assistant", "content": null, "tool_calls": [call]}));
}

fn part_text(path: &str, part: Value) -> Result<String, ApiError> {
    let mut part = Fields::of(path, part)?;
    let kind: String = part.need("type")?;
    if !matches!(kind.as_str(), "input_text" | "output_text" | "text") {
        let message = format!("content of type `{kind:.80}` is not supported, only text");
        return Err(ApiError::unsupported(format!("{path}.type"), message));
    }
    let text = part.need("text")?;
    for ignored in ["annotations", "logprobs", "prompt_cache_breakpoint"] {
        let _: Option<Value> = part.take(ignored)?;
    }
    part.finish(&[])?;
    Ok(text)
}
