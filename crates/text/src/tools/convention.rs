//! What is said to models whose template has no word for tools.
//!
//! The tools are listed at the end of the system message, one JSON object a line, and the model is told to
//! call one by writing
//!
//! ```text
//! <tool_call>
//! {"name": "NAME", "arguments": {..}}
//! </tool_call>
//! ```
//!
//! several of them on lines of their own. Results come back as a user's turn, each in `<tool_response>` tags.
//! A custom tool's input is text, so its call is a first line `<custom_call name="NAME">` and then the input, to
//! the end of the turn: nothing needs escaping, and such a call is the last.

use serde::Serialize;
use serde_json::{Value, json};

use super::{CustomInput, CustomTool, ToolSyntax};
use crate::{Message, Role, Tool, ToolCall};

/// The first characters of a custom call; the name follows.
pub(crate) const CUSTOM_OPEN: &str = "<custom_call name=\"";
/// Between a custom call's name and its input.
pub(crate) const CUSTOM_INPUT: &str = "\">\n";

/// How calls are written by convention.
pub(crate) fn syntax() -> ToolSyntax {
    ToolSyntax {
        before_name: "<tool_call>\n{\"name\": \"".into(),
        before_arguments: "\", \"arguments\": ".into(),
        after_arguments: "}\n</tool_call>".into(),
        separator: Some("\n".into()),
        native: false,
    }
}

/// A call of a custom tool as it stands in an answer.
pub fn custom_call(name: &str, input: &str) -> String {
    format!("{CUSTOM_OPEN}{name}{CUSTOM_INPUT}{input}")
}

/// The conversation in words that every template can carry.
pub(crate) fn plain(messages: &[Message], tools: &[Tool]) -> Vec<Message> {
    let mut plain: Vec<Message> = Vec::with_capacity(messages.len() + 1);
    let mut after_result = false;
    for message in messages {
        match message.role {
            Role::Tool => {
                let content = message.content.as_deref().unwrap_or_default();
                let result = format!("<tool_response>\n{content}\n</tool_response>");
                match plain.last_mut() {
                    // Results of parallel calls are one turn.
                    Some(Message {
                        content: Some(so_far),
                        ..
                    }) if after_result => {
                        so_far.push('\n');
                        so_far.push_str(&result);
                    }
                    _ => plain.push(Message::user(result)),
                }
                after_result = true;
            }
            _ => {
                after_result = false;
                let mut message = message.clone();
                let calls = std::mem::take(&mut message.tool_calls);
                if !calls.is_empty() {
                    message.content = Some(with_calls(message.content.take(), &calls));
                }
                plain.push(message);
            }
        }
    }
    if !tools.is_empty() {
        say(&mut plain, &instructions(tools));
    }
    plain
}

/// Adds the description of custom tools.
pub(crate) fn add_custom(messages: &mut Vec<Message>, tools: &[CustomTool]) {
    if tools.is_empty() {
        return;
    }
    let mut text = String::from("You may call these tools that take plain text:\n");
    for tool in tools {
        let format = match &tool.input {
            CustomInput::Text => json!({"type": "text"}),
            CustomInput::Lark(grammar) => json!({"syntax": "lark", "definition": grammar}),
            CustomInput::Regex(regex) => json!({"syntax": "regex", "definition": regex}),
        };
        let mut about = json!({"name": tool.name});
        if let Some(description) = &tool.description {
            about["description"] = json!(description);
        }
        about["input"] = format;
        text.push_str(&spaced(&about));
        text.push('\n');
    }
    text.push_str(
        "To call one, end your answer with a line <custom_call name=\"NAME\"> and then its input.",
    );
    say(messages, &text);
}

/// At the end of the system message, which is made if there is none.
fn say(messages: &mut Vec<Message>, text: &str) {
    match messages.first_mut() {
        Some(first) if matches!(first.role, Role::System | Role::Developer) => {
            let so_far = first.content.take().unwrap_or_default();
            first.content = Some(if so_far.is_empty() {
                text.to_string()
            } else {
                format!("{so_far}\n\n{text}")
            });
        }
        _ => messages.insert(0, Message::system(text)),
    }
}

fn instructions(tools: &[Tool]) -> String {
    let mut text = String::from("You may call these tools:\n");
    for tool in tools {
        let function = &tool.function;
        let mut about = json!({"name": function.name});
        if let Some(description) = &function.description {
            about["description"] = json!(description);
        }
        if let Some(parameters) = &function.parameters {
            about["parameters"] = parameters.clone();
        }
        text.push_str(&spaced(&about));
        text.push('\n');
    }
    text.push_str(
        "To call one, answer with\n<tool_call>\n{\"name\": \"NAME\", \"arguments\": {ARGUMENTS}}\n</tool_call>",
    );
    text
}

fn with_calls(content: Option<String>, calls: &[ToolCall]) -> String {
    let syntax = syntax();
    let mut text = content.unwrap_or_default();
    for call in calls {
        if !text.is_empty() {
            text.push('\n');
        }
        let parsed: Option<Value> = serde_json::from_str(&call.function.arguments).ok();
        let arguments = parsed
            .filter(Value::is_object)
            .map_or_else(|| call.function.arguments.clone(), |object| spaced(&object));
        text.push_str(&syntax.before_name);
        text.push_str(&call.function.name);
        text.push_str(&syntax.before_arguments);
        text.push_str(&arguments);
        text.push_str(&syntax.after_arguments);
    }
    text
}

/// JSON with a blank after each comma and colon, as Python and most training data write it.
fn spaced(value: &Value) -> String {
    struct Spaced;
    impl serde_json::ser::Formatter for Spaced {
        fn begin_array_value<W: ?Sized + std::io::Write>(
            &mut self,
            writer: &mut W,
            first: bool,
        ) -> std::io::Result<()> {
            writer.write_all(if first { b"" } else { b", " })
        }

        fn begin_object_key<W: ?Sized + std::io::Write>(
            &mut self,
            writer: &mut W,
            first: bool,
        ) -> std::io::Result<()> {
            writer.write_all(if first { b"" } else { b", " })
        }

        fn begin_object_value<W: ?Sized + std::io::Write>(
            &mut self,
            writer: &mut W,
        ) -> std::io::Result<()> {
            writer.write_all(b": ")
        }
    }
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, Spaced);
    match value.serialize(&mut serializer) {
        Ok(()) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(_) => value.to_string(),
    }
}
