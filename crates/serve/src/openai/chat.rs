//! `POST /v1/chat/completions`, whole and streamed.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request as HttpRequest, State};
use axum::response::{IntoResponse, Response};
use bantam_engine::Usage;
use bantam_text::{CallKind, ToolDemand};
use serde_json::{Map, Value, json};

use super::answers::{Answers, Piece};
use super::request::ChatRequest;
use super::response::{
    Assembly, Call, CallDelta, CallNews, ChatCompletion, Chunk, ChunkChoice, Delta, Head, Logprobs,
    TokenLogprob, UsageBody,
};
use super::sse::{self, Writer, frame};
use super::stored;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::server::App;

/// Names this build's arithmetic: the same fingerprint, seed and request give the same answer.
pub(crate) const FINGERPRINT: &str = concat!("bantam-", env!("CARGO_PKG_VERSION"));

const ROUTE: &str = "/v1/chat/completions";

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    http: HttpRequest,
) -> Result<Response, ApiError> {
    let caller = Caller::of(&http)?;
    let body = app.read_json(http).await?;
    let request = ChatRequest::parse(&body)?;
    drop(body);
    if !request.stream {
        return whole(&app, &caller, request)
            .await
            .map(|completion| Json(completion).into_response());
    }
    let (include_usage, started) = (request.include_usage, start(&app, &caller, request).await?);
    let Started {
        answers,
        head,
        kept,
        facts,
    } = started;
    let n = answers.len();
    let writer = Chunks {
        head: Head {
            object: "chat.completion.chunk",
            ..head
        },
        include_usage,
        facts,
        done: vec![None; n],
        assembly: kept.map(|kept| (Assembly::new(n, facts.with_logprobs), kept)),
        app,
        caller,
    };
    Ok(sse::response(answers, Box::new(writer)))
}

/// The whole answer to a request, whatever it says of streaming.
pub(crate) async fn whole(
    app: &Arc<App>,
    caller: &Caller,
    request: ChatRequest,
) -> Result<ChatCompletion, ApiError> {
    let Started {
        mut answers,
        head,
        kept,
        facts,
    } = start(app, caller, request).await?;
    let mut assembly = Assembly::new(answers.len(), facts.with_logprobs);
    while let Some(next) = answers.next().await {
        let (idx, piece) = next?;
        assembly.push(idx, &piece);
    }
    let metadata = kept.as_ref().map(|kept| kept.metadata.clone());
    let completion = assembly.finish(head, facts.predicted, metadata);
    if let Some(kept) = kept {
        stored::keep(app, caller, &completion, kept)?;
    }
    Ok(completion)
}

/// The answer to a body that nobody waits for.
pub(crate) async fn answer(
    app: &Arc<App>,
    caller: &Caller,
    body: &[u8],
) -> Result<Value, ApiError> {
    let request = ChatRequest::parse(body)?;
    no_stream(request.stream)?;
    let completion = whole(app, caller, request).await?;
    serde_json::to_value(completion).map_err(|_| ApiError::internal("the answer is broken"))
}

/// Refuses to stream where nobody reads along.
pub(crate) fn no_stream(stream: bool) -> Result<(), ApiError> {
    if stream {
        let message = "a batch's answers are not streamed";
        return Err(ApiError::unsupported("stream", message));
    }
    Ok(())
}

/// What an answer that is kept is kept with.
pub(crate) struct Kept {
    pub(crate) metadata: Map<String, Value>,
    pub(crate) messages: Vec<Value>,
}

/// What the form of the answer depends on.
#[derive(Clone, Copy)]
struct Facts {
    with_logprobs: bool,
    predicted: bool,
    /// There will be calls and no text.
    only_calls: bool,
}

struct Started {
    answers: Answers,
    head: Head,
    kept: Option<Kept>,
    facts: Facts,
}

async fn start(app: &Arc<App>, caller: &Caller, request: ChatRequest) -> Result<Started, ApiError> {
    let model = app.model(&request.model)?;
    let head = Head {
        id: ids::random("chatcmpl-"),
        object: "chat.completion",
        created: ids::now(),
        model: model.id.clone(),
        service_tier: "default",
        system_fingerprint: FINGERPRINT,
    };
    let demand = request.ask.tools.as_ref().map(|tools| tools.demand);
    let facts = Facts {
        with_logprobs: request.ask.logprobs.is_some(),
        predicted: request.ask.prediction.is_some(),
        only_calls: demand == Some(ToolDemand::Required),
    };
    let kept = request.store.then(|| Kept {
        metadata: request.metadata.unwrap_or_default(),
        messages: request.input,
    });
    Ok(Started {
        answers: Answers::start(app, caller, &model, ROUTE, request.ask).await?,
        head,
        kept,
        facts,
    })
}

/// Turns parts of answers into chunks.
struct Chunks {
    head: Head,
    include_usage: bool,
    facts: Facts,
    /// The usage of each choice that has ended.
    done: Vec<Option<Usage>>,
    /// The whole, if it is to be kept.
    assembly: Option<(Assembly, Kept)>,
    app: Arc<App>,
    caller: Caller,
}

impl Writer for Chunks {
    /// Who speaks.
    fn opening(&mut self) -> String {
        let content = (!self.facts.only_calls).then(String::new);
        (0..self.done.len())
            .map(|index| {
                let delta = Delta {
                    role: Some("assistant"),
                    content: Some(content.clone()),
                    ..Delta::default()
                };
                self.chunk(index, delta, None, None)
            })
            .collect()
    }

    fn piece(&mut self, idx: usize, piece: Piece) -> String {
        if let Some((assembly, _)) = &mut self.assembly {
            assembly.push(idx, &piece);
        }
        match piece {
            Piece::Text { text, logprobs } => self.text(idx, text, logprobs),
            Piece::Begin {
                call,
                id,
                kind,
                name,
            } => self.call(idx, call, CallNews::Begin(Call::new(id, kind, name))),
            Piece::Input { call, kind, text } => {
                let news = match kind {
                    CallKind::Function => CallNews::Arguments {
                        function: json!({"arguments": text}),
                    },
                    CallKind::Custom => CallNews::Input {
                        custom: json!({"input": text}),
                    },
                };
                self.call(idx, call, news)
            }
            Piece::End => String::new(),
            Piece::Done { reason, usage } => {
                self.done[idx] = Some(usage);
                let last = self.chunk(idx, Delta::default(), None, Some(reason));
                last + &self.closing()
            }
        }
    }

    /// An error ends the stream without its end mark.
    fn failure(&mut self, error: &ApiError) -> String {
        frame(&error.to_json())
    }
}

impl Chunks {
    fn text(&mut self, idx: usize, text: String, logprobs: Vec<TokenLogprob>) -> String {
        let delta = Delta {
            content: Some(Some(text)),
            ..Delta::default()
        };
        let logprobs = self.facts.with_logprobs.then_some(Logprobs {
            content: logprobs,
            refusal: None,
        });
        self.chunk(idx, delta, logprobs, None)
    }

    fn call(&self, idx: usize, call: usize, what: CallNews) -> String {
        let delta = Delta {
            tool_calls: vec![CallDelta { index: call, what }],
            ..Delta::default()
        };
        self.chunk(idx, delta, None, None)
    }

    /// After the last choice: the usage if asked for, and the end mark.
    fn closing(&mut self) -> String {
        let Some(usages) = self.done.iter().copied().collect::<Option<Vec<Usage>>>() else {
            return String::new();
        };
        let mut frames = String::new();
        if self.include_usage {
            let usage = Some(Some(UsageBody::of(&usages, self.facts.predicted)));
            frames.push_str(&frame(&Chunk {
                head: &self.head,
                choices: Vec::new(),
                usage,
            }));
        }
        if let Some((assembly, kept)) = self.assembly.take() {
            let metadata = Some(kept.metadata.clone());
            let whole = assembly.finish(self.head.clone(), self.facts.predicted, metadata);
            if let Err(error) = stored::keep(&self.app, &self.caller, &whole, kept) {
                return frames + &self.failure(&error);
            }
        }
        frames.push_str("data: [DONE]\n\n");
        frames
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
