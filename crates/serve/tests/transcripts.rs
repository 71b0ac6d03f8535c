//! Request in, exact bytes out, over a real socket and the mock model.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use serde_json::{Value, json};
use support::{ask, get, post, start};

/// The body with what differs from run to run replaced.
fn stable(body: &str) -> String {
    let mut out = String::new();
    let mut rest = body;
    while let Some(at) = rest.find("chatcmpl-") {
        out.push_str(&rest[..at]);
        out.push_str("chatcmpl-ID");
        rest = &rest[at + "chatcmpl-".len() + 24..];
    }
    out.push_str(rest);
    let mut parts = out.split("\"created\":");
    let mut out = parts.next().unwrap().to_string();
    for part in parts {
        out.push_str("\"created\":0");
        out.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
    }
    out
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

#[test]
fn models_and_health() {
    let server = start();
    insta::assert_snapshot!("models", get(&server, "/v1/models").body);
    insta::assert_snapshot!("model", get(&server, "/v1/models/mock").body);
    insta::assert_snapshot!("health", get(&server, "/health").body);
    server.stop().unwrap();
}

#[test]
fn a_whole_answer() {
    let server = start();
    insta::assert_snapshot!("whole", stable(&post(&server, &ask(json!({}))).body));
    let body = ask(json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 2}));
    insta::assert_snapshot!("logprobs", stable(&post(&server, &body).body));
    server.stop().unwrap();
}

#[test]
fn a_streamed_answer() {
    let server = start();
    let answer = post(&server, &ask(json!({"stream": true, "max_tokens": 4})));
    assert_eq!(
        answer.headers["content-type"],
        "text/event-stream; charset=utf-8"
    );
    assert_eq!(answer.headers["cache-control"], "no-cache");
    insta::assert_snapshot!("stream", stable(&answer.body));
    let body = json!({
        "stream": true, "stream_options": {"include_usage": true}, "logprobs": true, "max_tokens": 2,
    });
    insta::assert_snapshot!("stream_usage", stable(&post(&server, &ask(body)).body));
    server.stop().unwrap();
}

#[test]
fn streamed_is_whole() {
    let server = start();
    for extra in [
        json!({}),
        json!({"temperature": 1, "seed": 5, "max_tokens": 40}),
        json!({"temperature": 1, "seed": 6, "max_tokens": 40, "stop": ["a", "B"]}),
        json!({"logprobs": true, "top_logprobs": 3}),
    ] {
        let whole = post(&server, &ask(extra.clone())).json();
        let mut body = ask(extra);
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true});
        let chunks = post(&server, &body).chunks();
        let choices = chunks.iter().map(|c| &c["choices"][0]);
        let text: String = choices
            .clone()
            .filter_map(|c| c["delta"]["content"].as_str())
            .collect();
        assert_eq!(text, content(&whole));
        let usage = |value: &Value| {
            let usage = &value["usage"];
            (
                usage["prompt_tokens"].clone(),
                usage["completion_tokens"].clone(),
                usage["total_tokens"].clone(),
            )
        };
        assert_eq!(usage(chunks.last().unwrap()), usage(&whole));
        let end = chunks[chunks.len() - 2]["choices"][0]["finish_reason"].clone();
        assert_eq!(end, whole["choices"][0]["finish_reason"]);
        let logprobs: Vec<Value> = choices
            .filter_map(|c| c["logprobs"]["content"].as_array())
            .flatten()
            .cloned()
            .collect();
        let want = whole["choices"][0]["logprobs"]["content"].as_array();
        assert_eq!(logprobs, want.cloned().unwrap_or_default());
    }
    server.stop().unwrap();
}

#[test]
fn usage_counts_tokens() {
    let server = start();
    let answer = post(&server, &ask(json!({"n": 3, "temperature": 1, "seed": 1}))).json();
    let usage = &answer["usage"];
    let prompt = usage["prompt_tokens"].as_u64().unwrap();
    let completion = usage["completion_tokens"].as_u64().unwrap();
    assert_eq!(usage["total_tokens"], prompt + completion);
    assert!((3..=36).contains(&completion));
    let again = post(&server, &ask(json!({}))).json();
    assert_eq!(again["usage"]["prompt_tokens"], prompt);
    assert_eq!(
        again["usage"]["prompt_tokens_details"]["cached_tokens"],
        prompt - 1
    );
    server.stop().unwrap();
}

#[test]
fn seeds_and_choices() {
    let server = start();
    let texts = |extra: Value| -> Vec<String> {
        let answer = post(&server, &ask(extra)).json();
        let choices = answer["choices"].as_array().unwrap();
        assert!(choices.iter().enumerate().all(|(i, c)| c["index"] == i));
        choices
            .iter()
            .map(|c| c["message"]["content"].as_str().unwrap().to_string())
            .collect()
    };
    let seeded = |seed: i64, n: u64| texts(json!({"temperature": 1, "seed": seed, "n": n}));
    let three = seeded(7, 3);
    assert_eq!(three.len(), 3);
    assert_eq!(three, seeded(7, 3));
    assert_eq!(three[0], seeded(7, 1)[0]);
    assert_ne!(three[0], three[1]);
    assert_ne!(three[1], seeded(8, 1)[0]);
    let greedy = texts(json!({"n": 2}));
    assert_eq!(greedy[0], greedy[1]);
    // Without a temperature it is OpenAI's 1, without a seed another answer each time.
    let unset = json!({"temperature": null, "max_tokens": 40});
    assert_ne!(texts(unset.clone()), texts(unset));
    server.stop().unwrap();
}

#[test]
fn every_field_that_is_honoured_changes_the_answer() {
    let server = start();
    let of = |extra: Value| content(&post(&server, &ask(extra)).json()).to_string();
    let plain = of(json!({}));
    assert_eq!(of(json!({"top_k": 1, "temperature": 2})), plain);
    assert_eq!(of(json!({"top_p": 0, "temperature": 2})), plain);
    assert_eq!(of(json!({"min_p": 1, "temperature": 2})), plain);
    assert_eq!(
        of(json!({"max_completion_tokens": 3, "max_tokens": null})),
        plain[..3]
    );
    let third = plain[2..3].to_string();
    let first_at = plain.find(&third).unwrap();
    assert_eq!(of(json!({"stop": third})), plain[..first_at]);
    // Byte `b` is token `b + 3`.
    let x = json!({"88": 100});
    assert_eq!(of(json!({"logit_bias": x.clone(), "max_tokens": 3})), "UUU");
    assert_ne!(
        of(json!({"logit_bias": x.clone(), "frequency_penalty": 2, "max_tokens": 60})),
        "U".repeat(60)
    );
    assert_eq!(
        of(json!({"guided_choice": ["yes", "no"]})).replace("yes", "no"),
        "no"
    );
    assert_eq!(of(json!({"guided_regex": "[0-9]{4}"})).len(), 4);
    server.stop().unwrap();
}

#[test]
fn structured_answers_parse() {
    let server = start();
    let schema = json!({
        "type": "object",
        "properties": {"topic": {"enum": ["money", "food"]}, "sure": {"type": "boolean"}},
        "required": ["topic", "sure"],
        "additionalProperties": false,
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "t", "strict": true, "schema": schema}});
    for seed in 0..5 {
        let body =
            json!({"response_format": format, "temperature": 1, "seed": seed, "max_tokens": 200});
        let answer = post(&server, &ask(body)).json();
        assert_eq!(answer["choices"][0]["finish_reason"], "stop", "{answer}");
        let parsed: Value = serde_json::from_str(content(&answer)).unwrap();
        assert!(["money", "food"].contains(&parsed["topic"].as_str().unwrap()));
        assert!(parsed["sure"].is_boolean());
    }
    server.stop().unwrap();
}
