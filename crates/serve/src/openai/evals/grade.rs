//! Grading: a grader, a row, an answer; a score, or why there is none.

use std::sync::Arc;
use std::time::Instant;

use bantam_judge::expression::ExpressionError;
use bantam_judge::grader::{Similarity, cosine};
use bantam_judge::template::TemplateError;
use serde_json::{Map, Value, json};

use super::asking::{Asked, Asker};
use super::criteria::{Criterion, Grader, MessageTemplate};
use crate::apart::apart;
use crate::error::ApiError;
use crate::openai::embeddings;
use crate::outside::SandboxError;

/// What a grader said of an answer.
pub(crate) struct Graded {
    /// Absent where it failed.
    pub(crate) score: Option<f64>,
    pub(crate) passed: bool,
    /// The scores of graders inside it.
    pub(crate) inner: Map<String, Value>,
    /// The models that were asked.
    pub(crate) asked: Vec<Asked>,
    /// What a judging model was asked and said.
    pub(crate) sample: Value,
    pub(crate) error: Option<GradeError>,
    pub(crate) seconds: f64,
}

/// Why there is no score, by the names that OpenAI's answer has for it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum GradeError {
    /// A template reads what is not there.
    Variable(String),
    /// A formula has no value.
    Formula(String),
    /// A judging model's answer is not what was asked for.
    ModelParse(String),
    /// A judging model declined.
    ModelRefusal,
    /// A judging model could not be asked.
    ModelServer(String),
    /// A program failed.
    PythonRuntime(String),
    /// A program could not be run.
    PythonServer(String),
    /// Anything else.
    Other(String),
}

impl GradeError {
    pub(crate) fn message(&self) -> String {
        match self {
            GradeError::ModelRefusal => "the judging model declined to answer".to_string(),
            GradeError::Variable(why)
            | GradeError::Formula(why)
            | GradeError::ModelParse(why)
            | GradeError::ModelServer(why)
            | GradeError::PythonRuntime(why)
            | GradeError::PythonServer(why)
            | GradeError::Other(why) => why.clone(),
        }
    }

    /// The fourteen fields of `metadata.errors`.
    pub(crate) fn flags(error: Option<&GradeError>) -> Value {
        let is = |wanted: fn(&GradeError) -> bool| error.is_some_and(wanted);
        let details = |wanted: fn(&GradeError) -> bool| {
            error.filter(|error| wanted(error)).map(GradeError::message)
        };
        json!({
            "formula_parse_error": is(|e| matches!(e, GradeError::Formula(_))),
            "sample_parse_error": false,
            "sample_parse_error_details": null,
            "truncated_observation_error": false,
            "unresponsive_reward_error": false,
            "invalid_variable_error": is(|e| matches!(e, GradeError::Variable(_))),
            "invalid_variable_error_details": details(|e| matches!(e, GradeError::Variable(_))),
            "other_error": is(|e| matches!(e, GradeError::Other(_))),
            "other_error_details": details(|e| matches!(e, GradeError::Other(_))),
            "python_grader_server_error": is(|e| matches!(e, GradeError::PythonServer(_))),
            "python_grader_server_error_type": details(|e| matches!(e, GradeError::PythonServer(_))),
            "python_grader_runtime_error": is(|e| matches!(e, GradeError::PythonRuntime(_))),
            "python_grader_runtime_error_details": details(|e| matches!(e, GradeError::PythonRuntime(_))),
            "model_grader_server_error": is(|e| matches!(e, GradeError::ModelServer(_))),
            "model_grader_server_error_details": details(|e| matches!(e, GradeError::ModelServer(_))),
            "model_grader_refusal_error": is(|e| matches!(e, GradeError::ModelRefusal)),
            "model_grader_parse_error": is(|e| matches!(e, GradeError::ModelParse(_))),
            "model_grader_parse_error_details": details(|e| matches!(e, GradeError::ModelParse(_))),
        })
    }
}

impl From<TemplateError> for GradeError {
    fn from(error: TemplateError) -> Self {
        GradeError::Variable(error.to_string())
    }
}

impl From<ExpressionError> for GradeError {
    fn from(error: ExpressionError) -> Self {
        GradeError::Formula(error.to_string())
    }
}

/// What is filled in as a grading goes on, whether it comes to a score or not.
#[derive(Default)]
struct Notes {
    inner: Map<String, Value>,
    asked: Vec<Asked>,
    sample: Value,
}

/// Grades an answer. A grader that fails gives an error, never a score.
pub(crate) async fn grade(
    asker: &Asker,
    criterion: &Criterion,
    item: &Arc<Value>,
    sample: &Arc<Value>,
) -> Graded {
    let began = Instant::now();
    let mut notes = Notes::default();
    let score = match &criterion.grader {
        Grader::Multi { graders, output } => {
            multi(asker, graders, output, item, sample, &mut notes).await
        }
        simple => score(asker, simple, item, sample, &mut notes).await,
    };
    let (score, error) = match score {
        Ok(score) => (Some(score), None),
        Err(error) => (None, Some(error)),
    };
    Graded {
        score,
        passed: score.is_some_and(|score| score >= criterion.threshold),
        inner: notes.inner,
        asked: notes.asked,
        sample: notes.sample,
        error,
        seconds: began.elapsed().as_secs_f64(),
    }
}

async fn multi(
    asker: &Asker,
    graders: &[(String, Criterion)],
    output: &bantam_judge::expression::Expression,
    item: &Arc<Value>,
    sample: &Arc<Value>,
    notes: &mut Notes,
) -> Result<f64, GradeError> {
    let mut scores: Vec<(&str, f64)> = Vec::with_capacity(graders.len());
    for (name, inner) in graders {
        let score = score(asker, &inner.grader, item, sample, notes).await?;
        notes.inner.insert(name.clone(), json!(score));
        scores.push((name, score));
    }
    let of = |name: &str| scores.iter().find(|(known, _)| *known == name);
    Ok(output.value(|name| of(name).map(|(_, score)| *score))?)
}

async fn score(
    asker: &Asker,
    grader: &Grader,
    item: &Arc<Value>,
    sample: &Arc<Value>,
    notes: &mut Notes,
) -> Result<f64, GradeError> {
    match grader {
        Grader::StringCheck {
            input,
            reference,
            operation,
        } => Ok(operation.score(&input.fill(item, sample)?, &reference.fill(item, sample)?)),
        Grader::TextSimilarity {
            input,
            reference,
            metric,
            model,
        } => {
            let (input, reference) = (input.fill(item, sample)?, reference.fill(item, sample)?);
            similarity(asker, *metric, model.as_deref(), input, reference).await
        }
        Grader::ScoreModel {
            model,
            input,
            range,
            sampling,
        } => {
            let [low, high] = range;
            let rule = format!(
                "Answer with a JSON object {{\"score\": N}}, where N is a number between {low} and {high}."
            );
            let schema = json!({"score": {"type": "number"}});
            let body = judging(input, item, sample, &rule, "score", schema, Some(sampling))?;
            let answer = judge(asker, model, body, notes).await?;
            let score = answer["score"].as_f64();
            score.filter(|s| (*low..=*high).contains(s)).ok_or_else(|| {
                let answer = answer.to_string();
                GradeError::ModelParse(format!(
                    "`{answer:.200}` holds no `score` between {low} and {high}"
                ))
            })
        }
        Grader::LabelModel {
            model,
            input,
            labels,
            passing,
        } => {
            let all = json!(labels);
            let rule =
                format!("Answer with a JSON object {{\"label\": L}}, where L is one of {all}.");
            let schema = json!({"label": {"type": "string", "enum": labels}});
            let body = judging(input, item, sample, &rule, "label", schema, None)?;
            let answer = judge(asker, model, body, notes).await?;
            let label = answer["label"].as_str().unwrap_or_default();
            if !labels.iter().any(|known| known == label) {
                let answer = answer.to_string();
                return Err(GradeError::ModelParse(format!(
                    "`{answer:.200}` holds no `label` of the grader's"
                )));
            }
            Ok(f64::from(u8::from(passing.iter().any(|l| l == label))))
        }
        Grader::Python { source } => program(asker, source, item, sample).await,
        // One inside another was refused when it came.
        Grader::Multi { .. } => Err(GradeError::Other(
            "a `multi` grader stands in another".to_string(),
        )),
    }
}

async fn similarity(
    asker: &Asker,
    metric: Similarity,
    model: Option<&str>,
    input: String,
    reference: String,
) -> Result<f64, GradeError> {
    if metric == Similarity::Cosine {
        if input.is_empty() || reference.is_empty() {
            // An empty text has no direction.
            return Ok(f64::from(u8::from(input == reference)));
        }
        let vectors = embeddings::vectors(&asker.app, &asker.owner, model, [input, reference]);
        let [a, b] = vectors.await.map_err(of_model)?;
        return Ok(cosine(&a, &b));
    }
    // Some metrics take the product of the texts' lengths.
    let scored = tokio::task::spawn_blocking(move || metric.score(&input, &reference)).await;
    scored
        .ok()
        .flatten()
        .ok_or_else(|| GradeError::Other("the texts could not be compared".to_string()))
}

fn of_model(error: ApiError) -> GradeError {
    GradeError::ModelServer(error.message)
}

/// What a judging model is asked: the grader's messages, the rule after the last, and an answer of one form.
fn judging(
    input: &[MessageTemplate],
    item: &Value,
    sample: &Value,
    rule: &str,
    name: &str,
    properties: Value,
    sampling: Option<&Map<String, Value>>,
) -> Result<Value, GradeError> {
    let mut messages = Vec::with_capacity(input.len());
    for message in input {
        let text = message.text.fill(item, sample)?;
        messages.push(json!({"role": message.role, "content": text}));
    }
    match messages.last_mut().filter(|last| last["role"] == "user") {
        Some(last) => {
            let text = last["content"].as_str().unwrap_or_default();
            last["content"] = json!(format!("{text}\n\n{rule}"));
        }
        None => messages.push(json!({"role": "user", "content": rule})),
    }
    let schema = json!({
        "type": "object", "properties": properties, "required": [name], "additionalProperties": false,
    });
    let mut body = json!({
        "messages": messages, "temperature": 0.0,
        "response_format": {
            "type": "json_schema", "json_schema": {"name": name, "strict": true, "schema": schema},
        },
    });
    for (name, value) in sampling.into_iter().flatten() {
        body[name] = value.clone();
    }
    Ok(body)
}

async fn judge(
    asker: &Asker,
    model: &str,
    body: Value,
    notes: &mut Notes,
) -> Result<Value, GradeError> {
    let messages = body["messages"].clone();
    let asked = asker.ask(model, body).await.map_err(of_model)?;
    notes.sample = json!({
        "input": messages, "output": [{"role": "assistant", "content": asked.text()}],
        "model": asked.model, "finish_reason": asked.finish_reason, "usage": asked.usage(),
    });
    let declined = asked.message["refusal"].is_string();
    let text = asked.text().to_string();
    let finish = asked.finish_reason.clone();
    notes.asked.push(asked);
    if declined {
        return Err(GradeError::ModelRefusal);
    }
    serde_json::from_str(&text).map_err(|_| {
        GradeError::ModelParse(format!("`{text:.200}` is not JSON (finished by {finish})"))
    })
}

async fn program(
    asker: &Asker,
    source: &str,
    item: &Arc<Value>,
    sample: &Arc<Value>,
) -> Result<f64, GradeError> {
    let Some(sandbox) = asker.app.config.sandbox.clone() else {
        return Err(GradeError::PythonServer(NO_SANDBOX.to_string()));
    };
    // No more programs at a time than the machine has room for.
    let permit = asker.app.programs.acquire().await;
    let _permit = permit.map_err(|_| GradeError::PythonServer("the server ends".to_string()))?;
    let (source, item, sample) = (source.to_string(), Arc::clone(item), Arc::clone(sample));
    let receive = apart("program", move || sandbox.grade(&source, &sample, &item))
        .map_err(|error| GradeError::PythonServer(error.to_string()))?;
    match receive.await {
        Ok(Ok(score)) => Ok(score),
        Ok(Err(SandboxError::Program(why))) => Err(GradeError::PythonRuntime(why)),
        Ok(Err(SandboxError::Server(why))) => Err(GradeError::PythonServer(why)),
        Err(_) => Err(GradeError::PythonServer(
            "the program's thread failed".to_string(),
        )),
    }
}

/// Why programs are refused by a server that was given no place for them.
pub(crate) const NO_SANDBOX: &str = "this server has no place to run programs in";
