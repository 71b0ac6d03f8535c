//! Text to tokens and back: tokenizers, chat templates, stop strings, grammar masks.
//!
//! The rule of this room: it runs other people's programs (chat templates, regexes, grammars), so all of
//! them run with fuel, depth and size limits, and a failure is an error, never a quietly different answer.
//!
//! - [`Tokenizer`] turns text into ids, exactly as Hugging Face does, from `tokenizer.json` or GGUF metadata;
//! - [`WordPiece`] does so for sentence encoders;
//! - [`StreamDecoder`] turns ids back into text, one at a time, never splitting a character;
//! - [`Message`], [`Tool`], [`ToolCall`] are the conversation, in OpenAI's shapes;
//! - [`ChatTemplate`] renders a conversation; [`Chat`] is the one definition of prompt, loss mask and end
//!   of turn that training, judging, chatting and serving share;
//! - [`ToolSyntax`] is how calls of tools are written, [`ToolGrammar`] holds answers to it, [`ToolParser`] reads them;
//! - [`ConstraintEngine`] compiles JSON schemas, regexes, label sets and grammars into token masks;
//! - [`StopStrings`] watches a stream for stop strings;
//! - [`fuzz`] holds the entry points that fuzzers and hostile-input tests call.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod chat;
mod constraint;
mod error;
pub mod fuzz;
mod message;
mod stop;
mod stream;
mod template;
mod tokenizer;
mod tools;

pub use chat::{Chat, Example};
pub use constraint::{Constraint, ConstraintEngine, ConstraintSpec, TokenMask};
pub use error::TextError;
pub use message::{Function, FunctionCall, Message, Role, Tool, ToolCall};
pub use stop::{StopStrings, Watched};
pub use stream::StreamDecoder;
pub use template::{ChatTemplate, TemplateTokens};
pub use tokenizer::{GgufVocab, Specials, TokenKind, Tokenizer, WordPiece};
pub use tools::{
    CallKind, CustomInput, CustomTool, ToolDemand, ToolGrammar, ToolParser, ToolPiece, ToolSyntax,
    custom_call,
};
