//! Responses that are made while nobody waits.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use bantam_engine::EngineConfig;
use bantam_serve::{ServeConfig, Server};
use bantam_store::Store;
use serde_json::{Value, json};
use support::{config, get, send, start, start_with, wait_for};

/// A step of the model takes this long in these tests.
const STEP: Duration = Duration::from_millis(10);

fn respond(server: &Server, extra: Value) -> support::Answer {
    let mut body = json!({
        "model": "mock", "input": "where is the card?", "max_output_tokens": 12, "temperature": 0,
        "background": true,
    });
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    send(server, "POST", "/v1/responses", Some(&body))
}

fn path(response: &Value) -> String {
    format!("/v1/responses/{}", response["id"].as_str().unwrap())
}

/// Polls until the response has this status.
fn poll(server: &Server, response: &Value, status: &str) -> Value {
    for _ in 0..1000 {
        let now = get(server, &path(response)).json();
        if now["status"] == status {
            return now;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("{:?}", get(server, &path(response)));
}

#[test]
fn a_response_in_the_background_is_the_one_that_is_waited_for() {
    let server = start();
    let waited = respond(&server, json!({"background": false})).json();
    let queued = respond(&server, json!({})).json();
    assert_eq!(
        (&queued["status"], &queued["background"]),
        (&json!("queued"), &json!(true))
    );
    assert_eq!(queued["output"], json!([]));
    let done = poll(&server, &queued, waited["status"].as_str().unwrap());
    assert_eq!(
        done["usage"]["total_tokens"],
        waited["usage"]["total_tokens"]
    );
    assert_eq!(
        done["output"][0]["content"][0]["text"],
        waited["output"][0]["content"][0]["text"]
    );
    // Another goes on from it; cancelling it changes nothing.
    let next = respond(&server, json!({"previous_response_id": done["id"]}));
    assert_eq!(next.status, 200);
    let late = send(&server, "POST", &format!("{}/cancel", path(&done)), None).json();
    assert_eq!(late, done);
    let refused = send(&server, "POST", &format!("{}/cancel", path(&waited)), None);
    assert_eq!(refused.json()["error"]["code"], "not_cancellable");
    for (extra, param) in [
        (json!({"stream": true}), "stream"),
        (json!({"store": false}), "background"),
        (json!({"background": "yes"}), "background"),
        (json!({"max_output_tokens": 1_000_000}), "messages"),
    ] {
        assert_eq!(respond(&server, extra).json()["error"]["param"], param);
    }
    server.stop().unwrap();
}

#[test]
fn one_that_runs_is_cancelled_or_deleted_and_its_slot_is_free() {
    let server = start_with(config(), EngineConfig::default(), STEP);
    let long = json!({"max_output_tokens": 300, "logit_bias": {"2": -100}});
    let running = respond(&server, long.clone()).json();
    poll(&server, &running, "in_progress");
    let early = respond(&server, json!({"previous_response_id": running["id"]})).json();
    assert_eq!(early["error"]["param"], "previous_response_id", "{early}");
    let cancel = format!("{}/cancel", path(&running));
    let cancelled = send(&server, "POST", &cancel, None).json();
    assert_eq!(cancelled["status"], "cancelled");
    wait_for(&server, "its slot is free", |h| h["running"] == 0);
    assert_eq!(
        get(&server, &path(&running)).json(),
        cancelled,
        "and it stays so"
    );
    assert_eq!(send(&server, "POST", &cancel, None).json(), cancelled);
    let gone = respond(&server, long).json();
    poll(&server, &gone, "in_progress");
    assert_eq!(
        send(&server, "DELETE", &path(&gone), None).json()["deleted"],
        true
    );
    wait_for(&server, "its slot is free", |h| h["running"] == 0);
    assert_eq!(get(&server, &path(&gone)).status, 404);
    server.stop().unwrap();
}

#[test]
fn a_stop_waits_for_it_and_what_it_cuts_off_is_told() {
    let store = Arc::new(Store::in_memory().unwrap());
    let kept = |grace: Duration| ServeConfig {
        store: Some(Arc::clone(&store)),
        shutdown_grace: grace,
        ..config()
    };
    let server = start_with(kept(Duration::from_secs(60)), EngineConfig::default(), STEP);
    let patient = respond(
        &server,
        json!({"max_output_tokens": 20, "logit_bias": {"2": -100}}),
    )
    .json();
    server.stop().unwrap();
    let server = start_with(kept(Duration::ZERO), EngineConfig::default(), STEP);
    let found = get(&server, &path(&patient)).json();
    assert!(
        ["completed", "incomplete"].contains(&found["status"].as_str().unwrap()),
        "{found}"
    );
    let cut = respond(
        &server,
        json!({"max_output_tokens": 300, "logit_bias": {"2": -100}}),
    )
    .json();
    server.stop().unwrap();
    let server = start_with(
        kept(Duration::ZERO),
        EngineConfig::default(),
        Duration::ZERO,
    );
    let found = get(&server, &path(&cut)).json();
    assert_eq!(found["status"], "failed");
    assert_eq!(found["error"]["code"], "server_error");
    assert!(
        found["error"]["message"]
            .as_str()
            .unwrap()
            .contains("stopped")
    );
    server.stop().unwrap();
}
