//! Byte-level BPE, exactly as Hugging Face's fast tokenizers split and merge.
//!
//! Both doors (`tokenizer.json` and GGUF metadata) end in the same [`Parts`], so that a model gives the same
//! ids from either file. Only byte-level BPE comes in: every string has an encoding and every id has bytes.
//!
//! Two ways to read text, and the difference is a security boundary. [`Tokenizer::encode`] reads the text of
//! special tokens (`<|im_end|>`) as those tokens; it is for what a chat template wrote. What people wrote goes
//! through [`Tokenizer::encode_plain`], for which the same characters are only characters.

mod bytes;
mod gguf;
mod hf;
mod split;
mod wordpiece;

use std::fmt;

use tokenizers::models::bpe::BPE;
use tokenizers::{
    AddedToken, AddedVocabulary, Model, NormalizerWrapper, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper,
};

use crate::TextError;
pub(crate) use bytes::spell;
pub use gguf::GgufVocab;
pub use hf::Specials;
pub use wordpiece::WordPiece;

/// The largest vocabulary accepted; real ones end near 300 thousand.
pub(crate) const MAX_VOCAB: usize = 1 << 21;
/// The longest token accepted, in bytes of the file's own spelling.
pub(crate) const MAX_TOKEN_BYTES: usize = 1 << 14;

/// What an id stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of ordinary text.
    Normal,
    /// A control token such as `<|im_end|>`: never the encoding of what people wrote.
    Control,
    /// Added on top of the merges, but text all the same (`<tool_call>`, `<think>`).
    UserDefined,
    /// Padding of the embedding table: no text encodes to it.
    Unused,
}

/// Text to ids and back.
pub struct Tokenizer {
    bpe: BPE,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: PreTokenizerWrapper,
    /// Splits off control and user-defined tokens.
    added: AddedVocabulary,
    /// Splits off user-defined tokens only.
    plain: AddedVocabulary,
    /// Token bytes, one after the other, and where each ends.
    bytes: Vec<u8>,
    ends: Vec<u32>,
    kinds: Vec<TokenKind>,
    /// Text and id of every control token.
    control: Vec<(String, u32)>,
    /// The id of every single byte, for text that the splitter gives up on.
    single_bytes: Vec<Option<u32>>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    add_bos: bool,
}

/// What both doors hand over.
struct Parts {
    /// Spelling (in the byte alphabet) and id of the ordinary tokens.
    vocab: Vec<(String, u32)>,
    merges: Vec<(String, String)>,
    /// Take a whole piece that is in the vocabulary without merging (Llama 3).
    ignore_merges: bool,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: PreTokenizerWrapper,
    added: Vec<(AddedToken, u32)>,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    add_bos: bool,
}

impl Tokenizer {
    /// Reads `tokenizer.json`; `specials` comes from `tokenizer_config.json`.
    pub fn from_hf_json(json: &[u8], specials: &Specials) -> Result<Self, TextError> {
        Self::assemble(hf::read(json, specials)?)
    }

    /// Reads the `tokenizer.ggml.*` metadata of a GGUF file.
    pub fn from_gguf(vocab: GgufVocab) -> Result<Self, TextError> {
        Self::assemble(gguf::read(vocab)?)
    }

    fn assemble(parts: Parts) -> Result<Self, TextError> {
        let bad = |message: String| TextError::Tokenizer(message);
        let n = parts.vocab_size;
        let mut spelled: Vec<Vec<u8>> = vec![Vec::new(); n];
        let mut kinds = vec![TokenKind::Unused; n];
        let mut single_bytes = vec![None; 256];
        for (spelling, id) in &parts.vocab {
            let bytes = bytes::of_spelling(spelling);
            if let [byte] = bytes.as_slice() {
                single_bytes[usize::from(*byte)] = Some(*id);
            }
            spelled[*id as usize] = bytes;
            kinds[*id as usize] = TokenKind::Normal;
        }
        let mut control = Vec::new();
        for (token, id) in &parts.added {
            spelled[*id as usize] = token.content.clone().into_bytes();
            kinds[*id as usize] = if token.special {
                TokenKind::Control
            } else {
                TokenKind::UserDefined
            };
            if token.special {
                control.push((token.content.clone(), *id));
            }
        }
        let mut bytes = Vec::with_capacity(spelled.iter().map(Vec::len).sum());
        let mut ends = Vec::with_capacity(n);
        for token in &spelled {
            bytes.extend_from_slice(token);
            ends.push(
                u32::try_from(bytes.len())
                    .map_err(|_| bad("the vocabulary is over 4 GiB".into()))?,
            );
        }
        drop(spelled);

        // The added tokens get their ids from a vocabulary of their own, so that no merge can reach them.
        let ids: tokenizers::models::bpe::Vocab = parts
            .added
            .iter()
            .map(|(t, id)| (t.content.clone(), *id))
            .collect();
        let ids = BPE::builder()
            .vocab_and_merges(ids, Vec::new())
            .cache_capacity(0)
            .build()
            .map_err(|e| bad(e.to_string()))?;
        let mut added = AddedVocabulary::new();
        for (token, id) in &parts.added {
            if token.special {
                added.add_special_tokens(
                    std::slice::from_ref(token),
                    &ids,
                    parts.normalizer.as_ref(),
                );
            } else {
                added.add_tokens(std::slice::from_ref(token), &ids, parts.normalizer.as_ref());
            }
            if added.token_to_id(&token.content, &ids) != Some(*id) {
                return Err(bad(format!(
                    "added token {:?} does not get its id {id}",
                    token.content
                )));
            }
        }
        let mut plain = added.clone();
        plain.set_encode_special_tokens(true);

        let vocab: tokenizers::models::bpe::Vocab = parts.vocab.into_iter().collect();
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, parts.merges)
            .ignore_merges(parts.ignore_merges)
            .build()
            .map_err(|e| bad(e.to_string()))?;
        for (name, id) in [("bos", parts.bos), ("eos", parts.eos), ("pad", parts.pad)] {
            if let Some(id) = id.filter(|&id| id as usize >= n) {
                return Err(bad(format!(
                    "{name} token {id} is outside the vocabulary of {n}"
                )));
            }
        }
        Ok(Tokenizer {
            bpe,
            normalizer: parts.normalizer,
            pre_tokenizer: parts.pre_tokenizer,
            added,
            plain,
            bytes,
            ends,
            kinds,
            control,
            single_bytes,
            bos: parts.bos,
            eos: parts.eos,
            pad: parts.pad,
            add_bos: parts.add_bos,
        })
    }

    /// The ids of `text`, in which the text of a special token is that token. Nothing is put before or after:
    /// a chat template writes its own beginning of sequence.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        self.encode_split(
            self.added
                .extract_and_normalize(self.normalizer.as_ref(), text),
            text,
        )
    }

    /// The ids of `text`, in which the text of a control token is only characters.
    pub fn encode_plain(&self, text: &str) -> Vec<u32> {
        self.encode_split(
            self.plain
                .extract_and_normalize(self.normalizer.as_ref(), text),
            text,
        )
    }

    fn encode_split(&self, mut split: PreTokenizedString, text: &str) -> Vec<u32> {
        let done = self
            .pre_tokenizer
            .pre_tokenize(&mut split)
            .and_then(|()| split.tokenize(|piece| self.bpe.tokenize(piece.get())));
        if done.is_err() {
            // A pattern from the file hit its backtracking limit. The ids stay lossless.
            return text
                .bytes()
                .filter_map(|b| self.single_bytes[usize::from(b)])
                .collect();
        }
        split
            .get_splits(OffsetReferential::Original, OffsetType::None)
            .into_iter()
            .filter_map(|(_, _, tokens)| tokens.as_ref())
            .flat_map(|tokens| tokens.iter().map(|t| t.id))
            .collect()
    }

    /// Splits `text` at its added tokens: the id and text of each, and the ordinary text between them.
    pub(crate) fn split_added<'t>(&self, text: &'t str) -> Vec<(&'t str, Option<u32>)> {
        let split = self
            .added
            .extract_and_normalize(None::<&NormalizerWrapper>, text);
        split
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), tokens)| {
                let id = tokens.as_ref().and_then(|t| t.first()).map(|t| t.id);
                (&text[start..end], id)
            })
            .collect()
    }

    /// The text of `ids`, special tokens included; bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.token_bytes(id));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The text of `ids` without control tokens.
    pub fn decode_text(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::new();
        for &id in ids.iter().filter(|&&id| !self.is_special(id)) {
            bytes.extend_from_slice(self.token_bytes(id));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes an id stands for; none if it is out of range or unused.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }

    /// What an id stands for; [`TokenKind::Unused`] if it is out of range.
    pub fn kind(&self, id: u32) -> TokenKind {
        self.kinds
            .get(id as usize)
            .copied()
            .unwrap_or(TokenKind::Unused)
    }

    /// Is this a control token?
    pub fn is_special(&self, id: u32) -> bool {
        self.kind(id) == TokenKind::Control
    }

    /// Text and id of every control token, in the order of the file.
    pub fn special_tokens(&self) -> &[(String, u32)] {
        &self.control
    }

    /// One more than the largest id. The model's embedding table may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.kinds.len()
    }

    /// The id of a token by its text (an added token's own text, or an ordinary token's bytes as text).
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        if let Some(id) = self.added.get_vocab().get(token) {
            return Some(*id);
        }
        self.bpe.token_to_id(&spell(token.as_bytes()))
    }

    /// The beginning-of-sequence token.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// The end-of-sequence token.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The padding token.
    pub fn pad(&self) -> Option<u32> {
        self.pad
    }

    /// Does a text without a template begin with [`Tokenizer::bos`]?
    pub fn add_bos(&self) -> bool {
        self.add_bos
    }

    /// The text of a token if it has one, as templates want `bos_token` and `eos_token`.
    pub fn token_text(&self, id: u32) -> Option<String> {
        let bytes = self.token_bytes(id);
        (!bytes.is_empty()).then(|| String::from_utf8_lossy(bytes).into_owned())
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("special_tokens", &self.control.len())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .finish_non_exhaustive()
    }
}
