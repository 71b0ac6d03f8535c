//! `tools`, `tool_choice` and `parallel_tool_calls`: what the model is told of, and what it may call.

use std::collections::HashSet;

use bantam_text::{
    Chat, ConstraintSpec, CustomInput, CustomTool, Function, Tool, ToolDemand, ToolGrammar,
};
use serde_json::Value;

use super::fields::Fields;
use crate::error::ApiError;

/// The most tools a request may declare, as OpenAI has it.
const TOOLS_MAX: usize = 128;

/// Tools of both kinds.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct ToolSet {
    pub(crate) functions: Vec<Tool>,
    pub(crate) customs: Vec<CustomTool>,
}

impl ToolSet {
    fn is_empty(&self) -> bool {
        self.functions.is_empty() && self.customs.is_empty()
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        let functions = self
            .functions
            .iter()
            .map(|tool| tool.function.name.as_str());
        functions.chain(self.customs.iter().map(|tool| tool.name.as_str()))
    }

    /// Those of these names.
    fn only(&self, names: &HashSet<(bool, String)>) -> ToolSet {
        let has = |custom: bool, name: &str| names.contains(&(custom, name.to_string()));
        ToolSet {
            functions: (self.functions.iter())
                .filter(|tool| has(false, &tool.function.name))
                .cloned()
                .collect(),
            customs: (self.customs.iter())
                .filter(|tool| has(true, &tool.name))
                .cloned()
                .collect(),
        }
    }
}

/// Tools that may be called.
#[derive(Debug, Clone)]
pub(crate) struct ToolUse {
    /// What the model is told of.
    pub(crate) shown: ToolSet,
    callable: ToolSet,
    pub(crate) demand: ToolDemand,
    parallel: bool,
}

impl ToolUse {
    /// Reads the three fields; `None` if nothing may be called. `flat` tools are those of the Responses API.
    pub(crate) fn take(fields: &mut Fields, flat: bool) -> Result<Option<Self>, ApiError> {
        let items = fields.items("tools")?.unwrap_or_default();
        let choice: Option<Value> = fields.take("tool_choice")?;
        let parallel: Option<bool> = fields.take("parallel_tool_calls")?;
        if items.len() > TOOLS_MAX {
            let message = format!("`tools` must be at most {TOOLS_MAX}, not {}", items.len());
            return Err(ApiError::invalid("tools", message));
        }
        let mut shown = ToolSet::default();
        for (path, value) in items {
            tool(&path, value, flat, &mut shown)?;
        }
        let mut seen = HashSet::new();
        if let Some(name) = shown.names().find(|name| !seen.insert(name.to_string())) {
            let message = format!("two tools are called `{name}`");
            return Err(ApiError::invalid("tools", message));
        }
        let mut this = Self {
            callable: shown.clone(),
            shown,
            demand: ToolDemand::Auto,
            parallel: parallel.unwrap_or(true),
        };
        match choice {
            None => {}
            Some(Value::String(word)) => match word.as_str() {
                "auto" => {}
                "none" => return Ok(None),
                "required" => this.demand = ToolDemand::Required,
                _ => {
                    let message = "`tool_choice` must be `none`, `auto`, `required` or an object";
                    return Err(ApiError::invalid("tool_choice", message));
                }
            },
            Some(choice) => this.choose(choice, flat)?,
        }
        if this.callable.is_empty() {
            return match this.demand {
                ToolDemand::Auto => Ok(None),
                ToolDemand::Required => {
                    let message = "`tool_choice` asks for a call and there are no `tools`";
                    Err(ApiError::invalid("tool_choice", message))
                }
            };
        }
        Ok(Some(this))
    }

    /// An object as `tool_choice`.
    fn choose(&mut self, choice: Value, flat: bool) -> Result<(), ApiError> {
        let mut choice = Fields::of("tool_choice", choice)?;
        let kind: String = choice.need("type")?;
        match kind.as_str() {
            "function" | "custom" => {
                let name = named(&mut choice, &kind, flat)?;
                self.restrict("tool_choice", &[(kind == "custom", name)])?;
                self.demand = ToolDemand::Required;
                self.parallel = false;
            }
            "allowed_tools" => {
                let mut allowed = if flat {
                    None
                } else {
                    let inner = choice.object("allowed_tools")?;
                    Some(inner.ok_or_else(|| ApiError::missing("tool_choice.allowed_tools"))?)
                };
                let inner = allowed.as_mut().unwrap_or(&mut choice);
                let mode: String = inner.need("mode")?;
                self.demand = match mode.as_str() {
                    "auto" => ToolDemand::Auto,
                    "required" => ToolDemand::Required,
                    _ => {
                        let path = inner.path("mode");
                        let message = format!("`{path}` must be `auto` or `required`");
                        return Err(ApiError::invalid(path, message));
                    }
                };
                let path = inner.path("tools");
                let mut names = Vec::new();
                for (path, item) in inner.items("tools")?.unwrap_or_default() {
                    let mut item = Fields::of(path, item)?;
                    let kind: String = item.need("type")?;
                    let name = named(&mut item, &kind, flat)?;
                    item.finish(&[])?;
                    names.push((kind == "custom", name));
                }
                self.restrict(&path, &names)?;
                if let Some(allowed) = allowed {
                    allowed.finish(&[])?;
                }
            }
            _ => {
                let message = "`tool_choice.type` must be `function`, `custom` or `allowed_tools`";
                return Err(ApiError::invalid("tool_choice.type", message));
            }
        }
        choice.finish(&[])
    }

    fn restrict(&mut self, path: &str, names: &[(bool, String)]) -> Result<(), ApiError> {
        let names: HashSet<(bool, String)> = names.iter().cloned().collect();
        let only = self.shown.only(&names);
        if only.names().count() < names.len() || names.is_empty() {
            let message = format!("`{path}` names a tool that is not in `tools`");
            return Err(ApiError::invalid(path, message));
        }
        self.callable = only;
        Ok(())
    }

    /// The grammar of answers; `answer` is what one without calls looks like.
    pub(crate) fn grammar(&self, chat: &Chat, answer: Option<ConstraintSpec>) -> ToolGrammar {
        let syntax = chat.tool_syntax().clone();
        ToolGrammar {
            functions: self.callable.functions.clone(),
            customs: self.callable.customs.clone(),
            demand: self.demand,
            parallel: self.parallel && syntax.takes_parallel(),
            answer: answer.map(Box::new),
            syntax,
        }
    }

    /// Which of the tools a grammar failed on, if one of them fails alone.
    pub(crate) fn culprit(
        &self,
        compiles: impl Fn(&ToolGrammar) -> bool,
        whole: &ToolGrammar,
    ) -> String {
        let functions = self.callable.functions.iter().map(|tool| {
            let alone = ToolGrammar {
                functions: vec![tool.clone()],
                customs: Vec::new(),
                ..whole.clone()
            };
            (tool.function.name.as_str(), alone)
        });
        let customs = self.callable.customs.iter().map(|tool| {
            let alone = ToolGrammar {
                functions: Vec::new(),
                customs: vec![tool.clone()],
                ..whole.clone()
            };
            (tool.name.as_str(), alone)
        });
        let mut all = functions.chain(customs);
        let culprit = all
            .find(|(_, alone)| !compiles(alone))
            .map(|(name, _)| name);
        let at = culprit.and_then(|name| self.shown.names().position(|shown| shown == name));
        at.map_or_else(|| "tools".to_string(), |at| format!("tools[{at}]"))
    }
}

/// The name in `{"type": KIND, KIND: {"name": ..}}`, or in the flat `{"type": KIND, "name": ..}`.
fn named(fields: &mut Fields, kind: &str, flat: bool) -> Result<String, ApiError> {
    if !matches!(kind, "function" | "custom") {
        let path = fields.path("type");
        let message = format!("`{path}` must be `function` or `custom`");
        return Err(ApiError::invalid(path, message));
    }
    if flat {
        return fields.need("name");
    }
    let Some(mut inner) = fields.object(kind)? else {
        return Err(ApiError::missing(&fields.path(kind)));
    };
    let name = inner.need("name")?;
    inner.finish(&[])?;
    Ok(name)
}

fn tool(path: &str, value: Value, flat: bool, into: &mut ToolSet) -> Result<(), ApiError> {
    let mut outer = Fields::of(path, value)?;
    let kind: String = outer.need("type")?;
    if !matches!(kind.as_str(), "function" | "custom") {
        let param = outer.path("type");
        let message =
            format!("tools of type `{kind}` are not supported, only `function` and `custom`");
        return Err(ApiError::unsupported(param, message));
    }
    let mut nested = if flat {
        None
    } else {
        let inner = outer.object(&kind)?;
        Some(inner.ok_or_else(|| ApiError::missing(&format!("{path}.{kind}")))?)
    };
    let fields = nested.as_mut().unwrap_or(&mut outer);
    let name: String = fields.need("name")?;
    let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    if !(1..=64).contains(&name.len()) || !name.chars().all(is_plain) {
        let param = fields.path("name");
        let message = format!("`{param}` must have 1 to 64 letters, digits, `_`, `-` and `.`");
        return Err(ApiError::invalid(param, message));
    }
    let description: Option<String> = fields.take("description")?;
    if kind == "function" {
        let parameters: Option<Value> = fields.take("parameters")?;
        if parameters.as_ref().is_some_and(|p| !p.is_object()) {
            let param = fields.path("parameters");
            let message = format!("`{param}` must be a JSON schema, an object");
            return Err(ApiError::invalid(param, message));
        }
        let strict = fields.take("strict")?;
        into.functions.push(Tool {
            kind: "function".to_string(),
            function: Function {
                name,
                description,
                parameters,
                strict,
            },
        });
    } else {
        let input = match fields.object("format")? {
            None => CustomInput::Text,
            Some(format) => input(format)?,
        };
        into.customs.push(CustomTool {
            name,
            description,
            input,
        });
    }
    if let Some(nested) = nested {
        nested.finish(&[])?;
    }
    outer.finish(&[])
}

/// `format` of a custom tool: `grammar` is nested in chat completions and flat in responses; both are read.
fn input(mut format: Fields) -> Result<CustomInput, ApiError> {
    let kind: String = format.need("type")?;
    let input = match kind.as_str() {
        "text" => CustomInput::Text,
        "grammar" => {
            let mut nested = format.object("grammar")?;
            let grammar = nested.as_mut().unwrap_or(&mut format);
            let syntax: String = grammar.need("syntax")?;
            let definition: String = grammar.need("definition")?;
            let input = match syntax.as_str() {
                "lark" => CustomInput::Lark(definition),
                "regex" => CustomInput::Regex(definition),
                _ => {
                    let path = grammar.path("syntax");
                    let message = format!("`{path}` must be `lark` or `regex`");
                    return Err(ApiError::invalid(path, message));
                }
            };
            if let Some(nested) = nested {
                nested.finish(&[])?;
            }
            input
        }
        _ => {
            let path = format.path("type");
            let message = format!("`{path}` must be `text` or `grammar`");
            return Err(ApiError::invalid(path, message));
        }
    };
    format.finish(&[])?;
    Ok(input)
}
