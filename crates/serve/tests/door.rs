//! Who comes in, how much they may use, what is told twice, and what is counted.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Duration;

use bantam_engine::EngineConfig;
use bantam_serve::{ServeConfig, Server, Tls};
use bantam_store::{KeyLimits, NewKey, Scope, Store};
use serde_json::{Value, json};
use support::{Answer, CHAT, ask, config, get, model, send_with, start_with};

/// A store with a key of these scopes and limits, and the header that sends it.
fn key(store: &Store, scopes: &[Scope], limits: KeyLimits) -> (String, String) {
    let (key, text) = NewKey::generate("test", scopes.to_vec(), limits, 0).unwrap();
    store.create_key(&key).unwrap();
    (key.id, format!("Authorization: Bearer {text}\r\n"))
}

fn start(store: &Arc<Store>) -> Server {
    let config = ServeConfig {
        keys: Some(Arc::clone(store)),
        ..config()
    };
    start_with(config, EngineConfig::default(), Duration::ZERO)
}

fn chat(server: &Server, headers: &str, extra: Value) -> Answer {
    send_with(server, "POST", CHAT, headers, Some(&ask(extra)))
}

#[test]
fn a_key_opens_what_its_scopes_say_until_it_is_revoked() {
    let store = Arc::new(Store::in_memory().unwrap());
    let (id, asks) = key(&store, &[Scope::Inference], KeyLimits::default());
    let (_, trains) = key(&store, &[Scope::Train], KeyLimits::default());
    let (_, rules) = key(&store, &[Scope::Admin], KeyLimits::default());
    let server = start(&store);
    assert_eq!(chat(&server, "", json!({})).status, 401);
    assert_eq!(chat(&server, &asks, json!({})).status, 200);
    assert_eq!(chat(&server, &rules, json!({})).status, 200);
    let refused = chat(&server, &trains, json!({}));
    assert_eq!(
        (refused.status, refused.json()["error"]["code"].clone()),
        (403, json!("insufficient_scope"))
    );
    let delete = |headers: &str| send_with(&server, "DELETE", "/v1/models/mock", headers, None);
    assert_eq!(delete(&asks).json()["error"]["code"], "insufficient_scope");
    assert_eq!(
        delete(&rules).json()["error"]["code"],
        "protected",
        "it is no tuned model"
    );
    // What one key keeps, another does not see.
    let kept = chat(&server, &asks, json!({"store": true})).json();
    let path = format!("{CHAT}/{}", kept["id"].as_str().unwrap());
    assert_eq!(send_with(&server, "GET", &path, &asks, None).status, 200);
    assert_eq!(send_with(&server, "GET", &path, &rules, None).status, 404);
    assert!(store.key(&id).unwrap().unwrap().last_used.is_some());
    store.revoke_key(&id, 1).unwrap();
    assert_eq!(chat(&server, &asks, json!({})).status, 401);
    for open in ["/health", "/ready"] {
        assert_eq!(get(&server, open).status, 200);
    }
    assert_eq!(get(&server, "/metrics").status, 401);
    server.stop().unwrap();
}

#[test]
fn a_tuned_model_can_be_taken_away() {
    let mut tuned = model("ft:mock:x", EngineConfig::default(), Duration::ZERO);
    tuned.tuned = true;
    tuned.aliases = vec!["gpt-4o".to_string()];
    let base = model("mock", EngineConfig::default(), Duration::ZERO);
    let server = Server::start(config(), support::models(vec![base, tuned])).unwrap();
    assert_eq!(
        chat(&server, "", json!({"model": "gpt-4o"})).json()["model"],
        "ft:mock:x"
    );
    let gone = send_with(&server, "DELETE", "/v1/models/ft:mock:x", "", None);
    assert_eq!(
        gone.json(),
        json!({"id": "ft:mock:x", "object": "model", "deleted": true})
    );
    assert_eq!(chat(&server, "", json!({"model": "gpt-4o"})).status, 404);
    assert_eq!(
        get(&server, "/v1/models").json()["data"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    server.stop().unwrap();
}

#[test]
fn limits_say_when_to_come_back() {
    let store = Arc::new(Store::in_memory().unwrap());
    let two = KeyLimits {
        requests_per_minute: Some(2),
        ..KeyLimits::default()
    };
    let (_, hasty) = key(&store, &[Scope::Inference], two);
    let few = KeyLimits {
        tokens_per_minute: Some(30),
        ..KeyLimits::default()
    };
    let (_, talker) = key(&store, &[Scope::Inference], few);
    let day = KeyLimits {
        tokens_per_day: Some(10),
        ..KeyLimits::default()
    };
    let (_, daily) = key(&store, &[Scope::Inference], day);
    let server = start(&store);
    let first = chat(&server, &hasty, json!({}));
    assert_eq!(first.headers["x-ratelimit-limit-requests"], "2");
    assert_eq!(first.headers["x-ratelimit-remaining-requests"], "1");
    assert_eq!(chat(&server, &hasty, json!({})).status, 200);
    let refused = chat(&server, &hasty, json!({}));
    assert_eq!(
        (refused.status, refused.json()["error"]["code"].clone()),
        (429, json!("rate_limit_exceeded"))
    );
    let ms: u64 = refused.headers["retry-after-ms"].parse().unwrap();
    assert!((20_000..=30_000).contains(&ms), "{ms}");
    assert_eq!(
        refused.headers["retry-after"],
        ms.div_ceil(1000).to_string()
    );
    // What a request took is known when it has ended.
    assert_eq!(chat(&server, &talker, json!({})).status, 200);
    assert_eq!(
        chat(&server, &talker, json!({})).json()["error"]["type"],
        "tokens"
    );
    assert_eq!(chat(&server, &daily, json!({})).status, 200);
    let spent = chat(&server, &daily, json!({}));
    assert_eq!(spent.json()["error"]["code"], "insufficient_quota");
    assert_eq!(spent.headers["x-should-retry"], "false");
    server.stop().unwrap();
}

#[test]
fn what_is_sent_twice_is_answered_once() {
    let server = support::start();
    let named = "Idempotency-Key: one\r\n";
    let body = json!({"temperature": 1, "max_tokens": 20});
    let first = chat(&server, named, body.clone());
    let again = chat(&server, named, body.clone());
    assert_eq!(first.body, again.body);
    assert_eq!(again.headers["idempotent-replayed"], "true");
    assert_ne!(
        first.body,
        chat(&server, "Idempotency-Key: two\r\n", body).body
    );
    let other = chat(&server, named, json!({}));
    assert_eq!(
        (other.status, other.json()["error"]["code"].clone()),
        (400, json!("idempotency_key_reused"))
    );
    let mistake = json!({"colour": 1});
    let refused = chat(&server, "Idempotency-Key: three\r\n", mistake.clone());
    assert_eq!(
        refused.body,
        chat(&server, "Idempotency-Key: three\r\n", mistake).body
    );
    let streamed = chat(
        &server,
        "Idempotency-Key: four\r\n",
        json!({"stream": true}),
    );
    assert_eq!(streamed.status, 400);
    server.stop().unwrap();
}

#[test]
fn what_happened_is_counted() {
    let server = support::start();
    chat(
        &server,
        "",
        json!({"max_tokens": 5, "logit_bias": {"2": -100}}),
    );
    chat(&server, "", json!({"colour": 1}));
    get(&server, "/no/such/path");
    let page = get(&server, "/metrics");
    assert!(page.headers["content-type"].starts_with("text/plain; version=0.0.4"));
    for line in [
        "bantam_requests_total{route=\"/v1/chat/completions\",status=\"200\"} 1",
        "bantam_errors_total{route=\"/v1/chat/completions\",status=\"400\"} 1",
        "bantam_errors_total{route=\"other\",status=\"404\"} 1",
        "bantam_tokens_total{model=\"mock\",kind=\"completion\"} 5",
        "bantam_time_to_first_token_seconds_count{model=\"mock\",route=\"/v1/chat/completions\"} 1",
        "bantam_inter_token_seconds_count{model=\"mock\"} 4",
        "bantam_batch_size{model=\"mock\"} 0",
    ] {
        assert!(
            page.body.lines().any(|l| l == line),
            "{line}\n{}",
            page.body
        );
    }
    assert!(!page.body.contains("no/such"));
    server.stop().unwrap();
}

#[test]
fn a_deadline_ends_an_answer() {
    let quick = ServeConfig {
        answer_timeout: Duration::from_millis(200),
        ..config()
    };
    let server = start_with(quick, EngineConfig::default(), Duration::from_millis(20));
    let long = json!({"max_tokens": 300, "logit_bias": {"2": -100}});
    let late = chat(&server, "", long.clone());
    assert_eq!(
        (late.status, late.json()["error"]["code"].clone()),
        (504, json!("deadline_exceeded"))
    );
    let mut body = long;
    body["stream"] = json!(true);
    let events = chat(&server, "", body);
    assert!(
        events
            .events()
            .last()
            .unwrap()
            .contains("deadline_exceeded")
    );
    support::wait_for(&server, "its slot is free", |h| h["running"] == 0);
    server.stop().unwrap();
}

#[test]
fn connections_can_be_encrypted() {
    let dir = std::env::temp_dir().join(format!("bantam-tls-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_string()]).unwrap();
    let (cert, key) = (dir.join("cert.pem"), dir.join("key.pem"));
    std::fs::write(&cert, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let tls = |cert: &std::path::Path| ServeConfig {
        tls: Some(Tls {
            cert: cert.to_path_buf(),
            key: key.clone(),
        }),
        ..config()
    };
    let server = start_with(tls(&cert), EngineConfig::default(), Duration::ZERO);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = "localhost".try_into().unwrap();
    let connection = rustls::ClientConnection::new(Arc::new(client), name).unwrap();
    let socket = std::net::TcpStream::connect(server.addr()).unwrap();
    let mut stream = rustls::StreamOwned::new(connection, socket);
    stream
        .write_all(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    assert!(answer.starts_with(b"HTTP/1.1 200"));
    // One that shakes no hands holds nobody up.
    let mut plain = std::net::TcpStream::connect(server.addr()).unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    server.stop().unwrap();
    let wrong = Server::start(
        tls(&dir.join("none.pem")),
        support::models(vec![model("m", EngineConfig::default(), Duration::ZERO)]),
    );
    assert!(wrong.err().unwrap().to_string().contains("none.pem"));
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_page_may_call_only_if_its_origin_is_listed() {
    let config = ServeConfig {
        cors_origins: vec!["https://app.example".parse().unwrap()],
        ..config()
    };
    let server = start_with(config, EngineConfig::default(), Duration::ZERO);
    let asks = |origin: &str| {
        let headers = format!(
            "Origin: {origin}\r\nAccess-Control-Request-Method: POST\r\n\
             Access-Control-Request-Headers: authorization,content-type,x-stainless-os\r\n"
        );
        send_with(&server, "OPTIONS", CHAT, &headers, None)
    };
    let listed = asks("https://app.example");
    assert_eq!(listed.status, 200);
    let told = |answer: &Answer, name: &str| answer.headers.get(name).cloned();
    let allowed = "access-control-allow-origin";
    assert_eq!(
        told(&listed, allowed).as_deref(),
        Some("https://app.example")
    );
    assert_eq!(
        told(&listed, "access-control-allow-headers").as_deref(),
        Some("authorization,content-type,x-stainless-os")
    );
    assert_eq!(told(&listed, "access-control-allow-credentials"), None);
    assert_eq!(told(&asks("https://other.example"), allowed), None);
    let answer = chat(&server, "Origin: https://app.example\r\n", json!({}));
    assert_eq!(answer.status, 200);
    assert_eq!(
        told(&answer, allowed).as_deref(),
        Some("https://app.example")
    );
    assert!(
        told(&answer, "access-control-expose-headers").is_some_and(|h| h.contains("x-request-id"))
    );
    // An error is to be read, too.
    let refused = chat(&server, "Origin: https://app.example\r\n", json!({"n": 0}));
    assert_eq!(
        (refused.status, told(&refused, allowed).is_some()),
        (400, true)
    );
    server.stop().unwrap();
    let closed = start_with(self::config(), EngineConfig::default(), Duration::ZERO);
    let answer = chat(&closed, "Origin: https://app.example\r\n", json!({}));
    assert_eq!(told(&answer, allowed), None);
    closed.stop().unwrap();
}
