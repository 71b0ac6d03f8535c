//! Clients that are slow, that leave, that are too many, and a server that has to go.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::Read;
use std::time::{Duration, Instant};

use bantam_engine::EngineConfig;
use bantam_serve::ServeConfig;
use serde_json::{Value, json};
use support::{ask, config, finish, get, post, post_open, start_with, wait_for};

/// A step of the model takes this long in these tests.
const STEP: Duration = Duration::from_millis(20);

/// An answer of 300 steps, six seconds: far longer than any of these tests should wait.
fn endless(extra: Value) -> Value {
    // Nothing ends it early: the mock's end token is forbidden.
    let mut body = ask(json!({"max_tokens": 300, "logit_bias": {"2": -100}}));
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn is_idle(health: &Value) -> bool {
    health["running"] == 0 && health["queue_depth"] == 0
}

#[test]
fn a_client_that_leaves_is_cancelled() {
    let one_slot = EngineConfig {
        slots: 1,
        ..EngineConfig::default()
    };
    let server = start_with(config(), one_slot, STEP);
    let began = Instant::now();
    for stream in [true, false] {
        // One runs, one waits; both clients leave.
        let mut running = post_open(&server, &endless(json!({"stream": stream})));
        wait_for(&server, "running", |h| h["running"] == 1);
        let waiting = post_open(&server, &endless(json!({"stream": stream})));
        wait_for(&server, "waiting", |h| h["queue_depth"] == 1);
        if stream {
            let mut some = [0; 64];
            running.read_exact(&mut some).unwrap();
        }
        drop(waiting);
        wait_for(&server, "the one that waits is gone", |h| {
            h["queue_depth"] == 0
        });
        drop(running);
        wait_for(&server, "the one that runs is gone", is_idle);
    }
    assert!(
        began.elapsed() < Duration::from_secs(5),
        "cancelled, not finished"
    );
    assert_eq!(post(&server, &ask(json!({"max_tokens": 2}))).status, 200);
    server.stop().unwrap();
}

#[test]
fn a_client_that_does_not_read_holds_up_no_one() {
    let server = start_with(config(), EngineConfig::default(), Duration::ZERO);
    let lazy = post_open(
        &server,
        &endless(json!({"stream": true, "logprobs": true, "top_logprobs": 20})),
    );
    let quick = post(&server, &ask(json!({"max_tokens": 100})));
    assert_eq!(quick.status, 200);
    wait_for(
        &server,
        "the engine is done with the lazy one, too",
        is_idle,
    );
    let late = finish(lazy);
    assert_eq!(late.chunks().len(), 302, "who speaks, 300 tokens, the end");
    server.stop().unwrap();
}

#[test]
fn a_client_that_reads_nothing_loses_its_slot_and_its_connection() {
    let hasty = ServeConfig {
        write_timeout: Duration::from_millis(300),
        ..config()
    };
    let server = start_with(hasty, EngineConfig::default(), Duration::ZERO);
    // Ten megabytes: more than the system keeps for a client that does not read.
    let heavy = json!({"stream": true, "logprobs": true, "top_logprobs": 20, "n": 16});
    let lazy = [0; 3].map(|_| post_open(&server, &endless(heavy.clone())));
    let quick = post(&server, &ask(json!({"max_tokens": 20})));
    assert_eq!(quick.status, 200, "nobody else waits for them");
    let cut = "bantam_slow_clients_total 3";
    for _ in 0..500 {
        if get(&server, "/metrics").body.contains(cut) {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    wait_for(&server, "their slots are free", is_idle);
    for mut stream in lazy {
        let mut all = Vec::new();
        let _ = stream.read_to_end(&mut all);
        assert!(
            !String::from_utf8_lossy(&all).contains("[DONE]"),
            "it was cut"
        );
    }
    server.stop().unwrap();
}

#[test]
fn a_full_queue_is_a_429() {
    let small = EngineConfig {
        slots: 1,
        queue: 2,
        ..EngineConfig::default()
    };
    let server = start_with(config(), small, STEP);
    let first = post_open(&server, &endless(json!({})));
    let second = post_open(&server, &endless(json!({})));
    wait_for(&server, "full", |h| {
        h["running"] == 1 && h["queue_depth"] == 1
    });
    let refused = post(&server, &ask(json!({})));
    assert_eq!(refused.status, 429);
    assert_eq!(refused.headers["retry-after"], "1");
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    drop((first, second));
    wait_for(&server, "empty", is_idle);
    assert_eq!(
        post(&server, &ask(json!({"max_tokens": 2, "n": 2}))).status,
        200
    );
    let many = post(&server, &ask(json!({"n": 3})));
    assert_eq!(
        (many.status, many.json()["error"]["param"].as_str()),
        (400, Some("n"))
    );
    server.stop().unwrap();
}

#[test]
fn a_server_that_stops_finishes_what_runs() {
    let server = start_with(config(), EngineConfig::default(), STEP);
    let addr = server.addr();
    let body = json!({"max_tokens": 40, "logit_bias": {"2": -100}});
    let whole = post_open(&server, &ask(body.clone()));
    let mut streamed = ask(body);
    streamed["stream"] = json!(true);
    let streamed = post_open(&server, &streamed);
    wait_for(&server, "running", |h| h["running"] == 2);
    let stopping = std::thread::spawn(move || server.stop());
    let whole = finish(whole).json();
    assert_eq!(whole["usage"]["completion_tokens"], 40);
    assert_eq!(finish(streamed).chunks().len(), 42);
    stopping.join().unwrap().unwrap();
    assert!(std::net::TcpStream::connect(addr).is_err());
}

#[test]
fn a_server_that_stops_does_not_wait_for_ever() {
    let hasty = ServeConfig {
        shutdown_grace: Duration::from_millis(200),
        ..config()
    };
    let server = start_with(hasty, EngineConfig::default(), STEP);
    let running = post_open(&server, &endless(json!({"stream": true})));
    wait_for(&server, "running", |h| h["running"] == 1);
    let began = Instant::now();
    server.stop().unwrap();
    assert!(began.elapsed() < Duration::from_secs(4));
    drop(running);
}

#[test]
fn many_at_once_get_what_each_would_alone() {
    let server = start_with(
        config(),
        EngineConfig {
            slots: 4,
            ..EngineConfig::default()
        },
        Duration::ZERO,
    );
    let body = |seed: u64| ask(json!({"temperature": 1, "seed": seed, "max_tokens": 30}));
    let alone: Vec<Value> = (0..12)
        .map(|seed| post(&server, &body(seed)).json()["choices"].clone())
        .collect();
    let open: Vec<_> = (0..12)
        .map(|seed| post_open(&server, &body(seed)))
        .collect();
    for (stream, alone) in open.into_iter().zip(alone) {
        assert_eq!(finish(stream).json()["choices"], alone);
    }
    assert_eq!(get(&server, "/health").json()["status"], "ok");
    server.stop().unwrap();
}
