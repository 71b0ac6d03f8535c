//! What a run asks the model that is judged: its messages, filled in from a row, and how to sample.

use bantam_judge::template::{Path, Root};
use serde_json::{Map, Value, json};

use super::criteria::{MessageTemplate, messages};
use super::rows::Source;
use crate::error::ApiError;
use crate::openai::fields::{self, Fields};
use crate::openai::request::ChatRequest;

/// The messages of a row.
pub(crate) enum Input {
    Template(Vec<MessageTemplate>),
    /// Messages, or a text, that stand in the row.
    Reference(Path),
}

/// A model and how it is asked.
pub(crate) struct Prompt {
    pub(crate) model: String,
    input: Input,
    /// A chat request without its messages.
    sampling: Map<String, Value>,
}

impl Prompt {
    /// Reads `model`, `input_messages` and `sampling_params` of a data source; `None` if no model is to be asked.
    pub(crate) fn read(fields: &mut Fields, source: &Source) -> Result<Option<Prompt>, ApiError> {
        let model: Option<String> = fields.take("model")?;
        let path = fields.path("input_messages");
        let input = match fields.object("input_messages")? {
            Some(input) => Some(read_input(input)?),
            // A conversation that was kept is asked again as it was.
            None if source.is_kept() => Path::parse("item.input").ok().map(Input::Reference),
            None => None,
        };
        let params_path = fields.path("sampling_params");
        let params = fields.object("sampling_params")?;
        let Some(model) = model else {
            if params.is_some() || (input.is_some() && !source.is_kept()) {
                let message = "`data_source.model` must say whom to ask";
                return Err(ApiError::invalid("data_source.model", message));
            }
            return Ok(None);
        };
        let input = input.ok_or_else(|| ApiError::missing(&path))?;
        let sampling = match params {
            Some(params) => read_sampling(params)?,
            None => Map::new(),
        };
        // Whatever is wrong with it is wrong with every row.
        let mut probe = Value::Object(sampling.clone());
        probe["model"] = json!(model);
        probe["messages"] = json!([{"role": "user", "content": "?"}]);
        ChatRequest::parse(probe.to_string().as_bytes()).map_err(|error| {
            let param = error.param.as_deref().unwrap_or_default();
            let at = format!("{params_path}.{param}");
            let message = format!("`{params_path}`: {}", error.message);
            ApiError::invalid(at, message)
        })?;
        Ok(Some(Prompt {
            model,
            input,
            sampling,
        }))
    }

    /// The places for values in it.
    pub(crate) fn places(&self) -> Vec<&Path> {
        match &self.input {
            Input::Template(messages) => messages.iter().flat_map(|m| m.text.places()).collect(),
            Input::Reference(path) => vec![path],
        }
    }

    /// The chat request of a row.
    pub(crate) fn body(&self, item: &Value) -> Result<Value, String> {
        let nothing = Value::Null;
        let messages = match &self.input {
            Input::Template(templates) => {
                let mut messages = Vec::with_capacity(templates.len());
                for message in templates {
                    let text = message.text.fill(item, &nothing);
                    let text = text.map_err(|e| format!("input_messages: {e}"))?;
                    messages.push(json!({"role": message.role, "content": text}));
                }
                Value::Array(messages)
            }
            Input::Reference(path) => {
                let found = path.find(item, &nothing);
                match found.map_err(|e| format!("input_messages: {e}"))? {
                    Value::String(text) => json!([{"role": "user", "content": text}]),
                    Value::Array(messages) => Value::Array(messages.clone()),
                    _ => {
                        return Err(format!(
                            "input_messages: `{path}` is neither a text nor an array of messages"
                        ));
                    }
                }
            }
        };
        let mut body = Value::Object(self.sampling.clone());
        body["messages"] = messages;
        Ok(body)
    }

    /// How it samples, as output items tell it.
    pub(crate) fn sampled(&self, name: &str) -> Value {
        self.sampling.get(name).cloned().unwrap_or(Value::Null)
    }
}

fn read_input(mut input: Fields) -> Result<Input, ApiError> {
    let kind: String = input.need("type")?;
    let read = match kind.as_str() {
        "template" => Input::Template(messages(&mut input, "template")?),
        "item_reference" => {
            let path = input.path("item_reference");
            let text: String = input.need("item_reference")?;
            let reference = Path::parse(&text)
                .ok()
                .filter(|path| path.root == Root::Item);
            Input::Reference(reference.ok_or_else(|| {
                let message = format!("`{path}` must be a path such as `item.input`");
                ApiError::invalid(path, message)
            })?)
        }
        _ => {
            let path = input.path("type");
            let message = format!("`{path}` must be `template` or `item_reference`");
            return Err(ApiError::invalid(path, message));
        }
    };
    input.finish(&[])?;
    Ok(read)
}

/// Sampling parameters of either kind of data source, as a chat request has them.
fn read_sampling(mut params: Fields) -> Result<Map<String, Value>, ApiError> {
    let mut chat = Map::new();
    for name in [
        "temperature",
        "top_p",
        "seed",
        "max_completion_tokens",
        "response_format",
        "reasoning_effort",
    ] {
        if let Some(value) = params.take::<Value>(name)? {
            chat.insert(name.to_string(), value);
        }
    }
    if let Some(tools) = params.take::<Vec<Value>>("tools")? {
        let tools = tools.into_iter().map(|tool| {
            // Responses' tools are flat.
            let Value::Object(mut flat) = tool else {
                return tool;
            };
            if flat.get("type") != Some(&json!("function")) || flat.contains_key("function") {
                return Value::Object(flat);
            }
            flat.shift_remove("type");
            json!({"type": "function", "function": flat})
        });
        chat.insert("tools".to_string(), tools.collect());
    }
    if let Some(mut text) = params.object("text")? {
        if let Some(format) = text.take::<Map<String, Value>>("format")? {
            let format = match format.get("type").and_then(Value::as_str) {
                Some("json_schema") => {
                    let mut inner = format.clone();
                    inner.shift_remove("type");
                    json!({"type": "json_schema", "json_schema": inner})
                }
                _ => Value::Object(format),
            };
            chat.insert("response_format".to_string(), format);
        }
        text.finish(&[])?;
    }
    params.finish(&[])?;
    Ok(chat)
}

/// The prompt of a run that was kept.
pub(crate) fn of_kept(data_source: &Value, source: &Source) -> Result<Option<Prompt>, ApiError> {
    let mut fields = Fields::of("data_source", data_source.clone())?;
    fields.take::<Value>("type")?;
    fields.take::<Value>("source")?;
    Prompt::read(&mut fields, source)
}

/// Reads a schema that rows must fit.
pub(crate) fn schema(path: &str, schema: &Value) -> Result<(), ApiError> {
    fields::read::<Map<String, Value>>(path, schema.clone())?;
    validator(schema)
        .map(drop)
        .map_err(|why| ApiError::invalid(path, format!("`{path}`: {why}")))
}

/// What judges rows by a schema.
pub(crate) fn validator(schema: &Value) -> Result<jsonschema::Validator, String> {
    jsonschema::validator_for(schema).map_err(|error| error.to_string())
}
