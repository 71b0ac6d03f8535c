//! One request's answer as it grows: from logits to tokens to text.

use std::sync::Arc;
use std::time::Instant;

use bantam_text::Tokenizer;

use crate::mask::Mask;
use crate::output::Output;
use crate::sampler::{Pick, Row, Sampler, Scratch, logprobs};
use crate::{Finish, Request, RequestError, TokenEvent, TokenLogprobs};

/// The state of one answer; all that the engine does between two passes happens in here, for
/// each answer by itself.
pub(crate) struct Answer {
    pub(crate) request: Request,
    /// The prompt, then the answer.
    pub(crate) tokens: Vec<u32>,
    pub(crate) n_generated: usize,
    /// Those of them that a constraint left no choice about.
    pub(crate) n_forced: usize,
    /// What is to be told.
    pub(crate) events: Vec<TokenEvent>,
    pub(crate) first_token: Option<Instant>,
    /// Digest of the logits that tokens were chosen from, if it is wanted.
    pub(crate) digest: Option<Digest>,
    sampler: Sampler,
    output: Output,
    /// That of the next token, if there is a constraint.
    mask: Mask,
}

/// What came of a pass.
#[derive(Debug, Default)]
pub(crate) struct Advance {
    /// How many of the drafted tokens are now in the answer.
    pub(crate) n_confirmed: usize,
    /// `Some` if the answer is over.
    pub(crate) finish: Option<Finish>,
}

/// Logits as they come back from a pass.
#[derive(Clone, Copy)]
pub(crate) enum Logits<'a> {
    /// Of the tokens of the narrow mask.
    Narrow(&'a [f32]),
    /// Whole rows: after the last known token, then after each drafted one.
    Rows(&'a [f32]),
}

impl Answer {
    pub(crate) fn new(request: Request, tokenizer: &Arc<Tokenizer>, with_digest: bool) -> Self {
        Self {
            tokens: request.prompt.clone(),
            n_generated: 0,
            n_forced: 0,
            events: Vec::new(),
            first_token: None,
            digest: with_digest.then(Digest::default),
            sampler: Sampler::new(request.sampling.clone(), &request.prompt),
            output: Output::new(tokenizer, &request.stop),
            mask: Mask::default(),
            request,
        }
    }

    /// Takes the tokens that the constraint leaves no choice about, and knows the mask of the
    /// first that it does. Nothing is asked of the model, unless the logits themselves are wanted.
    pub(crate) fn look_ahead(&mut self, n_tokens: usize) -> Option<Finish> {
        loop {
            let constraint = self.request.constraint.as_mut()?;
            match constraint.allowed() {
                Ok(words) => self.mask.set(words, n_tokens),
                Err(error) => return Some(Finish::Error(RequestError::Constraint(error))),
            }
            if self.mask.n_allowed() == 0 {
                let at = self.n_generated;
                return Some(Finish::Error(RequestError::DeadEnd { at }));
            }
            if self.request.logprobs.is_some() {
                return None;
            }
            let only = self.mask.only()?;
            self.n_forced += 1;
            if let Some(finish) = self.accept(only, None) {
                return Some(finish);
            }
        }
    }

    /// The tokens whose logits are enough to choose the next from; `None` if all are needed.
    pub(crate) fn narrow(&self) -> Option<&[u32]> {
        if self.request.constraint.is_none() || self.request.logprobs.is_some() {
            return None;
        }
        self.mask.ids()
    }

    /// How many of these tokens the constraint would let through.
    pub(crate) fn n_possible(&mut self, tokens: &[u32]) -> usize {
        match &mut self.request.constraint {
            Some(constraint) => constraint.n_possible(tokens),
            None => tokens.len(),
        }
    }

    /// Tokens that will be chosen next whatever the logits are, and that are sampled nevertheless
    /// because log-probabilities are wanted.
    pub(crate) fn forced(&mut self) -> Vec<u32> {
        match &mut self.request.constraint {
            Some(constraint) if self.request.logprobs.is_some() => constraint.forced(),
            _ => Vec::new(),
        }
    }

    /// Takes the next token from `logits`, those after it that are forced, and goes on from one row
    /// to the next for as long as `draft` says what was then chosen.
    pub(crate) fn advance(
        &mut self,
        logits: Logits<'_>,
        draft: &[u32],
        (vocab, n_tokens): (usize, usize),
        scratch: &mut Scratch,
    ) -> Advance {
        let mut n_confirmed = 0;
        loop {
            let row = match logits {
                Logits::Narrow(logits) => Row::Narrow(logits),
                Logits::Rows(rows) => Row::Full(&rows[n_confirmed * vocab..][..vocab]),
            };
            let before = self.tokens.len();
            let finish = self
                .take(row, n_tokens, scratch)
                .or_else(|| self.look_ahead(n_tokens));
            let left = &draft[n_confirmed..];
            let taken = &self.tokens[before..];
            let n_same = taken.iter().zip(left).take_while(|(a, b)| a == b).count();
            n_confirmed += n_same;
            // The row after the last token is at hand only if all of them were drafted.
            let is_at_hand = n_same == taken.len() && matches!(logits, Logits::Rows(_));
            if finish.is_some() || !is_at_hand {
                return Advance {
                    n_confirmed,
                    finish,
                };
            }
        }
    }

    /// Chooses one token from a row.
    fn take(&mut self, row: Row<'_>, n_tokens: usize, scratch: &mut Scratch) -> Option<Finish> {
        let mask = self.request.constraint.is_some().then_some(&self.mask);
        if let Some(digest) = &mut self.digest {
            digest.row(row, n_tokens, mask);
        }
        let token = match self.sampler.choose(row, n_tokens, mask, scratch) {
            Pick::Token(token) => token,
            Pick::DeadEnd => {
                let at = self.n_generated;
                return Some(Finish::Error(RequestError::DeadEnd { at }));
            }
            Pick::NotFinite => {
                let at = self.tokens.len();
                return Some(Finish::Error(RequestError::NotFinite { at }));
            }
        };
        let reported = match (self.request.logprobs, row) {
            (Some(n_top), Row::Full(row)) => Some(logprobs(row, n_tokens, token, n_top, scratch)),
            _ => None,
        };
        self.accept(token, reported)
    }

    /// Adds a token to the answer. `Some` if that ends it.
    fn accept(&mut self, token: u32, logprobs: Option<TokenLogprobs>) -> Option<Finish> {
        self.n_generated += 1;
        self.first_token.get_or_insert_with(Instant::now);
        if self.request.end_tokens.contains(&token) {
            return Some(Finish::Stop);
        }
        let mut is_done = false;
        if let Some(constraint) = &mut self.request.constraint {
            if let Err(error) = constraint.commit(token) {
                return Some(Finish::Error(RequestError::Constraint(error)));
            }
            is_done = constraint.is_done();
        }
        self.tokens.push(token);
        self.sampler.took(token);
        let events = &mut self.events;
        let stopped = self.output.push(token, logprobs, &mut |t| events.push(t));
        if stopped || is_done {
            Some(Finish::Stop)
        } else if self.n_generated == self.request.max_tokens {
            Some(Finish::Length)
        } else {
            None
        }
    }

    /// Tells what was held back. The last characters may still complete a stop string.
    pub(crate) fn flush(&mut self, finish: Finish) -> Finish {
        let events = &mut self.events;
        let stopped = self.output.finish(&mut |t| events.push(t));
        if stopped && finish == Finish::Length {
            Finish::Stop
        } else {
            finish
        }
    }
}

/// FNV-1a over 32-bit words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Digest(pub(crate) u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    pub(crate) fn word(&mut self, word: u32) {
        self.0 = (self.0 ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3);
    }

    /// The logits that a choice sees: the same of a whole row as of a narrow one.
    fn row(&mut self, row: Row<'_>, n_tokens: usize, mask: Option<&Mask>) {
        match (row, mask.and_then(Mask::ids)) {
            (Row::Narrow(logits), _) => logits.iter().for_each(|l| self.word(l.to_bits())),
            (Row::Full(row), Some(ids)) => {
                ids.iter()
                    .for_each(|&id| self.word(row[id as usize].to_bits()));
            }
            (Row::Full(row), None) => row[..n_tokens].iter().for_each(|l| self.word(l.to_bits())),
        }
    }
}
