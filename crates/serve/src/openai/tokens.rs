//! `POST /tokenize` and `POST /detokenize`: what a model reads, before it reads it.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use serde_json::{Value, json};

use super::fields::Fields;
use super::messages::messages;
use super::tools::ToolUse;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::server::App;

/// `{"model", "prompt"}` or `{"model", "messages", "tools"?}` to `{"tokens", "count", "max_model_len"}`; with
/// `return_token_strs` the tokens' texts, too.
pub(crate) async fn tokenize(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    Caller::of(&http)?;
    let body = app.read_json(http).await?;
    let mut fields = Fields::of_body(&body)?;
    let model = app.model(&fields.need::<String>("model")?)?;
    let prompt: Option<String> = fields.take("prompt")?;
    let conversation = fields.items("messages")?.map(messages).transpose()?;
    let tools = ToolUse::take(&mut fields, false)?;
    let with_texts = fields.take("return_token_strs")?.unwrap_or(false);
    fields.finish(&[])?;
    let working = tokio::task::spawn_blocking(move || {
        let tokenizer = model.chat.tokenizer();
        let tokens = match (prompt, conversation) {
            (Some(text), None) => tokenizer.encode(&text),
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
    let model = app.model(&fields.need::<String>("model")?)?;
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
