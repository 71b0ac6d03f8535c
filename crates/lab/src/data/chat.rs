//! Chat rows: the checks that the OpenAI API makes of a training file, each naming the field.

use serde_json::{Map, Value};

use bantam_text::{Function, FunctionCall};

use super::{Message, Role, Row, RowProblem, Tool, ToolCall, only_fields, string, wrong_type};

type Object = Map<String, Value>;

/// Reads a row whose fields are already known to be a chat row's.
pub(super) fn parse(row: &Object, line: usize) -> Result<Row, RowProblem> {
    let (tools, parallel_tool_calls) = tools_of(row, "")?;
    let value = row.get("messages").ok_or(RowProblem::Missing {
        field: "messages",
        place: String::new(),
    })?;
    let mut messages: Vec<Message> = Vec::new();
    add_turns(&mut messages, array(value, "messages")?, "messages", &tools)?;
    let mut answers = messages
        .iter()
        .filter(|message| message.role == Role::Assistant)
        .peekable();
    if answers.peek().is_none() {
        return Err(invalid(
            "messages",
            "hold no assistant message",
            Some("the assistant's turns are what is learnt"),
        ));
    }
    if answers.all(|answer| !answer.is_trained()) {
        return Err(invalid(
            "messages",
            "have weight 0 in every assistant message: nothing would be learnt",
            None,
        ));
    }
    Ok(Row {
        messages,
        tools,
        parallel_tool_calls,
        line,
    })
}

/// The tools that an object declares, and whether they may be called side by side. `place` is the object's path and a
/// dot, or empty for the row itself.
pub(super) fn tools_of(
    object: &Object,
    place: &str,
) -> Result<(Vec<Tool>, Option<bool>), RowProblem> {
    let path = format!("{place}tools");
    let tools = match object.get("tools") {
        None | Some(Value::Null) => Vec::new(),
        Some(value) => parse_tools(array(value, &path)?, &path)?,
    };
    let parallel_tool_calls = match object.get("parallel_tool_calls") {
        None => None,
        Some(Value::Bool(parallel)) => Some(*parallel),
        Some(other) => {
            let path = format!("{place}parallel_tool_calls");
            return Err(wrong_type(other, &path, "true or false"));
        }
    };
    Ok((tools, parallel_tool_calls))
}

/// Reads the messages of a list at `place` behind those that come before them.
pub(super) fn add_turns(
    messages: &mut Vec<Message>,
    items: &[Value],
    place: &str,
    tools: &[Tool],
) -> Result<(), RowProblem> {
    for (i, item) in items.iter().enumerate() {
        let place = format!("{place}[{i}]");
        let message = parse_message(item, &place, tools)?;
        check_answers_a_call(&message, messages, &place)?;
        messages.push(message);
    }
    Ok(())
}

fn parse_message(value: &Value, place: &str, tools: &[Tool]) -> Result<Message, RowProblem> {
    let message = object(value, place)?;
    let path = |field: &str| format!("{place}.{field}");
    let role = match string(required(message, "role", place)?, &path("role"))? {
        "system" => Role::System,
        "developer" => Role::Developer,
        "user" => Role::User,
        "assistant" => Role::Assistant,
        "tool" => Role::Tool,
        other => {
            let hint = match other {
                "function" => {
                    "roles are system, developer, user, assistant, tool; `function` is now `tool`"
                }
                _ => "roles are system, developer, user, assistant, tool",
            };
            return Err(invalid(&path("role"), &format!("is `{other}`"), Some(hint)));
        }
    };
    let allowed: &[&'static str] = match role {
        Role::Assistant => &["role", "content", "name", "tool_calls", "weight", "refusal"],
        Role::Tool => &["role", "content", "tool_call_id"],
        Role::System | Role::Developer | Role::User => &["role", "content", "name"],
    };
    only_fields(message, allowed, place)?;
    if let Some(refusal) = message.get("refusal").filter(|refusal| !refusal.is_null()) {
        return Err(wrong_type(refusal, &path("refusal"), "null"));
    }

    let tool_calls = match message.get("tool_calls") {
        None | Some(Value::Null) => Vec::new(),
        Some(calls) => parse_calls(
            array(calls, &path("tool_calls"))?,
            &path("tool_calls"),
            tools,
        )?,
    };
    let content = match message.get("content") {
        None | Some(Value::Null) if !tool_calls.is_empty() => None,
        None => {
            return Err(RowProblem::Missing {
                field: "content",
                place: place.to_owned(),
            });
        }
        Some(Value::Array(parts)) => Some(parse_parts(parts, &path("content"))?),
        Some(content) => Some(string(content, &path("content"))?.to_owned()),
    };
    if role == Role::Assistant
        && tool_calls.is_empty()
        && content.as_deref().is_some_and(|c| c.trim().is_empty())
    {
        return Err(invalid(
            &path("content"),
            "is empty",
            Some("an assistant message needs text or tool calls"),
        ));
    }
    let optional = |field: &str| match message.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => string(value, &path(field)).map(|text| Some(text.to_owned())),
    };
    let tool_call_id = optional("tool_call_id")?;
    if role == Role::Tool && tool_call_id.is_none() {
        return Err(RowProblem::Missing {
            field: "tool_call_id",
            place: place.to_owned(),
        });
    }
    let trained = match message.get("weight") {
        None | Some(Value::Null) => None,
        Some(weight) => Some(match weight.as_f64() {
            Some(0.0) => false,
            Some(1.0) => true,
            _ => {
                return Err(invalid(
                    &path("weight"),
                    &format!("must be 0 or 1, not {weight}"),
                    None,
                ));
            }
        }),
    };
    Ok(Message {
        role,
        content,
        name: optional("name")?,
        tool_calls,
        tool_call_id,
        trained,
    })
}

/// The text parts of a content list, one after the other.
fn parse_parts(parts: &[Value], place: &str) -> Result<String, RowProblem> {
    let mut text = String::new();
    for (i, part) in parts.iter().enumerate() {
        let place = format!("{place}[{i}]");
        let part = object(part, &place)?;
        let kind = string(required(part, "type", &place)?, &format!("{place}.type"))?;
        if kind != "text" {
            return Err(invalid(
                &format!("{place}.type"),
                &format!("is `{kind}`"),
                Some("only text parts are read"),
            ));
        }
        only_fields(part, &["type", "text"], &place)?;
        text.push_str(string(
            required(part, "text", &place)?,
            &format!("{place}.text"),
        )?);
    }
    Ok(text)
}

fn parse_calls(calls: &[Value], place: &str, tools: &[Tool]) -> Result<Vec<ToolCall>, RowProblem> {
    let mut parsed: Vec<ToolCall> = Vec::new();
    for (i, call) in calls.iter().enumerate() {
        let place = format!("{place}[{i}]");
        let call = object(call, &place)?;
        only_fields(call, &["id", "type", "function"], &place)?;
        must_be_function(call, &place)?;
        let id = string(required(call, "id", &place)?, &format!("{place}.id"))?.to_owned();
        if parsed.iter().any(|earlier| earlier.id == id) {
            return Err(invalid(
                &format!("{place}.id"),
                &format!("`{id}` is there twice"),
                None,
            ));
        }
        let place = format!("{place}.function");
        let function = object(required(call, "function", &place)?, &place)?;
        only_fields(function, &["name", "arguments"], &place)?;
        let name = function_name(function, &place)?;
        if !tools.iter().any(|tool| tool.function.name == name) {
            let hint = Some("declare every tool that is called in the row's `tools`");
            return Err(invalid(
                &format!("{place}.name"),
                &format!("calls `{name}`, which is not in `tools`"),
                hint,
            ));
        }
        let path = format!("{place}.arguments");
        let arguments = string(required(function, "arguments", &place)?, &path)?.to_owned();
        if !matches!(super::parse_strict(&arguments), Ok(Value::Object(_))) {
            return Err(invalid(&path, "is not the text of a JSON object", None));
        }
        let function = FunctionCall { name, arguments };
        parsed.push(ToolCall {
            id,
            kind: "function".to_owned(),
            function,
        });
    }
    Ok(parsed)
}

fn parse_tools(tools: &[Value], place: &str) -> Result<Vec<Tool>, RowProblem> {
    let mut parsed: Vec<Tool> = Vec::new();
    for (i, tool) in tools.iter().enumerate() {
        let place = format!("{place}[{i}]");
        let tool = object(tool, &place)?;
        only_fields(tool, &["type", "function"], &place)?;
        must_be_function(tool, &place)?;
        let place = format!("{place}.function");
        let function = object(required(tool, "function", &place)?, &place)?;
        only_fields(
            function,
            &["name", "description", "parameters", "strict"],
            &place,
        )?;
        let name = function_name(function, &place)?;
        if parsed.iter().any(|earlier| earlier.function.name == name) {
            return Err(invalid(
                &format!("{place}.name"),
                &format!("declares `{name}` twice"),
                None,
            ));
        }
        let description = match function.get("description") {
            None | Some(Value::Null) => None,
            Some(text) => Some(string(text, &format!("{place}.description"))?.to_owned()),
        };
        let parameters = match function.get("parameters") {
            None | Some(Value::Null) => None,
            Some(schema) => {
                object(schema, &format!("{place}.parameters")).map(|_| Some(schema.clone()))?
            }
        };
        let strict = match function.get("strict") {
            None | Some(Value::Null) => None,
            Some(Value::Bool(strict)) => Some(*strict),
            Some(other) => {
                return Err(wrong_type(
                    other,
                    &format!("{place}.strict"),
                    "true or false",
                ));
            }
        };
        let function = Function {
            name,
            description,
            parameters,
            strict,
        };
        parsed.push(Tool {
            kind: "function".to_owned(),
            function,
        });
    }
    Ok(parsed)
}

fn must_be_function(object: &Object, place: &str) -> Result<(), RowProblem> {
    let kind = string(required(object, "type", place)?, &format!("{place}.type"))?;
    if kind == "function" {
        return Ok(());
    }
    Err(invalid(
        &format!("{place}.type"),
        &format!("is `{kind}`"),
        Some("the only type is `function`"),
    ))
}

fn function_name(function: &Object, place: &str) -> Result<String, RowProblem> {
    let path = format!("{place}.name");
    let name = string(required(function, "name", place)?, &path)?;
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        return Err(invalid(
            &path,
            "must be 1 to 64 letters, digits, `_` or `-`",
            None,
        ));
    }
    Ok(name.to_owned())
}

/// A tool's turn must answer a call of an earlier assistant turn that no other turn has answered.
fn check_answers_a_call(
    message: &Message,
    before: &[Message],
    place: &str,
) -> Result<(), RowProblem> {
    let Some(id) = &message.tool_call_id else {
        return Ok(());
    };
    let called = before
        .iter()
        .flat_map(|earlier| &earlier.tool_calls)
        .filter(|call| call.id == *id)
        .count();
    let answered = before
        .iter()
        .filter(|earlier| earlier.tool_call_id.as_ref() == Some(id))
        .count();
    if answered < called {
        return Ok(());
    }
    Err(invalid(
        &format!("{place}.tool_call_id"),
        &format!("`{id}` answers no open call of an earlier turn"),
        None,
    ))
}

fn required<'a>(
    object: &'a Object,
    field: &'static str,
    place: &str,
) -> Result<&'a Value, RowProblem> {
    object.get(field).ok_or_else(|| RowProblem::Missing {
        field,
        place: place.to_owned(),
    })
}

pub(super) fn object<'a>(value: &'a Value, place: &str) -> Result<&'a Object, RowProblem> {
    value
        .as_object()
        .ok_or_else(|| wrong_type(value, place, "an object"))
}

pub(super) fn array<'a>(value: &'a Value, place: &str) -> Result<&'a [Value], RowProblem> {
    let items = value
        .as_array()
        .ok_or_else(|| wrong_type(value, place, "an array"))?;
    if items.is_empty() && !place.ends_with("tools") && !place.ends_with("tool_calls") {
        return Err(invalid(place, "is empty", None));
    }
    Ok(items)
}

pub(super) fn invalid(field: &str, problem: &str, hint: Option<&'static str>) -> RowProblem {
    RowProblem::Invalid {
        field: field.to_owned(),
        problem: problem.to_owned(),
        hint,
    }
}
