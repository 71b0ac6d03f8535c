//! How each model family cuts text before merging, as their Hugging Face tokenizers define it.

use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::TextError;

/// The values of `tokenizer.ggml.pre` understood here.
pub(super) const KNOWN: &str = "smollm, llama-bpe, qwen2, gpt-2";

/// Llama 3: digits in groups of up to three.
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Qwen 2 and later: digits one by one.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Everything a family adds to its merges.
pub(super) struct Family {
    pub(super) normalizer: Option<NormalizerWrapper>,
    pub(super) pre_tokenizer: PreTokenizerWrapper,
    pub(super) ignore_merges: bool,
}

/// The family that `tokenizer.ggml.pre` names.
pub(super) fn family(pre: &str) -> Result<Family, TextError> {
    // The pattern of GPT-2 itself is the one built into `ByteLevel`.
    let gpt2 = || PreTokenizerWrapper::from(ByteLevel::new(false, true, true));
    let by_pattern = |pattern: &str| -> Result<PreTokenizerWrapper, TextError> {
        let pattern = SplitPattern::Regex(pattern.to_string());
        let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
            .map_err(|e| TextError::Tokenizer(e.to_string()))?;
        let bytes = ByteLevel::new(false, false, false);
        Ok(Sequence::new(vec![split.into(), bytes.into()]).into())
    };
    let plain = |pre_tokenizer| Family {
        normalizer: None,
        pre_tokenizer,
        ignore_merges: false,
    };
    match pre {
        "gpt-2" => Ok(plain(gpt2())),
        "smollm" => Ok(plain(
            Sequence::new(vec![Digits::new(true).into(), gpt2()]).into(),
        )),
        "llama-bpe" => Ok(Family {
            ignore_merges: true,
            ..plain(by_pattern(LLAMA3)?)
        }),
        "qwen2" => Ok(Family {
            normalizer: Some(NFC.into()),
            ..plain(by_pattern(QWEN2)?)
        }),
        other => Err(TextError::UnknownPreTokenizer {
            pre: other.to_string(),
            known: KNOWN,
        }),
    }
}
