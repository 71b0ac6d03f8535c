//! The scheduler: who waits, who runs, and what one step does.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bantam_text::Tokenizer;

use crate::output::Output;
use crate::prefix::{PrefixCache, common_prefix};
use crate::sampler::{Sampler, Scratch, logprobs, only_allowed};
use crate::{
    Event, Finish, LanguageModel, ModelError, Request, RequestError, RequestId, Span, SubmitError,
    Timings, TokenLogprobs, Usage, Wants,
};

/// How much an engine does at once, and how much it keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Requests that run at the same time.
    pub slots: usize,
    /// Tokens read in one step. Answers come first; prompts share the rest, and always get a
    /// few. Smaller steps make running answers smoother and long prompts slower.
    pub step_tokens: usize,
    /// Requests that may wait for a slot.
    pub queue: usize,
    /// Finished requests whose caches are kept; 0 turns every kind of prefix reuse off.
    pub prefix_entries: usize,
    /// The memory those caches may hold.
    pub prefix_bytes: usize,
    /// The shortest shared prefix worth a fork.
    pub prefix_min: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            slots: 8,
            step_tokens: 256,
            queue: 64,
            prefix_entries: 8,
            prefix_bytes: 256 << 20,
            prefix_min: 16,
        }
    }
}

/// The fewest prompt tokens a step reads, if any wait, however many answers are running.
const PREFILL_MIN: usize = 16;

/// Generates answers with one model. See the crate's documentation for what holds.
pub struct Engine<M: LanguageModel> {
    model: M,
    tokenizer: Arc<Tokenizer>,
    config: EngineConfig,
    /// Tokens that both the model and the tokenizer know; no other is ever chosen.
    n_tokens: usize,
    next_id: u64,
    queue: VecDeque<Waiting>,
    slots: Vec<Slot<M::Cache>>,
    prefixes: PrefixCache<M::Cache>,
    /// Events of requests that ended between steps.
    outbox: Vec<(RequestId, Event)>,
    rows: Vec<f32>,
    scratch: Scratch,
}

/// A request without a slot.
struct Waiting {
    id: RequestId,
    request: Request,
    submitted: Instant,
}

/// A running request.
struct Slot<C> {
    id: RequestId,
    request: Request,
    cache: C,
    /// The prompt, then the answer. Those from `fed` on are not in the cache yet.
    tokens: Vec<u32>,
    fed: usize,
    n_cached: usize,
    n_generated: usize,
    sampler: Sampler,
    output: Output,
    /// The mask for the next token, where it is known already.
    mask: Option<Vec<u32>>,
    submitted: Instant,
    admitted: Instant,
    prefilled: Option<Instant>,
    first_token: Option<Instant>,
}

/// What one slot contributes to a step.
struct Part {
    slot_idx: usize,
    end: usize,
    wants: Wants,
}

impl<M: LanguageModel> Engine<M> {
    /// An idle engine. Counts of 0 that would stop it from working are taken as 1.
    pub fn new(model: M, tokenizer: Arc<Tokenizer>, config: EngineConfig) -> Self {
        let n_tokens = model.vocab().min(tokenizer.vocab_size());
        let config = EngineConfig {
            slots: config.slots.max(1),
            step_tokens: config.step_tokens.max(1),
            queue: config.queue.max(1),
            prefix_min: config.prefix_min.max(1),
            ..config
        };
        let prefixes = PrefixCache::new(config.prefix_entries, config.prefix_bytes);
        Self {
            model,
            tokenizer,
            config,
            n_tokens,
            next_id: 0,
            queue: VecDeque::new(),
            slots: Vec::new(),
            prefixes,
            outbox: Vec::new(),
            rows: Vec::new(),
            scratch: Scratch::default(),
        }
    }

    /// Queues a request, or says why it cannot be run. Nothing is computed before the next step.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, SubmitError> {
        self.check(&request)?;
        if self.queue.len() >= self.config.queue {
            return Err(SubmitError::QueueFull {
                waiting: self.queue.len(),
            });
        }
        let id = RequestId(self.next_id);
        self.next_id += 1;
        self.queue.push_back(Waiting {
            id,
            request,
            submitted: Instant::now(),
        });
        Ok(id)
    }

    /// Whether a request can be run at all, whatever the queue.
    pub fn check(&self, request: &Request) -> Result<(), SubmitError> {
        let (prompt_tokens, max_tokens) = (request.prompt.len(), request.max_tokens);
        let max_context = self.model.max_context();
        if prompt_tokens == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if max_tokens == 0 {
            return Err(SubmitError::NoTokensWanted);
        }
        if prompt_tokens.saturating_add(max_tokens) > max_context {
            return Err(SubmitError::ContextOverflow {
                prompt_tokens,
                max_tokens,
                max_context,
            });
        }
        let vocab = self.model.vocab();
        if let Some(&token) = request.prompt.iter().find(|&&t| t as usize >= vocab) {
            return Err(SubmitError::UnknownToken { token, vocab });
        }
        request.sampling.check(vocab)
    }

    /// Ends a request where it stands; its [`Event::Done`] comes with the next step. `false` if
    /// it is not known or has ended already.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        if let Some(idx) = self.queue.iter().position(|w| w.id == id) {
            if let Some(waiting) = self.queue.remove(idx) {
                let usage = Usage {
                    prompt_tokens: waiting.request.prompt.len(),
                    ..Usage::default()
                };
                let timings = Timings {
                    queue: waiting.submitted.elapsed(),
                    ..Timings::default()
                };
                self.outbox.push((
                    id,
                    Event::Done {
                        finish: Finish::Cancelled,
                        usage,
                        timings,
                    },
                ));
            }
            return true;
        }
        let Some(idx) = self.slots.iter().position(|s| s.id == id) else {
            return false;
        };
        let slot = self.slots.remove(idx);
        self.outbox.push((id, slot.done(Finish::Cancelled)));
        self.keep(slot);
        true
    }

    /// Whether no request waits or runs and no event is left to tell.
    pub fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.slots.is_empty() && self.outbox.is_empty()
    }

    /// Requests without a slot.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// Requests that may still be submitted before one is refused.
    pub fn queue_room(&self) -> usize {
        self.config.queue - self.queue.len()
    }

    /// Requests with a slot.
    pub fn running(&self) -> usize {
        self.slots.len()
    }

    /// The caches kept for their prefixes: how many, and their bytes.
    pub fn prefixes(&self) -> (usize, usize) {
        (self.prefixes.len(), self.prefixes.bytes())
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The tokenizer that answers are decoded with.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// Does one step: gives free slots to waiting requests, runs the model once over all that
    /// are running, takes a token for each that is past its prompt. A request's events come in
    /// order; the last is [`Event::Done`].
    pub fn step(&mut self, sink: &mut dyn FnMut(RequestId, Event)) {
        for (id, event) in self.outbox.drain(..) {
            sink(id, event);
        }
        self.admit();
        let parts = self.plan();
        if parts.is_empty() {
            return;
        }
        let failures = self.forward(&parts);
        let mut ended: Vec<(usize, Finish)> = Vec::new();
        let vocab = self.model.vocab();
        let mut row_idx = 0;
        for (part, failure) in parts.iter().zip(failures) {
            let slot = &mut self.slots[part.slot_idx];
            let finish = if let Some(error) = failure {
                Some(Finish::Error(error))
            } else {
                slot.fed = part.end;
                if slot.prefilled.is_none() && slot.fed >= slot.request.prompt.len() {
                    slot.prefilled = Some(Instant::now());
                }
                if part.wants == Wants::Last {
                    let row = &self.rows[row_idx * vocab..][..vocab];
                    row_idx += 1;
                    slot.advance(row, self.n_tokens, &mut self.scratch, sink)
                } else {
                    None
                }
            };
            if let Some(finish) = finish {
                ended.push((part.slot_idx, finish));
            }
        }
        ended.sort_unstable_by_key(|e| e.0);
        while let Some((slot_idx, finish)) = ended.pop() {
            let mut slot = self.slots.remove(slot_idx);
            let finish = slot.flush(finish, sink);
            sink(slot.id, slot.done(finish.clone()));
            // After a failure of the model the cache cannot be trusted.
            let broken = matches!(
                finish,
                Finish::Error(RequestError::Model(_) | RequestError::NotFinite { .. })
            );
            if !broken {
                self.keep(slot);
            }
        }
    }

    /// Gives free slots to waiting requests, first come first served.
    fn admit(&mut self) {
        while self.slots.len() < self.config.slots {
            let Some(next) = self.queue.pop_front() else {
                return;
            };
            let Some((cache, n_cached)) = self.start(&next.request.prompt) else {
                self.queue.push_front(next);
                return;
            };
            let Waiting {
                id,
                request,
                submitted,
            } = next;
            self.slots.push(Slot {
                id,
                cache,
                tokens: request.prompt.clone(),
                fed: n_cached,
                n_cached,
                n_generated: 0,
                sampler: Sampler::new(request.sampling.clone(), &request.prompt),
                output: Output::new(&self.tokenizer, &request.stop),
                mask: None,
                request,
                submitted,
                admitted: Instant::now(),
                prefilled: None,
                first_token: None,
            });
        }
    }

    /// A cache to start `prompt` from, and how much of it that holds. `None` if it is better to
    /// wait: a running request is about to read a beginning that the prompt shares.
    fn start(&mut self, prompt: &[u32]) -> Option<(M::Cache, usize)> {
        if self.config.prefix_entries == 0 {
            return Some((self.model.new_cache(), 0));
        }
        // The last token is always read anew: its logits are needed.
        let usable = |shared: usize| shared.min(prompt.len() - 1);
        let kept = self
            .prefixes
            .longest(prompt)
            .map(|(idx, len)| (idx, usable(len)));
        let live = self.slots.iter().enumerate().rev();
        let live = live
            .map(|(idx, slot)| (idx, usable(common_prefix(&slot.tokens[..slot.fed], prompt))))
            .max_by_key(|&(_, len)| len);
        let kept_len = kept.map_or(0, |k| k.1);
        let live_len = live.map_or(0, |l| l.1);
        let best = kept_len.max(live_len);
        let coming = self.slots.iter().filter(|s| s.fed < s.request.prompt.len());
        let coming = coming
            .map(|s| usable(common_prefix(&s.request.prompt, prompt)))
            .max();
        if coming.unwrap_or(0) >= best + self.config.prefix_min {
            return None;
        }
        if best < self.config.prefix_min {
            return Some((self.model.new_cache(), 0));
        }
        let cache = match (kept, live) {
            (Some((idx, len)), _) if len == best => self.model.fork(self.prefixes.get(idx), best),
            (_, Some((idx, _))) => self.model.fork(&self.slots[idx].cache, best),
            _ => return Some((self.model.new_cache(), 0)),
        };
        Some((cache, best))
    }

    /// What each slot reads in this step. Answers come first, then prompts in their order.
    fn plan(&self) -> Vec<Part> {
        let mut parts = Vec::with_capacity(self.slots.len());
        let is_answering = |slot: &Slot<M::Cache>| slot.fed >= slot.request.prompt.len();
        let mut budget = self.config.step_tokens;
        for (slot_idx, slot) in self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, s)| is_answering(s))
        {
            let end = slot.tokens.len();
            budget = budget.saturating_sub(end - slot.fed);
            parts.push(Part {
                slot_idx,
                end,
                wants: Wants::Last,
            });
        }
        budget = budget.max(PREFILL_MIN.min(self.config.step_tokens));
        for (slot_idx, slot) in self
            .slots
            .iter()
            .enumerate()
            .filter(|(_, s)| !is_answering(s))
        {
            let end = slot.tokens.len().min(slot.fed + budget);
            if end == slot.fed {
                break;
            }
            budget -= end - slot.fed;
            let wants = if end == slot.tokens.len() {
                Wants::Last
            } else {
                Wants::None
            };
            parts.push(Part {
                slot_idx,
                end,
                wants,
            });
        }
        parts
    }

    /// Runs the model; the wanted rows are in `self.rows`, in the order of `parts`. If it fails
    /// on all the parts together, each is tried alone and answers for itself.
    fn forward(&mut self, parts: &[Part]) -> Vec<Option<RequestError>> {
        let mut rows = std::mem::take(&mut self.rows);
        rows.clear();
        let together = self.try_forward(parts, &mut rows);
        let failures = match together {
            Ok(()) => parts.iter().map(|_| None).collect(),
            Err(error) if parts.len() == 1 => {
                vec![Some(error)]
            }
            Err(_) => {
                rows.clear();
                let mut row = Vec::new();
                parts
                    .iter()
                    .map(|part| {
                        row.clear();
                        let result = self
                            .rewind(part)
                            .and_then(|()| self.try_forward(std::slice::from_ref(part), &mut row));
                        rows.extend_from_slice(if result.is_ok() { &row } else { &[] });
                        result.err()
                    })
                    .collect()
            }
        };
        self.rows = rows;
        failures
    }

    /// Takes a cache back to where it was before the step.
    fn rewind(&mut self, part: &Part) -> Result<(), RequestError> {
        let slot = &mut self.slots[part.slot_idx];
        guard(|| {
            let len = self.model.cache_len(&slot.cache);
            if len < slot.fed {
                return Err(ModelError(format!(
                    "a cache of {} tokens now has {len}",
                    slot.fed
                )));
            }
            self.model.truncate(&mut slot.cache, slot.fed);
            Ok(())
        })
    }

    fn try_forward(&mut self, parts: &[Part], rows: &mut Vec<f32>) -> Result<(), RequestError> {
        let mut caches: Vec<Option<&mut Slot<M::Cache>>> =
            self.slots.iter_mut().map(Some).collect();
        let mut spans: Vec<Span<'_, M::Cache>> = Vec::with_capacity(parts.len());
        for part in parts {
            if let Some(slot) = caches[part.slot_idx].take() {
                spans.push(Span {
                    cache: &mut slot.cache,
                    tokens: &slot.tokens[slot.fed..part.end],
                    wants: part.wants,
                });
            }
        }
        guard(|| self.model.forward(&mut spans, rows))?;
        let n_rows = parts.iter().filter(|p| p.wants == Wants::Last).count();
        if rows.len() != n_rows * self.model.vocab() {
            let message = format!("{} logits for {n_rows} rows", rows.len());
            return Err(RequestError::Model(message));
        }
        for part in parts {
            let len = self.model.cache_len(&self.slots[part.slot_idx].cache);
            if len != part.end {
                let message = format!("a cache has {len} tokens after reading {}", part.end);
                return Err(RequestError::Model(message));
            }
        }
        Ok(())
    }

    /// Leaves a finished request's cache to those that come after.
    fn keep(&mut self, slot: Slot<M::Cache>) {
        let Slot {
            cache,
            mut tokens,
            fed,
            ..
        } = slot;
        tokens.truncate(fed);
        if fed >= self.config.prefix_min {
            let bytes = self.model.cache_bytes(&cache);
            self.prefixes.insert(tokens, cache, bytes);
        }
    }
}

impl<C> Slot<C> {
    /// Takes the next token from `row`, and with it those that a constraint leaves no choice
    /// about. `Some` if the answer is over.
    fn advance(
        &mut self,
        row: &[f32],
        n_tokens: usize,
        scratch: &mut Scratch,
        sink: &mut dyn FnMut(RequestId, Event),
    ) -> Option<Finish> {
        let is_bad = |l: &f32| l.is_nan() || *l == f32::INFINITY;
        if row.iter().any(is_bad) || row.iter().all(|l| *l == f32::NEG_INFINITY) {
            return Some(Finish::Error(RequestError::NotFinite { at: self.fed }));
        }
        if let Err(error) = self.look_up_mask() {
            return Some(Finish::Error(error));
        }
        let mask = self.mask.take();
        let Some(token) = self.sampler.choose(row, n_tokens, mask.as_deref(), scratch) else {
            return Some(Finish::Error(RequestError::DeadEnd {
                at: self.n_generated,
            }));
        };
        let reported = self.request.logprobs;
        let reported = reported.map(|n_top| logprobs(row, n_tokens, token, n_top, scratch));
        if let Some(finish) = self.accept(token, reported, sink) {
            return Some(finish);
        }
        // Where the constraint leaves one token there is nothing to ask the model; unless the
        // logits themselves are wanted, it reads the token together with the next free choice.
        while self.request.constraint.is_some() && self.request.logprobs.is_none() {
            if let Err(error) = self.look_up_mask() {
                return Some(Finish::Error(error));
            }
            let only = self
                .mask
                .as_deref()
                .and_then(|mask| only_allowed(mask, n_tokens))?;
            self.mask = None;
            if let Some(finish) = self.accept(only, None, sink) {
                return Some(finish);
            }
        }
        None
    }

    /// Fills `self.mask`, if there is a constraint.
    fn look_up_mask(&mut self) -> Result<(), RequestError> {
        if let (None, Some(constraint)) = (&self.mask, &mut self.request.constraint) {
            let mask = constraint.allowed().map_err(RequestError::Constraint)?;
            self.mask = Some(mask.to_vec());
        }
        Ok(())
    }

    /// Adds a token to the answer. `Some` if that ends it.
    fn accept(
        &mut self,
        token: u32,
        logprobs: Option<TokenLogprobs>,
        sink: &mut dyn FnMut(RequestId, Event),
    ) -> Option<Finish> {
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
        let id = self.id;
        let stopped = self
            .output
            .push(token, logprobs, &mut |t| sink(id, Event::Token(t)));
        if stopped || is_done {
            Some(Finish::Stop)
        } else if self.n_generated == self.request.max_tokens {
            Some(Finish::Length)
        } else {
            None
        }
    }

    /// Tells what was held back. The last characters may still complete a stop string.
    fn flush(&mut self, finish: Finish, sink: &mut dyn FnMut(RequestId, Event)) -> Finish {
        let id = self.id;
        let stopped = self.output.finish(&mut |t| sink(id, Event::Token(t)));
        if stopped && finish == Finish::Length {
            Finish::Stop
        } else {
            finish
        }
    }

    fn done(&self, finish: Finish) -> Event {
        let now = Instant::now();
        let usage = Usage {
            prompt_tokens: self.request.prompt.len(),
            cached_tokens: self.n_cached,
            completion_tokens: self.n_generated,
        };
        let timings = Timings {
            queue: self.admitted - self.submitted,
            prefill: self.prefilled.unwrap_or(now) - self.admitted,
            decode: self.prefilled.map_or(Duration::ZERO, |t| now - t),
            first_token: self
                .first_token
                .map_or(Duration::ZERO, |t| t - self.submitted),
        };
        Event::Done {
            finish,
            usage,
            timings,
        }
    }
}

/// Calls into the model; a panic there becomes an error.
fn guard(call: impl FnOnce() -> Result<(), ModelError>) -> Result<(), RequestError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| RequestError::Model(error.0)),
        Err(payload) => {
            let message = payload
                .downcast_ref::<&str>()
                .map(ToString::to_string)
                .or_else(|| payload.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "panic without a message".to_string());
            Err(RequestError::Model(format!("panic: {message}")))
        }
    }
}
