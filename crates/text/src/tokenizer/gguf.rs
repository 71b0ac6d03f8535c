//! The tokenizer inside a GGUF file.

use std::collections::HashSet;

use tokenizers::AddedToken;

use super::{MAX_TOKEN_BYTES, MAX_VOCAB, Parts, split};
use crate::TextError;

/// The `tokenizer.ggml.*` metadata, as read from the file.
#[derive(Debug, Clone, Default)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`; byte-level BPE is `gpt2`.
    pub model: String,
    /// `tokenizer.ggml.pre`.
    pub pre: String,
    /// `tokenizer.ggml.tokens`.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`; may be absent.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.merges`, two spellings with a space between.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`; byte-level BPE has no use for it.
    pub unk: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: bool,
}

// Values of `tokenizer.ggml.token_type`.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

pub(super) fn read(v: GgufVocab) -> Result<Parts, TextError> {
    let bad = |message: String| Err(TextError::Tokenizer(message));
    if v.model != "gpt2" {
        return bad(format!(
            "tokenizer model `{}` is not supported; hint: only byte-level BPE (`gpt2`) is",
            v.model
        ));
    }
    if v.tokens.is_empty() || v.tokens.len() > MAX_VOCAB {
        return bad(format!(
            "{} tokens; expected 1 to {MAX_VOCAB}",
            v.tokens.len()
        ));
    }
    if !v.token_types.is_empty() && v.token_types.len() != v.tokens.len() {
        return bad(format!(
            "{} token types for {} tokens",
            v.token_types.len(),
            v.tokens.len()
        ));
    }
    let family = split::family(&v.pre)?;
    let vocab_size = v.tokens.len();
    let mut vocab = Vec::with_capacity(vocab_size);
    let mut added = Vec::new();
    let mut seen = HashSet::with_capacity(vocab_size);
    for (id, token) in v.tokens.into_iter().enumerate() {
        if token.len() > MAX_TOKEN_BYTES {
            return bad(format!(
                "token {id} is {} bytes long; the limit is {MAX_TOKEN_BYTES}",
                token.len()
            ));
        }
        let kind = v.token_types.get(id).copied().unwrap_or(1);
        let id = u32::try_from(id).unwrap_or(u32::MAX);
        if kind == UNUSED {
            continue;
        }
        if token.is_empty() {
            return bad(format!("token {id} is empty"));
        }
        if !seen.insert(token.clone()) {
            return bad(format!("token {token:?} appears twice"));
        }
        match kind {
            CONTROL => added.push((AddedToken::from(token, true).normalized(false), id)),
            USER_DEFINED => added.push((AddedToken::from(token, false).normalized(false), id)),
            _ => vocab.push((token, id)),
        }
    }
    let mut merges = Vec::with_capacity(v.merges.len());
    for (i, merge) in v.merges.iter().enumerate() {
        // A spelling holds no space, so the first one separates.
        match merge.split_once(' ') {
            Some((a, b)) if !a.is_empty() && !b.is_empty() => {
                merges.push((a.to_string(), b.to_string()))
            }
            _ => return bad(format!("merge {i} is not two tokens: {merge:?}")),
        }
    }
    Ok(Parts {
        vocab,
        merges,
        ignore_merges: family.ignore_merges,
        normalizer: family.normalizer,
        pre_tokenizer: family.pre_tokenizer,
        added,
        vocab_size,
        bos: v.bos,
        eos: v.eos,
        pad: v.pad,
        add_bos: v.add_bos,
    })
}
