//! What can go wrong with text, each with the values needed to say so.

use thiserror::Error;

/// Any failure of this crate.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum TextError {
    /// The tokenizer file or metadata is malformed, or uses a part that is not byte-level BPE.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// The GGUF names a pre-tokenizer whose splitting rules are not known here.
    #[error("pre-tokenizer `{pre}` is not supported; hint: known ones are {known}")]
    UnknownPreTokenizer {
        /// The value of `tokenizer.ggml.pre`.
        pre: String,
        /// The supported values.
        known: &'static str,
    },
    /// The chat template does not parse.
    #[error("chat template does not parse: {0}")]
    TemplateSyntax(String),
    /// The chat template failed, or refused the conversation with `raise_exception`.
    #[error("chat template failed: {0}")]
    Template(String),
    /// The rendered conversation is too long.
    #[error("chat template wrote more than {limit} bytes")]
    TemplateOutput {
        /// The limit that was hit.
        limit: usize,
    },
    /// Rendering more turns changed the text of the earlier ones, so that prompt and answer cannot be told apart.
    #[error(
        "chat template does not extend prefix-wise at message {message}: after {shared} equal bytes {before:?} became \
         {after:?}; hint: such a template rewrites earlier turns, so a loss mask over them would be wrong; train \
         one answer a row (`weight: 0` on the others), or fix the template"
    )]
    NotPrefix {
        /// Index of the message whose rendering is not an extension.
        message: usize,
        /// How many bytes of the two renderings agree.
        shared: usize,
        /// What the shorter rendering says after that.
        before: String,
        /// What the longer rendering says instead.
        after: String,
    },
    /// The conversation trains nothing.
    #[error("no token of this row would be trained: {0}")]
    NothingTrained(&'static str),
    /// The conversation would train every token, its prompt included.
    #[error(
        "every token of this row would be trained: the template puts nothing before the answer"
    )]
    EverythingTrained,
    /// The trained turn does not end in a token at which serving stops.
    #[error(
        "message {message} would not train an end-of-turn token; its last tokens are {tail:?}; hint: the model would \
         never learn to stop"
    )]
    EndOfTurnNotTrained {
        /// Index of the assistant message.
        message: usize,
        /// The end of the trained text.
        tail: String,
    },
    /// No end of turn could be found for this template and tokenizer.
    #[error("no end-of-turn token: {0}")]
    NoEndOfTurn(String),
    /// A template changed text that was protected from being read as special tokens.
    #[error(
        "a message contains the text of a special token, and the chat template cuts or changes it so that it cannot be \
         kept apart"
    )]
    Unprotectable,
    /// A message is malformed.
    #[error("{0}")]
    Message(String),
    /// The constraint cannot be compiled within its limits.
    #[error("constraint refused: {0}")]
    Constraint(String),
    /// The constraint failed while generating; the answer so far must not be used.
    #[error("constraint failed: {0}")]
    ConstraintFailed(String),
}
