//! The grammar of answers that may, or must, call tools.
//!
//! Free text is kept from containing the beginning of a call, so that what looks like a call is one, and what
//! is one has a known name and arguments that its schema allows.

use llguidance::api::GrammarWithLexer;
use serde_json::{Value, json};

use super::convention::{CUSTOM_INPUT, CUSTOM_OPEN};
use super::{CustomInput, CustomTool, ToolSyntax};
use crate::{ConstraintSpec, TextError, Tool};

/// Must there be a call?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolDemand {
    /// Text, calls, or text and then calls.
    Auto,
    /// At least one call, and nothing else.
    Required,
}

/// Which calls an answer may hold, and how they are written.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolGrammar {
    /// The functions that may be called.
    pub functions: Vec<Tool>,
    /// The custom tools that may be called.
    pub customs: Vec<CustomTool>,
    /// Must there be a call?
    pub demand: ToolDemand,
    /// May there be several?
    pub parallel: bool,
    /// What an answer without calls looks like; any text, if absent.
    pub answer: Option<Box<ConstraintSpec>>,
    /// How calls are written.
    pub syntax: ToolSyntax,
}

impl ToolGrammar {
    /// The grammar, and those it refers to. `single` makes one of a constraint that is not about tools.
    pub(crate) fn grammars(
        &self,
        single: &dyn Fn(&ConstraintSpec) -> Result<GrammarWithLexer, TextError>,
    ) -> Result<Vec<GrammarWithLexer>, TextError> {
        let mut rules = String::new();
        let mut parts = Vec::new();
        let mut named = |name: String, spec: &ConstraintSpec| -> Result<String, TextError> {
            let grammar = single(spec)?;
            let reference = format!("@{name}");
            parts.push(GrammarWithLexer {
                name: Some(name),
                ..grammar
            });
            Ok(reference)
        };
        let syntax = &self.syntax;
        let trigger = syntax.trigger();
        let has_functions = !self.functions.is_empty();
        let has_customs = !self.customs.is_empty();
        if has_functions {
            let mut calls = Vec::new();
            for (i, tool) in self.functions.iter().enumerate() {
                let head = format!(
                    "{}{}{}",
                    &syntax.before_name[trigger.len()..],
                    tool.function.name,
                    syntax.before_arguments
                );
                let schema = ConstraintSpec::JsonSchema(arguments(&tool.function.parameters));
                let arguments = named(format!("args_{i}"), &schema)?;
                let tail = literal(&syntax.after_arguments);
                rules.push_str(&format!(
                    "call_{i}: {} {arguments} {tail}\n",
                    literal(&head)
                ));
                calls.push(format!("call_{i}"));
            }
            rules.push_str(&format!("function: {}\n", calls.join(" | ")));
        }
        if has_customs {
            let mut calls = Vec::new();
            for (i, tool) in self.customs.iter().enumerate() {
                let head = format!("{}{CUSTOM_INPUT}", tool.name);
                let input = match &tool.input {
                    CustomInput::Text => ConstraintSpec::Regex("(?s:.+)".to_string()),
                    CustomInput::Lark(grammar) => ConstraintSpec::Lark(grammar.clone()),
                    CustomInput::Regex(regex) => ConstraintSpec::Regex(regex.clone()),
                };
                let input = named(format!("input_{i}"), &input)?;
                rules.push_str(&format!("custom_{i}: {} {input}\n", literal(&head)));
                calls.push(format!("custom_{i}"));
            }
            rules.push_str(&format!("custom: {}\n", calls.join(" | ")));
        }
        // What may follow the first function's call.
        let separator = syntax.separator.as_deref().filter(|_| self.parallel);
        let more = match separator {
            Some(separator) if has_functions => {
                let again = literal(&format!("{separator}{trigger}"));
                let custom = if has_customs {
                    format!(" ({} custom)?", literal(&format!("\n{CUSTOM_OPEN}")))
                } else {
                    String::new()
                };
                format!(" ({again} function)*{custom}")
            }
            _ => String::new(),
        };
        let free = match (&self.answer, self.demand) {
            (_, ToolDemand::Required) => None,
            (Some(answer), ToolDemand::Auto) => {
                let answer = named("answer".to_string(), answer)?;
                rules.push_str(&format!("answer: {answer}\n"));
                None
            }
            (None, ToolDemand::Auto) => {
                let mut openings = Vec::new();
                if has_functions {
                    openings.push(escape(trigger));
                }
                if has_customs {
                    openings.push(escape(CUSTOM_OPEN));
                }
                let openings = openings.join("|");
                let not = format!("~/(?s:.*)({openings})(?s:.*)/");
                rules.push_str(&format!("TEXT: /(?s:.+)/ & {not}\n"));
                rules.push_str(&format!("LEAD: /(?s:.*)/ & {not}\n"));
                rules.push_str("answer: TEXT\n");
                Some(())
            }
        };
        let mut ways = Vec::new();
        if self.demand == ToolDemand::Auto {
            ways.push("answer".to_string());
            if free.is_some() {
                // The model may have nothing to say.
                ways.push(String::new());
            }
        }
        let mut opening = |name: &str, text: &str| match free {
            Some(()) => {
                rules.push_str(&format!("{name}[lazy]: LEAD {}\n", literal(text)));
                name.to_string()
            }
            None => literal(text),
        };
        if has_functions {
            ways.push(format!("{} function{more}", opening("open_f", trigger)));
        }
        if has_customs {
            ways.push(format!("{} custom", opening("open_c", CUSTOM_OPEN)));
        }
        let start = format!("start: {}\n{rules}", ways.join(" | "));
        let mut all = vec![GrammarWithLexer::from_lark(start)];
        all.append(&mut parts);
        Ok(all)
    }
}

/// The schema of a function's arguments. One without parameters takes none; one that does not say whether it
/// takes more than it declares does not, so that a model cannot make arguments up.
fn arguments(parameters: &Option<Value>) -> Value {
    let mut schema = match parameters {
        Some(Value::Object(fields)) => Value::Object(fields.clone()),
        Some(other) => return other.clone(),
        None => json!({}),
    };
    if let Some(fields) = schema.as_object_mut() {
        let combines = ["anyOf", "oneOf", "allOf", "$ref", "patternProperties"]
            .iter()
            .any(|key| fields.contains_key(*key));
        if !combines {
            fields.entry("type").or_insert(json!("object"));
            fields.entry("additionalProperties").or_insert(json!(false));
        }
    }
    schema
}

/// A string in Lark's syntax.
fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// The regex of exactly this text, safe between slashes.
fn escape(text: &str) -> String {
    crate::constraint::escape(text)
}
