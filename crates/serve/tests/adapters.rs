//! Adapters that come, are replaced and go while requests run over the same base.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bantam_engine::EngineConfig;
use bantam_serve::{LoadedAdapter, Models, ServedAdapter, ServedEmbedder, Server};
use serde_json::{Value, json};
use support::{
    Counter, ask, config, finish, get, model, model_with, post, post_open, send, send_with,
    wait_for,
};

/// Bytes that each adapter says it takes.
const BYTES: usize = 1000;

/// An adapter over `mock` that counts how often it is read.
fn adapter(id: &str, number: u64, reads: &Arc<AtomicUsize>) -> ServedAdapter {
    let reads = Arc::clone(reads);
    let mut adapter = ServedAdapter::new(id, "mock", move || {
        reads.fetch_add(1, Ordering::Relaxed);
        Ok(LoadedAdapter::new(Arc::new(number), BYTES).with_embedder(Arc::new(Counter)))
    });
    adapter.aliases = vec![format!("ft:mock:{id}")];
    adapter
}

fn shelf(adapter_bytes: usize, delay: Duration) -> Arc<Models> {
    let models = Models::new(adapter_bytes);
    models
        .add(model("mock", EngineConfig::default(), delay))
        .unwrap();
    Arc::new(models)
}

fn says(server: &Server, model: &str) -> String {
    let answer = post(server, &ask(json!({"model": model})));
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    answer["choices"][0]["message"]["content"]
        .as_str()
        .unwrap()
        .to_string()
}

/// A metric without labels.
fn metric(server: &Server, name: &str) -> f64 {
    let page = get(server, "/metrics").body;
    let line = page.lines().find(|l| l.starts_with(&format!("{name} ")));
    line.unwrap().split(' ').nth(1).unwrap().parse().unwrap()
}

#[test]
fn adapters_share_a_base_and_can_be_added_replaced_and_removed() {
    let reads = Arc::default();
    let models = shelf(10 * BYTES, Duration::ZERO);
    let server = Server::start(config(), Arc::clone(&models)).unwrap();
    let bare = says(&server, "mock");
    assert_eq!(post(&server, &ask(json!({"model": "one"}))).status, 404);
    models.add_adapter(adapter("one", 1, &reads)).unwrap();
    models.add_adapter(adapter("two", 2, &reads)).unwrap();
    let (one, two) = (says(&server, "one"), says(&server, "two"));
    assert!(
        one != two && one != bare && two != bare,
        "{one} {two} {bare}"
    );
    assert_eq!(says(&server, "ft:mock:one"), one);
    assert_eq!(says(&server, "mock"), bare, "the base is as it was");
    let health = get(&server, "/health").json();
    assert_eq!(health["models"][1]["base"], "mock");
    assert_eq!(models.ids(), ["mock", "one", "two"]);

    // Scores and vectors are the adapter's, too.
    let decide = |model: &str| {
        let body = json!({"model": model, "input": "x", "questions": [
            {"type": "predicate", "instructions": "is it?"}]});
        send(&server, "POST", "/v1/decisions", Some(&body)).json()["answers"].clone()
    };
    assert_ne!(decide("one"), decide("two"));
    let embed = json!({"model": "one", "input": "abc"});
    let vectors = send(&server, "POST", "/v1/embeddings", Some(&embed)).json();
    assert_eq!(vectors["model"], "one");
    assert_eq!(vectors["data"][0]["embedding"], json!([1.0, 1.0, 1.0]));

    models.add_adapter(adapter("one", 3, &reads)).unwrap();
    assert_ne!(says(&server, "one"), one, "the new one answers from now on");
    assert!(!models.remove("mock"), "adapters are over it");
    let gone = send_with(&server, "DELETE", "/v1/models/one", "", None);
    assert_eq!(gone.status, 200);
    assert_eq!(post(&server, &ask(json!({"model": "one"}))).status, 404);
    assert_eq!(says(&server, "two"), two);
    assert_eq!(metric(&server, "bantam_adapter_bytes"), BYTES as f64);

    // Names are given once, and a base must be there.
    let taken = models.add_adapter(adapter("mock", 4, &reads)).unwrap_err();
    assert_eq!(taken.to_string(), "two models are called `mock`");
    let lost = ServedAdapter::new("three", "none", || Err(String::new()));
    let error = models.add_adapter(lost).unwrap_err().to_string();
    assert!(error.contains("`none` is not served"), "{error}");
    let wrong = ServedAdapter::new("three", "mock", || {
        Ok(LoadedAdapter::new(Arc::new("no number"), 1))
    });
    assert!(
        models.add_adapter(wrong).is_err(),
        "not of this kind of model"
    );
    assert_eq!(models.ids(), ["mock", "two"]);
    server.stop().unwrap();
}

#[test]
fn running_answers_keep_the_adapter_they_began_with() {
    let step = Duration::from_millis(10);
    let reads = Arc::default();
    let models = shelf(10 * BYTES, step);
    models.add_adapter(adapter("one", 1, &reads)).unwrap();
    let server = Server::start(config(), Arc::clone(&models)).unwrap();
    let long = json!({"model": "one", "max_tokens": 60, "logit_bias": {"2": -100}, "stream": true});
    let whole = post(&server, &ask(long.clone())).body;
    let text = |body: &str| -> String {
        let data = body.split("\n\n").filter_map(|e| e.strip_prefix("data: {"));
        let chunk = |e: &str| serde_json::from_str::<Value>(&format!("{{{e}")).unwrap();
        let delta = |c: Value| {
            c["choices"][0]["delta"]["content"]
                .as_str()
                .map(str::to_owned)
        };
        data.map(chunk).filter_map(delta).collect()
    };
    let begun = |what: &str| {
        let mut stream = post_open(&server, &ask(long.clone()));
        let mut some = [0; 400];
        stream.read_exact(&mut some).unwrap();
        wait_for(&server, what, |h| h["running"] == 1);
        (stream, some)
    };
    for what in ["replaced", "removed"] {
        let (mut stream, some) = begun(what);
        if what == "replaced" {
            models.add_adapter(adapter("one", 2, &reads)).unwrap();
            models.add_adapter(adapter("one", 1, &reads)).unwrap();
        } else {
            assert!(models.remove("one"));
        }
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        let all = String::from_utf8([&some[..], &rest].concat()).unwrap();
        let unchunked: String = all
            .split("\r\n")
            .filter(|line| line.starts_with("data: "))
            .map(|line| format!("{}\n\n", line.trim_end()))
            .collect();
        assert_eq!(text(&unchunked), text(&whole), "{what}");
    }
    wait_for(&server, "idle", |h| h["running"] == 0);
    // The engine lets go of it a moment after its last answer.
    for _ in 0..200 {
        if metric(&server, "bantam_adapter_bytes") == 0.0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(metric(&server, "bantam_adapter_bytes"), 0.0);
    server.stop().unwrap();
}

#[test]
fn the_adapter_that_was_not_asked_for_longest_makes_way() {
    let counts: Vec<Arc<AtomicUsize>> = (0..3).map(|_| Arc::default()).collect();
    let models = shelf(2 * BYTES, Duration::ZERO);
    for (i, (id, reads)) in ["a", "b", "c"].iter().zip(&counts).enumerate() {
        models.add_adapter(adapter(id, i as u64, reads)).unwrap();
    }
    let server = Server::start(config(), Arc::clone(&models)).unwrap();
    let n_reads = || -> Vec<usize> { counts.iter().map(|c| c.load(Ordering::Relaxed)).collect() };
    assert_eq!(n_reads(), [1, 1, 1], "all were read when they were added");
    assert_eq!(metric(&server, "bantam_adapters"), 2.0, "and two are kept");
    let first = says(&server, "b");
    says(&server, "c");
    assert_eq!(n_reads(), [1, 1, 1]);
    // `b` goes: `c` was asked for later.
    says(&server, "a");
    says(&server, "c");
    assert_eq!(n_reads(), [2, 1, 1]);
    assert_eq!(says(&server, "b"), first);
    assert_eq!(n_reads(), [2, 2, 1]);
    let health = get(&server, "/health").json();
    let states: Vec<&Value> = (1..4).map(|i| &health["models"][i]["in_memory"]).collect();
    assert_eq!(states, [&json!(false), &json!(true), &json!(true)]);
    server.stop().unwrap();
}

#[test]
fn where_running_requests_fill_the_memory_others_come_back_later() {
    let reads = Arc::default();
    let models = shelf(BYTES / 2, Duration::from_millis(10));
    models.add_adapter(adapter("a", 1, &reads)).unwrap();
    models.add_adapter(adapter("b", 2, &reads)).unwrap();
    let server = Server::start(config(), Arc::clone(&models)).unwrap();
    // More than there is memory for: a single one always fits.
    let long = json!({"model": "a", "max_tokens": 300, "logit_bias": {"2": -100}, "stream": true});
    let running = post_open(&server, &ask(long));
    wait_for(&server, "running", |h| h["running"] == 1);
    let refused = post(&server, &ask(json!({"model": "b"})));
    assert_eq!(refused.status, 429);
    assert!(refused.headers.contains_key("retry-after-ms"));
    drop(running);
    wait_for(&server, "idle", |h| h["running"] == 0);
    says(&server, "b");
    server.stop().unwrap();
}

#[test]
fn what_cannot_be_read_harms_nobody_else() {
    let is_there = Arc::new(AtomicBool::new(true));
    let (models, reads) = (shelf(BYTES, Duration::ZERO), Arc::default());
    let there = Arc::clone(&is_there);
    let fragile = ServedAdapter::new("fragile", "mock", move || {
        assert!(there.load(Ordering::Relaxed), "a planned panic");
        Ok(LoadedAdapter::new(Arc::new(7u64), BYTES))
    });
    models.add_adapter(fragile).unwrap();
    // It makes way for another, and is not to be had after that.
    models.add_adapter(adapter("other", 1, &reads)).unwrap();
    is_there.store(false, Ordering::Relaxed);
    let lazy = ServedEmbedder::on_first_use("lazy", {
        let there = Arc::clone(&is_there);
        move || match there.load(Ordering::Relaxed) {
            true => Ok(Arc::new(Counter)),
            false => Err("no network".to_string()),
        }
    });
    models.add_embedder(lazy).unwrap();
    let server = Server::start(config(), Arc::clone(&models)).unwrap();
    assert_eq!(post(&server, &ask(json!({"model": "fragile"}))).status, 500);
    let embed = || {
        let body = json!({"model": "lazy", "input": "abc"});
        send(&server, "POST", "/v1/embeddings", Some(&body))
    };
    let refused = embed();
    assert_eq!(refused.status, 503);
    assert_eq!(refused.json()["error"]["code"], "model_not_loaded");
    assert!(!refused.body.contains("no network"), "that is for the log");
    says(&server, "other");
    says(&server, "mock");
    is_there.store(true, Ordering::Relaxed);
    says(&server, "fragile");
    assert_eq!(embed().status, 200, "tried again");
    server.stop().unwrap();
}

#[test]
fn a_hidden_base_is_there_for_its_adapters_alone() {
    let models = Models::default();
    let mut base = model_with("mock", EngineConfig::default(), Duration::ZERO, 400);
    base.hidden = true;
    models.add(base).unwrap();
    models
        .add_adapter(adapter("one", 1, &Arc::default()))
        .unwrap();
    let server = Server::start(config(), Arc::new(models)).unwrap();
    says(&server, "one");
    assert_eq!(post(&server, &ask(json!({}))).status, 404);
    let list = get(&server, "/v1/models").json();
    assert_eq!(list["data"].as_array().unwrap().len(), 1);
    finish(support::open(server.addr(), "GET", "/ready", "", ""));
    server.stop().unwrap();
}
