//! `POST /v1/completions`: text that goes on, without a conversation around it.
//!
//! With `echo` and `logprobs` the prompt's own tokens are reported, too: what harnesses that compare the
//! likelihood of given answers ask for.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request as HttpRequest, State};
use axum::response::{IntoResponse, Response};
use bantam_engine::{Request, Sampling, Usage};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::answers::{Answers, Piece};
use super::ask::{Job, check_biases, choices};
use super::chat::FINGERPRINT;
use super::fields::{Fields, Neutral};
use super::format::{Wanted, constraint};
use super::prompt::{Prompt, prompts};
use super::response::{TokenLogprob, UsageBody};
use super::score;
use super::sse::{self, Writer, frame};
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::models::Model;
use crate::server::App;

const ROUTE: &str = "/v1/completions";

const NEUTRAL: &[Neutral] = &[(
    "suffix",
    &["\"\""],
    "models here are not trained to fill gaps",
)];

/// A checked request.
pub(crate) struct CompletionRequest {
    model: String,
    prompts: Vec<Prompt>,
    n: usize,
    best_of: usize,
    echo: bool,
    pub(crate) stream: bool,
    include_usage: bool,
    logprobs: Option<usize>,
    max_tokens: usize,
    temperature: Option<f32>,
    sampling: Sampling,
    seed: Option<i64>,
    stop: Vec<String>,
    wanted: Option<Wanted>,
}

impl CompletionRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let mut fields = Fields::of_body(body)?;
        let model = fields.need("model")?;
        let prompts = prompts("prompt", fields.take("prompt")?)?;
        let (stream, include_usage) = fields.stream()?;
        let echo = fields.take("echo")?.unwrap_or(false);
        let n = fields.whole("n", 1, 128)?.unwrap_or(1);
        let best_of = fields.whole("best_of", 1, 20)?.unwrap_or(n);
        if best_of < n {
            let message = format!("`best_of` must be at least `n`, {n}");
            return Err(ApiError::invalid("best_of", message));
        }
        let logprobs = fields.whole("logprobs", 0, 20)?;
        let least = u64::from(!echo);
        let max_tokens = fields.whole("max_tokens", least, u64::MAX)?.unwrap_or(16);
        if stream && (best_of > n || (echo && logprobs.is_some())) {
            let message = "`best_of`, and `echo` with `logprobs`, cannot be streamed";
            return Err(ApiError::invalid("stream", message));
        }
        let request = Self {
            model,
            prompts,
            n,
            best_of,
            echo,
            stream,
            include_usage,
            logprobs,
            max_tokens,
            temperature: fields.ranged("temperature", 0.0, 2.0)?,
            sampling: fields.sampling()?,
            seed: fields.take("seed")?,
            stop: fields.stops()?,
            wanted: constraint(&mut fields)?,
        };
        fields.finish(NEUTRAL)?;
        Ok(request)
    }

    /// The prompts' tokens, and one request for each choice; those that score a prompt come first.
    fn prepare(self, model: &Model, prompts: &[Vec<u32>]) -> Result<Job, ApiError> {
        let info = model.worker.info;
        check_biases(&self.sampling, info.vocab)?;
        let mut requests = Vec::new();
        if let (true, Some(top)) = (self.echo, self.logprobs) {
            let scored = prompts.iter().filter(|prompt| prompt.len() > 1);
            requests.extend(
                scored.map(|prompt| score::request(prompt[..1].to_vec(), &prompt[1..], top)),
            );
        }
        let constraint = match &self.wanted {
            None => None,
            Some((param, spec)) => Some(
                (model.constraints.compile(spec))
                    .map_err(|e| ApiError::constraint(param, e.to_string()))?
                    .into(),
            ),
        };
        let mut sampling = self.sampling;
        sampling.temperature = self.temperature.unwrap_or(model.default_temperature);
        if self.max_tokens > 0 {
            for prompt in prompts {
                let one = Request {
                    prompt: prompt.clone(),
                    max_tokens: self.max_tokens,
                    sampling: sampling.clone(),
                    stop: self.stop.clone(),
                    end_tokens: model.chat.end_tokens().to_vec(),
                    constraint: Clone::clone(&constraint),
                    // The best are found by their log-probabilities.
                    logprobs: self.logprobs.or((self.best_of > self.n).then_some(0)),
                    ..Request::default()
                };
                requests.extend(choices(one, self.best_of, self.seed));
            }
        }
        let with_logprobs = self.logprobs.is_some() || self.best_of > self.n;
        Ok(Job {
            requests,
            grammar: None,
            with_logprobs,
        })
    }
}

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    http: HttpRequest,
) -> Result<Response, ApiError> {
    let caller = Caller::of(&http)?;
    let body = app.read_json(http).await?;
    let request = CompletionRequest::parse(&body)?;
    drop(body);
    if !request.stream {
        let whole = whole(&app, &caller, request).await?;
        return Ok(Json(whole).into_response());
    }
    let include_usage = request.include_usage;
    let Started {
        answers,
        head,
        plan,
    } = start(&app, &caller, request).await?;
    let answers = answers.ok_or_else(|| ApiError::internal("there is nothing to stream"))?;
    let n = answers.len();
    let writer = Chunks {
        head,
        plan,
        include_usage,
        done: vec![None; n],
        offsets: vec![0; n],
    };
    Ok(sse::response(answers, Box::new(writer)))
}

#[derive(Clone, Serialize)]
struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: &'static str,
}

/// Which answer is which, and what is shown of it.
struct Plan {
    n: usize,
    best_of: usize,
    logprobs: Option<usize>,
    prompts: Vec<Vec<u32>>,
    /// The prompts as text, if they are echoed.
    echo: Option<Vec<String>>,
    /// For each prompt, the answer that scores it.
    scores: Vec<Option<usize>>,
    /// The first answer that is no score.
    first: usize,
}

struct Started {
    answers: Option<Answers>,
    head: Head,
    plan: Plan,
}

async fn start(
    app: &Arc<App>,
    caller: &Caller,
    request: CompletionRequest,
) -> Result<Started, ApiError> {
    let model = app.model(&request.model)?;
    let prompts: Vec<Vec<u32>> = {
        let (model, prompts) = (Arc::clone(&model), request.prompts.clone());
        let encoding = move || -> Result<_, ApiError> {
            prompts.iter().map(|p| p.encode("prompt", &model)).collect()
        };
        tokio::task::spawn_blocking(encoding)
            .await
            .map_err(|_| ApiError::internal("the request failed"))??
    };
    let is_scored = request.echo && request.logprobs.is_some();
    let mut n_scores = 0;
    let scores = prompts
        .iter()
        .map(|prompt| {
            (is_scored && prompt.len() > 1).then(|| {
                n_scores += 1;
                n_scores - 1
            })
        })
        .collect();
    let tokenizer = model.chat.tokenizer();
    let plan = Plan {
        n: request.n,
        best_of: request.best_of,
        logprobs: request.logprobs,
        echo: request.echo.then(|| {
            let texts = request.prompts.iter().zip(&prompts);
            texts
                .map(|(given, ids)| match given {
                    Prompt::Text(text) => text.clone(),
                    Prompt::Tokens(_) => tokenizer.decode(ids),
                })
                .collect()
        }),
        scores,
        first: n_scores,
        prompts: prompts.clone(),
    };
    let n_generated = if request.max_tokens > 0 {
        prompts.len() * request.best_of
    } else {
        0
    };
    let n = n_scores + n_generated;
    let capacity = model.worker.info.capacity;
    if n > capacity {
        let message = format!(
            "`prompt` asks for {n} answers at once, counting `n` and scores; at most {capacity} can be given here"
        );
        return Err(ApiError::invalid("prompt", message));
    }
    let head = Head {
        id: ids::random("cmpl-"),
        object: "text_completion",
        created: ids::now(),
        model: model.id.clone(),
        system_fingerprint: FINGERPRINT,
    };
    let answers = if n == 0 {
        None
    } else {
        let prepare = move |model: &Model| request.prepare(model, &prompts);
        Some(Answers::prepare(app, caller, &model, ROUTE, n, prepare).await?)
    };
    Ok(Started {
        answers,
        head,
        plan,
    })
}

/// The whole answer to a request, whatever it says of streaming.
pub(crate) async fn whole(
    app: &Arc<App>,
    caller: &Caller,
    request: CompletionRequest,
) -> Result<Value, ApiError> {
    let Started {
        answers,
        head,
        plan,
    } = start(app, caller, request).await?;
    let model = app.model(&head.model)?;
    let mut all: Vec<Answer> = Vec::new();
    if let Some(mut answers) = answers {
        all.resize_with(answers.len(), Answer::default);
        while let Some(next) = answers.next().await {
            match next? {
                (idx, Piece::Text { text, logprobs }) => {
                    all[idx].text.push_str(&text);
                    all[idx].logprobs.extend(logprobs);
                }
                (idx, Piece::Done { reason, usage }) => {
                    all[idx].reason = reason;
                    all[idx].usage = usage;
                }
                _ => {}
            }
        }
    }
    let mut shown = Vec::new();
    let mut usage = Usage::default();
    for (i, prompt) in plan.prompts.iter().enumerate() {
        usage.prompt_tokens += prompt.len();
        let generated = plan.first + i * plan.best_of;
        let mut own: Vec<Answer> = match all.get(generated..generated + plan.best_of) {
            Some(own) => own.to_vec(),
            // Nothing was to be generated: the prompt alone is the answer.
            None => vec![
                Answer {
                    reason: "length",
                    ..Answer::default()
                };
                plan.n
            ],
        };
        let own_usage = own.iter().map(|answer| answer.usage);
        usage.completion_tokens += own_usage
            .clone()
            .map(|u| u.completion_tokens)
            .sum::<usize>();
        usage.cached_tokens += own_usage.map(|u| u.cached_tokens).next().unwrap_or(0);
        if plan.best_of > plan.n {
            own.sort_by(|a, b| b.mean().total_cmp(&a.mean()));
            own.truncate(plan.n);
        }
        let score = plan.scores[i].and_then(|idx| all.get(idx));
        for answer in own {
            let echo = plan.echo.as_ref().map(|texts| texts[i].as_str());
            let logprobs = plan.logprobs.map(|_| {
                let mut list = List::default();
                if echo.is_some() {
                    // Nothing comes before the first token, so nothing is known of it.
                    list.first(model.chat.tokenizer().token_bytes(prompt[0]));
                    for one in score.iter().flat_map(|score| &score.logprobs) {
                        list.push(one);
                    }
                }
                for one in &answer.logprobs {
                    list.push(one);
                }
                list
            });
            shown.push(json!({
                "index": shown.len(),
                "text": echo.unwrap_or_default().to_string() + &answer.text,
                "logprobs": logprobs,
                "finish_reason": answer.reason,
            }));
        }
    }
    let mut body = serde_json::to_value(&head).unwrap_or_default();
    body["choices"] = Value::Array(shown);
    body["usage"] = json!(UsageBody::of(&[usage], false));
    Ok(body)
}

#[derive(Clone, Default)]
struct Answer {
    text: String,
    logprobs: Vec<TokenLogprob>,
    reason: &'static str,
    usage: Usage,
}

impl Answer {
    /// The mean log-probability of a token.
    fn mean(&self) -> f64 {
        let sum: f64 = self
            .logprobs
            .iter()
            .map(|l| f64::from(l.taken.logprob))
            .sum();
        sum / self.logprobs.len().max(1) as f64
    }
}

/// Log-probabilities as lists side by side.
#[derive(Default, Serialize)]
struct List {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
    #[serde(skip)]
    offset: usize,
}

impl List {
    fn add(&mut self, bytes: &[u8]) {
        self.tokens.push(show(bytes));
        self.text_offset.push(self.offset);
        // Continuation bytes belong to a character that has been counted.
        self.offset += bytes.iter().filter(|b| **b & 0xc0 != 0x80).count();
    }

    fn first(&mut self, bytes: &[u8]) {
        self.add(bytes);
        self.token_logprobs.push(None);
        self.top_logprobs.push(None);
    }

    fn push(&mut self, one: &TokenLogprob) {
        self.add(&one.taken.bytes);
        self.token_logprobs.push(Some(one.taken.logprob));
        let mut top = Map::new();
        for other in &one.top_logprobs {
            let text = show(&other.bytes);
            top.entry(text).or_insert(json!(other.logprob));
        }
        if !one.top_logprobs.is_empty() {
            top.entry(show(&one.taken.bytes))
                .or_insert(json!(one.taken.logprob));
        }
        self.top_logprobs.push(Some(top));
    }
}

/// A token as text; one that is no text by itself in OpenAI's spelling.
fn show(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_string(),
        Err(_) => {
            let escaped = bytes.iter().map(|b| format!("\\x{b:02x}"));
            "bytes:".to_string() + &escaped.collect::<String>()
        }
    }
}

/// Turns parts of answers into chunks.
struct Chunks {
    head: Head,
    plan: Plan,
    include_usage: bool,
    done: Vec<Option<Usage>>,
    offsets: Vec<usize>,
}

impl Chunks {
    fn chunk(
        &self,
        idx: usize,
        text: &str,
        logprobs: Option<List>,
        reason: Option<&str>,
    ) -> String {
        let choice = json!({
            "index": idx, "text": text, "logprobs": logprobs, "finish_reason": reason,
        });
        self.frame(vec![choice], Value::Null)
    }

    fn frame(&self, choices: Vec<Value>, usage: Value) -> String {
        let mut body = serde_json::to_value(&self.head).unwrap_or_default();
        body["choices"] = Value::Array(choices);
        if self.include_usage {
            body["usage"] = usage;
        }
        frame(&body)
    }
}

impl Writer for Chunks {
    fn opening(&mut self) -> String {
        let Some(texts) = &self.plan.echo else {
            return String::new();
        };
        (0..self.done.len())
            .map(|idx| self.chunk(idx, &texts[idx / self.plan.n], None, None))
            .collect()
    }

    fn piece(&mut self, idx: usize, piece: Piece) -> String {
        match piece {
            Piece::Text { text, logprobs } => {
                let list = self.plan.logprobs.map(|_| {
                    let mut list = List {
                        offset: self.offsets[idx],
                        ..List::default()
                    };
                    logprobs.iter().for_each(|one| list.push(one));
                    self.offsets[idx] = list.offset;
                    list
                });
                self.chunk(idx, &text, list, None)
            }
            Piece::Done { reason, usage } => {
                self.done[idx] = Some(usage);
                let mut frames = self.chunk(idx, "", None, Some(reason));
                if let Some(all) = self.done.iter().copied().collect::<Option<Vec<_>>>() {
                    if self.include_usage {
                        let usage = Usage {
                            prompt_tokens: self.plan.prompts.iter().map(Vec::len).sum(),
                            cached_tokens: all[0].cached_tokens,
                            completion_tokens: all.iter().map(|u| u.completion_tokens).sum(),
                            ..Usage::default()
                        };
                        let usage = json!(UsageBody::of(&[usage], false));
                        frames.push_str(&self.frame(Vec::new(), usage));
                    }
                    frames.push_str("data: [DONE]\n\n");
                }
                frames
            }
            _ => String::new(),
        }
    }

    fn failure(&mut self, error: &ApiError) -> String {
        frame(&error.to_json())
    }
}
