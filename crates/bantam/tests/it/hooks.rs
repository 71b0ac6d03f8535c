//! Webhooks of a running server: signed, tried again, and not lost with the process.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bantam_testkit::tiny;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::jobs::{create, file, post};
use crate::support::{Server, World};

/// What a receiver got: the headers, and the body as it came.
#[derive(Debug, Clone)]
struct Got {
    headers: String,
    body: String,
    status: u16,
}

impl Got {
    fn header(&self, name: &str) -> String {
        let lines = self.headers.lines();
        let mut pairs = lines.filter_map(|line| line.split_once(": "));
        let found = pairs.find(|(key, _)| key.eq_ignore_ascii_case(name));
        found
            .map(|(_, value)| value.to_string())
            .unwrap_or_default()
    }

    fn event(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }
}

/// Someone who is told: declines the first so many, then takes all.
struct Receiver {
    url: String,
    got: Arc<Mutex<Vec<Got>>>,
    declines: Arc<AtomicUsize>,
}

impl Receiver {
    fn new(declines: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/hooks", listener.local_addr().unwrap());
        let got = Arc::new(Mutex::new(Vec::new()));
        let declines = Arc::new(AtomicUsize::new(declines));
        let (log, left) = (Arc::clone(&got), Arc::clone(&declines));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut text = String::new();
                let mut piece = [0; 4096];
                let (headers, body) = loop {
                    let n = stream.read(&mut piece).unwrap_or(0);
                    text.push_str(&String::from_utf8_lossy(&piece[..n]));
                    let Some((headers, body)) = text.split_once("\r\n\r\n") else {
                        continue;
                    };
                    let length = headers.to_lowercase();
                    let length = length
                        .lines()
                        .find_map(|l| l.strip_prefix("content-length: "));
                    let length: usize = length.map_or(0, |l| l.parse().unwrap());
                    if body.len() >= length {
                        break (headers.to_string(), body.to_string());
                    }
                };
                let declined =
                    left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
                let status = if declined.is_ok() { 503 } else { 204 };
                log.lock().unwrap().push(Got {
                    headers,
                    body,
                    status,
                });
                let _ = stream.write_all(
                    format!(
                        "HTTP/1.1 {status} x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                    )
                    .as_bytes(),
                );
            }
        });
        Self { url, got, declines }
    }

    fn got(&self) -> Vec<Got> {
        self.got.lock().unwrap().clone()
    }

    fn wait(&self, what: &str, is: impl Fn(&[Got]) -> bool) -> Vec<Got> {
        let began = Instant::now();
        loop {
            let got = self.got();
            if is(&got) {
                return got;
            }
            assert!(
                began.elapsed() < Duration::from_secs(120),
                "{what}: {got:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

const SECRET: &str = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3";

fn start(world: &World, receiver: &Receiver) -> Server {
    let config = format!(
        "data = \"data\"\n[[webhooks]]\nurl = \"{}\"\nsecret_env = \"HOOK_SECRET\"\n[[model]]\nmodel = \"./model\"\nid = \"model\"\n",
        receiver.url
    );
    std::fs::write(world.at("bantam.toml"), config).unwrap();
    Server::start_with(
        world,
        &["--config", "bantam.toml"],
        &[("HOOK_SECRET", SECRET)],
    )
}

fn taken(got: &[Got]) -> Vec<&Got> {
    got.iter().filter(|one| one.status == 204).collect()
}

#[test]
fn whoever_is_told_is_told_once_it_is_over() {
    let world = World::empty();
    tiny::write_model(&world.at("model"), 0);
    tiny::write_rows(&world.at("train.jsonl"), 60, 1);
    let receiver = Receiver::new(2);
    let refused = world.run(&["serve", "--model", "./model", "--config", "none.toml"]);
    assert!(!refused.status.success());
    let server = start(&world, &receiver);

    // A run of an eval: declined twice, then taken; each time the same name, a new time, a signature that holds.
    let (_, eval) = post(
        &server,
        "/v1/evals",
        &json!({
            "data_source_config": {"type": "custom", "item_schema": {"type": "object"}},
            "testing_criteria": [{"type": "string_check", "name": "a", "operation": "eq", "input": "x", "reference": "x"}],
        }),
    );
    let runs = format!("/v1/evals/{}/runs", eval["id"].as_str().unwrap());
    let one = json!({"data_source": {"type": "jsonl", "source": {"type": "file_content", "content": [{"item": {}}]}}});
    let (_, run) = post(&server, &runs, &one);
    let got = receiver.wait("the run is told", |got| !taken(got).is_empty());
    assert_eq!(got.len(), 3, "two were declined: {got:?}");
    let event = got[2].event();
    assert_eq!(
        (&event["type"], &event["object"]),
        (&json!("eval.run.succeeded"), &json!("event"))
    );
    assert_eq!(event["data"], json!({"id": run["id"]}));
    for one in &got {
        assert_eq!(one.header("webhook-id"), event["id"].as_str().unwrap());
        assert_eq!(one.body, got[0].body);
        assert!(verified(one), "{one:?}");
    }

    // The server is killed while nobody takes anything; the next one tells.
    receiver.declines.store(1_000_000, Ordering::SeqCst);
    let (_, run) = post(&server, &runs, &one);
    receiver.wait("it is tried", |got| got.len() > 3);
    server.signal(Signal::KILL);
    drop(server);
    receiver.declines.store(0, Ordering::SeqCst);
    let server = start(&world, &receiver);
    let got = receiver.wait("the killed server's event is told", |got| {
        taken(got).len() == 2
    });
    assert_eq!(taken(&got)[1].event()["data"], json!({"id": run["id"]}));

    // A job that is cancelled, and one that succeeds.
    let train = file(&server, &world, "train.jsonl");
    let body =
        json!({"model": "model", "training_file": train, "hyperparameters": {"n_epochs": 1}});
    let first = create(&server, &body);
    let got = receiver.wait("the job is told", |got| taken(got).len() == 3);
    let event = taken(&got)[2].event();
    assert_eq!(
        (&event["type"], &event["data"]["id"]),
        (&json!("fine_tuning.job.succeeded"), &json!(first))
    );
    server.stop();
    assert_eq!(taken(&receiver.got()).len(), 3, "nothing is told twice");
}

/// Asks Python, whose implementation is not ours, whether the signature is that of the body.
fn verified(got: &Got) -> bool {
    let program = "import base64, hashlib, hmac, sys\n\
        _, secret, id, at, signature, body = sys.argv\n\
        key = base64.b64decode(secret.removeprefix('whsec_'))\n\
        want = base64.b64encode(hmac.new(key, f'{id}.{at}.{body}'.encode(), hashlib.sha256).digest()).decode()\n\
        sys.exit(signature != 'v1,' + want)";
    let header = |name: &str| got.header(name);
    let status = std::process::Command::new("python3")
        .args([
            "-c",
            program,
            SECRET,
            &header("webhook-id"),
            &header("webhook-timestamp"),
        ])
        .args([&header("webhook-signature"), &got.body])
        .status();
    status.unwrap().success()
}
