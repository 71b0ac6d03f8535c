//! Texts that are given as strings or as tokens.

use serde_json::Value;

use crate::error::ApiError;
use crate::models::Model;

/// One text.
#[derive(Clone)]
pub(crate) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

/// A string, strings, tokens, or lists of tokens; nothing is the beginning of a text. `name` is the field's.
pub(crate) fn prompts(name: &str, value: Option<Value>) -> Result<Vec<Prompt>, ApiError> {
    let bad = || {
        let message = format!(
            "`{name}` must be a string, an array of strings, of token ids, or of arrays of token ids"
        );
        ApiError::invalid(name, message)
    };
    let token = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    let tokens = |items: &[Value]| items.iter().map(token).collect::<Option<Vec<u32>>>();
    match value {
        None => Ok(vec![Prompt::Text(String::new())]),
        Some(Value::String(text)) => Ok(vec![Prompt::Text(text)]),
        Some(Value::Array(items)) if items.is_empty() => Err(bad()),
        Some(Value::Array(items)) if items[0].is_u64() => {
            Ok(vec![Prompt::Tokens(tokens(&items).ok_or_else(bad)?)])
        }
        Some(Value::Array(items)) => items
            .iter()
            .map(|item| match item {
                Value::String(text) => Ok(Prompt::Text(text.clone())),
                Value::Array(ids) => tokens(ids).map(Prompt::Tokens).ok_or_else(bad),
                _ => Err(bad()),
            })
            .collect(),
        Some(_) => Err(bad()),
    }
}

impl Prompt {
    /// Its tokens, the beginning of sequence included if the model was trained with one.
    pub(crate) fn encode(&self, name: &str, model: &Model) -> Result<Vec<u32>, ApiError> {
        let tokenizer = model.chat.tokenizer();
        let vocab = model.worker.info.vocab;
        match self {
            Prompt::Tokens(ids) if ids.is_empty() => {
                let message = format!("`{name}` holds an empty list");
                Err(ApiError::invalid(name, message))
            }
            Prompt::Tokens(ids) => match ids.iter().find(|id| **id as usize >= vocab) {
                Some(id) => {
                    let message = format!("token {id} is not in the vocabulary of {vocab} tokens");
                    Err(ApiError::invalid(name, message))
                }
                None => Ok(ids.clone()),
            },
            Prompt::Text(text) => {
                let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
                let mut ids: Vec<u32> = bos.into_iter().collect();
                ids.extend(tokenizer.encode(text));
                if ids.is_empty() {
                    // Something must come before the first token; what ends a text begins one.
                    let start = tokenizer.bos().or_else(|| tokenizer.eos());
                    ids.extend(start.or_else(|| model.chat.end_tokens().first().copied()));
                }
                Ok(ids)
            }
        }
    }
}
