//! The scheduler: who waits, who runs, and what one step does.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bantam_text::Tokenizer;

use crate::answer::{Advance, Answer, Digest, Logits};
use crate::draft::Record;
use crate::memory::Start;
use crate::plan::{Asks, Part, wants};
use crate::prefix::{NodeId, PrefixTree};
use crate::queue::{FairQueue, Offer};
use crate::sampler::Scratch;
use crate::{
    AdapterId, Event, Finish, LanguageModel, ModelError, Request, RequestError, RequestId, Span,
    SubmitError, Timings, Usage, Wants,
};

/// How much an engine does at once, and how much it keeps. Nothing of it changes an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Requests that run at the same time, at most.
    pub slots: usize,
    /// Tokens read in one step while no answer is running.
    pub step_tokens: usize,
    /// The same while answers are. Answers come first; prompts share the rest, and always get
    /// a few. Smaller steps make running answers smoother and long prompts slower.
    pub busy_step_tokens: usize,
    /// Requests that may wait for a slot.
    pub queue: usize,
    /// The memory for what running requests have read, and for what is kept of earlier ones. If
    /// it runs short the kept is dropped, then the newest requests are paused. One request
    /// always runs.
    pub kv_bytes: usize,
    /// The part of that memory for what is kept; 0 turns every kind of prefix reuse off.
    pub prefix_bytes: usize,
    /// The shortest shared prefix worth a fork.
    pub prefix_min: usize,
    /// The most tokens of an answer that are guessed ahead in one step; 0 for none.
    pub draft_tokens: usize,
    /// Keep a digest of the logits that answers were chosen from, for [`Engine::take_digests`].
    pub digests: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            slots: 64,
            step_tokens: 512,
            busy_step_tokens: 128,
            queue: 256,
            kv_bytes: 2 << 30,
            prefix_bytes: 256 << 20,
            prefix_min: 16,
            draft_tokens: 12,
            digests: false,
        }
    }
}

/// Generates answers with one model. See the crate's documentation for what holds.
pub struct Engine<M: LanguageModel> {
    pub(crate) model: M,
    tokenizer: Arc<Tokenizer>,
    pub(crate) config: EngineConfig,
    /// Tokens that both the model and the tokenizer know; no other is ever chosen.
    n_tokens: usize,
    next_id: u64,
    pub(crate) adapters: HashMap<AdapterId, Arc<M::Adapter>>,
    queue: FairQueue<Waiting<M>>,
    pub(crate) slots: Vec<Slot<M>>,
    /// Requests that gave up their slot for want of memory, the first to go on last.
    pub(crate) paused: Vec<Slot<M>>,
    pub(crate) prefixes: PrefixTree<M::Cache>,
    pub(crate) record: Record,
    /// Events of requests that ended between steps.
    outbox: Vec<(RequestId, Event)>,
    rows: Vec<f32>,
    scratch: Mutex<Vec<Scratch>>,
    digests: Vec<(RequestId, u64)>,
}

/// An adapter in use: unloading it takes its name away and nothing else.
type InUse<M> = (AdapterId, Arc<<M as LanguageModel>::Adapter>);

/// A request without a slot.
struct Waiting<M: LanguageModel> {
    id: RequestId,
    request: Request,
    adapter: Option<InUse<M>>,
    submitted: Instant,
}

/// A running request.
pub(crate) struct Slot<M: LanguageModel> {
    id: RequestId,
    adapter: Option<InUse<M>>,
    pub(crate) cache: M::Cache,
    pub(crate) answer: Answer,
    /// How many of the answer's tokens are in the cache.
    pub(crate) fed: usize,
    /// Whether a prompt is being read; else the slot takes a token in every step.
    pub(crate) is_reading: bool,
    /// Tokens guessed for this step.
    pub(crate) draft: Vec<u32>,
    /// What the model reads in this step, where that is not a piece of the tokens.
    feed: Vec<u32>,
    n_cached: usize,
    n_drafted: usize,
    n_accepted: usize,
    /// The node whose blocks the first `n_shared` tokens of the cache are.
    pub(crate) pin: Option<NodeId>,
    pub(crate) n_shared: usize,
    submitted: Instant,
    admitted: Instant,
    prefilled: Option<Instant>,
}

impl<M: LanguageModel> Engine<M> {
    /// An idle engine. Counts of 0 that would stop it from working are taken as 1.
    pub fn new(model: M, tokenizer: Arc<Tokenizer>, config: EngineConfig) -> Self {
        let n_tokens = model.vocab().min(tokenizer.vocab_size());
        let step_tokens = config.step_tokens.max(1);
        let config = EngineConfig {
            slots: config.slots.max(1),
            step_tokens,
            busy_step_tokens: config.busy_step_tokens.clamp(1, step_tokens),
            queue: config.queue.max(1),
            prefix_min: config.prefix_min.max(1),
            ..config
        };
        Self {
            prefixes: PrefixTree::new(model.cache_block()),
            model,
            tokenizer,
            config,
            n_tokens,
            next_id: 0,
            adapters: HashMap::new(),
            queue: FairQueue::new(),
            slots: Vec::new(),
            paused: Vec::new(),
            record: Record::default(),
            outbox: Vec::new(),
            rows: Vec::new(),
            scratch: Mutex::default(),
            digests: Vec::new(),
        }
    }

    /// Makes an adapter known. Nothing is copied or computed, and no running request waits for it.
    pub fn load_adapter(&mut self, adapter: Arc<M::Adapter>) -> AdapterId {
        let id = AdapterId(self.next_id);
        self.next_id += 1;
        self.adapters.insert(id, adapter);
        id
    }

    /// Forgets an adapter; `false` if it is not known. Requests that were accepted before keep it
    /// until they end.
    pub fn unload_adapter(&mut self, id: AdapterId) -> bool {
        self.prefixes.forget(id);
        self.adapters.remove(&id).is_some()
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
        let waiting = Waiting {
            id,
            adapter: self.in_use(request.adapter)?,
            submitted: Instant::now(),
            request,
        };
        self.queue.push(waiting.request.client, waiting);
        Ok(id)
    }

    /// Whether a request can be run at all, whatever the queue.
    pub fn check(&self, request: &Request) -> Result<(), SubmitError> {
        if request.max_tokens == 0 {
            return Err(SubmitError::NoTokensWanted);
        }
        self.check_prompt(&request.prompt, request.max_tokens)?;
        self.in_use(request.adapter)?;
        request.sampling.check(self.model.vocab())
    }

    /// Whether a prompt and so many tokens after it can be read.
    pub(crate) fn check_prompt(
        &self,
        prompt: &[u32],
        max_tokens: usize,
    ) -> Result<(), SubmitError> {
        let (vocab, max_context) = (self.model.vocab(), self.model.max_context());
        if prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if prompt.len().saturating_add(max_tokens) > max_context {
            return Err(SubmitError::ContextOverflow {
                prompt_tokens: prompt.len(),
                max_tokens,
                max_context,
            });
        }
        match prompt.iter().find(|&&t| t as usize >= vocab) {
            Some(&token) => Err(SubmitError::UnknownToken { token, vocab }),
            None => Ok(()),
        }
    }

    /// An adapter by its name.
    pub(crate) fn in_use(&self, id: Option<AdapterId>) -> Result<Option<InUse<M>>, SubmitError> {
        let find = |id: AdapterId| match self.adapters.get(&id) {
            Some(adapter) => Ok((id, Arc::clone(adapter))),
            None => Err(SubmitError::UnknownAdapter { id: id.0 }),
        };
        id.map(find).transpose()
    }

    /// Ends a request where it stands; its [`Event::Done`] comes with the next step. `false` if
    /// it is not known or has ended already.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        if let Some(waiting) = self.queue.remove(|w| w.id == id) {
            let usage = Usage {
                prompt_tokens: waiting.request.prompt.len(),
                ..Usage::default()
            };
            let timings = Timings {
                queue: waiting.submitted.elapsed(),
                ..Timings::default()
            };
            let finish = Finish::Cancelled;
            let done = Event::Done {
                finish,
                usage,
                timings,
            };
            self.outbox.push((id, done));
            return true;
        }
        let of = |slots: &mut Vec<Slot<M>>| {
            let idx = slots.iter().position(|s| s.id == id)?;
            Some(slots.remove(idx))
        };
        let Some(slot) = of(&mut self.slots).or_else(|| of(&mut self.paused)) else {
            return false;
        };
        self.outbox.push((id, slot.done(Finish::Cancelled)));
        self.keep(slot);
        true
    }

    /// Whether no request waits or runs and no event is left to tell.
    pub fn is_idle(&self) -> bool {
        self.waiting() == 0 && self.slots.is_empty() && self.outbox.is_empty()
    }

    /// Requests without a slot.
    pub fn waiting(&self) -> usize {
        self.queue.len() + self.paused.len()
    }

    /// Requests that may still be submitted before one is refused.
    pub fn queue_room(&self) -> usize {
        self.config.queue - self.queue.len()
    }

    /// Requests with a slot.
    pub fn running(&self) -> usize {
        self.slots.len()
    }

    /// What is kept for its prefixes: how many pieces, and their bytes.
    pub fn prefixes(&self) -> (usize, usize) {
        (self.prefixes.len(), self.prefixes.bytes())
    }

    /// The memory of what is running and what is kept.
    pub fn kv_bytes(&self) -> usize {
        self.running_bytes() + self.prefixes.bytes()
    }

    /// The model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The tokenizer that answers are decoded with.
    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    /// The digests of the requests that have ended since the last call: of every logit that each
    /// token of the answer was chosen from. Empty without [`EngineConfig::digests`].
    pub fn take_digests(&mut self) -> Vec<(RequestId, u64)> {
        std::mem::take(&mut self.digests)
    }

    /// Does one step: gives free slots to waiting requests, runs the model once over all that
    /// are running, takes the next tokens for each that is past its prompt. A request's events
    /// come in order; the last is [`Event::Done`].
    pub fn step(&mut self, sink: &mut dyn FnMut(RequestId, Event)) {
        for (id, event) in self.outbox.drain(..) {
            sink(id, event);
        }
        self.make_room();
        let mut ended = self.admit();
        self.trim();
        // A constraint may have left no choice from beginning to end.
        self.tell(&mut ended, sink);
        let parts = self.plan();
        if parts.is_empty() {
            return;
        }
        let failures = self.forward(&parts);
        let mut ended = self.advance(&parts, failures);
        self.tell(&mut ended, sink);
    }

    /// Tells what is new of each answer, and ends those that are over.
    fn tell(&mut self, ended: &mut Vec<(usize, Finish)>, sink: &mut dyn FnMut(RequestId, Event)) {
        ended.sort_unstable_by_key(|e| e.0);
        for (idx, finish) in ended.iter_mut() {
            let answer = &mut self.slots[*idx].answer;
            *finish = answer.flush(std::mem::replace(finish, Finish::Cancelled));
        }
        for slot in &mut self.slots {
            for event in slot.answer.events.drain(..) {
                sink(slot.id, Event::Token(event));
            }
        }
        for (idx, finish) in ended.iter() {
            let slot = &self.slots[*idx];
            sink(slot.id, slot.done(finish.clone()));
        }
        while let Some((idx, finish)) = ended.pop() {
            let slot = self.slots.remove(idx);
            if let Some(Digest(digest)) = slot.answer.digest {
                self.digests.push((slot.id, digest));
            }
            // After a failure of the model the cache cannot be trusted.
            let broken = matches!(
                finish,
                Finish::Error(RequestError::Model(_) | RequestError::NotFinite { .. })
            );
            if broken {
                self.unpin(slot.pin);
            } else {
                self.keep(slot);
            }
        }
    }

    /// Gives free slots to requests that were paused, then to those that wait, the clients taking
    /// turns. The slots whose answer is over before it began.
    fn admit(&mut self) -> Vec<(usize, Finish)> {
        let mut ended = Vec::new();
        while self.slots.len() < self.config.slots {
            let Some(slot) = self.paused.pop() else {
                break;
            };
            let tokens = &slot.answer.tokens;
            if !self.has_room(tokens.len()) {
                self.paused.push(slot);
                return ended;
            }
            let Some(start) = self.start(slot.adapter_id(), tokens) else {
                self.paused.push(slot);
                return ended;
            };
            self.slots.push(Slot {
                cache: start.cache,
                fed: start.len,
                n_shared: start.len,
                pin: start.pin,
                ..slot
            });
        }
        let mut queue = std::mem::replace(&mut self.queue, FairQueue::new());
        queue.offer(|waiting| {
            if self.slots.len() >= self.config.slots || !self.has_room(waiting.request.prompt.len())
            {
                return Offer::Stop(waiting);
            }
            let adapter = waiting.request.adapter;
            let Some(start) = self.start(adapter, &waiting.request.prompt) else {
                return Offer::Later(waiting);
            };
            let slot = self.slot(waiting, start);
            self.slots.push(slot);
            let slot_idx = self.slots.len() - 1;
            let first = self.slots[slot_idx].answer.look_ahead(self.n_tokens);
            ended.extend(first.map(|finish| (slot_idx, finish)));
            Offer::Taken
        });
        self.queue = queue;
        ended
    }

    fn slot(&self, waiting: Waiting<M>, start: Start<M::Cache>) -> Slot<M> {
        let answer = Answer::new(waiting.request, &self.tokenizer, self.config.digests);
        Slot {
            id: waiting.id,
            adapter: waiting.adapter,
            cache: start.cache,
            answer,
            fed: start.len,
            is_reading: true,
            draft: Vec::new(),
            feed: Vec::new(),
            n_cached: start.len,
            n_drafted: 0,
            n_accepted: 0,
            pin: start.pin,
            n_shared: start.len,
            submitted: waiting.submitted,
            admitted: Instant::now(),
            prefilled: None,
        }
    }

    /// Runs the model; what was wanted is in `self.rows`, in the order of `parts`. If it fails
    /// on all the parts together, each is tried alone and answers for itself.
    fn forward(&mut self, parts: &[Part]) -> Vec<Option<RequestError>> {
        for part in parts {
            let slot = &mut self.slots[part.slot_idx];
            slot.feed.clear();
            if !slot.draft.is_empty() {
                let known = &slot.answer.tokens[slot.fed..part.end];
                slot.feed.extend_from_slice(known);
                slot.feed.extend_from_slice(&slot.draft);
            }
        }
        let mut rows = std::mem::take(&mut self.rows);
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
                        let result = self
                            .rewind(part)
                            .and_then(|()| self.try_forward(std::slice::from_ref(part), &mut row));
                        // What a failed part would have given is never looked at.
                        row.resize(part.n_logits, 0.0);
                        rows.extend_from_slice(&row);
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
        let mut slots: Vec<Option<&mut Slot<M>>> = self.slots.iter_mut().map(Some).collect();
        let mut spans: Vec<Span<'_, M>> = Vec::with_capacity(parts.len());
        for part in parts {
            if let Some(slot) = slots[part.slot_idx].take() {
                spans.push(slot.span(part));
            }
        }
        share_lists(&mut spans);
        guard(|| self.model.forward(&mut spans, rows))?;
        let n_logits: usize = parts.iter().map(|p| p.n_logits).sum();
        if rows.len() != n_logits {
            let message = format!("{} logits instead of {n_logits}", rows.len());
            return Err(RequestError::Model(message));
        }
        for part in parts {
            let slot = &self.slots[part.slot_idx];
            let (len, end) = (
                self.model.cache_len(&slot.cache),
                part.end + slot.draft.len(),
            );
            if len != end {
                let message = format!("a cache has {len} tokens after reading {end}");
                return Err(RequestError::Model(message));
            }
        }
        Ok(())
    }

    /// Takes the next tokens of every answer that has logits, on all threads, and leaves the caches
    /// with what the answers hold. The slots whose answer is over.
    fn advance(
        &mut self,
        parts: &[Part],
        failures: Vec<Option<RequestError>>,
    ) -> Vec<(usize, Finish)> {
        let sizes = (self.model.vocab(), self.n_tokens);
        let mut slots: Vec<Option<&mut Slot<M>>> = self.slots.iter_mut().map(Some).collect();
        let mut tasks = Vec::with_capacity(parts.len());
        let mut ended = Vec::new();
        let mut rest = &self.rows[..];
        for (part, failure) in parts.iter().zip(failures) {
            let logits;
            (logits, rest) = rest.split_at(part.n_logits.min(rest.len()));
            if let Some(error) = failure {
                ended.push((part.slot_idx, Finish::Error(error)));
                continue;
            }
            let Some(slot) = slots[part.slot_idx].take() else {
                continue;
            };
            slot.fed = part.end;
            if slot.fed == slot.answer.tokens.len() {
                slot.is_reading = false;
                slot.prefilled.get_or_insert_with(Instant::now);
            }
            let logits = match part.asks {
                Asks::Nothing => continue,
                Asks::Narrow => Logits::Narrow(logits),
                Asks::Rows => Logits::Rows(logits),
            };
            let (answer, draft) = (&mut slot.answer, slot.draft.as_slice());
            tasks.push((
                part,
                Mutex::new((answer, draft, logits, Advance::default())),
            ));
        }
        let scratches = &self.scratch;
        self.model.run(tasks.len(), &|idx| {
            let mut task = lock(&tasks[idx].1);
            let (answer, draft, logits, advance) = &mut *task;
            let mut scratch = lock(scratches).pop().unwrap_or_default();
            *advance = answer.advance(*logits, draft, sizes, &mut scratch);
            lock(scratches).push(scratch);
        });
        let done: Vec<(&Part, Advance)> = tasks
            .into_iter()
            .map(|(part, task)| {
                let task = task.into_inner().unwrap_or_else(PoisonError::into_inner);
                (part, task.3)
            })
            .collect();
        for (part, advance) in done {
            let slot = &mut self.slots[part.slot_idx];
            let (n, n_true) = (slot.draft.len(), advance.n_confirmed);
            slot.fed += n_true;
            if n > n_true {
                self.model.truncate(&mut slot.cache, slot.fed);
            }
            slot.n_drafted += n;
            slot.n_accepted += n_true;
            if let Some(matched) = part.matched {
                self.record.learn(matched, n, n_true);
            }
            slot.draft.clear();
            ended.extend(advance.finish.map(|finish| (part.slot_idx, finish)));
        }
        ended
    }
}

impl<M: LanguageModel> Slot<M> {
    pub(crate) fn adapter_id(&self) -> Option<AdapterId> {
        self.adapter.as_ref().map(|a| a.0)
    }

    /// Tokens that are not in the cache yet.
    pub(crate) fn n_unread(&self) -> usize {
        self.answer.tokens.len() - self.fed
    }

    fn span(&mut self, part: &Part) -> Span<'_, M> {
        let tokens = if self.draft.is_empty() {
            &self.answer.tokens[self.fed..part.end]
        } else {
            &self.feed
        };
        Span {
            cache: &mut self.cache,
            tokens,
            wants: wants(&self.answer, &self.draft, part.asks),
            adapter: self.adapter.as_ref().map(|a| &*a.1),
        }
    }

    fn done(&self, finish: Finish) -> Event {
        let now = Instant::now();
        let answer = &self.answer;
        let usage = Usage {
            prompt_tokens: answer.request.prompt.len(),
            cached_tokens: self.n_cached,
            completion_tokens: answer.n_generated,
            forced_tokens: answer.n_forced,
            drafted_tokens: self.n_drafted,
            accepted_tokens: self.n_accepted,
        };
        let timings = Timings {
            queue: self.admitted - self.submitted,
            prefill: self.prefilled.unwrap_or(now) - self.admitted,
            decode: self.prefilled.map_or(Duration::ZERO, |t| now - t),
            first_token: answer
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

/// Makes spans that want the same tokens' logits name one list, so that the model sees it.
fn share_lists<M: LanguageModel>(spans: &mut [Span<'_, M>]) {
    for idx in 1..spans.len() {
        let (before, rest) = spans.split_at_mut(idx);
        let Wants::LastOf(list) = rest[0].wants else {
            continue;
        };
        let same = before
            .iter()
            .find(|span| matches!(span.wants, Wants::LastOf(other) if other == list));
        if let Some(span) = same {
            rest[0].wants = span.wants;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A poisoned lock says that a task panicked, and that panic is on its way already.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Calls into the model; a panic there becomes an error.
pub(crate) fn guard(call: impl FnOnce() -> Result<(), ModelError>) -> Result<(), RequestError> {
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
