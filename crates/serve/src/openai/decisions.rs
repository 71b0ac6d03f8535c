//! `POST /v1/decisions` and `POST /v1/rerank`: probabilities over closed sets.
//!
//! Nothing is generated: each option is scored as the whole answer, its end included, and the probabilities are those
//! scores, normalised over the options. The questions of a request share the input, which is read once. Where a
//! temperature was fitted for the model the scores are divided by it first; the answer says whether one was.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use serde_json::{Value, json};

use super::fields::Fields;
use super::messages::messages;
use super::responses;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::models::Model;
use crate::residents::Resident;
use crate::server::App;
use crate::worker::SharedSeat;

/// The most questions and documents of a request.
const QUESTIONS_MAX: usize = 400;
const DOCUMENTS_MAX: usize = 1000;

/// A question and its options.
struct Question {
    kind: Kind,
    name: Option<String>,
    text: String,
    /// The options as the model says them.
    options: Vec<String>,
}

enum Kind {
    Predicate,
    /// The values, as they were given.
    Choice(Vec<Value>),
    /// The labels, lowest first.
    Score(Vec<String>),
}

/// `POST /v1/decisions`
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = Caller::of(&http)?;
    let body = app.read_json(http).await?;
    let mut fields = Fields::of_body(&body)?;
    let model = app.model(&fields.need::<String>("model")?)?;
    let mut context = Vec::new();
    match fields.need::<Value>("input")? {
        Value::String(text) => context.push(json!({"role": "user", "content": text})),
        Value::Array(items) if !items.is_empty() => {
            for (i, item) in items.into_iter().enumerate() {
                responses::add_item(&format!("input[{i}]"), item, &mut context)?;
            }
        }
        _ => {
            let message = "`input` must be a string or an array of items";
            return Err(ApiError::invalid("input", message));
        }
    }
    let items = fields.items("questions")?.unwrap_or_default();
    if items.is_empty() || items.len() > QUESTIONS_MAX {
        let message = format!("`questions` must be 1 to {QUESTIONS_MAX}");
        return Err(ApiError::invalid("questions", message));
    }
    let questions: Result<Vec<Question>, _> = items
        .into_iter()
        .map(|(path, item)| question(&path, item))
        .collect();
    let questions = questions?;
    fields.finish(&[])?;
    caller.admit()?;
    let scorer = Scorer::new(&app, model).await?;
    let mut answers = Vec::with_capacity(questions.len());
    let mut n_tokens = 0;
    for question in questions {
        let mut asked = context.clone();
        ask(&mut asked, &question.text);
        let scored = scorer.score(asked, question.options.clone()).await?;
        n_tokens += scored.n_tokens;
        answers.push(question.answer(&scored.probabilities));
    }
    caller.spend(n_tokens as u64);
    Ok(Json(json!({
        "model": scorer.model.id, "answers": answers, "usage": usage(n_tokens),
        "calibrated": scorer.model.calibration.is_some(),
    })))
}

fn usage(n_tokens: usize) -> Value {
    json!({"input_tokens": n_tokens, "output_tokens": 0, "prompt_tokens": n_tokens, "total_tokens": n_tokens})
}

/// Puts a question after the conversation, into the user's turn if it is theirs.
fn ask(context: &mut Vec<Value>, question: &str) {
    if let Some(last) = context.last_mut().filter(|last| last["role"] == "user")
        && let Some(text) = last["content"].as_str()
    {
        last["content"] = json!(format!("{text}\n\n{question}"));
        return;
    }
    context.push(json!({"role": "user", "content": question}));
}

fn question(path: &str, item: Value) -> Result<Question, ApiError> {
    let mut fields = Fields::of(path, item)?;
    let kind: String = fields.need("type")?;
    let instructions: String = fields.need("instructions")?;
    let name: Option<String> = fields.take("name")?;
    let question = match kind.as_str() {
        "predicate" => Question {
            kind: Kind::Predicate,
            name,
            text: format!("{instructions}\nAnswer with true or false."),
            options: vec!["true".to_string(), "false".to_string()],
        },
        "choice" => {
            let mut text = format!("{instructions}\nAnswer with one of:");
            let (mut values, mut options) = (Vec::new(), Vec::new());
            for (path, item) in options_of(&mut fields, "choices", 2)? {
                let mut choice = Fields::of(path, item)?;
                let value: Value = choice.need("value")?;
                let option = match &value {
                    Value::String(text) if !text.is_empty() => text.clone(),
                    Value::Bool(flag) => flag.to_string(),
                    _ => {
                        let path = choice.path("value");
                        let message = format!("`{path}` must be a string or a boolean");
                        return Err(ApiError::invalid(path, message));
                    }
                };
                if options.contains(&option) {
                    let path = choice.path("value");
                    let message = format!("`{path}` is there twice");
                    return Err(ApiError::invalid(path, message));
                }
                line(&mut text, &option, choice.take("description")?);
                choice.finish(&[])?;
                values.push(value);
                options.push(option);
            }
            Question {
                kind: Kind::Choice(values),
                name,
                text,
                options,
            }
        }
        "score" => {
            let mut text = format!("{instructions}\nAnswer with one of these levels:");
            let mut labels = Vec::new();
            for (path, item) in options_of(&mut fields, "levels", 2)? {
                let mut level = Fields::of(path, item)?;
                let label: String = level.need("label")?;
                let number = (labels.len() + 1).to_string();
                let about: Option<String> = level.take("description")?;
                let about =
                    about.map_or_else(|| label.clone(), |about| format!("{label}: {about}"));
                line(&mut text, &number, Some(about));
                level.finish(&[])?;
                labels.push(label);
            }
            Question {
                options: (1..=labels.len()).map(|n| n.to_string()).collect(),
                kind: Kind::Score(labels),
                name,
                text,
            }
        }
        _ => {
            let path = fields.path("type");
            let message = format!("`{path}` must be `predicate`, `choice` or `score`");
            return Err(ApiError::invalid(path, message));
        }
    };
    fields.finish(&[])?;
    Ok(question)
}

fn line(text: &mut String, option: &str, about: Option<String>) {
    text.push_str("\n- ");
    text.push_str(option);
    if let Some(about) = about {
        text.push_str(": ");
        text.push_str(&about);
    }
}

fn options_of(
    fields: &mut Fields,
    name: &str,
    least: usize,
) -> Result<Vec<(String, Value)>, ApiError> {
    let items = fields.items(name)?.unwrap_or_default();
    if !(least..=255).contains(&items.len()) {
        let path = fields.path(name);
        let message = format!("`{path}` must be {least} to 255");
        return Err(ApiError::invalid(path, message));
    }
    Ok(items)
}

impl Question {
    fn answer(self, probabilities: &[f64]) -> Value {
        let best = (0..probabilities.len()).max_by(|a, b| {
            probabilities[*a]
                .total_cmp(&probabilities[*b])
                .then(b.cmp(a))
        });
        let best = best.unwrap_or(0);
        match self.kind {
            Kind::Predicate => {
                json!({"type": "predicate", "name": self.name, "probability": probabilities[0]})
            }
            Kind::Choice(values) => {
                let all = values.iter().zip(probabilities);
                let all: Vec<Value> = all
                    .map(|(value, p)| json!({"value": value, "probability": p}))
                    .collect();
                json!({
                    "type": "choice", "name": self.name, "choice": values[best],
                    "confidence": probabilities[best], "probabilities": all,
                })
            }
            Kind::Score(labels) => {
                let mean: f64 = probabilities
                    .iter()
                    .enumerate()
                    .map(|(i, p)| (i + 1) as f64 * p)
                    .sum();
                let all = labels.iter().zip(probabilities).enumerate();
                let all: Vec<Value> = all
                    .map(
                        |(i, (label, p))| json!({"value": i + 1, "label": label, "probability": p}),
                    )
                    .collect();
                json!({
                    "type": "score", "name": self.name, "score": mean,
                    "confidence": probabilities[best], "probabilities": all,
                })
            }
        }
    }
}

struct Scored {
    probabilities: Vec<f64>,
    n_tokens: usize,
}

/// Asks a model for likelihoods: its adapter is in memory, and its place in the queue kept, from question to question.
struct Scorer {
    model: Arc<Model>,
    resident: Option<Arc<Resident>>,
    seat: SharedSeat,
}

impl Scorer {
    async fn new(app: &App, model: Arc<Model>) -> Result<Self, ApiError> {
        let seat = model.worker.seat(1)?.share();
        let resident = app.models.resident(&model).await?;
        Ok(Self {
            model,
            resident,
            seat,
        })
    }

    /// How likely each option is as the answer to a conversation, among the options.
    async fn score(
        &self,
        conversation: Vec<Value>,
        options: Vec<String>,
    ) -> Result<Scored, ApiError> {
        let model = Arc::clone(&self.model);
        let encoding = move || -> Result<(Vec<u32>, Vec<Vec<u32>>), ApiError> {
            let items = conversation.into_iter().enumerate();
            let items = items.map(|(i, message)| (format!("input[{i}]"), message));
            let messages = messages(items.collect())?;
            let prompt = model.chat.prompt(&messages, &[]);
            let prompt = prompt.map_err(|e| ApiError::invalid("input", e.to_string()))?;
            let tokenizer = model.chat.tokenizer();
            let end = model.chat.end_tokens().first().copied();
            let options = options.iter().map(|option| {
                let mut ids = tokenizer.encode_plain(option);
                ids.extend(end);
                ids
            });
            Ok((prompt, options.collect()))
        };
        let (prompt, options) = tokio::task::spawn_blocking(encoding)
            .await
            .map_err(|_| ApiError::internal("the request failed"))??;
        let n_tokens = prompt.len() + options.iter().map(Vec::len).sum::<usize>();
        let worker = &self.model.worker;
        let resident = self.resident.clone();
        let scores = worker.score(prompt, options, resident, &self.seat).await?;
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let temperature = self.model.calibration.unwrap_or(1.0);
        let weights = scores
            .iter()
            .map(|score| ((score - max) / temperature).exp());
        let weights: Vec<f64> = weights.collect();
        let sum: f64 = weights.iter().sum();
        if !sum.is_finite() || sum <= 0.0 {
            return Err(ApiError::internal("the options have no likelihood"));
        }
        Ok(Scored {
            probabilities: weights.into_iter().map(|w| w / sum).collect(),
            n_tokens,
        })
    }
}

/// `POST /v1/rerank`: documents by how likely the model finds that they answer the query.
pub(crate) async fn rerank(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = Caller::of(&http)?;
    let body = app.read_json(http).await?;
    let mut fields = Fields::of_body(&body)?;
    let model = app.model(&fields.need::<String>("model")?)?;
    let query: String = fields.need("query")?;
    let items = fields.items("documents")?.unwrap_or_default();
    if items.is_empty() || items.len() > DOCUMENTS_MAX {
        let message = format!("`documents` must be 1 to {DOCUMENTS_MAX}");
        return Err(ApiError::invalid("documents", message));
    }
    let mut documents = Vec::with_capacity(items.len());
    for (path, item) in items {
        match item {
            Value::String(text) => documents.push(text),
            other => {
                let mut document = Fields::of(path, other)?;
                documents.push(document.need("text")?);
                document.finish(&[])?;
            }
        }
    }
    let top_n = fields
        .whole("top_n", 1, u64::MAX)?
        .unwrap_or(documents.len());
    let with_documents = fields.take("return_documents")?.unwrap_or(false);
    fields.finish(&[])?;
    caller.admit()?;
    let scorer = Scorer::new(&app, model).await?;
    let mut n_tokens = 0;
    let mut ranked = Vec::with_capacity(documents.len());
    for (index, document) in documents.iter().enumerate() {
        // The query comes first: it is what the prompts share.
        let text = format!(
            "Query: {query}\n\nDocument: {document}\n\nDoes the document answer the query? Answer with yes or no."
        );
        let asked = vec![json!({"role": "user", "content": text})];
        let options = vec!["yes".to_string(), "no".to_string()];
        let scored = scorer.score(asked, options).await?;
        n_tokens += scored.n_tokens;
        ranked.push((index, scored.probabilities[0]));
    }
    caller.spend(n_tokens as u64);
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let results: Vec<Value> = ranked
        .into_iter()
        .take(top_n)
        .map(|(index, relevance)| {
            let mut result = json!({"index": index, "relevance_score": relevance});
            if with_documents {
                result["document"] = json!({"text": documents[index]});
            }
            result
        })
        .collect();
    Ok(Json(json!({
        "id": ids::random("rerank-"), "model": scorer.model.id, "results": results, "usage": usage(n_tokens),
    })))
}
