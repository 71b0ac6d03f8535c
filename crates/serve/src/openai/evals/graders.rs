//! `/v1/fine_tuning/alpha/graders`: a grader tried on one answer.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use axum::Json;
use axum::extract::{Request, State};
use serde_json::{Map, Value, json};

use super::asking::Asker;
use super::criteria::{Criterion, Use, criterion, sample_of};
use super::grade::{GradeError, grade};
use super::runs;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::openai::fields::Fields;
use crate::server::App;

fn grader(fields: &mut Fields) -> Result<Criterion, ApiError> {
    criterion("grader", fields.need("grader")?, Use::Alone)
}

/// `POST /v1/fine_tuning/alpha/graders/validate`: the grader, if it can be run here.
pub(crate) async fn validate(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    Caller::of(&http)?;
    let body = app.read_json(http).await?;
    let mut fields = Fields::of_body(&body)?;
    let criterion = grader(&mut fields)?;
    fields.finish(&[])?;
    runs::ready(&app, std::slice::from_ref(&criterion), None).await?;
    Ok(Json(json!({"grader": criterion.shown})))
}

/// `POST /v1/fine_tuning/alpha/graders/run`: a grader that fails is told in `metadata.errors`, and its reward is 0.
pub(crate) async fn run(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&http)?.owner;
    let body = app.read_json(http).await?;
    let mut fields = Fields::of_body(&body)?;
    let criterion = grader(&mut fields)?;
    let answer: String = fields.need("model_sample")?;
    let item: Map<String, Value> = fields.take("item")?.unwrap_or_default();
    // It was called so before.
    fields.finish(&[("reference_answer", &[], "it stands in `item`")])?;
    runs::ready(&app, std::slice::from_ref(&criterion), None).await?;
    let asker = Asker {
        app: Arc::clone(&app),
        owner,
        stop: Arc::new(AtomicBool::new(false)),
    };
    let sample = sample_of(&answer, json!({"output_tools": [], "choices": []}));
    let graded = grade(
        &asker,
        &criterion,
        &Arc::new(Value::Object(item)),
        &Arc::new(sample),
    )
    .await;
    let mut usage: Map<String, Value> = Map::new();
    let mut tokens = 0;
    for asked in &graded.asked {
        let n = asked.prompt_tokens + asked.completion_tokens;
        tokens += n;
        let before = usage.get(&asked.model).and_then(Value::as_u64).unwrap_or(0);
        usage.insert(asked.model.clone(), json!(before + n));
    }
    let was_asked = !graded.asked.is_empty();
    Ok(Json(json!({
        "reward": graded.score.unwrap_or(0.0),
        "metadata": {
            "name": criterion.name, "type": criterion.kind,
            "errors": GradeError::flags(graded.error.as_ref()),
            "execution_time": graded.seconds,
            "scores": graded.inner,
            "token_usage": was_asked.then_some(tokens),
            "sampled_model_name": graded.asked.first().map(|asked| &asked.model),
        },
        "sub_rewards": graded.inner,
        "model_grader_token_usage_per_model": usage,
    })))
}
