//! WordPiece, the tokenizer of BERT's family, for encoders of sentences.
//!
//! Exactly as Hugging Face's fast tokenizer cuts text, with one difference on purpose: text that spells a special
//! token (`[SEP]`) is only characters, since what people wrote must not end a sentence. Nothing is cut off or
//! padded, whatever the file says; who embeds refuses what is too long.

use std::collections::{HashMap, HashSet};
use std::fmt;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::models::wordpiece::WordPiece as Pieces;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{
    Model, NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer,
};

use super::hf::MAX_FILE_BYTES;
use super::{MAX_TOKEN_BYTES, MAX_VOCAB};
use crate::TextError;

/// The longest word that a file may ask to be cut; cutting takes the square of it.
const MAX_WORD_CHARS: usize = 200;
/// The longest mark before a piece inside a word; it is put before every piece that is tried.
const MAX_PREFIX_BYTES: usize = 16;

/// Text to the ids that an encoder reads.
pub struct WordPiece {
    normalizer: BertNormalizer,
    pieces: Pieces,
    vocab_size: usize,
    unk: u32,
    cls: u32,
    sep: u32,
}

#[derive(Deserialize)]
struct File {
    model: ModelPart,
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<PostProcessor>,
}

#[derive(Deserialize)]
struct ModelPart {
    #[serde(rename = "type", default)]
    kind: Option<String>,
    #[serde(default)]
    vocab: HashMap<String, u32>,
    #[serde(default = "default_unk")]
    unk_token: String,
    #[serde(default = "default_prefix")]
    continuing_subword_prefix: String,
    #[serde(default = "default_word_chars")]
    max_input_chars_per_word: usize,
}

#[derive(Deserialize)]
struct Added {
    content: String,
    #[serde(default)]
    special: bool,
}

#[derive(Deserialize)]
#[serde(tag = "type")]
enum PostProcessor {
    TemplateProcessing {
        single: Vec<TemplatePart>,
    },
    BertProcessing {
        sep: (String, u32),
        cls: (String, u32),
    },
}

#[derive(Deserialize)]
enum TemplatePart {
    SpecialToken { id: String },
    Sequence { id: String },
}

#[derive(Deserialize)]
struct NormalizerPart {
    #[serde(default = "yes")]
    clean_text: bool,
    #[serde(default = "yes")]
    handle_chinese_chars: bool,
    #[serde(default)]
    strip_accents: Option<bool>,
    #[serde(default = "yes")]
    lowercase: bool,
}

fn default_unk() -> String {
    "[UNK]".into()
}

fn default_prefix() -> String {
    "##".into()
}

fn default_word_chars() -> usize {
    100
}

fn yes() -> bool {
    true
}

fn bad<T>(message: impl Into<String>) -> Result<T, TextError> {
    Err(TextError::Tokenizer(message.into()))
}

impl WordPiece {
    /// Reads `tokenizer.json`.
    pub fn from_hf_json(json: &[u8]) -> Result<Self, TextError> {
        if json.len() > MAX_FILE_BYTES {
            return bad(format!(
                "tokenizer.json is over {} MiB",
                MAX_FILE_BYTES >> 20
            ));
        }
        let file: File = serde_json::from_slice(json)
            .map_err(|e| TextError::Tokenizer(format!("tokenizer.json: {e}")))?;
        let kind = |part: &Option<Value>| -> String {
            let name = part.as_ref().and_then(|p| p.get("type")?.as_str());
            name.unwrap_or("none").to_owned()
        };
        if file
            .model
            .kind
            .as_deref()
            .is_some_and(|kind| kind != "WordPiece")
        {
            return bad("the model is not WordPiece; hint: only encoders of BERT's family embed");
        }
        if kind(&file.pre_tokenizer) != "BertPreTokenizer" {
            return bad(format!(
                "pre-tokenizer `{}` is not supported; hint: WordPiece goes with `BertPreTokenizer`",
                kind(&file.pre_tokenizer)
            ));
        }
        let normalizer = match (kind(&file.normalizer).as_str(), file.normalizer) {
            ("BertNormalizer", Some(part)) => NormalizerPart::deserialize(part)
                .map_err(|e| TextError::Tokenizer(format!("normalizer: {e}")))?,
            (other, _) => {
                return bad(format!(
                    "normalizer `{other}` is not supported; hint: WordPiece goes with `BertNormalizer`"
                ));
            }
        };
        if let Some(token) = file.added_tokens.iter().find(|token| !token.special) {
            return bad(format!("added token {:?} is not supported", token.content));
        }
        let (cls, sep) = match &file.post_processor {
            Some(PostProcessor::BertProcessing { sep, cls }) => (cls.0.as_str(), sep.0.as_str()),
            Some(PostProcessor::TemplateProcessing { single }) => match single.as_slice() {
                [
                    TemplatePart::SpecialToken { id: cls },
                    TemplatePart::Sequence { id },
                    TemplatePart::SpecialToken { id: sep },
                ] if id == "A" => (cls.as_str(), sep.as_str()),
                _ => {
                    return bad("post-processor: expected one token before and one after the text");
                }
            },
            None => ("[CLS]", "[SEP]"),
        };
        let normalizer = BertNormalizer::new(
            normalizer.clean_text,
            normalizer.handle_chinese_chars,
            normalizer.strip_accents,
            normalizer.lowercase,
        );
        Self::assemble(&file.model, normalizer, (cls, sep))
    }

    /// Reads `vocab.txt`, one token a line; the other settings are BERT's own.
    pub fn from_vocab(text: &str, lowercase: bool) -> Result<Self, TextError> {
        let mut vocab = HashMap::new();
        for (id, line) in text.lines().enumerate() {
            let id = u32::try_from(id).unwrap_or(u32::MAX);
            if vocab.len() >= MAX_VOCAB || vocab.insert(line.trim_end().to_owned(), id).is_some() {
                return bad(format!("vocab.txt:{}: this token appears twice", id + 1));
            }
        }
        let model = ModelPart {
            kind: None,
            vocab,
            unk_token: default_unk(),
            continuing_subword_prefix: default_prefix(),
            max_input_chars_per_word: default_word_chars(),
        };
        let normalizer = BertNormalizer::new(true, true, None, lowercase);
        Self::assemble(&model, normalizer, ("[CLS]", "[SEP]"))
    }

    fn assemble(
        model: &ModelPart,
        normalizer: BertNormalizer,
        (cls, sep): (&str, &str),
    ) -> Result<Self, TextError> {
        if model.vocab.is_empty() || model.vocab.len() > MAX_VOCAB {
            return bad(format!(
                "{} tokens; expected 1 to {MAX_VOCAB}",
                model.vocab.len()
            ));
        }
        if !(1..=MAX_WORD_CHARS).contains(&model.max_input_chars_per_word) {
            return bad(format!(
                "max_input_chars_per_word is not 1 to {MAX_WORD_CHARS}"
            ));
        }
        if model.continuing_subword_prefix.len() > MAX_PREFIX_BYTES {
            return bad(format!(
                "continuing_subword_prefix is over {MAX_PREFIX_BYTES} bytes"
            ));
        }
        let mut seen = HashSet::with_capacity(model.vocab.len());
        for (token, &id) in &model.vocab {
            if token.len() > MAX_TOKEN_BYTES || id as usize >= MAX_VOCAB || !seen.insert(id) {
                return bad(format!("token {id} is too long, too large or there twice"));
            }
        }
        let find = |token: &str| match model.vocab.get(token) {
            Some(&id) => Ok(id),
            None => bad(format!("the vocabulary has no {token:?}")),
        };
        let (unk, cls, sep) = (find(&model.unk_token)?, find(cls)?, find(sep)?);
        let vocab: tokenizers::models::bpe::Vocab = model
            .vocab
            .iter()
            .map(|(token, &id)| (token.clone(), id))
            .collect();
        let pieces = Pieces::builder()
            .vocab(vocab)
            .unk_token(model.unk_token.clone())
            .continuing_subword_prefix(model.continuing_subword_prefix.clone())
            .max_input_chars_per_word(model.max_input_chars_per_word)
            .build()
            .map_err(|e| TextError::Tokenizer(e.to_string()))?;
        Ok(Self {
            normalizer,
            pieces,
            vocab_size: seen.into_iter().max().map_or(0, |id| id as usize + 1),
            unk,
            cls,
            sep,
        })
    }

    /// The ids of `text` as an encoder reads them: `[CLS]`, the pieces, `[SEP]`.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = vec![self.cls];
        let mut normalized = NormalizedString::from(text);
        let mut split = match self.normalizer.normalize(&mut normalized) {
            Ok(()) => PreTokenizedString::from(normalized),
            Err(_) => PreTokenizedString::from(text),
        };
        let done = BertPreTokenizer
            .pre_tokenize(&mut split)
            .and_then(|()| split.tokenize(|word| self.pieces.tokenize(word.get())));
        match done {
            Ok(()) => ids.extend(
                split
                    .get_splits(OffsetReferential::Original, OffsetType::None)
                    .into_iter()
                    .filter_map(|(_, _, tokens)| tokens.as_ref())
                    .flat_map(|tokens| tokens.iter().map(|token| token.id)),
            ),
            // None of the three steps has an error to give; a text is never dropped in silence all the same.
            Err(_) => ids.push(self.unk),
        }
        ids.push(self.sep);
        ids
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }
}

impl fmt::Debug for WordPiece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WordPiece")
            .field("vocab_size", &self.vocab_size)
            .finish_non_exhaustive()
    }
}
