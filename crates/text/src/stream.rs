//! Ids to text, one at a time, without ever showing half a character.

use std::sync::Arc;

use crate::Tokenizer;

/// Turns ids into text as they come. The pieces, joined, are exactly [`Tokenizer::decode_text`] of all ids.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Arc<Tokenizer>,
    /// The beginning of a character whose end has not come; at most three bytes between pushes.
    pending: Vec<u8>,
}

impl StreamDecoder {
    /// A decoder with nothing pending.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        StreamDecoder {
            tokenizer,
            pending: Vec::new(),
        }
    }

    /// The text that `id` completes. Control tokens have none.
    pub fn push(&mut self, id: u32) -> String {
        if !self.tokenizer.is_special(id) {
            self.pending
                .extend_from_slice(self.tokenizer.token_bytes(id));
        }
        self.take(false)
    }

    /// What is left at the end: U+FFFD for a character that never ended.
    pub fn finish(&mut self) -> String {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> String {
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(e) => {
                    let (valid, after) = rest.split_at(e.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    match e.error_len() {
                        // Wrong bytes: one replacement for each maximal wrong piece, as `from_utf8_lossy` does.
                        Some(n) => {
                            text.push('\u{fffd}');
                            rest = &after[n..];
                        }
                        None if all => {
                            text.push('\u{fffd}');
                            rest = &[];
                            break;
                        }
                        None => {
                            rest = after;
                            break;
                        }
                    }
                }
            }
        }
        let kept = rest.len();
        self.pending.drain(..self.pending.len() - kept);
        text
    }
}
