//! The tokenizer as the grammar engine sees it: a trie of token bytes, and canonical encodings.

use std::collections::HashSet;
use std::sync::Arc;

use toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use crate::{TextError, TokenKind, Tokenizer};

struct Env {
    tokenizer: Arc<Tokenizer>,
    trie: TokTrie,
}

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie
            .tokenize_with_greedy_fallback(bytes, |text| self.tokenizer.encode_plain(text))
    }
}

/// Checks that answers can end.
pub(super) fn check_ends(tokenizer: &Tokenizer, end_tokens: &[u32]) -> Result<(), TextError> {
    let refuse = |message: &str| TextError::Constraint(message.to_string());
    if end_tokens.is_empty() {
        return Err(refuse(
            "there is no end token, so an answer could never end",
        ));
    }
    if end_tokens
        .iter()
        .any(|id| *id as usize >= tokenizer.vocab_size())
    {
        return Err(refuse("an end token is outside the vocabulary"));
    }
    Ok(())
}

/// Builds the trie. Control tokens are marked, so that no grammar over text can reach them.
pub(super) fn token_env(
    tokenizer: &Arc<Tokenizer>,
    end_tokens: &[u32],
) -> Result<TokEnv, TextError> {
    check_ends(tokenizer, end_tokens)?;
    let (n, first_end) = (tokenizer.vocab_size(), end_tokens[0]);
    let refuse = |message: &str| TextError::Constraint(message.to_string());
    let vocab_size = u32::try_from(n).map_err(|_| refuse("the vocabulary is too large"))?;
    let mut seen: HashSet<&[u8]> = HashSet::with_capacity(n);
    let mut words = Vec::with_capacity(n);
    for id in 0..vocab_size {
        let bytes = tokenizer.token_bytes(id);
        words.push(match tokenizer.kind(id) {
            TokenKind::Control => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes].concat(),
            // The marker is no UTF-8, so a token that begins with it is of no use in text; and of two
            // tokens with the same bytes only the first is ever an encoding.
            TokenKind::Normal | TokenKind::UserDefined
                if bytes.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER) && seen.insert(bytes) =>
            {
                bytes.to_vec()
            }
            _ => Vec::new(),
        });
    }
    if words.iter().any(|w| w.len() > MAX_TRIE_WORD_BYTES) {
        return Err(refuse("a token is too long for the grammar engine"));
    }
    let trie =
        TokTrie::from(&TokRxInfo::new(vocab_size, first_end), &words).with_eos_tokens(end_tokens);
    Ok(Arc::new(Env {
        tokenizer: tokenizer.clone(),
        trie,
    }))
}

/// The trie is walked recursively, one level a byte.
const MAX_TRIE_WORD_BYTES: usize = 1 << 12;
