//! What one step reads: the next token of every answer, the guesses that are worth their rows, and as
//! much of the waiting prompts as leaves the answers smooth.

use crate::answer::Answer;
use crate::draft::{self, Guess};
use crate::engine::{Engine, Slot};
use crate::{LanguageModel, Wants};

/// The fewest prompt tokens a step reads, if any wait, however many answers are running.
const PREFILL_MIN: usize = 16;

/// A guess under a narrow mask must be as likely as if so many more rows were read.
const NARROW_ROWS: usize = 8;

/// What one slot contributes to a step.
pub(crate) struct Part {
    pub(crate) slot_idx: usize,
    /// The slot's tokens up to here are read.
    pub(crate) end: usize,
    pub(crate) asks: Asks,
    /// How many logits that gives.
    pub(crate) n_logits: usize,
    /// How the draft that is read behind them was found, to learn from it.
    pub(crate) matched: Option<usize>,
}

/// The logits a part wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asks {
    /// None: the prompt goes on.
    Nothing,
    /// Those of the tokens that the mask allows.
    Narrow,
    /// Whole rows: after the last known token and each drafted one.
    Rows,
}

/// The wish in the model's words.
pub(crate) fn wants<'a>(answer: &'a Answer, draft: &[u32], asks: Asks) -> Wants<'a> {
    match asks {
        Asks::Nothing => Wants::None,
        Asks::Narrow => answer.narrow().map_or(Wants::Last, Wants::LastOf),
        Asks::Rows if draft.is_empty() => Wants::Last,
        Asks::Rows => Wants::Tail(1 + draft.len()),
    }
}

impl<M: LanguageModel> Slot<M> {
    fn part(&self, slot_idx: usize, end: usize, matched: Option<usize>, vocab: usize) -> Part {
        let asks = if end < self.answer.tokens.len() {
            Asks::Nothing
        } else if self.draft.is_empty() && self.answer.narrow().is_some() {
            Asks::Narrow
        } else {
            Asks::Rows
        };
        Part {
            slot_idx,
            end,
            asks,
            n_logits: wants(&self.answer, &self.draft, asks).n_logits(vocab),
            matched,
        }
    }
}

impl<M: LanguageModel> Engine<M> {
    /// What each slot reads in this step. Neighbours share an adapter where they can.
    pub(crate) fn plan(&mut self) -> Vec<Part> {
        let vocab = self.model.vocab();
        let answering = self.slots.iter().filter(|s| !s.is_reading);
        let n_answer_rows: usize = answering.map(Slot::n_unread).sum();
        let budget = if n_answer_rows == 0 {
            self.config.step_tokens
        } else {
            self.config.busy_step_tokens
        };
        let reads = self.share_prompts(budget, n_answer_rows);
        let mut n_rows = n_answer_rows + reads.iter().map(|r| r.1).sum::<usize>();
        let mut parts: Vec<Part> = Vec::with_capacity(self.slots.len());
        for (slot_idx, n) in reads {
            let slot = &self.slots[slot_idx];
            parts.push(slot.part(slot_idx, slot.fed + n, None, vocab));
        }
        for slot_idx in 0..self.slots.len() {
            if self.slots[slot_idx].is_reading {
                continue;
            }
            let matched = self.draft(slot_idx, n_rows, budget.saturating_sub(n_rows));
            let slot = &self.slots[slot_idx];
            n_rows += slot.draft.len();
            parts.push(slot.part(slot_idx, slot.answer.tokens.len(), matched, vocab));
        }
        parts.sort_by_key(|p| (self.slots[p.slot_idx].adapter_id(), p.slot_idx));
        parts
    }

    /// How much of each prompt is read: what the answers leave of the budget. Half of it goes to
    /// the prompt that came first, so that none waits for ever, and the rest to those that
    /// are done soonest.
    fn share_prompts(&self, budget: usize, n_answer_rows: usize) -> Vec<(usize, usize)> {
        let reading = self.slots.iter().enumerate().filter(|(_, s)| s.is_reading);
        let mut reads: Vec<(usize, usize)> = reading.map(|(idx, s)| (idx, s.n_unread())).collect();
        let mut left = budget
            .saturating_sub(n_answer_rows)
            .max(PREFILL_MIN.min(budget));
        let Some(&first) = reads.first() else {
            return reads;
        };
        let for_first = first.1.min(if reads.len() == 1 {
            left
        } else {
            left.div_ceil(2)
        });
        left -= for_first;
        reads[1..].sort_by_key(|r| (r.1, r.0));
        for read in &mut reads[1..] {
            read.1 = read.1.min(left);
            left -= read.1;
        }
        reads[0].1 = first.1.min(for_first + left);
        reads.retain(|r| r.1 > 0);
        reads
    }

    /// Fills a slot's draft with at most `room` tokens, in a step of `n_rows` others; what
    /// to learn from it.
    fn draft(&mut self, slot_idx: usize, n_rows: usize, room: usize) -> Option<usize> {
        let slot = &mut self.slots[slot_idx];
        slot.draft.clear();
        let answer = &mut slot.answer;
        // The last token of an answer is never read.
        let most = (answer.request.max_tokens - answer.n_generated - 1)
            .min(self.config.draft_tokens)
            .min(room);
        if most == 0 {
            return None;
        }
        let forced = answer.forced();
        if !forced.is_empty() {
            slot.draft.extend(forced.into_iter().take(most));
            return None;
        }
        // A guess needs whole rows of logits, where a narrow mask would do with a few of them.
        let n_rows = if answer.narrow().is_some() {
            n_rows + NARROW_ROWS
        } else {
            n_rows
        };
        // Looking for a match reads the whole text, so not where none could count.
        if !self.record.is_any_worth(n_rows) {
            return None;
        }
        let prediction = answer.request.prediction.as_deref().unwrap_or(&[]);
        let guess: Guess = draft::guess(&answer.tokens, answer.n_generated, prediction)?;
        let n = self.record.worth(guess, n_rows).min(most);
        slot.draft
            .extend_from_slice(guess.tokens(&answer.tokens, prediction, n));
        let n = answer.n_possible(&slot.draft);
        slot.draft.truncate(n);
        (n > 0).then_some(guess.matched)
    }
}
