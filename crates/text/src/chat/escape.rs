//! Keeps what people wrote from being read as special tokens.
//!
//! A message may contain the text `<|im_end|>`. Rendered and encoded as a whole it would end the turn, and the
//! rest could speak in another role. So, before rendering, each special token's text inside the conversation
//! is swapped for one private-use character that stands for it; after rendering, the text is cut at the special
//! tokens that the template wrote, the characters are swapped back, and the pieces between are encoded plainly.
//! Conversations without such text (nearly all) take the ordinary way and get the ordinary ids.

use serde_json::Value;

use crate::{TextError, Tokenizer};

/// Supplementary private use area B.
const FIRST: u32 = 0x10_0000;
const LAST: u32 = 0x10_fffd;

/// The stand-ins of one conversation.
pub(super) struct Escapes {
    /// The character that stands for the control token of index 0; `None` if nothing needs one.
    base: Option<u32>,
}

impl Escapes {
    /// Swaps the texts of control tokens in `values` for stand-ins that occur neither there nor in `template`.
    pub(super) fn protect(
        tokenizer: &Tokenizer,
        values: &mut [Value],
        template: &str,
    ) -> Result<Self, TextError> {
        let control = tokenizer.special_tokens();
        let mut found = false;
        let mut private = Vec::new();
        let mut look = |text: &str| {
            found |= has_control(tokenizer, text);
            private.extend(
                text.chars()
                    .map(u32::from)
                    .filter(|c| (FIRST..=LAST).contains(c)),
            );
        };
        look_at_strings(values, &mut look);
        if !found {
            return Ok(Escapes { base: None });
        }
        private.extend(
            template
                .chars()
                .map(u32::from)
                .filter(|c| (FIRST..=LAST).contains(c)),
        );
        private.sort_unstable();
        let n = u32::try_from(control.len()).map_err(|_| TextError::Unprotectable)?;
        let mut base = FIRST;
        while let Some(taken) = private
            .iter()
            .find(|c| (base..base.saturating_add(n)).contains(*c))
        {
            base = taken + 1;
        }
        if base.saturating_add(n) > LAST {
            return Err(TextError::Unprotectable);
        }
        for value in values {
            swap_strings(value, &|text| hide(tokenizer, text, base));
        }
        Ok(Escapes { base: Some(base) })
    }

    /// Is anything protected?
    pub(super) fn active(&self) -> bool {
        self.base.is_some()
    }

    /// The text with every stand-in swapped back.
    pub(super) fn reveal(&self, tokenizer: &Tokenizer, text: &str) -> String {
        let Some(base) = self.base else {
            return text.to_string();
        };
        let control = tokenizer.special_tokens();
        let mut out = String::with_capacity(text.len());
        for c in text.chars() {
            let index = u32::from(c)
                .checked_sub(base)
                .and_then(|i| control.get(i as usize));
            match index {
                Some((token, _)) => out.push_str(token),
                None => out.push(c),
            }
        }
        out
    }

    /// The ids of rendered text: special tokens where the template wrote them, and only there.
    pub(super) fn encode(&self, tokenizer: &Tokenizer, rendered: &str) -> Vec<u32> {
        if !self.active() {
            return tokenizer.encode(rendered);
        }
        let mut ids = Vec::new();
        let mut between = String::new();
        for (piece, id) in tokenizer.split_added(rendered) {
            match id.filter(|&id| tokenizer.is_special(id)) {
                Some(id) => {
                    ids.extend(tokenizer.encode_plain(&self.reveal(tokenizer, &between)));
                    between.clear();
                    ids.push(id);
                }
                None => between.push_str(piece),
            }
        }
        ids.extend(tokenizer.encode_plain(&self.reveal(tokenizer, &between)));
        ids
    }
}

fn has_control(tokenizer: &Tokenizer, text: &str) -> bool {
    tokenizer
        .special_tokens()
        .iter()
        .any(|(token, _)| text.contains(token.as_str()))
}

/// Swaps control tokens' texts for stand-ins, the leftmost and there the longest first.
fn hide(tokenizer: &Tokenizer, text: &str, base: u32) -> String {
    if !has_control(tokenizer, text) {
        return text.to_string();
    }
    let control = tokenizer.special_tokens();
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let here = control
            .iter()
            .zip(base..)
            .filter(|((token, _), _)| rest.starts_with(token.as_str()));
        match here.max_by_key(|((token, _), _)| token.len()) {
            Some(((token, _), stand_in)) => {
                out.extend(char::from_u32(stand_in));
                rest = &rest[token.len()..];
            }
            None => {
                out.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
    }
    out
}

fn look_at_strings(values: &[Value], look: &mut impl FnMut(&str)) {
    for value in values {
        match value {
            Value::String(text) => look(text),
            Value::Array(items) => look_at_strings(items, look),
            Value::Object(fields) => {
                for (key, field) in fields {
                    look(key);
                    look_at_strings(std::slice::from_ref(field), look);
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
    }
}

fn swap_strings(value: &mut Value, swap: &impl Fn(&str) -> String) {
    match value {
        Value::String(text) => *text = swap(text),
        Value::Array(items) => items.iter_mut().for_each(|item| swap_strings(item, swap)),
        Value::Object(fields) => {
            let old = std::mem::take(fields);
            for (key, mut field) in old {
                swap_strings(&mut field, swap);
                fields.insert(swap(&key), field);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
