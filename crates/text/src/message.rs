//! The conversation: messages, tools and tool calls, in the shapes of the OpenAI API.
//!
//! Reading is strict: an unknown field, a part that is not text, or content that is missing where it is
//! needed, is an error that names it. Fields that the API's own answers carry as `null` or empty
//! (`refusal`, `annotations`, `audio`, `function_call`) are accepted as such, so that an answer can be sent
//! back as history.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions.
    System,
    /// Instructions, by their newer name; templates are shown `system`.
    Developer,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The name that chat templates know.
    pub fn template_name(self) -> &'static str {
        match self {
            Role::System | Role::Developer => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
            Role::Tool => "tool",
        }
    }
}

/// One turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawMessage")]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// The text; absent only beside tool calls.
    pub content: Option<String>,
    /// The speaker's or the tool's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The calls an assistant makes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The call that a `tool` message answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// `Some(false)` (`"weight": 0`) keeps an assistant turn out of the loss.
    #[serde(
        rename = "weight",
        skip_serializing_if = "Option::is_none",
        serialize_with = "weight_as_number"
    )]
    pub trained: Option<bool>,
}

impl Message {
    /// A message with this role and text and nothing else.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Message {
            role,
            content: Some(content.into()),
            name: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            trained: None,
        }
    }

    /// A `system` message.
    pub fn system(content: impl Into<String>) -> Self {
        Message::new(Role::System, content)
    }

    /// A `user` message.
    pub fn user(content: impl Into<String>) -> Self {
        Message::new(Role::User, content)
    }

    /// An `assistant` message.
    pub fn assistant(content: impl Into<String>) -> Self {
        Message::new(Role::Assistant, content)
    }

    /// Is this an assistant turn that counts in the loss?
    pub fn is_trained(&self) -> bool {
        self.role == Role::Assistant && self.trained != Some(false)
    }
}

/// A call that an assistant makes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ToolCall {
    /// Links the call with the `tool` message that answers it.
    #[serde(default)]
    pub id: String,
    /// Always `function`.
    #[serde(
        rename = "type",
        default = "function_kind",
        deserialize_with = "only_function"
    )]
    pub kind: String,
    /// What is called.
    pub function: FunctionCall,
}

/// Name and arguments of a call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionCall {
    /// The function's name.
    pub name: String,
    /// The arguments, as JSON text.
    pub arguments: String,
}

/// A tool the model may call.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    /// Always `function`.
    #[serde(rename = "type", deserialize_with = "only_function")]
    pub kind: String,
    /// The function.
    pub function: Function,
}

/// A function's description.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// The function's name.
    pub name: String,
    /// What it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub description: Option<String>,
    /// JSON schema of its arguments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameters: Option<Value>,
    /// Must calls follow the schema exactly?
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strict: Option<bool>,
}

fn function_kind() -> String {
    "function".to_string()
}

fn only_function<'de, D: serde::Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    let kind = String::deserialize(d)?;
    match kind.as_str() {
        "function" => Ok(kind),
        other => Err(serde::de::Error::custom(format!(
            "type `{other}` is not supported, only `function`"
        ))),
    }
}

fn weight_as_number<S: serde::Serializer>(trained: &Option<bool>, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_u8(u8::from(*trained != Some(false)))
}

/// A message as it arrives.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMessage {
    role: Role,
    #[serde(default)]
    content: Option<RawContent>,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<ToolCall>>,
    #[serde(default)]
    tool_call_id: Option<String>,
    #[serde(default)]
    weight: Option<f64>,
    #[serde(default)]
    refusal: Option<Value>,
    #[serde(default)]
    annotations: Option<Value>,
    #[serde(default)]
    audio: Option<Value>,
    #[serde(default)]
    function_call: Option<Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawContent {
    Text(String),
    Parts(Vec<Value>),
    Other(#[allow(dead_code)] serde::de::IgnoredAny),
}

impl TryFrom<RawMessage> for Message {
    type Error = String;

    fn try_from(raw: RawMessage) -> Result<Self, String> {
        let must_be_empty = [
            ("refusal", &raw.refusal),
            ("annotations", &raw.annotations),
            ("audio", &raw.audio),
            ("function_call", &raw.function_call),
        ];
        for (field, value) in must_be_empty {
            let empty = match value {
                None | Some(Value::Null) => true,
                Some(Value::Array(items)) => items.is_empty(),
                Some(_) => false,
            };
            if !empty {
                return Err(format!("`{field}` is not supported in a message"));
            }
        }
        let content = match raw.content {
            None => None,
            Some(RawContent::Text(text)) => Some(text),
            Some(RawContent::Parts(parts)) => Some(join_parts(&parts)?),
            Some(RawContent::Other(_)) => {
                return Err("`content` must be a string or an array of text parts".to_string());
            }
        };
        let tool_calls = raw.tool_calls.unwrap_or_default();
        if !tool_calls.is_empty() && raw.role != Role::Assistant {
            return Err("`tool_calls` belong to an assistant message".to_string());
        }
        if content.is_none() && tool_calls.is_empty() {
            return Err("`content` is missing".to_string());
        }
        if raw.tool_call_id.is_some() && raw.role != Role::Tool {
            return Err("`tool_call_id` belongs to a tool message".to_string());
        }
        let trained = match raw.weight {
            None => None,
            Some(_) if raw.role != Role::Assistant => {
                return Err("`weight` belongs to an assistant message".to_string());
            }
            Some(0.0) => Some(false),
            Some(1.0) => Some(true),
            Some(other) => return Err(format!("`weight` must be 0 or 1, not {other}")),
        };
        Ok(Message {
            role: raw.role,
            content,
            name: raw.name,
            tool_calls,
            tool_call_id: raw.tool_call_id,
            trained,
        })
    }
}

/// The text of `[{"type":"text","text":..}, ..]`, joined without a separator.
fn join_parts(parts: &[Value]) -> Result<String, String> {
    let mut text = String::new();
    for part in parts {
        let kind = part.get("type").and_then(Value::as_str);
        match (kind, part.get("text").and_then(Value::as_str)) {
            (Some("text"), Some(t)) => text.push_str(t),
            (Some("text"), None) => return Err("a text part needs a `text` string".to_string()),
            (Some(other), _) => {
                return Err(format!(
                    "content part `{other}` is not supported, only `text`"
                ));
            }
            (None, _) => return Err("a content part needs a `type`".to_string()),
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<Message, String> {
        serde_json::from_str(json).map_err(|e| e.to_string())
    }

    #[test]
    fn text_and_parts_read_alike() {
        let whole = read(r#"{"role":"user","content":"ab"}"#).unwrap();
        let parts = read(
            r#"{"role":"user","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}"#,
        )
        .unwrap();
        assert_eq!(whole, parts);
    }

    #[test]
    fn an_answer_can_be_sent_back() {
        let m = read(r#"{"role":"assistant","content":null,"refusal":null,"annotations":[],"audio":null,"tool_calls":[{"id":"c1","type":"function","function":{"name":"f","arguments":"{}"}}]}"#)
            .unwrap();
        assert_eq!(m.tool_calls[0].function.name, "f");
        assert_eq!(read(&serde_json::to_string(&m).unwrap()).unwrap(), m);
    }

    #[test]
    fn weights_are_zero_or_one() {
        let m = read(r#"{"role":"assistant","content":"x","weight":0}"#).unwrap();
        assert!(!m.is_trained());
        assert_eq!(
            serde_json::to_string(&m).unwrap(),
            r#"{"role":"assistant","content":"x","weight":0}"#
        );
        assert!(
            read(r#"{"role":"assistant","content":"x","weight":1.0}"#)
                .unwrap()
                .is_trained()
        );
        assert!(
            read(r#"{"role":"assistant","content":"x","weight":0.5}"#)
                .unwrap_err()
                .contains("must be 0 or 1")
        );
    }

    #[test]
    fn errors_name_the_culprit() {
        for (json, needle) in [
            (r#"{"role":"user","content":"x","colour":1}"#, "colour"),
            (r#"{"role":"bot","content":"x"}"#, "bot"),
            (r#"{"role":"user"}"#, "`content` is missing"),
            (r#"{"role":"user","content":7}"#, "string or an array"),
            (
                r#"{"role":"user","content":[{"type":"image_url","image_url":{}}]}"#,
                "image_url",
            ),
            (
                r#"{"role":"user","content":"x","tool_calls":[{"id":"a","type":"function","function":{"name":"f","arguments":""}}]}"#,
                "assistant",
            ),
            (
                r#"{"role":"assistant","content":"x","function_call":{}}"#,
                "function_call",
            ),
        ] {
            let error = read(json).unwrap_err();
            assert!(error.contains(needle), "{json}: {error}");
        }
    }
}
