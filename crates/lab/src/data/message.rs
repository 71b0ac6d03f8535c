//! The messages of a conversation, in the OpenAI API's words.

use serde_json::Value;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Standing instructions.
    System,
    /// Standing instructions, under their newer name.
    Developer,
    /// The person or program that asks.
    User,
    /// The model.
    Assistant,
    /// A tool's result.
    Tool,
}

/// One turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; `None` only in an assistant's turn of tool calls.
    pub content: Option<String>,
    /// The speaker's name, where the row gives one.
    pub name: Option<String>,
    /// The calls an assistant makes.
    pub tool_calls: Vec<ToolCall>,
    /// Which call a tool's turn answers.
    pub tool_call_id: Option<String>,
    /// 0 keeps an assistant's turn out of the loss; 1 is the rule.
    pub weight: Option<u8>,
}

impl Message {
    /// A plain turn.
    pub fn text(role: Role, content: impl Into<String>) -> Message {
        Message {
            role,
            content: Some(content.into()),
            name: None,
            tool_calls: Vec::new(),
            tool_call_id: None,
            weight: None,
        }
    }
}

/// A call of a tool.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// Its id, which the tool's turn repeats.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// The arguments, as the JSON text the model writes.
    pub arguments: String,
}

/// A tool that may be called: the function's declaration.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// The function's name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// JSON Schema of its arguments.
    pub parameters: Option<Value>,
}
