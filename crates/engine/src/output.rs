//! From sampled tokens to text: characters held back until they are whole, tokens held back
//! until they cannot become part of a stop string.

use std::collections::VecDeque;
use std::sync::Arc;

use bantam_text::{StopStrings, StreamDecoder, Tokenizer};

use crate::{TokenEvent, TokenLogprobs};

/// The text of one answer, as far as it is certain.
pub(crate) struct Output {
    decoder: StreamDecoder,
    stops: StopStrings,
    held: VecDeque<Held>,
    /// Decoded text of the tokens in `held`.
    text: String,
    /// How much text lies before `text`.
    base: usize,
    /// How much text is known not to begin a stop string.
    released: usize,
}

struct Held {
    id: u32,
    logprobs: Option<TokenLogprobs>,
    /// Where the token's text ends, counted from the beginning of the answer.
    end: usize,
}

impl Output {
    pub(crate) fn new(tokenizer: &Arc<Tokenizer>, stop: &[String]) -> Self {
        Self {
            decoder: StreamDecoder::new(Arc::clone(tokenizer)),
            stops: StopStrings::new(stop),
            held: VecDeque::new(),
            text: String::new(),
            base: 0,
            released: 0,
        }
    }

    /// Takes a token; `true` if it completes a stop string, after which the answer is over.
    pub(crate) fn push(
        &mut self,
        id: u32,
        logprobs: Option<TokenLogprobs>,
        emit: &mut dyn FnMut(TokenEvent),
    ) -> bool {
        let text = self.decoder.push(id);
        self.text.push_str(&text);
        self.held.push_back(Held {
            id,
            logprobs,
            end: self.base + self.text.len(),
        });
        let hit = self.stop_at(&text);
        if hit {
            self.cut(emit);
        } else if self.decoder.clone().finish().is_empty() {
            // No character is incomplete, so none of these tokens can still gain text.
            self.flush(emit);
        }
        hit
    }

    /// Ends the answer: what was held back is text after all. `true` if the last characters
    /// complete a stop string.
    pub(crate) fn finish(&mut self, emit: &mut dyn FnMut(TokenEvent)) -> bool {
        let tail = self.decoder.finish();
        self.text.push_str(&tail);
        if let Some(last) = self.held.back_mut() {
            last.end = self.base + self.text.len();
        }
        let hit = self.stop_at(&tail);
        if !hit {
            self.released += self.stops.finish().len();
        }
        self.cut(emit);
        hit
    }

    fn stop_at(&mut self, text: &str) -> bool {
        let found = self.stops.push(text);
        self.released += found.text.len();
        found.stop.is_some()
    }

    /// Emits the tokens whose text is certain to the end.
    fn flush(&mut self, emit: &mut dyn FnMut(TokenEvent)) {
        while self
            .held
            .front()
            .is_some_and(|held| held.end <= self.released)
        {
            self.emit_first(emit);
        }
    }

    /// Emits the text before a stop string: whole tokens, and the beginning of the one it cuts.
    fn cut(&mut self, emit: &mut dyn FnMut(TokenEvent)) {
        self.flush(emit);
        if let Some(held) = self.held.front_mut().filter(|_| self.base < self.released) {
            held.end = self.released;
            self.emit_first(emit);
        }
        self.held.clear();
    }

    fn emit_first(&mut self, emit: &mut dyn FnMut(TokenEvent)) {
        if let Some(Held { id, logprobs, end }) = self.held.pop_front() {
            let rest = self.text.split_off(end - self.base);
            let text_delta = std::mem::replace(&mut self.text, rest);
            self.base = end;
            emit(TokenEvent {
                id,
                text_delta,
                logprobs,
            });
        }
    }
}
