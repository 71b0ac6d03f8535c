//! Chat templates: the model's own Jinja program that turns a conversation into text.
//!
//! The environment is the one Hugging Face renders in: `trim_blocks`, `lstrip_blocks`, loop controls, Python's
//! string methods, `tojson` with Python's spacing, `raise_exception`, `{% generation %}` blocks. The program is
//! not trusted: it has fuel, a recursion limit and a limit on what it writes. What it cannot have is a memory
//! limit inside one expression, so a template is still to be taken from where the weights are taken.

mod clock;
mod python;

use std::io;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use serde::Serialize;

use crate::TextError;

/// The longest template source read.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// The most a template may write.
const MAX_OUTPUT_BYTES: usize = 16 << 20;
/// Instructions a rendering may take; real templates take about a hundred a message.
const FUEL: u64 = 5_000_000;
/// Nesting of macros and recursive loops.
const MAX_RECURSION: usize = 64;

/// The texts of special tokens that templates write by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TemplateTokens {
    /// `bos_token`.
    pub bos: Option<String>,
    /// `eos_token`.
    pub eos: Option<String>,
    /// `pad_token`.
    pub pad: Option<String>,
    /// `unk_token`.
    pub unk: Option<String>,
}

/// A parsed chat template.
#[derive(Clone)]
pub struct ChatTemplate {
    env: Arc<Environment<'static>>,
    source: Arc<str>,
    tokens: TemplateTokens,
    variables: Arc<std::collections::HashSet<String>>,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Parses a template. `now`, in seconds since 1970, is the clock that `strftime_now` reads (in UTC); without
    /// it the function is not defined, and templates fall back to the date written in them, so that the
    /// same conversation gives the same ids on every day.
    pub fn new(source: &str, tokens: TemplateTokens, now: Option<i64>) -> Result<Self, TextError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(TextError::TemplateSyntax(format!(
                "it is over {} KiB long",
                MAX_SOURCE_BYTES >> 10
            )));
        }
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        env.set_syntax(syntax.map_err(|e| TextError::TemplateSyntax(describe(&e)))?);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(MAX_RECURSION);
        env.set_debug(false);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_formatter(|out, _state, value| {
            out.write_str(&python::display(value)?).map_err(Error::from)
        });
        env.add_filter("tojson", python::tojson);
        env.add_function(
            "raise_exception",
            |message: String| -> Result<Value, Error> {
                Err(Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        if let Some(now) = now {
            env.add_function("strftime_now", move |format: &str| {
                clock::strftime(now, format)
            });
        }
        let runnable = without_generation_tags(source);
        env.add_template_owned(NAME, runnable)
            .map_err(|e| TextError::TemplateSyntax(describe(&e)))?;
        let template = env
            .get_template(NAME)
            .map_err(|e| TextError::TemplateSyntax(describe(&e)))?;
        let variables = Arc::new(template.undeclared_variables(false));
        Ok(ChatTemplate {
            env: Arc::new(env),
            source: source.into(),
            tokens,
            variables,
        })
    }

    /// The template as given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Does the template look at `tools`?
    pub fn takes_tools(&self) -> bool {
        self.variables.contains("tools")
    }

    /// Does the template look at a message's `tool_calls`?
    pub fn takes_tool_calls(&self) -> bool {
        self.source.contains("tool_calls")
    }

    /// Renders a conversation given as JSON values.
    pub(crate) fn render(
        &self,
        messages: &[serde_json::Value],
        tools: &[serde_json::Value],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        #[derive(Serialize)]
        struct Context<'a> {
            messages: &'a [serde_json::Value],
            tools: Option<&'a [serde_json::Value]>,
            documents: Option<()>,
            add_generation_prompt: bool,
            #[serde(skip_serializing_if = "Option::is_none")]
            bos_token: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            eos_token: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            pad_token: Option<&'a str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            unk_token: Option<&'a str>,
        }
        let context = Value::from(Serde(Context {
            messages,
            tools: (!tools.is_empty()).then_some(tools),
            documents: None,
            add_generation_prompt,
            bos_token: self.tokens.bos.as_deref(),
            eos_token: self.tokens.eos.as_deref(),
            pad_token: self.tokens.pad.as_deref(),
            unk_token: self.tokens.unk.as_deref(),
        }));
        let template = self
            .env
            .get_template(NAME)
            .map_err(|e| TextError::Template(describe(&e)))?;
        let mut out = Capped {
            bytes: Vec::new(),
            full: false,
        };
        let done = template.render_captured_to(context, &mut out).map(|_| ());
        if out.full {
            return Err(TextError::TemplateOutput {
                limit: MAX_OUTPUT_BYTES,
            });
        }
        done.map_err(|e| TextError::Template(describe(&e)))?;
        String::from_utf8(out.bytes)
            .map_err(|_| TextError::Template("it wrote bytes that are not UTF-8".into()))
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

/// A buffer that refuses to grow past the limit.
struct Capped {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Capped {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + buf.len() > MAX_OUTPUT_BYTES {
            self.full = true;
            return Err(io::Error::other("the template writes too much"));
        }
        self.bytes.extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The error and its line, on one line.
fn describe(e: &Error) -> String {
    let what = match (e.kind(), e.detail()) {
        (ErrorKind::OutOfFuel, _) => "it runs for too long".to_string(),
        (_, Some(detail)) => detail.to_string(),
        (kind, None) => kind.to_string(),
    };
    match e.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

/// `{% generation %}` marks the assistant's tokens for Hugging Face and writes nothing itself. Bantam finds
/// them by rendering, so the tags become a block that is always taken.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let Some(end) = tag[2..].find("%}").map(|n| n + 2) else {
            out.push_str(tag);
            return out;
        };
        let inner = &tag[2..end];
        let word = inner.trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+'));
        match word {
            "generation" => {
                out.push_str(&format!("{{%{}%}}", inner.replace("generation", "if true")))
            }
            "endgeneration" => out.push_str(&format!(
                "{{%{}%}}",
                inner.replace("endgeneration", "endif")
            )),
            _ => {
                // Only the opening is passed, so that a `{%` inside the tag is looked at again.
                out.push_str("{%");
                rest = &tag[2..];
                continue;
            }
        }
        rest = &tag[end + 2..];
    }
    out.push_str(rest);
    out
}
