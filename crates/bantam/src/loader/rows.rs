//! Rows as the lab reads them, messages as the templates take them: the same words in two crates.

use std::path::Path;

use anyhow::Context as _;
use bantam_lab::data::{self, Row};
use bantam_lab::train::TrainRow;
use bantam_text::{Chat, Example, Function, FunctionCall, Message, Role, Tool, ToolCall};

/// A conversation for a template.
pub(crate) fn messages(from: &[data::Message]) -> Vec<Message> {
    from.iter().map(message).collect()
}

fn message(from: &data::Message) -> Message {
    Message {
        role: match from.role {
            data::Role::System => Role::System,
            data::Role::Developer => Role::Developer,
            data::Role::User => Role::User,
            data::Role::Assistant => Role::Assistant,
            data::Role::Tool => Role::Tool,
        },
        content: from.content.clone(),
        name: from.name.clone(),
        tool_calls: from
            .tool_calls
            .iter()
            .map(|call| ToolCall {
                id: call.id.clone(),
                kind: "function".into(),
                function: FunctionCall {
                    name: call.name.clone(),
                    arguments: call.arguments.clone(),
                },
            })
            .collect(),
        tool_call_id: from.tool_call_id.clone(),
        trained: from.weight.map(|weight| weight != 0),
    }
}

/// Tools for a template.
pub(crate) fn tools(from: &[data::Tool]) -> Vec<Tool> {
    let function = |tool: &data::Tool| Function {
        name: tool.name.clone(),
        description: tool.description.clone(),
        parameters: tool.parameters.clone(),
        strict: None,
    };
    from.iter()
        .map(|tool| Tool {
            kind: "function".into(),
            function: function(tool),
        })
        .collect()
}

/// A row as tokens and loss mask; the error names its file and line.
pub(crate) fn example(chat: &Chat, row: &Row, path: &Path) -> anyhow::Result<Example> {
    let example = chat.example(&messages(&row.messages), &tools(&row.tools));
    example.with_context(|| {
        format!(
            "{}:{}: this row cannot be trained on",
            path.display(),
            row.line
        )
    })
}

/// All rows of a file as tokens and loss masks.
pub(crate) fn train_rows(chat: &Chat, rows: &[Row], path: &Path) -> anyhow::Result<Vec<TrainRow>> {
    rows.iter()
        .map(|row| {
            let Example { tokens, trained } = example(chat, row, path)?;
            Ok(TrainRow {
                tokens,
                trained,
                line: row.line,
            })
        })
        .collect()
}
