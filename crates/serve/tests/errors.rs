//! Every error has a status, a code, a field where there is one, OpenAI's shape, and a request id.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bantam_engine::{Embedder, Engine, EngineConfig};
use bantam_serve::{ApiKey, Models, ServeConfig, ServeError, ServedEmbedder, ServedModel, Server};
use serde_json::{Value, json};
use support::mock::Mock;
use support::{
    Answer, CHAT, JSON, ask, config, finish, get, model, models, open, post, send, start,
    start_with,
};

fn check(answer: &Answer, status: u16, code: &str, param: Option<&str>) {
    assert_eq!(answer.status, status, "{answer:?}");
    assert!(
        answer.headers["x-request-id"].starts_with("req_"),
        "{answer:?}"
    );
    assert_eq!(answer.headers["content-type"], "application/json");
    let body = answer.json();
    assert_eq!(body.as_object().unwrap().len(), 1);
    let error = &body["error"];
    assert_eq!(
        (error["code"].as_str(), error["param"].as_str()),
        (Some(code), param),
        "{error}"
    );
    assert!(!error["message"].as_str().unwrap().is_empty());
    assert!(error["type"].as_str().unwrap().ends_with("_error"));
}

#[test]
fn routes_and_bodies() {
    let limits = ServeConfig {
        body_bytes_max: 2000,
        body_timeout: Duration::from_millis(300),
        ..config()
    };
    let server = start_with(limits, EngineConfig::default(), Duration::ZERO);
    let addr = server.addr();
    let post_raw = |headers: &str, body: &str| finish(open(addr, "POST", CHAT, headers, body));
    check(&get(&server, "/v1/nothing"), 404, "unknown_url", None);
    check(&get(&server, "/"), 404, "unknown_url", None);
    check(
        &get(&server, "/v1/completions"),
        405,
        "method_not_allowed",
        None,
    );
    check(
        &finish(open(addr, "DELETE", "/v1/models", "", "")),
        405,
        "method_not_allowed",
        None,
    );
    check(
        &get(&server, "/v1/models/other"),
        404,
        "model_not_found",
        Some("model"),
    );
    check(
        &get(&server, "/v1/models/a/b"),
        404,
        "model_not_found",
        Some("model"),
    );
    check(
        &get(&server, "/v1/models/%ff"),
        404,
        "model_not_found",
        Some("model"),
    );
    check(&post_raw(JSON, "{\"model\":"), 400, "invalid_json", None);
    check(&post_raw(JSON, "[]"), 400, "invalid_json", None);
    check(&post_raw(JSON, ""), 400, "invalid_json", None);
    check(&post_raw("", "{}"), 415, "unsupported_media_type", None);
    check(
        &post_raw("Content-Type: text/plain\r\n", "{}"),
        415,
        "unsupported_media_type",
        None,
    );
    check(
        &post_raw(JSON, &" ".repeat(2001)),
        413,
        "request_too_large",
        None,
    );
    // A body that never comes.
    let lying =
        format!("POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: 9\r\n\r\n{{");
    let mut stream = std::net::TcpStream::connect(addr).unwrap();
    std::io::Write::write_all(&mut stream, lying.as_bytes()).unwrap();
    check(&finish(stream), 408, "request_timeout", None);
    // A body in chunks, without a length, past the limit.
    let chunk = format!("7d1\r\n{}\r\n0\r\n\r\n", " ".repeat(2001));
    let chunked = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{JSON}Transfer-Encoding: chunked\r\n\r\n{chunk}"
    );
    let mut stream = std::net::TcpStream::connect(addr).unwrap();
    std::io::Write::write_all(&mut stream, chunked.as_bytes()).unwrap();
    check(&finish(stream), 413, "request_too_large", None);
    server.stop().unwrap();
}

#[test]
fn requests_that_cannot_be_run() {
    // Room for fewer answers than one call may ask for.
    let small = EngineConfig {
        queue: 64,
        ..EngineConfig::default()
    };
    let server = start_with(config(), small, Duration::ZERO);
    let long = "x".repeat(500);
    let table: Vec<(Value, u16, &str, Option<&str>)> = vec![
        (
            json!({"model": "gpt-4o"}),
            404,
            "model_not_found",
            Some("model"),
        ),
        (
            json!({"temprature": 1}),
            400,
            "unknown_parameter",
            Some("temprature"),
        ),
        (
            json!({"tools": [{"type": "function"}]}),
            400,
            "missing_required_parameter",
            Some("tools[0].function"),
        ),
        (
            json!({"tools": [
                {"type": "function", "function": {"name": "a"}},
                {"type": "function", "function": {"name": "b", "parameters": {"not": {}}}},
            ]}),
            400,
            "unsupported_constraint",
            Some("tools[1]"),
        ),
        (
            json!({"response_format": {"type": "json_object"}, "stop": "x"}),
            400,
            "invalid_value",
            Some("stop"),
        ),
        (
            json!({"max_tokens": 1000}),
            400,
            "context_length_exceeded",
            Some("messages"),
        ),
        (
            json!({"logit_bias": {"99999": 1}}),
            400,
            "invalid_value",
            Some("logit_bias"),
        ),
        (json!({"n": 100}), 400, "invalid_value", Some("n")),
        (
            json!({"guided_regex": "(a"}),
            400,
            "unsupported_constraint",
            Some("guided_regex"),
        ),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}}),
            400,
            "unsupported_constraint",
            Some("response_format.json_schema.schema"),
        ),
        (
            json!({"messages": [{"role": "user", "content": long}]}),
            400,
            "context_length_exceeded",
            Some("messages"),
        ),
        (
            json!({"messages": [{"role": "user", "content": long}], "max_tokens": null}),
            400,
            "context_length_exceeded",
            Some("messages"),
        ),
        (
            json!({"messages": [{"role": "user", "content": "hi", "name": "bob"}]}),
            400,
            "unsupported_parameter",
            Some("messages[0].name"),
        ),
        // The mock model panics on reading byte 1, and fails on byte 2.
        (
            json!({"messages": [{"role": "user", "content": "\u{1}"}]}),
            500,
            "internal_error",
            None,
        ),
        (
            json!({"messages": [{"role": "user", "content": "\u{2}"}]}),
            500,
            "internal_error",
            None,
        ),
    ];
    for (extra, status, code, param) in table {
        check(&post(&server, &ask(extra.clone())), status, code, param);
        if status == 500 {
            continue;
        }
        // The same before a stream begins.
        let mut body = ask(extra);
        body["stream"] = json!(true);
        check(&post(&server, &body), status, code, param);
    }
    let over = post(&server, &ask(json!({"max_tokens": 1000}))).json();
    let message = over["error"]["message"].as_str().unwrap();
    assert!(
        message.contains("1000") && message.contains("400"),
        "{message}"
    );
    assert_eq!(
        post(&server, &ask(json!({}))).status,
        200,
        "and the server goes on"
    );
    server.stop().unwrap();
}

#[test]
fn an_error_within_a_stream_is_an_event_and_no_end_mark_follows() {
    let server = start();
    let body = json!({"stream": true, "messages": [{"role": "user", "content": "\u{1}"}]});
    let answer = post(&server, &ask(body));
    assert_eq!(answer.status, 200);
    let events = answer.events();
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "internal_error");
    server.stop().unwrap();
}

#[test]
fn keys() {
    let keys = vec![ApiKey::new("sesame"), ApiKey::new("other")];
    let server = start_with(
        ServeConfig {
            api_keys: keys.clone(),
            ..config()
        },
        EngineConfig::default(),
        Duration::ZERO,
    );
    let models = |headers: &str| finish(open(server.addr(), "GET", "/v1/models", headers, ""));
    check(&models(""), 401, "missing_api_key", None);
    check(
        &models("Authorization: Bearer wrong\r\n"),
        401,
        "invalid_api_key",
        None,
    );
    check(&get(&server, "/v1/nothing"), 401, "missing_api_key", None);
    assert_eq!(models("Authorization: Bearer sesame\r\n").status, 200);
    assert_eq!(models("Authorization: Bearer other\r\n").status, 200);
    assert_eq!(get(&server, "/health").status, 200);
    server.stop().unwrap();
}

#[test]
fn a_foreign_page_cannot_call_an_open_server() {
    let server = start();
    let mut stream = std::net::TcpStream::connect(server.addr()).unwrap();
    let request = "GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    check(&finish(stream), 403, "forbidden_host", None);
    server.stop().unwrap();
}

#[test]
fn what_cannot_start_says_why() {
    let start = |config, all| Server::start(config, models(all)).err().unwrap();
    let mock = |id| model(id, EngineConfig::default(), Duration::ZERO);
    let open_wide = ServeConfig {
        host: IpAddr::from([0, 0, 0, 0]),
        ..config()
    };
    let error = start(open_wide, vec![mock("m")]);
    assert!(matches!(error, ServeError::KeyNeeded { .. }));
    assert!(error.to_string().contains("hint: set a key"));
    assert!(matches!(start(config(), vec![]), ServeError::Models(_)));
    let models = Models::default();
    models.add(mock("m")).unwrap();
    let twice = models.add(mock("m")).unwrap_err();
    assert_eq!(twice.to_string(), "two models are called `m`");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    assert!(matches!(
        start(ServeConfig { port, ..config() }, vec![mock("m")]),
        ServeError::Bind { .. }
    ));
    let ServedModel {
        chat, constraints, ..
    } = mock("m");
    let broken = ServedModel::new("m", chat, constraints, || {
        Err::<Engine<Mock>, _>("no such file")
    });
    assert_eq!(
        Models::default().add(broken).unwrap_err().to_string(),
        "model `m` did not load: no such file"
    );
}

/// Vectors that are not even long enough to be counted.
struct Trap;

impl Embedder for Trap {
    fn dims(&self) -> usize {
        panic!("a planned panic with a secret")
    }

    fn max_tokens(&self) -> usize {
        100
    }

    fn vocab(&self) -> usize {
        300
    }

    fn encode(&self, _: &str) -> Vec<u32> {
        Vec::new()
    }

    fn vectors(&self, _: &[&[u32]]) -> Vec<Vec<f32>> {
        Vec::new()
    }
}

#[test]
fn a_panic_is_one_answer_of_500() {
    let shelf = models(vec![model("mock", EngineConfig::default(), Duration::ZERO)]);
    shelf
        .add_embedder(ServedEmbedder::new("trap", Arc::new(Trap)))
        .unwrap();
    let server = Server::start(config(), shelf).unwrap();
    let mut seen = HashSet::new();
    for _ in 0..3 {
        let body = json!({"model": "trap", "input": "abc"});
        let failed = send(&server, "POST", "/v1/embeddings", Some(&body));
        check(&failed, 500, "internal_error", None);
        assert!(!failed.body.contains("secret"));
        assert!(seen.insert(failed.headers["x-request-id"].clone()));
        assert_eq!(post(&server, &ask(json!({}))).status, 200, "it lives on");
    }
    let counted = "bantam_errors_total{route=\"/v1/embeddings\",status=\"500\"} 3";
    assert!(get(&server, "/metrics").body.contains(counted));
    server.stop().unwrap();
}
