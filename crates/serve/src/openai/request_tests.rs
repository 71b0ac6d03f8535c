//! What is taken, what is refused, and by which name.

use bantam_engine::Sampling;
use serde_json::json;

use super::*;

fn with(extra: Value) -> Result<ChatRequest, ApiError> {
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "hi"}]});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    ChatRequest::parse(body.to_string().as_bytes())
}

#[test]
fn defaults_are_openais() {
    let request = with(json!({})).unwrap_or_else(|e| panic!("{}", e.message));
    assert_eq!(
        (request.ask.n, request.stream, request.ask.max_tokens),
        (1, false, None)
    );
    assert_eq!(
        (request.ask.temperature, request.ask.logprobs),
        (None, None)
    );
    assert_eq!(request.ask.sampling, Sampling::default());
}

#[test]
fn hints_and_neutral_values_pass() {
    for extra in [
        json!({"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s"}),
        json!({"prompt_cache_key": "k", "prompt_cache_retention": "24h"}),
        json!({"store": true, "service_tier": "auto", "modalities": ["text"]}),
        json!({"prediction": {"type": "content", "content": [{"type": "text", "text": "x"}]}}),
        json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": {"type": "function", "function": {"name": "f"}}}),
        json!({"tools": [{"type": "custom", "custom": {"name": "c", "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "a"}}}}], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [{"type": "custom", "custom": {"name": "c"}}]}}}),
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
        (
            json!({"tools": [{"type": "function"}]}),
            "tools[0].function",
            "missing_required_parameter",
        ),
        (
            json!({"tool_choice": "required"}),
            "tool_choice",
            "invalid_value",
        ),
        (
            json!({"tools": [{"type": "web_search"}]}),
            "tools[0].type",
            "unsupported_parameter",
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}),
            "tools[0].function.name",
            "invalid_value",
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "a", "x": 1}}]}),
            "tools[0].function.x",
            "unknown_parameter",
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "a"}}], "tool_choice": {"type": "function", "function": {"name": "b"}}}),
            "tool_choice",
            "invalid_value",
        ),
        (
            json!({"tools": [{"type": "function", "function": {"name": "a"}}], "guided_regex": "b"}),
            "guided_regex",
            "invalid_value",
        ),
        (
            json!({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}),
            "messages[0].tool_call_id",
            "invalid_value",
        ),
        (
            json!({"prediction": {"type": "content"}}),
            "prediction.content",
            "invalid_value",
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
