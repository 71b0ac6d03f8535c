//! What goes back: completions, chunks, log-probabilities, usage.

use bantam_engine::{Finish, TokenLogprobs, Usage};
use bantam_text::Tokenizer;
use serde::Serialize;

/// Fields that every object of one call shares.
#[derive(Clone, Serialize)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) service_tier: &'static str,
    pub(crate) system_fingerprint: &'static str,
}

/// `chat.completion`.
#[derive(Serialize)]
pub(crate) struct ChatCompletion {
    #[serde(flatten)]
    pub(crate) head: Head,
    pub(crate) choices: Vec<Choice>,
    pub(crate) usage: UsageBody,
}

#[derive(Serialize)]
pub(crate) struct Choice {
    pub(crate) index: usize,
    pub(crate) message: AnswerMessage,
    pub(crate) logprobs: Option<Logprobs>,
    pub(crate) finish_reason: &'static str,
}

#[derive(Serialize)]
pub(crate) struct AnswerMessage {
    pub(crate) role: &'static str,
    pub(crate) content: String,
    pub(crate) refusal: Option<String>,
}

/// `chat.completion.chunk`.
#[derive(Serialize)]
pub(crate) struct Chunk<'a> {
    #[serde(flatten)]
    pub(crate) head: &'a Head,
    pub(crate) choices: Vec<ChunkChoice>,
    /// Absent unless asked for; then null in all chunks but the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Option<UsageBody>>,
}

#[derive(Serialize)]
pub(crate) struct ChunkChoice {
    pub(crate) index: usize,
    pub(crate) delta: Delta,
    pub(crate) logprobs: Option<Logprobs>,
    pub(crate) finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
pub(crate) struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<String>,
}

#[derive(Default, Serialize)]
pub(crate) struct Logprobs {
    pub(crate) content: Vec<TokenLogprob>,
    pub(crate) refusal: Option<Vec<TokenLogprob>>,
}

#[derive(Serialize)]
pub(crate) struct TokenLogprob {
    #[serde(flatten)]
    taken: OneLogprob,
    top_logprobs: Vec<OneLogprob>,
}

#[derive(Serialize)]
struct OneLogprob {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

#[derive(Clone, Copy, Serialize)]
pub(crate) struct UsageBody {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

#[derive(Clone, Copy, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

impl UsageBody {
    /// Of all choices together: they share one prompt, which counts once, as does what the first
    /// of them found in the cache.
    pub(crate) fn of(choices: &[Usage]) -> Self {
        let first = choices.first().copied().unwrap_or_default();
        let completion_tokens = choices.iter().map(|u| u.completion_tokens).sum();
        Self {
            prompt_tokens: first.prompt_tokens,
            completion_tokens,
            total_tokens: first.prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails {
                cached_tokens: first.cached_tokens,
            },
        }
    }
}

impl TokenLogprob {
    pub(crate) fn of(id: u32, logprobs: &TokenLogprobs, tokenizer: &Tokenizer) -> Self {
        let one = |id: u32, logprob: f32| {
            let bytes = tokenizer.token_bytes(id).to_vec();
            // JSON has no -inf; OpenAI writes this for "as good as never".
            let logprob = logprob.max(-9999.0);
            OneLogprob {
                token: String::from_utf8_lossy(&bytes).into_owned(),
                logprob,
                bytes,
            }
        };
        Self {
            taken: one(id, logprobs.logprob),
            top_logprobs: logprobs
                .top
                .iter()
                .map(|&(id, logprob)| one(id, logprob))
                .collect(),
        }
    }
}

/// OpenAI's word for an end that is no error.
pub(crate) fn finish_reason(finish: &Finish) -> &'static str {
    match finish {
        Finish::Length => "length",
        Finish::Stop | Finish::Cancelled | Finish::Error(_) => "stop",
    }
}
