//! `/tokenize`, `/detokenize` and `/tokenizer_info`: what a model reads, before it reads it.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, Request, State};
use serde_json::{Value, json};

use super::fields::Fields;
use super::messages::messages;
use super::tools::ToolUse;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::models::Model;
use crate::query;
use crate::server::App;

/// The model of this name; without a name, the one that is served, if there is one alone.
fn model(app: &App, name: Option<String>) -> Result<Arc<Model>, ApiError> {
    if let Some(name) = name {
        return app.model(&name);
    }
    match &app.models.listed()[..] {
        [one] => Ok(Arc::clone(one)),
        _ => Err(ApiError::missing("model")),
    }
}

/// `GET /tokenizer_info`: what a client that counts tokens itself wants to know; `?model=` where there are several.
pub(crate) async fn info(
    State(app): State<Arc<App>>,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    Caller::of(&request)?;
    let mut name = None;
    for (key, value) in query::pairs(raw.as_deref()) {
        match key.as_str() {
            "model" => name = Some(value),
            _ => return Err(ApiError::unknown(&key)),
        }
    }
    let model = model(&app, name)?;
    let tokenizer = model.chat.tokenizer();
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.token_text(id));
    Ok(Json(json!({
        "model": model.id,
        "vocab_size": tokenizer.vocab_size(),
        "max_model_len": model.worker.info.max_context,
        "bos_token": text(tokenizer.bos()),
        "eos_token": text(tokenizer.eos()),
        "pad_token": text(tokenizer.pad()),
        "chat_template": model.chat.template().source(),
    })))
}

/// `{"model", "prompt"}` or `{"model", "messages", "tools"?}` to `{"tokens", "count", "max_model_len"}`; with
/// `return_token_strs` the tokens' texts, too.
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    Caller::of(&http)?;
    let body = app.read_json(http).await?;
    let mut fields = Fields::of_body(&body)?;
    let model = model(&app, fields.take("model")?)?;
    // A text is cut as it stands either way; only what the model itself puts first is left out.
    let with_first = fields.take("add_special_tokens")?.unwrap_or(true);
    let prompt: Option<String> = fields.take("prompt")?;
    let conversation = fields.items("messages")?.map(messages).transpose()?;
    let tools = ToolUse::take(&mut fields, false)?;
    let with_texts = fields.take("return_token_strs")?.unwrap_or(false);
    fields.finish(&[])?;
    let working = tokio::task::spawn_blocking(move || {
        let tokenizer = model.chat.tokenizer();
        let tokens = match (prompt, conversation) {
            (Some(text), None) => {
                let first = tokenizer
                    .bos()
                    .filter(|_| with_first && tokenizer.add_bos());
                first.into_iter().chain(tokenizer.encode(&text)).collect()
            }
            (None, Some(messages)) => {
                let (functions, customs) = match &tools {
                    Some(tools) => (&*tools.shown.functions, &*tools.shown.customs),
                    None => (&[][..], &[][..]),
                };
                (model.chat.prompt_with(&messages, functions, customs))
                    .map_err(|e| ApiError::invalid("messages", e.to_string()))?
            }
            (None, None) => return Err(ApiError::missing("prompt")),
            (Some(_), Some(_)) => {
                let message = "`prompt` and `messages` cannot be combined";
                return Err(ApiError::invalid("prompt", message));
            }
        };
        let mut answer = json!({
            "count": tokens.len(),
            "max_model_len": model.worker.info.max_context,
            "tokens": tokens,
        });
        if with_texts {
            let text = |id: &u32| String::from_utf8_lossy(tokenizer.token_bytes(*id)).into_owned();
            answer["token_strs"] = tokens.iter().map(text).collect();
        }
        Ok(Json(answer))
    });
    working
        .await
        .map_err(|_| ApiError::internal("the request failed"))?
}

/// `{"model", "tokens"}` to `{"prompt"}`.
pub(crate) async fn detokenize(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    Caller::of(&http)?;
    let body = app.read_json(http).await?;
    let mut fields = Fields::of_body(&body)?;
    let model = model(&app, fields.take("model")?)?;
    let tokens: Vec<u32> = fields.need("tokens")?;
    fields.finish(&[])?;
    let tokenizer = model.chat.tokenizer();
    let vocab = tokenizer.vocab_size();
    if let Some(at) = tokens.iter().position(|id| *id as usize >= vocab) {
        let message = format!("`tokens[{at}]` is not in the vocabulary of {vocab} tokens");
        return Err(ApiError::invalid(format!("tokens[{at}]"), message));
    }
    Ok(Json(json!({"prompt": tokenizer.decode(&tokens)})))
}
