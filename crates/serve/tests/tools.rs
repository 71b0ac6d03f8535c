//! Calls of tools over a real socket: always valid, whole and streamed alike, and sent back as history.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use serde_json::{Value, json};
use support::{ask, post, start_wide};

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "strict": true, "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"], "additionalProperties": false}}},
        {"type": "function", "function": {"name": "now"}},
    ])
}

/// A request with tools, and room for calls.
fn call(extra: Value) -> Value {
    let mut body = ask(json!({"tools": tools(), "max_tokens": 400, "temperature": 1}));
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

/// The calls of an answer, checked against their schemas.
fn calls(answer: &Value) -> Vec<(String, Value)> {
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    calls
        .iter()
        .map(|call| {
            assert!(call["id"].as_str().unwrap().starts_with("call_"));
            assert_eq!(call["type"], "function");
            let name = call["function"]["name"].as_str().unwrap();
            let text = call["function"]["arguments"].as_str().unwrap();
            let arguments: Value = serde_json::from_str(text).unwrap();
            match name {
                "now" => assert_eq!(arguments, json!({})),
                "weather" => {
                    assert!(["Rome", "Oslo"].contains(&arguments["city"].as_str().unwrap()));
                    assert!((1..=9).contains(&arguments["days"].as_i64().unwrap()));
                    assert_eq!(arguments.as_object().unwrap().len(), 2);
                }
                other => panic!("{other}"),
            }
            (name.to_string(), arguments)
        })
        .collect()
}

#[test]
fn a_choice_is_what_is_called() {
    let server = start_wide();
    for seed in 0..4 {
        let one = json!({"tool_choice": "required", "parallel_tool_calls": false, "seed": seed});
        let answer = post(&server, &call(one)).json();
        assert_eq!(calls(&answer).len(), 1);
        assert_eq!(answer["choices"][0]["message"]["content"], Value::Null);
        let named = json!({"type": "function", "function": {"name": "now"}});
        let answer = post(&server, &call(json!({"tool_choice": named, "seed": seed}))).json();
        assert_eq!(calls(&answer)[0].0, "now");
        let weather = json!({"type": "function", "function": {"name": "weather"}});
        let allowed = json!({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [weather]}});
        let body = json!({"tool_choice": allowed, "parallel_tool_calls": false, "seed": seed});
        assert_eq!(calls(&post(&server, &call(body)).json())[0].0, "weather");
    }
    let none = post(
        &server,
        &call(json!({"tool_choice": "none", "max_tokens": 12})),
    )
    .json();
    assert!(none["choices"][0]["message"].get("tool_calls").is_none());
    let auto = post(&server, &call(json!({"max_tokens": 12}))).json();
    assert!(auto["choices"][0]["message"]["content"].is_string());
    // An answer that is cut says so.
    let cut = post(
        &server,
        &call(json!({"tool_choice": "required", "max_tokens": 8})),
    )
    .json();
    assert_eq!(cut["choices"][0]["finish_reason"], "length");
    server.stop().unwrap();
}

#[test]
fn a_stream_spells_the_same_calls() {
    let server = start_wide();
    for choice in ["required", "auto"] {
        let body = call(
            json!({"tool_choice": choice, "seed": 3, "temperature": 0, "parallel_tool_calls": false}),
        );
        let whole = post(&server, &body).json();
        let mut body = body;
        body["stream"] = json!(true);
        let chunks = post(&server, &body).chunks();
        let mut text = String::new();
        let mut calls: Vec<(String, String)> = Vec::new();
        for delta in chunks.iter().map(|c| &c["choices"][0]["delta"]) {
            text.push_str(delta["content"].as_str().unwrap_or_default());
            for call in delta["tool_calls"].as_array().into_iter().flatten() {
                let idx = usize::try_from(call["index"].as_u64().unwrap()).unwrap();
                if let Some(name) = call["function"]["name"].as_str() {
                    assert_eq!(idx, calls.len());
                    assert_eq!(call["type"], "function");
                    calls.push((name.to_string(), String::new()));
                }
                calls[idx]
                    .1
                    .push_str(call["function"]["arguments"].as_str().unwrap());
            }
        }
        let message = &whole["choices"][0]["message"];
        assert_eq!(text, message["content"].as_str().unwrap_or_default());
        let want = message["tool_calls"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let want: Vec<(String, String)> = want
            .iter()
            .map(|call| {
                let function = &call["function"];
                let text = |field: &str| function[field].as_str().unwrap().to_string();
                (text("name"), text("arguments"))
            })
            .collect();
        assert_eq!(calls, want);
        let last = &chunks.last().unwrap()["choices"][0]["finish_reason"];
        assert_eq!(last, &whole["choices"][0]["finish_reason"]);
    }
    server.stop().unwrap();
}

#[test]
fn custom_tools_take_text_of_their_grammar() {
    let server = start_wide();
    let grammar =
        json!({"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-c]{3}"}});
    let tools = json!([{"type": "custom", "custom": {"name": "code", "description": "d", "format": grammar}}]);
    let body = call(json!({"tools": tools, "tool_choice": "required"}));
    let answer = post(&server, &body).json();
    let made = &answer["choices"][0]["message"]["tool_calls"][0];
    assert_eq!(
        (&made["type"], &made["custom"]["name"]),
        (&json!("custom"), &json!("code"))
    );
    let input = made["custom"]["input"].as_str().unwrap();
    assert!(input.len() == 3 && input.bytes().all(|b| (b'a'..=b'c').contains(&b)));
    let lark = json!({"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: \"x\" \"y\"+"}});
    let tools = json!([{"type": "custom", "custom": {"name": "code", "format": lark}}]);
    let body = call(
        json!({"tools": tools, "tool_choice": {"type": "custom", "custom": {"name": "code"}}, "stream": true}),
    );
    let chunks = post(&server, &body).chunks();
    let deltas = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["delta"]["tool_calls"][0]["custom"]["input"].as_str());
    assert!(deltas.collect::<String>().starts_with("xy"));
    server.stop().unwrap();
}

#[test]
fn an_answer_and_its_results_can_be_sent_back() {
    let server = start_wide();
    let first = post(
        &server,
        &call(json!({"tool_choice": "required", "seed": 1})),
    )
    .json();
    let made = first["choices"][0]["message"].clone();
    let id = made["tool_calls"][0]["id"].clone();
    let messages = json!([
        {"role": "user", "content": "where is the card?"},
        made,
        {"role": "tool", "tool_call_id": id, "content": "here"},
    ]);
    let body = call(json!({"messages": messages, "max_tokens": 5, "tool_choice": "auto"}));
    assert_eq!(post(&server, &body).status, 200);
    let mut lost = messages;
    lost[2]["tool_call_id"] = json!("call_other");
    let refused = post(&server, &call(json!({"messages": lost}))).json();
    assert_eq!(refused["error"]["param"], "messages[2].tool_call_id");
    server.stop().unwrap();
}

#[test]
fn a_stop_string_never_leaves_half_a_call() {
    let server = start_wide();
    let named = json!({"type": "function", "function": {"name": "weather"}});
    let refused = post(
        &server,
        &call(json!({"tool_choice": named, "stop": "city"})),
    );
    assert_eq!(
        (refused.status, refused.json()["error"]["param"].clone()),
        (400, json!("stop"))
    );
    server.stop().unwrap();
}

#[test]
fn a_format_and_tools_go_together() {
    let server = start_wide();
    let schema = json!({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "f", "schema": schema}});
    for seed in 0..6 {
        let body =
            call(json!({"response_format": format, "seed": seed, "parallel_tool_calls": false}));
        let answer = post(&server, &body).json();
        let message = &answer["choices"][0]["message"];
        match message["content"].as_str() {
            Some(text) => {
                let value: Value = serde_json::from_str(text).unwrap();
                assert!(value["a"].is_boolean());
            }
            None => assert_eq!(calls(&answer).len(), 1),
        }
    }
    server.stop().unwrap();
}
