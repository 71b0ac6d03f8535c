//! `POST /v1/embeddings`: texts as vectors.
//!
//! A sentence encoder gives its own vectors, a generating model the mean of its last layer over the tokens, scaled to
//! length 1. Fewer `dimensions`
//! are the first ones, scaled to length 1 again.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use bantam_engine::{EmbedError, shorten};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::fields::Fields;
use super::prompt::{Prompt, prompts};
use crate::caller::Caller;
use crate::error::ApiError;
use crate::server::App;

/// The most texts of a request, as OpenAI has it.
const INPUTS_MAX: usize = 2048;

pub(crate) async fn create(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let caller = Caller::of(&http)?;
    let body = app.read_json(http).await?;
    answer(&app, &caller, &body).await.map(Json)
}

/// The answer to a body.
pub(crate) async fn answer(
    app: &Arc<App>,
    caller: &Caller,
    body: &[u8],
) -> Result<Value, ApiError> {
    let mut fields = Fields::of_body(body)?;
    let model: String = fields.need("model")?;
    let input: Value = fields.need("input")?;
    let inputs = prompts("input", Some(input))?;
    let dimensions = fields.whole("dimensions", 1, u64::MAX)?;
    let encoding: Option<String> = fields.take("encoding_format")?;
    let as_base64 = match encoding.as_deref() {
        None | Some("float") => false,
        Some("base64") => true,
        Some(_) => {
            let message = "`encoding_format` must be `float` or `base64`";
            return Err(ApiError::invalid("encoding_format", message));
        }
    };
    fields.finish(&[])?;
    if inputs.len() > INPUTS_MAX {
        let message = format!(
            "`input` must be at most {INPUTS_MAX} texts, not {}",
            inputs.len()
        );
        return Err(ApiError::invalid("input", message));
    }
    caller.admit()?;
    let vectors = app.models.embedder(&model).await?;
    let embedder = Arc::clone(&vectors.embedder);
    let dims = embedder.dims();
    if dimensions.is_some_and(|n| n > dims) {
        let message = format!("`dimensions` must be at most {dims} for this model");
        return Err(ApiError::invalid("dimensions", message));
    }
    // One request of embeddings computes at a time: the others would only take its threads.
    let turn = app.embedding.acquire().await;
    let turn = turn.map_err(|_| ApiError::stopping())?;
    let computing = move || -> Result<(Vec<Vec<f32>>, usize), ApiError> {
        let tokens: Vec<Vec<u32>> = inputs
            .into_iter()
            .enumerate()
            .map(|(i, input)| match input {
                Prompt::Text(text) if text.is_empty() => {
                    let path = format!("input[{i}]");
                    let message = format!("`{path}` is empty");
                    Err(ApiError::invalid(path, message))
                }
                Prompt::Text(text) => Ok(embedder.encode(&text)),
                Prompt::Tokens(ids) => Ok(ids),
            })
            .collect::<Result<_, _>>()?;
        let n_tokens = tokens.iter().map(Vec::len).sum();
        let mut vectors = embedder.embed(&tokens).map_err(|error| match error {
            EmbedError::TooLong { index, tokens, max } => {
                ApiError::too_long_input(&format!("input[{index}]"), tokens, max)
            }
            error => ApiError::invalid("input", error.to_string()),
        })?;
        if let Some(n) = dimensions {
            vectors.iter_mut().for_each(|vector| shorten(vector, n));
        }
        Ok((vectors, n_tokens))
    };
    let (rows, n_tokens) = tokio::task::spawn_blocking(computing)
        .await
        .map_err(|_| ApiError::internal("the request failed"))??;
    drop(turn);
    let show = |(index, vector): (usize, Vec<f32>)| {
        let embedding = if as_base64 {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            json!(STANDARD.encode(bytes))
        } else {
            json!(vector)
        };
        json!({"object": "embedding", "index": index, "embedding": embedding})
    };
    let data: Vec<Value> = rows.into_iter().enumerate().map(show).collect();
    caller.spend(n_tokens as u64);
    Ok(json!({
        "object": "list", "data": data, "model": vectors.id,
        "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
    }))
}

/// The vectors of two texts, by a model or, if none is named, by the first that is there for it.
pub(crate) async fn vectors(
    app: &Arc<App>,
    owner: &str,
    model: Option<&str>,
    texts: [String; 2],
) -> Result<[Vec<f32>; 2], ApiError> {
    let first = || {
        let encoders = app.models.embedders();
        let encoder = encoders.first().map(|encoder| encoder.id.clone());
        encoder.or_else(|| app.models.ids().into_iter().next())
    };
    let model = model.map(str::to_string).or_else(first).unwrap_or_default();
    let body = json!({"model": model, "input": texts}).to_string();
    let answer = answer(app, &app.door.absent(owner)?, body.as_bytes()).await?;
    let vector = |i: usize| -> Vec<f32> {
        let numbers = answer["data"][i]["embedding"].as_array();
        let numbers = numbers.into_iter().flatten();
        numbers
            .filter_map(|x| x.as_f64().map(|x| x as f32))
            .collect()
    };
    Ok([vector(0), vector(1)])
}
