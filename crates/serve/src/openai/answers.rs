//! The engine's events, read as parts of answers: text, calls of tools, the end.
//!
//! Every endpoint that generates comes through here, whole or streamed, so this is where tokens are counted: for
//! the metrics, and against the caller's budget, whether or not the caller waits for the end.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bantam_engine::{Event, Finish, TokenEvent, Usage};
use bantam_text::{CallKind, ToolDemand, ToolParser, ToolPiece};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Sleep;

use super::ask::{Ask, Job};
use super::response::TokenLogprob;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::models::Model;
use crate::server::App;

/// A part of one of the answers.
#[derive(Debug)]
pub(crate) enum Piece {
    /// Text, with the log-probabilities of the tokens it is of, if asked for.
    Text {
        text: String,
        logprobs: Vec<TokenLogprob>,
    },
    /// The call of this number begins.
    Begin {
        call: usize,
        id: String,
        kind: CallKind,
        name: String,
    },
    /// More of a call's arguments or input.
    Input {
        call: usize,
        kind: CallKind,
        text: String,
    },
    /// The present call is complete.
    End,
    /// The end of this answer.
    Done { reason: &'static str, usage: Usage },
}

/// The answers to one request, as they come. Dropping them cancels what is still running.
pub(crate) struct Answers {
    pub(crate) model: Arc<Model>,
    events: UnboundedReceiver<(usize, Event)>,
    choices: Vec<Choice>,
    ready: VecDeque<(usize, Piece)>,
    with_logprobs: bool,
    deadline: Pin<Box<Sleep>>,
    meter: Meter,
}

struct Choice {
    parser: Option<ToolParser>,
    n_calls: usize,
    /// What is called last.
    kind: CallKind,
    /// Must there be a call?
    must_call: bool,
    done: bool,
}

/// Counts what was used.
struct Meter {
    app: Arc<App>,
    caller: Caller,
    model: Arc<Model>,
    route: &'static str,
    began: Instant,
    last: Vec<Option<Instant>>,
    prompt_tokens: usize,
    n_tokens: usize,
}

impl Answers {
    /// Queues a request for answers.
    pub(crate) async fn start(
        app: &Arc<App>,
        caller: &Caller,
        model: &Arc<Model>,
        route: &'static str,
        ask: Ask,
    ) -> Result<Self, ApiError> {
        let n = ask.n;
        Self::prepare(app, caller, model, route, n, move |model| {
            ask.prepare(model)
        })
        .await
    }

    /// The same for requests that are made otherwise; `prepare` may take its time.
    pub(crate) async fn prepare(
        app: &Arc<App>,
        caller: &Caller,
        model: &Arc<Model>,
        route: &'static str,
        n: usize,
        prepare: impl FnOnce(&Model) -> Result<Job, ApiError> + Send + 'static,
    ) -> Result<Self, ApiError> {
        let began = Instant::now();
        let capacity = model.worker.info.capacity;
        if n > capacity {
            let message = format!("`n` must be at most {capacity} on this server, not {n}");
            return Err(ApiError::invalid("n", message));
        }
        caller.admit()?;
        let seat = model.worker.seat(n)?;
        let resident = app.models.resident(model).await?;
        let preparing = {
            let model = Arc::clone(model);
            tokio::task::spawn_blocking(move || prepare(&model))
        };
        let mut job = preparing
            .await
            .map_err(|_| ApiError::internal("the request failed"))??;
        let client = caller.client();
        job.requests.iter_mut().for_each(|r| r.client = client);
        let prompt_tokens = job.requests.first().map_or(0, |r| r.prompt.len());
        let n = job.requests.len();
        let events = model.worker.submit(job.requests, resident, seat).await?;
        let parser = job.grammar.as_ref().map(ToolParser::new);
        let demand = job.grammar.as_ref().map(|grammar| grammar.demand);
        Ok(Self {
            model: Arc::clone(model),
            events,
            choices: (0..n)
                .map(|_| Choice {
                    parser: parser.clone(),
                    n_calls: 0,
                    kind: CallKind::Function,
                    must_call: demand == Some(ToolDemand::Required),
                    done: false,
                })
                .collect(),
            ready: VecDeque::new(),
            with_logprobs: job.with_logprobs,
            deadline: Box::pin(tokio::time::sleep(app.config.answer_timeout)),
            meter: Meter {
                app: Arc::clone(app),
                caller: caller.clone(),
                model: Arc::clone(model),
                route,
                began,
                last: vec![None; n],
                prompt_tokens,
                n_tokens: 0,
            },
        })
    }

    /// The next part, and of which answer; `None` after the end of the last. After an error nothing follows.
    pub(crate) fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<(usize, Piece), ApiError>>> {
        loop {
            if let Some(piece) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(piece)));
            }
            if self.choices.iter().all(|choice| choice.done) {
                return Poll::Ready(None);
            }
            match self.events.poll_recv(cx) {
                Poll::Pending => {
                    if self.deadline.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    self.choices
                        .iter_mut()
                        .for_each(|choice| choice.done = true);
                    return Poll::Ready(Some(Err(ApiError::too_long())));
                }
                Poll::Ready(None) => return Poll::Ready(Some(Err(ApiError::stopping()))),
                Poll::Ready(Some((idx, event))) => {
                    if let Err(error) = self.take(idx, event) {
                        self.choices
                            .iter_mut()
                            .for_each(|choice| choice.done = true);
                        self.ready.clear();
                        return Poll::Ready(Some(Err(error)));
                    }
                }
            }
        }
    }

    /// The same, to be awaited.
    pub(crate) async fn next(&mut self) -> Option<Result<(usize, Piece), ApiError>> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// How many answers there are.
    pub(crate) fn len(&self) -> usize {
        self.choices.len()
    }

    fn take(&mut self, idx: usize, event: Event) -> Result<(), ApiError> {
        match event {
            Event::Token(token) => self.token(idx, token),
            Event::Done {
                finish: Finish::Error(error),
                ..
            } => return Err(error.into()),
            Event::Done { finish, usage, .. } => {
                let choice = &mut self.choices[idx];
                let is_cut = choice.parser.as_ref().is_some_and(ToolParser::in_call);
                let pieces = choice.parser.as_mut().map(ToolParser::finish);
                for piece in pieces.unwrap_or_default() {
                    choice.push(idx, piece, Vec::new(), &mut self.ready);
                }
                let reason = match finish {
                    Finish::Length => "length",
                    _ if is_cut || (choice.must_call && choice.n_calls == 0) => {
                        let message = "a stop string ended the answer inside a call";
                        return Err(ApiError::invalid("stop", message));
                    }
                    _ if choice.n_calls > 0 => "tool_calls",
                    _ => "stop",
                };
                choice.done = true;
                self.meter.done(&usage);
                self.ready.push_back((idx, Piece::Done { reason, usage }));
            }
        }
        Ok(())
    }

    fn token(&mut self, idx: usize, token: TokenEvent) {
        self.meter.token(idx);
        let logprobs = match &token.logprobs {
            Some(logprobs) if self.with_logprobs => {
                let tokenizer = self.model.chat.tokenizer();
                vec![TokenLogprob::of(token.id, logprobs, tokenizer)]
            }
            _ => Vec::new(),
        };
        let choice = &mut self.choices[idx];
        let Some(parser) = &mut choice.parser else {
            if !token.text_delta.is_empty() || !logprobs.is_empty() {
                let text = token.text_delta;
                self.ready.push_back((idx, Piece::Text { text, logprobs }));
            }
            return;
        };
        let was_text = parser.in_text();
        let pieces = parser.push(&token.text_delta);
        // Log-probabilities are of the message's text; a call has none.
        let mut logprobs = if was_text && parser.in_text() {
            logprobs
        } else {
            Vec::new()
        };
        for piece in pieces {
            let logprobs = std::mem::take(&mut logprobs);
            choice.push(idx, piece, logprobs, &mut self.ready);
        }
        if !logprobs.is_empty() {
            let text = String::new();
            self.ready.push_back((idx, Piece::Text { text, logprobs }));
        }
    }
}

impl Choice {
    fn push(
        &mut self,
        idx: usize,
        piece: ToolPiece,
        logprobs: Vec<TokenLogprob>,
        ready: &mut VecDeque<(usize, Piece)>,
    ) {
        let piece = match piece {
            ToolPiece::Text(text) => Piece::Text { text, logprobs },
            ToolPiece::Begin { kind, name } => {
                self.n_calls += 1;
                self.kind = kind;
                Piece::Begin {
                    call: self.n_calls - 1,
                    id: ids::random("call_"),
                    kind,
                    name,
                }
            }
            ToolPiece::Input(text) => Piece::Input {
                call: self.n_calls.saturating_sub(1),
                kind: self.kind,
                text,
            },
            ToolPiece::End => Piece::End,
        };
        ready.push_back((idx, piece));
    }
}

impl Meter {
    fn token(&mut self, idx: usize) {
        let now = Instant::now();
        self.n_tokens += 1;
        let metrics = &self.app.metrics;
        match self.last[idx].replace(now) {
            Some(last) => metrics.inter_token(&self.model.id, now - last),
            None => metrics.first_token(&self.model.id, self.route, now - self.began),
        }
    }

    fn done(&mut self, usage: &Usage) {
        self.app.metrics.tokens(&self.model.id, usage);
        self.n_tokens += 1;
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.caller
            .spend((self.prompt_tokens + self.n_tokens) as u64);
    }
}
