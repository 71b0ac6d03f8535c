//! `tokenizer.json`, the Hugging Face file.
//!
//! Read into plain data first and checked, because the file is hostile until proven otherwise: only the parts
//! that byte-level BPE is made of are let in, and the post-processor, padding and truncation are left out on
//! purpose (templates write their own special tokens, and nothing here may cut or pad).

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper};

use super::{MAX_TOKEN_BYTES, MAX_VOCAB, Parts};
use crate::TextError;

/// The largest `tokenizer.json` read.
pub(super) const MAX_FILE_BYTES: usize = 256 << 20;
/// The longest pattern read.
const MAX_PATTERN_BYTES: usize = 4096;

/// The special tokens that `tokenizer_config.json` names, by their text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Specials {
    /// `bos_token`.
    pub bos: Option<String>,
    /// `eos_token`.
    pub eos: Option<String>,
    /// `pad_token`.
    pub pad: Option<String>,
    /// `unk_token`; byte-level BPE has no use for it.
    pub unk: Option<String>,
    /// `add_bos_token`.
    pub add_bos: bool,
}

#[derive(Deserialize)]
struct File {
    model: ModelPart,
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Option<Value>,
    #[serde(default)]
    pre_tokenizer: Option<Value>,
    #[serde(default)]
    decoder: Option<Value>,
}

#[derive(Deserialize)]
struct ModelPart {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    vocab: HashMap<String, u32>,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    ignore_merges: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    dropout: Option<f32>,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
    #[serde(default)]
    end_of_word_suffix: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Line(String),
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    normalized: bool,
    #[serde(default)]
    special: bool,
}

pub(super) fn read(json: &[u8], specials: &Specials) -> Result<Parts, TextError> {
    let bad = |message: String| TextError::Tokenizer(message);
    if json.len() > MAX_FILE_BYTES {
        return Err(bad(format!(
            "tokenizer.json is over {} MiB",
            MAX_FILE_BYTES >> 20
        )));
    }
    let file: File =
        serde_json::from_slice(json).map_err(|e| bad(format!("tokenizer.json: {e}")))?;
    let model = file.model;
    let only_bpe = |what: &str| {
        bad(format!(
            "{what}; hint: only byte-level BPE tokenizers are supported"
        ))
    };
    if let Some(kind) = model.kind.as_deref().filter(|kind| *kind != "BPE") {
        return Err(only_bpe(&format!("model `{kind}`")));
    }
    if model.byte_fallback {
        return Err(only_bpe("`byte_fallback`"));
    }
    if model.dropout.is_some_and(|p| p != 0.0) {
        return Err(only_bpe("`dropout`"));
    }
    for affix in [&model.continuing_subword_prefix, &model.end_of_word_suffix] {
        if affix.as_deref().is_some_and(|a| !a.is_empty()) {
            return Err(only_bpe("a subword prefix or suffix"));
        }
    }
    let normalizer = match &file.normalizer {
        None | Some(Value::Null) => None,
        Some(part) => {
            check_normalizer(part)?;
            let read: NormalizerWrapper = serde_json::from_value(part.clone())
                .map_err(|e| bad(format!("normalizer: {e}")))?;
            Some(read)
        }
    };
    let part = file
        .pre_tokenizer
        .ok_or_else(|| only_bpe("no pre-tokenizer"))?;
    if !check_pre_tokenizer(&part)? {
        return Err(only_bpe("the pre-tokenizer never turns text into bytes"));
    }
    let pre_tokenizer: PreTokenizerWrapper =
        serde_json::from_value(part).map_err(|e| bad(format!("pre-tokenizer: {e}")))?;
    if let Some(kind) = file
        .decoder
        .as_ref()
        .and_then(kind_of)
        .filter(|kind| *kind != "ByteLevel")
    {
        return Err(only_bpe(&format!("decoder `{kind}`")));
    }

    let mut added = Vec::with_capacity(file.added_tokens.len());
    let mut taken = HashSet::new();
    let mut names = HashSet::new();
    for a in file.added_tokens {
        if a.content.is_empty() || a.content.len() > MAX_TOKEN_BYTES {
            return Err(bad(format!("added token {} is empty or too long", a.id)));
        }
        if !taken.insert(a.id) || !names.insert(a.content.clone()) {
            return Err(bad(format!(
                "added token {:?} ({}) appears twice",
                a.content, a.id
            )));
        }
        let token = AddedToken::from(a.content, a.special)
            .single_word(a.single_word)
            .lstrip(a.lstrip)
            .rstrip(a.rstrip)
            .normalized(a.normalized);
        added.push((token, a.id));
    }
    let mut vocab = Vec::with_capacity(model.vocab.len());
    for (spelling, id) in model.vocab {
        if spelling.len() > MAX_TOKEN_BYTES {
            return Err(bad(format!("token {id} is too long")));
        }
        if names.contains(&spelling) {
            // Listed twice on purpose: many files keep special tokens in the vocabulary too.
            let same = added.iter().any(|(t, a)| t.content == spelling && *a == id);
            if !same {
                return Err(bad(format!(
                    "added token {spelling:?} has another id in the vocabulary"
                )));
            }
            continue;
        }
        if !taken.insert(id) {
            return Err(bad(format!("id {id} is given twice")));
        }
        vocab.push((spelling, id));
    }
    let largest = taken
        .iter()
        .max()
        .copied()
        .ok_or_else(|| bad("the vocabulary is empty".into()))?;
    let vocab_size = largest as usize + 1;
    if vocab_size > MAX_VOCAB {
        return Err(bad(format!(
            "id {largest} is beyond the limit of {MAX_VOCAB}"
        )));
    }
    let mut merges = Vec::with_capacity(model.merges.len());
    for (i, merge) in model.merges.into_iter().enumerate() {
        merges.push(match merge {
            Merge::Pair(a, b) => (a, b),
            Merge::Line(line) => match line.split_once(' ') {
                Some((a, b)) => (a.to_string(), b.to_string()),
                None => return Err(bad(format!("merge {i} is not two tokens: {line:?}"))),
            },
        });
    }
    let id_of = |name: &str, text: &Option<String>| -> Result<Option<u32>, TextError> {
        let Some(text) = text else { return Ok(None) };
        let found = added
            .iter()
            .find(|(t, _)| t.content == *text)
            .map(|(_, id)| *id);
        let found = found.or_else(|| vocab.iter().find(|(t, _)| t == text).map(|(_, id)| *id));
        match found {
            Some(id) => Ok(Some(id)),
            None => Err(bad(format!("{name} {text:?} is not in the vocabulary"))),
        }
    };
    let (bos, eos, pad) = (
        id_of("bos_token", &specials.bos)?,
        id_of("eos_token", &specials.eos)?,
        id_of("pad_token", &specials.pad)?,
    );
    Ok(Parts {
        vocab,
        merges,
        ignore_merges: model.ignore_merges,
        normalizer,
        pre_tokenizer,
        added,
        vocab_size,
        bos,
        eos,
        pad,
        add_bos: specials.add_bos,
    })
}

fn kind_of(part: &Value) -> Option<&str> {
    part.get("type").and_then(Value::as_str)
}

fn check_normalizer(part: &Value) -> Result<(), TextError> {
    match kind_of(part) {
        Some("NFC" | "NFD" | "NFKC" | "NFKD") => Ok(()),
        Some("Sequence") => {
            let parts = part.get("normalizers").and_then(Value::as_array);
            parts.into_iter().flatten().try_for_each(check_normalizer)
        }
        other => Err(TextError::Tokenizer(format!(
            "normalizer `{}` is not supported; hint: only Unicode normal forms are",
            other.unwrap_or("?")
        ))),
    }
}

/// Are all parts known? `true` if one of them turns text into bytes.
fn check_pre_tokenizer(part: &Value) -> Result<bool, TextError> {
    match kind_of(part) {
        Some("ByteLevel") => Ok(true),
        Some("Digits") => Ok(false),
        Some("Split") => {
            let pattern = part
                .get("pattern")
                .and_then(|p| p.get("Regex").or_else(|| p.get("String")));
            match pattern.and_then(Value::as_str) {
                Some(text) if text.len() <= MAX_PATTERN_BYTES => Ok(false),
                _ => Err(TextError::Tokenizer(
                    "a split pattern is missing or too long".into(),
                )),
            }
        }
        Some("Sequence") => {
            let mut to_bytes = false;
            for inner in part
                .get("pretokenizers")
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
            {
                to_bytes |= check_pre_tokenizer(inner)?;
            }
            Ok(to_bytes)
        }
        other => Err(TextError::Tokenizer(format!(
            "pre-tokenizer `{}` is not supported; hint: only byte-level BPE tokenizers are",
            other.unwrap_or("?")
        ))),
    }
}
