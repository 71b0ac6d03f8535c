//! `POST /v1/chat/completions`, whole and streamed.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request as HttpRequest, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderName};
use axum::response::{IntoResponse, Response};
use bantam_engine::{BoxedConstraint, Event, Finish, Request, TokenEvent, Usage};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Interval, MissedTickBehavior};
use tokio_stream::Stream;

use super::request::ChatRequest;
use super::response::{
    AnswerMessage, ChatCompletion, Choice, Chunk, ChunkChoice, Delta, Head, Logprobs, TokenLogprob,
    UsageBody, finish_reason,
};
use crate::error::ApiError;
use crate::ids;
use crate::server::{App, Model};

/// A stream that has had nothing to say for so long says a comment, so that proxies keep it open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Names this build's arithmetic: the same fingerprint, seed and request give the same answer.
const FINGERPRINT: &str = concat!("bantam-", env!("CARGO_PKG_VERSION"));

type Events = UnboundedReceiver<(usize, Event)>;

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    http: HttpRequest,
) -> Result<Response, ApiError> {
    let body = app.read_json(http).await?;
    let request = ChatRequest::parse(&body)?;
    drop(body);
    let model = Arc::clone(app.model(&request.model)?);
    let (n, stream, include_usage) = (request.n, request.stream, request.include_usage);
    let capacity = model.worker.info.capacity;
    if n > capacity {
        let message = format!("`n` must be at most {capacity} on this server, not {n}");
        return Err(ApiError::invalid("n", message));
    }
    let seat = model.worker.seat(n)?;
    let head = Head {
        id: ids::random("chatcmpl-"),
        object: if stream {
            "chat.completion.chunk"
        } else {
            "chat.completion"
        },
        created: ids::now(),
        model: model.id.clone(),
        service_tier: "default",
        system_fingerprint: FINGERPRINT,
    };
    // Templates and schemas are programs: they run where they delay no other connection.
    let preparing = {
        let model = Arc::clone(&model);
        tokio::task::spawn_blocking(move || prepare(&model, request))
    };
    let requests = preparing
        .await
        .map_err(|_| ApiError::internal("the request failed"))??;
    let with_logprobs = requests[0].logprobs.is_some();
    let events = model.worker.submit(requests, seat).await?;
    if !stream {
        return collect(head, &model, n, with_logprobs, events)
            .await
            .map(IntoResponse::into_response);
    }
    let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + KEEP_ALIVE, KEEP_ALIVE);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let writer = Writer {
        head,
        model,
        with_logprobs,
        include_usage,
        done: vec![None; n],
        failed: false,
    };
    let ready = writer.opening();
    let frames = Frames {
        events,
        writer,
        ready,
        tick,
        is_over: false,
    };
    let headers = [
        (CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(frames)).into_response())
}

/// Renders the prompt, compiles the constraint, and makes one engine request for each choice.
fn prepare(model: &Model, request: ChatRequest) -> Result<Vec<Request>, ApiError> {
    let names = request.messages.iter().position(|m| m.name.is_some());
    if let Some(idx) = names.filter(|_| !model.chat.template().source().contains("name")) {
        let message = "this model's chat template has no place for a speaker's `name`";
        return Err(ApiError::unsupported(
            format!("messages[{idx}].name"),
            message,
        ));
    }
    let prompt = model.chat.prompt(&request.messages, &[]);
    let prompt = prompt.map_err(|e| ApiError::invalid("messages", e.to_string()))?;
    let constraint: Option<BoxedConstraint> = match &request.constraint {
        None => None,
        Some((param, spec)) => {
            let compiled = model.constraints.compile(spec);
            Some(
                compiled
                    .map_err(|e| ApiError::constraint(param, e.to_string()))?
                    .into(),
            )
        }
    };
    let info = model.worker.info;
    if let Some((token, _)) = request
        .sampling
        .logit_bias
        .iter()
        .find(|b| b.0 as usize >= info.vocab)
    {
        let message = format!(
            "token {token} is not in the vocabulary of {} tokens",
            info.vocab
        );
        return Err(ApiError::invalid("logit_bias", message));
    }
    // Without a limit the answer may take what the prompt leaves; at least one token, so that a
    // prompt that leaves nothing is refused with its numbers.
    let room = info.max_context.saturating_sub(prompt.len()).max(1);
    let seed = request
        .seed
        .map_or_else(ids::random_u64, |seed| seed as u64);
    let mut sampling = request.sampling;
    sampling.temperature = request.temperature.unwrap_or(model.default_temperature);
    let one = Request {
        prompt,
        max_tokens: request.max_tokens.unwrap_or(room),
        sampling,
        stop: request.stop,
        end_tokens: model.chat.end_tokens().to_vec(),
        constraint,
        logprobs: request.logprobs,
        ..Request::default()
    };
    Ok((0..request.n as u64)
        .map(|choice| {
            let mut request = one.clone();
            request.sampling.seed = ids::choice_seed(seed, choice);
            request
        })
        .collect())
}

/// Waits for all choices.
async fn collect(
    head: Head,
    model: &Model,
    n: usize,
    with_logprobs: bool,
    mut events: Events,
) -> Result<Json<ChatCompletion>, ApiError> {
    let mut usages = vec![Usage::default(); n];
    let mut choices: Vec<Choice> = (0..n)
        .map(|index| Choice {
            index,
            message: AnswerMessage {
                role: "assistant",
                content: String::new(),
                refusal: None,
            },
            logprobs: with_logprobs.then(Logprobs::default),
            finish_reason: "",
        })
        .collect();
    let mut n_done = 0;
    while n_done < n {
        let (idx, event) = events.recv().await.ok_or_else(ApiError::stopping)?;
        match event {
            Event::Token(token) => {
                let logprob = token_logprob(&token, model);
                choices[idx].message.content.push_str(&token.text_delta);
                if let (Some(logprobs), Some(logprob)) = (&mut choices[idx].logprobs, logprob) {
                    logprobs.content.push(logprob);
                }
            }
            Event::Done {
                finish: Finish::Error(error),
                ..
            } => return Err(error.into()),
            Event::Done { finish, usage, .. } => {
                choices[idx].finish_reason = finish_reason(&finish);
                usages[idx] = usage;
                n_done += 1;
            }
        }
    }
    Ok(Json(ChatCompletion {
        head,
        choices,
        usage: UsageBody::of(&usages),
    }))
}

fn token_logprob(token: &TokenEvent, model: &Model) -> Option<TokenLogprob> {
    let logprobs = token.logprobs.as_ref()?;
    Some(TokenLogprob::of(token.id, logprobs, model.chat.tokenizer()))
}

/// Turns events into server-sent events.
struct Writer {
    head: Head,
    model: Arc<Model>,
    with_logprobs: bool,
    include_usage: bool,
    /// The usage of each choice that has ended.
    done: Vec<Option<Usage>>,
    failed: bool,
}

impl Writer {
    /// The chunks that come before any text: who speaks.
    fn opening(&self) -> String {
        let delta = || Delta {
            role: Some("assistant"),
            content: Some(String::new()),
        };
        (0..self.done.len())
            .map(|index| self.chunk(index, delta(), None, None))
            .collect()
    }

    fn frames(&mut self, index: usize, event: Event) -> String {
        match event {
            Event::Token(token) => {
                let logprob = token_logprob(&token, &self.model);
                if token.text_delta.is_empty() && logprob.is_none() {
                    return String::new();
                }
                let delta = Delta {
                    role: None,
                    content: Some(token.text_delta),
                };
                let logprobs = logprob.filter(|_| self.with_logprobs);
                let logprobs = logprobs.map(|l| Logprobs {
                    content: vec![l],
                    refusal: None,
                });
                self.chunk(index, delta, logprobs, None)
            }
            Event::Done {
                finish: Finish::Error(error),
                ..
            } => self.failure(&error.into()),
            Event::Done { finish, usage, .. } => {
                self.done[index] = Some(usage);
                let last = self.chunk(index, Delta::default(), None, Some(finish_reason(&finish)));
                last + &self.closing()
            }
        }
    }

    /// After the last choice: the usage if asked for, and the end mark.
    fn closing(&self) -> String {
        let Some(usages) = self.done.iter().copied().collect::<Option<Vec<Usage>>>() else {
            return String::new();
        };
        let mut frames = String::new();
        if self.include_usage {
            let usage = Some(Some(UsageBody::of(&usages)));
            frames.push_str(&frame(&Chunk {
                head: &self.head,
                choices: Vec::new(),
                usage,
            }));
        }
        frames.push_str("data: [DONE]\n\n");
        frames
    }

    /// An error ends the stream without its end mark.
    fn failure(&mut self, error: &ApiError) -> String {
        self.failed = true;
        frame(&error.to_json())
    }

    /// What to say when no more events come.
    fn end(&mut self) -> String {
        if self.failed || self.done.iter().all(Option::is_some) {
            return String::new();
        }
        self.failure(&ApiError::stopping())
    }

    fn chunk(
        &self,
        index: usize,
        delta: Delta,
        logprobs: Option<Logprobs>,
        finish_reason: Option<&'static str>,
    ) -> String {
        let choices = vec![ChunkChoice {
            index,
            delta,
            logprobs,
            finish_reason,
        }];
        let usage = self.include_usage.then_some(None);
        frame(&Chunk {
            head: &self.head,
            choices,
            usage,
        })
    }
}

fn frame(data: &impl serde::Serialize) -> String {
    let json = serde_json::to_string(data).expect("wire types have string keys and finite numbers");
    format!("data: {json}\n\n")
}

/// The body of a streamed answer. Dropping it, as happens when the client is gone, drops the
/// receiver, which cancels the answer.
struct Frames {
    events: Events,
    writer: Writer,
    /// Written, not sent yet.
    ready: String,
    tick: Interval,
    is_over: bool,
}

impl Stream for Frames {
    type Item = Result<String, std::convert::Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        while !self.is_over && self.ready.len() < 16 << 10 {
            match self.events.poll_recv(cx) {
                Poll::Ready(Some((index, event))) => {
                    let frames = self.writer.frames(index, event);
                    self.ready.push_str(&frames);
                    self.is_over = self.writer.failed;
                }
                Poll::Ready(None) => {
                    let frames = self.writer.end();
                    self.ready.push_str(&frames);
                    self.is_over = true;
                }
                Poll::Pending => break,
            }
        }
        if !self.ready.is_empty() {
            self.tick.reset();
            return Poll::Ready(Some(Ok(std::mem::take(&mut self.ready))));
        }
        if self.is_over {
            return Poll::Ready(None);
        }
        // Also registers the wake-up; a tick that is due is a comment.
        match self.tick.poll_tick(cx) {
            Poll::Ready(_) => Poll::Ready(Some(Ok(": waiting\n\n".to_string()))),
            Poll::Pending => Poll::Pending,
        }
    }
}
