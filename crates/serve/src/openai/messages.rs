//! The conversation of a chat request.

use bantam_text::{Message, custom_call};
use serde_json::{Value, json};

use super::fields::{Fields, read};
use crate::error::ApiError;

/// Reads `messages`. A `tool` message must answer a call that was made.
pub(crate) fn messages(items: Vec<(String, Value)>) -> Result<Vec<Message>, ApiError> {
    if items.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "`messages` must not be empty",
        ));
    }
    let mut calls: Vec<String> = Vec::new();
    let mut messages = Vec::with_capacity(items.len());
    for (path, value) in items {
        messages.push(message(&path, value, &mut calls)?);
    }
    Ok(messages)
}

/// Reads one message; `calls` are the names of the calls made so far.
fn message(path: &str, mut value: Value, calls: &mut Vec<String>) -> Result<Message, ApiError> {
    let Some(fields) = value.as_object_mut() else {
        return Err(ApiError::invalid(
            path,
            format!("`{path}` must be an object"),
        ));
    };
    if fields.contains_key("weight") {
        return Err(ApiError::unknown(&format!("{path}.weight")));
    }
    let parts = fields.get("content").and_then(Value::as_array);
    for (idx, part) in parts.into_iter().flatten().enumerate() {
        text_part(&format!("{path}.content[{idx}]"), part)?;
    }
    let made = fields.get_mut("tool_calls").and_then(Value::as_array_mut);
    let mut customs = Vec::new();
    if let Some(made) = made {
        for (idx, call) in made.iter().enumerate() {
            if let Some(id) = call.get("id").and_then(Value::as_str) {
                calls.push(id.to_string());
            }
            if call.get("type").and_then(Value::as_str) == Some("custom") {
                customs.push(custom(&format!("{path}.tool_calls[{idx}]"), call.clone())?);
            }
        }
        made.retain(|call| call.get("type").and_then(Value::as_str) != Some("custom"));
        if made.is_empty() && !customs.is_empty() {
            fields.shift_remove("tool_calls");
            fields.entry("content").or_insert(json!(""));
            if fields["content"].is_null() {
                fields["content"] = json!("");
            }
        }
    }
    if fields.get("role").and_then(Value::as_str) == Some("tool") {
        let param = format!("{path}.tool_call_id");
        let Some(id) = fields.get("tool_call_id").and_then(Value::as_str) else {
            return Err(ApiError::missing(&param));
        };
        if !calls.iter().any(|made| made == id) {
            let message = format!("`{param}` answers no call of an assistant message before it");
            return Err(ApiError::invalid(param, message));
        }
    }
    let mut message: Message = read(path, value)?;
    if !customs.is_empty() {
        let mut text = message.content.take().unwrap_or_default();
        for call in customs {
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(&call);
        }
        message.content = Some(text);
    }
    Ok(message)
}

fn text_part(path: &str, part: &Value) -> Result<(), ApiError> {
    let Value::Object(part) = part else {
        return Err(ApiError::invalid(
            path,
            format!("`{path}` must be an object"),
        ));
    };
    let kind = part.get("type").and_then(Value::as_str);
    if let Some(kind) = kind.filter(|kind| *kind != "text") {
        let message = format!("content of type `{kind}` is not supported, only `text`");
        return Err(ApiError::unsupported(format!("{path}.type"), message));
    }
    // A cache breakpoint is a hint: prefixes are found without it.
    let known = ["type", "text", "prompt_cache_breakpoint"];
    if let Some(name) = part.keys().find(|name| !known.contains(&name.as_str())) {
        return Err(ApiError::unknown(&format!("{path}.{name}")));
    }
    Ok(())
}

/// A custom tool's call as it stood in the answer.
fn custom(path: &str, call: Value) -> Result<String, ApiError> {
    let mut call = Fields::of(path, call)?;
    let _: Option<String> = call.take("id")?;
    let _: Option<String> = call.take("type")?;
    let Some(mut custom) = call.object("custom")? else {
        return Err(ApiError::missing(&call.path("custom")));
    };
    let (name, input): (String, String) = (custom.need("name")?, custom.need("input")?);
    custom.finish(&[])?;
    call.finish(&[])?;
    Ok(custom_call(&name, &input))
}
