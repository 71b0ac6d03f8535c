//! Asking a model for an eval, be it served here or a provider's.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::apart::apart;
use crate::error::ApiError;
use crate::openai::chat;
use crate::outside::{ProviderAnswer, Providers};
use crate::server::App;

/// Who asks, on whose behalf, and whether they still want to know.
#[derive(Clone)]
pub(crate) struct Asker {
    pub(crate) app: Arc<App>,
    pub(crate) owner: String,
    pub(crate) stop: Arc<AtomicBool>,
}

/// An answer and what it took.
pub(crate) struct Asked {
    pub(crate) model: String,
    /// The assistant's message.
    pub(crate) message: Value,
    pub(crate) finish_reason: String,
    pub(crate) prompt_tokens: u64,
    pub(crate) completion_tokens: u64,
    pub(crate) cached_tokens: u64,
    pub(crate) latency_ms: f64,
    /// Nothing is known of what a model costs that is served here.
    pub(crate) cost_usd: Option<f64>,
    /// Was the answer remembered?
    pub(crate) remembered: bool,
}

impl Asked {
    pub(crate) fn text(&self) -> &str {
        self.message["content"].as_str().unwrap_or_default()
    }

    /// Tokens, as evals tell them.
    pub(crate) fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
            "cached_tokens": self.cached_tokens, "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }
}

/// Why a model cannot be asked, if it cannot.
pub(crate) fn refusal(app: &App, param: &str, model: &str) -> Option<ApiError> {
    let is_known = provider(app, model).is_some() || app.models.has(model);
    (!is_known).then(|| {
        let message = format!(
            "`{param}`: the model `{model:.80}` is neither served here nor a provider's; serve it under that name, or name it in `[providers]` of the server's configuration"
        );
        ApiError::invalid(param, message)
    })
}

fn provider<'a>(app: &'a App, model: &str) -> Option<&'a Arc<dyn Providers>> {
    // A model that is served here is asked here.
    let providers = app.config.providers.as_ref();
    providers.filter(|known| !app.models.has(model) && known.knows(model))
}

impl Asker {
    /// Asks a chat request's body, and again as long as there is no room.
    pub(crate) async fn ask(&self, model: &str, mut body: Value) -> Result<Asked, ApiError> {
        body["model"] = json!(model);
        if let Some(provider) = provider(&self.app, model) {
            let provider = Arc::clone(provider);
            return far(provider, model.to_string(), body).await;
        }
        let bytes = body.to_string().into_bytes();
        loop {
            // The key may be revoked meanwhile.
            let caller = self.app.door.absent(&self.owner)?;
            let began = Instant::now();
            match chat::answer(&self.app, &caller, &bytes).await {
                Ok(body) => return read(model, &body, began.elapsed(), None),
                Err(error) => match error.pause() {
                    Some(pause) if !self.stop.load(Ordering::Relaxed) => {
                        tokio::time::sleep(pause).await;
                    }
                    _ => return Err(error),
                },
            }
        }
    }
}

async fn far(provider: Arc<dyn Providers>, model: String, body: Value) -> Result<Asked, ApiError> {
    let asked = model.clone();
    let receive = apart("provider", move || provider.chat(&asked, &body))
        .map_err(|e| ApiError::internal(format!("a thread for the provider: {e}")))?;
    let answer = receive
        .await
        .map_err(|_| ApiError::internal("the provider's thread failed"))?;
    let answer = answer.map_err(ApiError::internal)?;
    let took = Duration::from_secs_f64(answer.latency_ms / 1000.0);
    read(&model, &answer.body, took, Some(&answer))
}

fn read(
    model: &str,
    body: &Value,
    took: Duration,
    far: Option<&ProviderAnswer>,
) -> Result<Asked, ApiError> {
    let choice = &body["choices"][0];
    if !choice["message"].is_object() {
        return Err(ApiError::internal(format!(
            "`{model}` answered without a message"
        )));
    }
    let usage = &body["usage"];
    let tokens = |value: &Value| value.as_u64().unwrap_or(0);
    Ok(Asked {
        model: body["model"].as_str().unwrap_or(model).to_string(),
        message: choice["message"].clone(),
        finish_reason: choice["finish_reason"]
            .as_str()
            .unwrap_or_default()
            .to_string(),
        prompt_tokens: tokens(&usage["prompt_tokens"]),
        completion_tokens: tokens(&usage["completion_tokens"]),
        cached_tokens: tokens(&usage["prompt_tokens_details"]["cached_tokens"]),
        latency_ms: took.as_secs_f64() * 1000.0,
        cost_usd: far.and_then(|far| far.cost_usd),
        remembered: far.is_some_and(|far| far.cached),
    })
}
