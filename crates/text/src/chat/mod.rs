//! The one definition of prompt, loss mask and end of turn.
//!
//! Training, judging, chatting and serving all come here, so that a model is asked exactly what it was taught.
//! Where a turn ends is not guessed from a name: an answer is rendered and what the template writes after it
//! is looked at. What a row trains is not marked in the template: the conversation is rendered up to each answer
//! and again with it, and the difference is the answer.

mod escape;

use std::borrow::Cow;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::tools::convention;
use crate::{
    ChatTemplate, CustomTool, Message, Role, TextError, TokenKind, Tokenizer, Tool, ToolSyntax,
};
use escape::Escapes;

/// An answer no template knows.
const PROBE: &str = "Bantam7c1fAnswer";

/// A conversation as ids, and which of them are learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// The ids.
    pub tokens: Vec<u32>,
    /// `trained[i]`: is `tokens[i]` a target of the loss?
    pub trained: Vec<bool>,
}

/// A tokenizer and a template that belong together.
#[derive(Debug, Clone)]
pub struct Chat {
    tokenizer: Arc<Tokenizer>,
    template: ChatTemplate,
    end_tokens: Vec<u32>,
    tool_syntax: Arc<ToolSyntax>,
}

impl Chat {
    /// Joins a tokenizer and a template and finds where a turn ends. `more_end_tokens` are further ids at which
    /// the model's authors stop (`generation_config.json`).
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        template: ChatTemplate,
        more_end_tokens: &[u32],
    ) -> Result<Self, TextError> {
        let mut chat = Chat {
            tokenizer,
            template,
            end_tokens: Vec::new(),
            tool_syntax: Arc::new(convention::syntax()),
        };
        let own = chat.find_end_of_turn()?;
        let end_of_turn = own.and_then(|id| chat.tokenizer.token_text(id));
        let is_text = |text: &str| {
            let ids = chat.tokenizer.encode(text);
            !ids.into_iter().any(|id| chat.tokenizer.is_special(id))
        };
        let syntax = ToolSyntax::of(&chat.template, end_of_turn.as_deref(), &is_text);
        chat.tool_syntax = Arc::new(syntax);
        let all = own
            .into_iter()
            .chain(chat.tokenizer.eos())
            .chain(more_end_tokens.iter().copied());
        for id in all {
            if !chat.end_tokens.contains(&id) && (id as usize) < chat.tokenizer.vocab_size() {
                chat.end_tokens.push(id);
            }
        }
        if chat.end_tokens.is_empty() {
            return Err(TextError::NoEndOfTurn(
                "the template writes no special token after an answer, and the tokenizer names no end of sequence".into(),
            ));
        }
        Ok(chat)
    }

    /// The first added token that the template writes after an answer.
    fn find_end_of_turn(&self) -> Result<Option<u32>, TextError> {
        let messages = [Message::user("Hello."), Message::assistant(PROBE)];
        let text = self.template.render(&to_values(&messages), &[], false)?;
        let Some(at) = text.rfind(PROBE) else {
            return Err(TextError::NoEndOfTurn(
                "the template does not write an assistant's answer".into(),
            ));
        };
        let after = self.tokenizer.encode(&text[at + PROBE.len()..]);
        let added = |id: &u32| {
            matches!(
                self.tokenizer.kind(*id),
                TokenKind::Control | TokenKind::UserDefined
            )
        };
        Ok(after.into_iter().find(added))
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The template.
    pub fn template(&self) -> &ChatTemplate {
        &self.template
    }

    /// The ids that end an answer; the template's own is first.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// How calls of tools are written in answers.
    pub fn tool_syntax(&self) -> &ToolSyntax {
        &self.tool_syntax
    }

    /// The conversation as text, with or without the beginning of an answer. For people to look at: text in
    /// it that looks like a special token is not told apart from one.
    pub fn render(
        &self,
        messages: &[Message],
        tools: &[Tool],
        add_generation_prompt: bool,
    ) -> Result<String, TextError> {
        let (messages, tools) = self.speak(messages, tools)?;
        self.template.render(
            &to_values(&messages),
            &tool_values(tools),
            add_generation_prompt,
        )
    }

    /// The ids after which the model answers.
    pub fn prompt(&self, messages: &[Message], tools: &[Tool]) -> Result<Vec<u32>, TextError> {
        self.prompt_with(messages, tools, &[])
    }

    /// The ids after which the model answers, with tools that take text among those it may call.
    pub fn prompt_with(
        &self,
        messages: &[Message],
        tools: &[Tool],
        customs: &[CustomTool],
    ) -> Result<Vec<u32>, TextError> {
        let (mut messages, tools) = self.speak(messages, tools)?;
        convention::add_custom(messages.to_mut(), customs);
        let conversation = Conversation::new(self, &messages, tools)?;
        let text = conversation.render(messages.len(), true)?;
        Ok(conversation.escapes.encode(&self.tokenizer, &text))
    }

    /// The ids of a row and which of them are learned: every assistant turn whose weight is not 0, with the
    /// template's whole end of turn.
    ///
    /// The prompt and each learned turn are encoded apart, as they come about when serving: the prompt in one
    /// go, then the answer. Turns after the last learned one teach nothing and are left out.
    pub fn example(&self, messages: &[Message], tools: &[Tool]) -> Result<Example, TextError> {
        let (messages, tools) = self.speak(messages, tools)?;
        let messages = &*messages;
        if !messages.iter().any(|m| m.role == Role::Assistant) {
            return Err(TextError::NothingTrained("there is no assistant message"));
        }
        let conversation = Conversation::new(self, messages, tools)?;
        let mut example = Example {
            tokens: Vec::new(),
            trained: Vec::new(),
        };
        let mut done = String::new();
        for (i, _) in messages.iter().enumerate().filter(|(_, m)| m.is_trained()) {
            let asked = conversation.render(i, true)?;
            let prompt = extension(i, &done, &asked)?;
            let answered = conversation.render(i + 1, false)?;
            let answer = extension(i, &asked, &answered)?;
            example.push(conversation.escapes.encode(&self.tokenizer, prompt), false);
            let answer = conversation.escapes.encode(&self.tokenizer, answer);
            let last_special = answer
                .iter()
                .rev()
                .find(|id| self.tokenizer.kind(**id) != TokenKind::Normal);
            if !last_special.is_some_and(|id| self.end_tokens.contains(id)) {
                let tail = &answer[answer.len().saturating_sub(4)..];
                return Err(TextError::EndOfTurnNotTrained {
                    message: i,
                    tail: self.tokenizer.decode(tail),
                });
            }
            example.push(answer, true);
            done = answered;
        }
        if !example.trained.contains(&true) {
            return Err(TextError::NothingTrained(
                "every assistant message has weight 0",
            ));
        }
        if !example.trained.contains(&false) {
            return Err(TextError::EverythingTrained);
        }
        Ok(example)
    }

    /// The row as text with what is learned in `⟦` `⟧`.
    pub fn preview(&self, example: &Example) -> String {
        let mut out = String::new();
        let mut start = 0;
        while start < example.tokens.len() {
            let trained = example.trained[start];
            let run = example.trained[start..]
                .iter()
                .take_while(|t| **t == trained)
                .count();
            let text = self.tokenizer.decode(&example.tokens[start..start + run]);
            if trained {
                out.push('⟦');
                out.push_str(&text);
                out.push('⟧');
            } else {
                out.push_str(&text);
            }
            start += run;
        }
        out
    }

    /// The conversation as the template can carry it: one that does not know tools would drop them in silence,
    /// so it is given them in words.
    fn speak<'m>(
        &self,
        messages: &'m [Message],
        tools: &'m [Tool],
    ) -> Result<(Cow<'m, [Message]>, &'m [Tool]), TextError> {
        if messages.is_empty() {
            return Err(TextError::Message("there are no messages".into()));
        }
        let about_tools = |m: &Message| !m.tool_calls.is_empty() || m.role == Role::Tool;
        if self.tool_syntax.is_native() || (tools.is_empty() && !messages.iter().any(about_tools)) {
            return Ok((Cow::Borrowed(messages), tools));
        }
        Ok((Cow::Owned(convention::plain(messages, tools)), &[]))
    }
}

impl Example {
    fn push(&mut self, tokens: Vec<u32>, trained: bool) {
        self.trained
            .resize(self.trained.len() + tokens.len(), trained);
        self.tokens.extend(tokens);
    }
}

/// A conversation ready to render, with what people wrote protected.
struct Conversation<'a> {
    chat: &'a Chat,
    messages: Vec<Value>,
    tools: Vec<Value>,
    escapes: Escapes,
    /// Messages and tools as they were, kept only if something was protected.
    raw: Option<(Vec<Value>, Vec<Value>)>,
}

impl<'a> Conversation<'a> {
    fn new(chat: &'a Chat, messages: &[Message], tools: &[Tool]) -> Result<Self, TextError> {
        let raw_messages = to_values(messages);
        let raw_tools = tool_values(tools);
        let mut all: Vec<Value> = raw_messages.iter().chain(&raw_tools).cloned().collect();
        let escapes = Escapes::protect(&chat.tokenizer, &mut all, chat.template.source())?;
        let tools = all.split_off(raw_messages.len());
        let raw = escapes.active().then_some((raw_messages, raw_tools));
        Ok(Conversation {
            chat,
            messages: all,
            tools,
            escapes,
            raw,
        })
    }

    /// The first `n` messages as text, in which stand-ins are still in place.
    fn render(&self, n: usize, add_generation_prompt: bool) -> Result<String, TextError> {
        let template = &self.chat.template;
        let text = template.render(&self.messages[..n], &self.tools, add_generation_prompt)?;
        if let Some((messages, tools)) = &self.raw {
            // A template that measures or cuts a message may treat a stand-in unlike what it stands for.
            let plain = template.render(&messages[..n], tools, add_generation_prompt)?;
            if self.escapes.reveal(&self.chat.tokenizer, &text) != plain {
                return Err(TextError::Unprotectable);
            }
        }
        Ok(text)
    }
}

/// What `longer` adds to `shorter`.
fn extension<'t>(message: usize, shorter: &str, longer: &'t str) -> Result<&'t str, TextError> {
    if let Some(rest) = longer.strip_prefix(shorter) {
        return Ok(rest);
    }
    let shared: usize = shorter
        .chars()
        .zip(longer.chars())
        .take_while(|(a, b)| a == b)
        .map(|(a, _)| a.len_utf8())
        .sum();
    let excerpt = |text: &str| text[shared..].chars().take(24).collect::<String>();
    Err(TextError::NotPrefix {
        message,
        shared,
        before: excerpt(shorter),
        after: excerpt(longer),
    })
}

/// Messages as templates know them: roles by their template name, arguments of calls as objects.
fn to_values(messages: &[Message]) -> Vec<Value> {
    let one = |m: &Message| {
        let mut value = json!({
            "role": m.role.template_name(),
            "content": m.content.as_deref().unwrap_or_default(),
        });
        if let Some(name) = &m.name {
            value["name"] = json!(name);
        }
        if let Some(id) = &m.tool_call_id {
            value["tool_call_id"] = json!(id);
        }
        if !m.tool_calls.is_empty() {
            let calls = m.tool_calls.iter().map(|c| {
                let arguments: Option<Value> = serde_json::from_str(&c.function.arguments).ok();
                let arguments = arguments
                    .filter(Value::is_object)
                    .unwrap_or_else(|| json!(c.function.arguments));
                let function = json!({"name": c.function.name, "arguments": arguments});
                json!({"id": c.id, "type": c.kind, "function": function})
            });
            value["tool_calls"] = Value::Array(calls.collect());
        }
        value
    };
    messages.iter().map(one).collect()
}

fn tool_values(tools: &[Tool]) -> Vec<Value> {
    tools
        .iter()
        .map(|t| serde_json::to_value(t).unwrap_or(Value::Null))
        .collect()
}
