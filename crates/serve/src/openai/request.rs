//! `POST /v1/chat/completions`: from bytes to a request that can be run, or an error that names
//! the field.
//!
//! Every field of OpenAI's is in one of three tables: honoured, a hint, or refused. A hint is a
//! field whose only meaning is advice to the operator (`user`, `metadata` ...): it is checked and
//! has no effect. Nothing else is dropped: a field that is in no table is unknown, and a 400.

use bantam_engine::Sampling;
use bantam_text::{ConstraintSpec, Message};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// Fields that change the answer as documented. The last line is Bantam's own.
const HONOURED: &[&str] = &[
    "model",
    "messages",
    "n",
    "stream",
    "stream_options",
    "stop",
    "seed",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "response_format",
    "top_k",
    "min_p",
    "repetition_penalty",
    "guided_regex",
    "guided_choice",
];

/// Whether a value is what a field takes.
type Check = fn(&Value) -> bool;

/// Fields that are advice: checked to be what OpenAI takes, without effect.
const HINTS: &[(&str, Check, &str)] = &[
    ("user", Value::is_string, "a string"),
    (
        "metadata",
        is_metadata,
        "at most 16 pairs of strings, 64 and 512 characters long",
    ),
    (
        "safety_identifier",
        is_short,
        "a string of at most 128 characters",
    ),
    ("prompt_cache_key", Value::is_string, "a string"),
    ("prompt_cache_options", Value::is_object, "an object"),
    ("prompt_cache_retention", Value::is_string, "a string"),
    ("parallel_tool_calls", Value::is_boolean, "a boolean"),
];

/// Fields taken only with the value that asks for nothing.
const NEUTRAL: &[(&str, &[&str], &str)] = &[
    ("store", &["false"], "answers are not stored"),
    (
        "service_tier",
        &["\"auto\"", "\"default\""],
        "there is one tier",
    ),
    ("modalities", &["[\"text\"]"], "answers are text"),
    (
        "reasoning_effort",
        &["\"none\""],
        "models here do not reason apart from the answer",
    ),
    (
        "verbosity",
        &["\"medium\""],
        "the length of answers cannot be set in words",
    ),
    ("tools", &["[]"], "tools cannot be called"),
    (
        "tool_choice",
        &["\"none\"", "\"auto\""],
        "tools cannot be called",
    ),
    ("functions", &["[]"], "functions cannot be called"),
    (
        "function_call",
        &["\"none\"", "\"auto\""],
        "functions cannot be called",
    ),
    ("audio", &[], "answers are text"),
    ("moderation", &[], "nothing is moderated"),
    ("prediction", &[], "predicted outputs are not used"),
    ("web_search_options", &[], "the web is not searched"),
];

/// A request that has been checked as far as it can be without a model.
pub(crate) struct ChatRequest {
    pub(crate) model: String,
    pub(crate) messages: Vec<Message>,
    pub(crate) n: usize,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    pub(crate) stop: Vec<String>,
    /// The rest of the context, if absent.
    pub(crate) max_tokens: Option<usize>,
    pub(crate) temperature: Option<f32>,
    /// All but the temperature and, if `seed` is absent, the seed.
    pub(crate) sampling: Sampling,
    pub(crate) seed: Option<i64>,
    /// How many alternatives to report; `None` for no log-probabilities.
    pub(crate) logprobs: Option<usize>,
    /// With the field it came from.
    pub(crate) constraint: Option<(&'static str, ConstraintSpec)>,
}

#[derive(Deserialize)]
struct RawRequest {
    model: String,
    n: Option<u64>,
    stream: Option<bool>,
    stream_options: Option<RawStreamOptions>,
    stop: Option<Value>,
    seed: Option<i64>,
    max_tokens: Option<u64>,
    max_completion_tokens: Option<u64>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    frequency_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    logit_bias: Option<Map<String, Value>>,
    logprobs: Option<bool>,
    top_logprobs: Option<u64>,
    response_format: Option<Value>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStreamOptions {
    include_usage: Option<bool>,
    include_obfuscation: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawJsonSchema {
    name: String,
    #[serde(rename = "description")]
    _description: Option<String>,
    schema: Option<Value>,
    #[serde(rename = "strict")]
    _strict: Option<bool>,
}

impl ChatRequest {
    /// Reads and checks a body.
    pub(crate) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let value: Value = serde_json::from_slice(body)
            .map_err(|e| ApiError::malformed_json(format!("the body is not JSON: {e}")))?;
        let Value::Object(mut fields) = value else {
            return Err(ApiError::malformed_json(
                "the body must be a JSON object".to_string(),
            ));
        };
        check_fields(&fields)?;
        // An explicit null is an absent field, as OpenAI has it.
        fields.retain(|_, value| !value.is_null());
        let messages = fields
            .remove("messages")
            .ok_or_else(|| ApiError::missing("messages"))?;
        if !fields.contains_key("model") {
            return Err(ApiError::missing("model"));
        }
        let raw: RawRequest = read("", Value::Object(fields))?;
        raw.check(messages_of(messages)?)
    }
}

impl RawRequest {
    fn check(self, messages: Vec<Message>) -> Result<ChatRequest, ApiError> {
        let stream = self.stream.unwrap_or(false);
        let n = ranged_int("n", self.n, 1, 128)?.unwrap_or(1);
        if self.stream_options.is_some() && !stream {
            let message = "`stream_options` goes with `stream: true` only";
            return Err(ApiError::invalid("stream_options", message));
        }
        if self
            .stream_options
            .as_ref()
            .and_then(|o| o.include_obfuscation)
            == Some(true)
        {
            let message = "chunks are not padded";
            return Err(ApiError::unsupported(
                "stream_options.include_obfuscation",
                message,
            ));
        }
        let max_tokens = ranged_int("max_tokens", self.max_tokens, 1, u64::MAX)?;
        let max_completion = self.max_completion_tokens;
        let max_completion = ranged_int("max_completion_tokens", max_completion, 1, u64::MAX)?;
        if let (Some(old), Some(new)) = (max_tokens, max_completion)
            && old != new
        {
            let message = "`max_tokens` and `max_completion_tokens` differ";
            return Err(ApiError::invalid("max_tokens", message));
        }
        let logprobs = match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (true, top) => Some(ranged_int("top_logprobs", top, 0, 20)?.unwrap_or(0)),
            (false, None) => None,
            (false, Some(_)) => {
                let message = "`top_logprobs` goes with `logprobs: true` only";
                return Err(ApiError::invalid("top_logprobs", message));
            }
        };
        let seed = self.seed;
        let stop = stops(self.stop.as_ref())?;
        let constraint = self.constraint()?;
        let top_k = match self.top_k.unwrap_or(0) {
            // vLLM's clients write "all" as -1.
            -1 => 0,
            k => usize::try_from(k)
                .map_err(|_| ApiError::invalid("top_k", "`top_k` must be at least 0, or -1"))?,
        };
        let sampling = Sampling {
            temperature: 0.0,
            top_k,
            top_p: ranged("top_p", self.top_p, 0.0, 1.0)?.unwrap_or(1.0),
            min_p: ranged("min_p", self.min_p, 0.0, 1.0)?.unwrap_or(0.0),
            repetition_penalty: ranged("repetition_penalty", self.repetition_penalty, 0.01, 100.0)?
                .unwrap_or(1.0),
            presence_penalty: ranged("presence_penalty", self.presence_penalty, -2.0, 2.0)?
                .unwrap_or(0.0),
            frequency_penalty: ranged("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?
                .unwrap_or(0.0),
            logit_bias: biases(self.logit_bias.as_ref())?,
            seed: 0,
        };
        Ok(ChatRequest {
            messages,
            n,
            stream,
            include_usage: self
                .stream_options
                .and_then(|o| o.include_usage)
                .unwrap_or(false),
            stop,
            max_tokens: max_completion.or(max_tokens),
            temperature: ranged("temperature", self.temperature, 0.0, 2.0)?,
            sampling,
            seed,
            logprobs,
            constraint,
            model: self.model,
        })
    }

    /// The one constraint that is asked for, if any.
    fn constraint(&self) -> Result<Option<(&'static str, ConstraintSpec)>, ApiError> {
        let format = match &self.response_format {
            Some(format) => format_constraint(format)?,
            None => None,
        };
        let regex = self
            .guided_regex
            .clone()
            .map(|r| ("guided_regex", ConstraintSpec::Regex(r)));
        let choice = self.guided_choice.clone();
        if choice.as_ref().is_some_and(Vec::is_empty) {
            let message = "`guided_choice` needs at least one choice";
            return Err(ApiError::invalid("guided_choice", message));
        }
        let choice = choice.map(|labels| ("guided_choice", ConstraintSpec::Labels(labels)));
        let mut all = [format, regex, choice].into_iter().flatten();
        let first = all.next();
        match all.next() {
            Some((param, _)) => {
                let message = format!("`{param}` cannot be combined with another constraint");
                Err(ApiError::invalid(param, message))
            }
            None => Ok(first),
        }
    }
}

/// Every field must be in a table; those of [`NEUTRAL`] must ask for nothing.
fn check_fields(fields: &Map<String, Value>) -> Result<(), ApiError> {
    for (name, value) in fields {
        if HONOURED.contains(&name.as_str()) {
            continue;
        }
        if let Some((_, is_valid, what)) = HINTS.iter().find(|(known, ..)| known == name) {
            if !value.is_null() && !is_valid(value) {
                return Err(ApiError::invalid(name, format!("`{name}` must be {what}")));
            }
            continue;
        }
        let Some((_, values, why)) = NEUTRAL.iter().find(|(known, ..)| known == name) else {
            return Err(ApiError::unknown(name));
        };
        if !value.is_null() && !values.contains(&value.to_string().as_str()) {
            let but = match values {
                [] => String::new(),
                values => format!("; it may only be {}", values.join(" or ")),
            };
            return Err(ApiError::unsupported(
                name,
                format!("`{name}` is not supported: {why}{but}"),
            ));
        }
    }
    Ok(())
}

fn is_short(value: &Value) -> bool {
    value
        .as_str()
        .is_some_and(|text| text.chars().count() <= 128)
}

fn is_metadata(value: &Value) -> bool {
    let Some(pairs) = value.as_object() else {
        return false;
    };
    let fits = |(key, value): (&String, &Value)| {
        let value = value.as_str();
        key.chars().count() <= 64 && value.is_some_and(|v| v.chars().count() <= 512)
    };
    pairs.len() <= 16 && pairs.iter().all(fits)
}

/// Reads a value, naming where in it something is wrong.
fn read<T: serde::de::DeserializeOwned>(prefix: &str, value: Value) -> Result<T, ApiError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let inner = error.path().to_string();
        let param = match (prefix, inner.as_str()) {
            (prefix, ".") => prefix.to_string(),
            ("", inner) => inner.to_string(),
            (prefix, inner) => format!("{prefix}.{inner}"),
        };
        ApiError::invalid(param.clone(), format!("`{param}`: {}", error.into_inner()))
    })
}

fn messages_of(value: Value) -> Result<Vec<Message>, ApiError> {
    let Value::Array(values) = value else {
        return Err(ApiError::invalid("messages", "`messages` must be an array"));
    };
    if values.is_empty() {
        return Err(ApiError::invalid(
            "messages",
            "`messages` must not be empty",
        ));
    }
    let read_one = |(idx, value)| {
        let param = format!("messages[{idx}]");
        check_message(&param, &value)?;
        read(&param, value)
    };
    values.into_iter().enumerate().map(read_one).collect()
}

/// What the message type would take and serving does not.
fn check_message(param: &str, value: &Value) -> Result<(), ApiError> {
    let Value::Object(fields) = value else {
        return Err(ApiError::invalid(
            param,
            format!("`{param}` must be an object"),
        ));
    };
    if fields.contains_key("weight") {
        return Err(ApiError::unknown(&format!("{param}.weight")));
    }
    let parts = fields.get("content").and_then(Value::as_array);
    for (idx, part) in parts.into_iter().flatten().enumerate() {
        let param = format!("{param}.content[{idx}]");
        let Value::Object(part) = part else {
            return Err(ApiError::invalid(
                &*param,
                format!("`{param}` must be an object"),
            ));
        };
        if let Some(kind) = part
            .get("type")
            .and_then(Value::as_str)
            .filter(|kind| *kind != "text")
        {
            let message = format!("content of type `{kind}` is not supported, only `text`");
            return Err(ApiError::unsupported(format!("{param}.type"), message));
        }
        // A cache breakpoint is a hint: prefixes are found without it.
        let known = ["type", "text", "prompt_cache_breakpoint"];
        if let Some(name) = part.keys().find(|name| !known.contains(&name.as_str())) {
            return Err(ApiError::unknown(&format!("{param}.{name}")));
        }
    }
    Ok(())
}

fn stops(stop: Option<&Value>) -> Result<Vec<String>, ApiError> {
    let bad = || {
        let message = "`stop` must be a string or an array of at most 4, none of them empty";
        ApiError::invalid("stop", message)
    };
    let stops: Vec<String> = match stop {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(stops)) => {
            let all = stops
                .iter()
                .map(|s| s.as_str().map(str::to_string).ok_or_else(bad));
            all.collect::<Result<_, _>>()?
        }
        Some(_) => return Err(bad()),
    };
    if stops.len() > 4 || stops.iter().any(String::is_empty) {
        Err(bad())
    } else {
        Ok(stops)
    }
}

fn biases(biases: Option<&Map<String, Value>>) -> Result<Vec<(u32, f32)>, ApiError> {
    let read = |(token, bias): (&String, &Value)| {
        let token = token.parse::<u32>().ok();
        let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let message = "`logit_bias` must map token ids to numbers between -100 and 100";
        token
            .zip(bias.map(|b| b as f32))
            .ok_or_else(|| ApiError::invalid("logit_bias", message))
    };
    biases.into_iter().flatten().map(read).collect()
}

/// `response_format`; `{"type": "text"}` constrains nothing.
fn format_constraint(format: &Value) -> Result<Option<(&'static str, ConstraintSpec)>, ApiError> {
    let Value::Object(fields) = format else {
        return Err(ApiError::invalid(
            "response_format",
            "`response_format` must be an object",
        ));
    };
    let kind = fields
        .get("type")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let takes_schema = kind == "json_schema";
    let is_unknown = |name: &&String| *name != "type" && !(takes_schema && *name == "json_schema");
    if let Some(name) = fields.keys().find(is_unknown) {
        return Err(ApiError::unknown(&format!("response_format.{name}")));
    }
    match kind {
        "text" => Ok(None),
        "json_object" => Ok(Some(("response_format", ConstraintSpec::JsonObject))),
        "json_schema" => {
            let value = fields.get("json_schema").cloned();
            let value = value.ok_or_else(|| ApiError::missing("response_format.json_schema"))?;
            let raw: RawJsonSchema = read("response_format.json_schema", value)?;
            let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
            if !(1..=64).contains(&raw.name.len()) || !raw.name.chars().all(is_plain) {
                let param = "response_format.json_schema.name";
                let message = "must have 1 to 64 letters, digits, `_` and `-`";
                return Err(ApiError::invalid(param, format!("`{param}` {message}")));
            }
            let param = "response_format.json_schema.schema";
            // Without a schema the format says no more than "a JSON object".
            let spec = raw
                .schema
                .map_or(ConstraintSpec::JsonObject, ConstraintSpec::JsonSchema);
            Ok(Some((param, spec)))
        }
        _ => {
            let message = "`response_format.type` must be `text`, `json_object` or `json_schema`";
            Err(ApiError::invalid("response_format.type", message))
        }
    }
}

fn ranged(name: &str, value: Option<f32>, min: f32, max: f32) -> Result<Option<f32>, ApiError> {
    match value {
        Some(v) if !(min..=max).contains(&v) => {
            let message = format!("`{name}` must be between {min} and {max}, not {v}");
            Err(ApiError::invalid(name, message))
        }
        value => Ok(value),
    }
}

fn ranged_int(
    name: &str,
    value: Option<u64>,
    min: u64,
    max: u64,
) -> Result<Option<usize>, ApiError> {
    let Some(v) = value else { return Ok(None) };
    if !(min..=max).contains(&v) {
        let most = if max == u64::MAX {
            String::new()
        } else {
            format!(" and at most {max}")
        };
        let message = format!("`{name}` must be at least {min}{most}, not {v}");
        return Err(ApiError::invalid(name, message));
    }
    Ok(Some(usize::try_from(v).unwrap_or(usize::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn with(extra: Value) -> Result<ChatRequest, ApiError> {
        let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        ChatRequest::parse(body.to_string().as_bytes())
    }

    #[test]
    fn no_field_is_in_two_tables() {
        let hints = HINTS.iter().map(|(name, ..)| name);
        let neutral = NEUTRAL.iter().map(|(name, ..)| name);
        let mut all: Vec<&str> = HONOURED
            .iter()
            .chain(hints)
            .chain(neutral)
            .copied()
            .collect();
        let n = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), n);
    }

    #[test]
    fn defaults_are_openais() {
        let request = with(json!({})).unwrap_or_else(|e| panic!("{}", e.message));
        assert_eq!(
            (request.n, request.stream, request.max_tokens),
            (1, false, None)
        );
        assert_eq!((request.temperature, request.logprobs), (None, None));
        assert_eq!(request.sampling, Sampling::default());
    }

    #[test]
    fn hints_and_neutral_values_pass() {
        for extra in [
            json!({"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s"}),
            json!({"prompt_cache_key": "k", "prompt_cache_retention": "24h"}),
            json!({"store": false, "service_tier": "auto", "modalities": ["text"]}),
            json!({"tools": [], "tool_choice": "none", "parallel_tool_calls": true}),
            json!({"audio": null, "temperature": null, "reasoning_effort": "none"}),
            json!({"max_tokens": 5, "max_completion_tokens": 5}),
            json!({"response_format": {"type": "text"}, "top_k": -1}),
        ] {
            assert!(with(extra.clone()).is_ok(), "{extra}");
        }
    }

    #[test]
    fn every_refusal_names_its_field() {
        for (extra, param, code) in [
            (json!({"colour": 1}), "colour", "unknown_parameter"),
            (json!({"colour": null}), "colour", "unknown_parameter"),
            (json!({"store": true}), "store", "unsupported_parameter"),
            (
                json!({"tools": [{"type": "function"}]}),
                "tools",
                "unsupported_parameter",
            ),
            (
                json!({"tool_choice": "required"}),
                "tool_choice",
                "unsupported_parameter",
            ),
            (
                json!({"audio": {"voice": "x"}}),
                "audio",
                "unsupported_parameter",
            ),
            (
                json!({"service_tier": "flex"}),
                "service_tier",
                "unsupported_parameter",
            ),
            (
                json!({"temperature": "warm"}),
                "temperature",
                "invalid_value",
            ),
            (json!({"temperature": 2.5}), "temperature", "invalid_value"),
            (json!({"top_p": -0.1}), "top_p", "invalid_value"),
            (json!({"top_k": -2}), "top_k", "invalid_value"),
            (json!({"n": 0}), "n", "invalid_value"),
            (json!({"n": 129}), "n", "invalid_value"),
            (json!({"max_tokens": 0}), "max_tokens", "invalid_value"),
            (
                json!({"max_tokens": 1, "max_completion_tokens": 2}),
                "max_tokens",
                "invalid_value",
            ),
            (json!({"stop": ["a", ""]}), "stop", "invalid_value"),
            (
                json!({"stop": ["a", "b", "c", "d", "e"]}),
                "stop",
                "invalid_value",
            ),
            (
                json!({"logit_bias": {"x": 1}}),
                "logit_bias",
                "invalid_value",
            ),
            (
                json!({"logit_bias": {"1": 101}}),
                "logit_bias",
                "invalid_value",
            ),
            (json!({"top_logprobs": 2}), "top_logprobs", "invalid_value"),
            (
                json!({"logprobs": true, "top_logprobs": 21}),
                "top_logprobs",
                "invalid_value",
            ),
            (
                json!({"stream_options": {}}),
                "stream_options",
                "invalid_value",
            ),
            (json!({"metadata": {"a": 1}}), "metadata", "invalid_value"),
            (json!({"user": 7}), "user", "invalid_value"),
            (
                json!({"safety_identifier": "x".repeat(129)}),
                "safety_identifier",
                "invalid_value",
            ),
            (
                json!({"guided_choice": []}),
                "guided_choice",
                "invalid_value",
            ),
            (
                json!({"guided_choice": ["a"], "guided_regex": "b"}),
                "guided_choice",
                "invalid_value",
            ),
            (
                json!({"response_format": {"type": "xml"}}),
                "response_format.type",
                "invalid_value",
            ),
            (
                json!({"response_format": {"type": "text", "x": 1}}),
                "response_format.x",
                "unknown_parameter",
            ),
            (
                json!({"response_format": {"type": "json_schema"}}),
                "response_format.json_schema",
                "missing_required_parameter",
            ),
            (
                json!({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}),
                "response_format.json_schema.name",
                "invalid_value",
            ),
            (json!({"messages": []}), "messages", "invalid_value"),
            (
                json!({"messages": [{"role": "bot", "content": "x"}]}),
                "messages[0].role",
                "invalid_value",
            ),
            (
                json!({"messages": [{"role": "user", "content": "x", "weight": 0}]}),
                "messages[0].weight",
                "unknown_parameter",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
                "messages[0].content[0].type",
                "unsupported_parameter",
            ),
            (
                json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]}),
                "messages[0].content[0].b",
                "unknown_parameter",
            ),
        ] {
            let error = with(extra.clone())
                .err()
                .unwrap_or_else(|| panic!("{extra} passed"));
            assert_eq!(
                (error.param.as_deref(), error.code),
                (Some(param), Some(code)),
                "{extra}"
            );
            assert_eq!(error.status.as_u16(), 400);
        }
        for body in ["", "{", "[]", "\"x\"", "\u{0}"] {
            let error = ChatRequest::parse(body.as_bytes()).err().unwrap();
            assert_eq!(error.code, Some("invalid_json"), "{body}");
        }
        for (body, param) in [
            (json!({"model": "m"}), "messages"),
            (json!({"messages": []}), "model"),
        ] {
            let error = ChatRequest::parse(body.to_string().as_bytes())
                .err()
                .unwrap();
            assert_eq!(error.param.as_deref(), Some(param));
        }
    }
}
