//! What goes back: completions, chunks, log-probabilities, usage.

use bantam_engine::{TokenLogprobs, Usage};
use bantam_text::{CallKind, Tokenizer};
use serde::Serialize;
use serde_json::{Map, Value};

use super::answers::Piece;

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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) metadata: Option<Map<String, Value>>,
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
    pub(crate) content: Option<String>,
    pub(crate) refusal: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<Call>,
}

/// A call of a tool.
#[derive(Clone, Serialize)]
pub(crate) struct Call {
    pub(crate) id: String,
    #[serde(flatten)]
    pub(crate) what: Called,
}

#[derive(Clone, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub(crate) enum Called {
    Function { function: FunctionCall },
    Custom { custom: CustomCall },
}

#[derive(Clone, Serialize)]
pub(crate) struct FunctionCall {
    name: String,
    arguments: String,
}

#[derive(Clone, Serialize)]
pub(crate) struct CustomCall {
    name: String,
    input: String,
}

impl Call {
    /// A call of which nothing but the name is known.
    pub(crate) fn new(id: String, kind: CallKind, name: String) -> Self {
        let what = match kind {
            CallKind::Function => Called::Function {
                function: FunctionCall {
                    name,
                    arguments: String::new(),
                },
            },
            CallKind::Custom => Called::Custom {
                custom: CustomCall {
                    name,
                    input: String::new(),
                },
            },
        };
        Self { id, what }
    }

    fn push(&mut self, text: &str) {
        match &mut self.what {
            Called::Function { function } => function.arguments.push_str(text),
            Called::Custom { custom } => custom.input.push_str(text),
        }
    }
}

/// Answers that are being put together.
pub(crate) struct Assembly {
    choices: Vec<Choice>,
    usages: Vec<Usage>,
}

impl Assembly {
    pub(crate) fn new(n: usize, with_logprobs: bool) -> Self {
        let choice = |index| Choice {
            index,
            message: AnswerMessage {
                role: "assistant",
                content: None,
                refusal: None,
                tool_calls: Vec::new(),
            },
            logprobs: with_logprobs.then(Logprobs::default),
            finish_reason: "",
        };
        Self {
            choices: (0..n).map(choice).collect(),
            usages: vec![Usage::default(); n],
        }
    }

    /// Adds a part.
    pub(crate) fn push(&mut self, idx: usize, piece: &Piece) {
        let choice = &mut self.choices[idx];
        match piece {
            Piece::Text { text, logprobs } => {
                if !text.is_empty() {
                    let content = choice.message.content.get_or_insert_default();
                    content.push_str(text);
                }
                if let Some(all) = &mut choice.logprobs {
                    all.content.extend(logprobs.iter().cloned());
                }
            }
            Piece::Begin { id, kind, name, .. } => {
                let call = Call::new(id.clone(), *kind, name.clone());
                choice.message.tool_calls.push(call);
            }
            Piece::Input { call, text, .. } => {
                if let Some(call) = choice.message.tool_calls.get_mut(*call) {
                    call.push(text);
                }
            }
            Piece::End => {}
            Piece::Done { reason, usage } => {
                choice.finish_reason = reason;
                self.usages[idx] = *usage;
                // An answer without calls has a text, be it empty.
                if choice.message.tool_calls.is_empty() {
                    choice.message.content.get_or_insert_default();
                }
            }
        }
    }

    /// The whole.
    pub(crate) fn finish(
        self,
        head: Head,
        predicted: bool,
        metadata: Option<Map<String, Value>>,
    ) -> ChatCompletion {
        ChatCompletion {
            head: Head {
                object: "chat.completion",
                ..head
            },
            choices: self.choices,
            usage: UsageBody::of(&self.usages, predicted),
            metadata,
        }
    }
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
    /// Null beside the role of an answer that can only be calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<Option<String>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<CallDelta>,
}

/// Something new of a call.
#[derive(Serialize)]
pub(crate) struct CallDelta {
    pub(crate) index: usize,
    #[serde(flatten)]
    pub(crate) what: CallNews,
}

#[derive(Serialize)]
#[serde(untagged)]
pub(crate) enum CallNews {
    Begin(Call),
    Arguments { function: Value },
    Input { custom: Value },
}

#[derive(Default, Serialize)]
pub(crate) struct Logprobs {
    pub(crate) content: Vec<TokenLogprob>,
    pub(crate) refusal: Option<Vec<TokenLogprob>>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct TokenLogprob {
    #[serde(flatten)]
    pub(crate) taken: OneLogprob,
    pub(crate) top_logprobs: Vec<OneLogprob>,
}

#[derive(Debug, Clone, Serialize)]
pub(crate) struct OneLogprob {
    pub(crate) token: String,
    pub(crate) logprob: f32,
    pub(crate) bytes: Vec<u8>,
}

#[derive(Clone, Copy, Serialize)]
pub(crate) struct UsageBody {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) total_tokens: usize,
    prompt_tokens_details: PromptDetails,
    #[serde(skip_serializing_if = "Option::is_none")]
    completion_tokens_details: Option<CompletionDetails>,
}

#[derive(Clone, Copy, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

#[derive(Clone, Copy, Serialize)]
struct CompletionDetails {
    reasoning_tokens: usize,
    accepted_prediction_tokens: usize,
    rejected_prediction_tokens: usize,
}

impl UsageBody {
    /// Of all choices together: they share one prompt, which counts once, as does what the first of them found in
    /// the cache.
    pub(crate) fn of(choices: &[Usage], predicted: bool) -> Self {
        let first = choices.first().copied().unwrap_or_default();
        let completion_tokens = choices.iter().map(|u| u.completion_tokens).sum();
        Self {
            prompt_tokens: first.prompt_tokens,
            completion_tokens,
            total_tokens: first.prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptDetails {
                cached_tokens: first.cached_tokens,
            },
            completion_tokens_details: predicted.then(|| {
                let drafted: usize = choices.iter().map(|u| u.drafted_tokens).sum();
                let accepted: usize = choices.iter().map(|u| u.accepted_tokens).sum();
                CompletionDetails {
                    reasoning_tokens: 0,
                    accepted_prediction_tokens: accepted,
                    rejected_prediction_tokens: drafted.saturating_sub(accepted),
                }
            }),
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
