//! Tools: how a model is told of them, how its calls are written, constrained and read back.
//!
//! There is one [`ToolSyntax`] for each chat template, and training and serving both go by it. It is found, not
//! configured: a made-up call is rendered, and what the template writes around the name and the arguments is
//! the syntax. A template without one gets Bantam's own convention ([`convention`]), in words every template
//! can carry.

pub(crate) mod convention;
mod grammar;
mod parser;

use serde_json::{Value, json};

pub use convention::custom_call;
pub use grammar::{ToolDemand, ToolGrammar};
pub use parser::{CallKind, ToolParser, ToolPiece};

use crate::ChatTemplate;

/// A tool whose input is text rather than JSON.
#[derive(Debug, Clone, PartialEq)]
pub struct CustomTool {
    /// Its name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// What its input looks like.
    pub input: CustomInput,
}

/// What the input of a [`CustomTool`] looks like.
#[derive(Debug, Clone, PartialEq)]
pub enum CustomInput {
    /// Any text.
    Text,
    /// Text of this Lark grammar.
    Lark(String),
    /// Text that this regex matches.
    Regex(String),
}

/// How calls are written in an answer:
/// `before_name NAME before_arguments {..} after_arguments`, and `separator` before the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolSyntax {
    pub(crate) before_name: String,
    pub(crate) before_arguments: String,
    pub(crate) after_arguments: String,
    /// What stands between two calls; `None` if the template writes only one.
    pub(crate) separator: Option<String>,
    /// Does the template write tools and calls itself?
    pub(crate) native: bool,
}

/// Names and values that no template knows.
const NAMES: [&str; 2] = ["bantam7c1f_one", "bantam7c1f_two"];
const VALUES: [&str; 2] = ["bantam7c1fValueOne", "bantam7c1fValueTwo"];

impl ToolSyntax {
    /// The template's own syntax if it has one that can be read back, else the convention. `is_text` says
    /// whether a text is free of special tokens, which an answer's text never shows.
    pub(crate) fn of(
        template: &ChatTemplate,
        end_of_turn: Option<&str>,
        is_text: &dyn Fn(&str) -> bool,
    ) -> Self {
        if !template.takes_tools() || !template.takes_tool_calls() {
            return convention::syntax();
        }
        end_of_turn
            .and_then(|end| Self::probe(template, end))
            .filter(|found| {
                let parts = [
                    &found.before_name,
                    &found.before_arguments,
                    &found.after_arguments,
                ];
                let separator = found.separator.as_deref().unwrap_or_default();
                parts.into_iter().all(|part| is_text(part)) && is_text(separator)
            })
            .unwrap_or_else(convention::syntax)
    }

    /// Does the template write tools and calls itself?
    pub fn is_native(&self) -> bool {
        self.native
    }

    /// May an answer hold several calls?
    pub fn takes_parallel(&self) -> bool {
        self.separator.is_some()
    }

    /// The first characters of a call, by which it is told from text.
    pub(crate) fn trigger(&self) -> &str {
        let whole = self.before_name.as_str();
        match whole.find(['\n', '{']) {
            Some(at) if !whole[..at].trim().is_empty() => &whole[..at],
            _ => whole,
        }
    }

    fn probe(template: &ChatTemplate, end_of_turn: &str) -> Option<Self> {
        let tools: Vec<Value> = NAMES
            .iter()
            .map(|name| {
                let parameters =
                    json!({"type": "object", "properties": {"key": {"type": "string"}}});
                let function = json!({"name": name, "description": "d", "parameters": parameters});
                json!({"type": "function", "function": function})
            })
            .collect();
        let user = json!({"role": "user", "content": "Hello."});
        let asked = template
            .render(std::slice::from_ref(&user), &tools, true)
            .ok()?;
        let turn = |n: usize| {
            let calls: Vec<Value> = (0..n)
                .map(|i| {
                    let function = json!({"name": NAMES[i], "arguments": {"key": VALUES[i]}});
                    json!({"id": format!("call{i}000"), "type": "function", "function": function})
                })
                .collect();
            let answer = json!({"role": "assistant", "content": "", "tool_calls": calls});
            let messages = [user.clone(), answer];
            let text = template.render(&messages, &tools, false).ok()?;
            text.strip_prefix(&asked).map(str::to_string)
        };
        let one = turn(1)?;
        let (before_name, rest) = one.split_once(NAMES[0])?;
        let (before_arguments, rest) = split_at_arguments(rest, VALUES[0])?;
        let (after_arguments, _) = rest.split_once(end_of_turn)?;
        let is_plain = |text: &str| !text.contains("bantam7c1f") && !text.contains("000");
        if before_name.trim().is_empty() || before_arguments.is_empty() {
            return None;
        }
        if ![before_name, before_arguments, after_arguments]
            .into_iter()
            .all(is_plain)
        {
            return None;
        }
        let separator = turn(2).and_then(|two| {
            let (_, rest) = two.split_once(NAMES[0])?;
            let (_, rest) = split_at_arguments(rest, VALUES[0])?;
            let (between, _) = rest.split_once(NAMES[1])?;
            let separator = between
                .strip_prefix(after_arguments)?
                .strip_suffix(before_name)?;
            is_plain(separator).then(|| separator.to_string())
        });
        Some(Self {
            before_name: before_name.to_string(),
            before_arguments: before_arguments.to_string(),
            after_arguments: after_arguments.to_string(),
            separator,
            native: true,
        })
    }
}

/// The text before and after the made-up arguments, however they are spaced.
fn split_at_arguments<'t>(text: &'t str, value: &str) -> Option<(&'t str, &'t str)> {
    [": ", ":"]
        .iter()
        .find_map(|colon| text.split_once(&format!("{{\"key\"{colon}\"{value}\"}}")))
}
