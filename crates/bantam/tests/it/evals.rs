//! What evals need from outside a server: programs that reach nothing, and other servers' models.

use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bantam_testkit::tiny;
use serde_json::{Value, json};

use crate::jobs::{get, post};
use crate::support::{Server, World};

fn world(config: &str) -> World {
    let world = World::empty();
    tiny::write_model(&world.at("model"), 0);
    let model = "[[model]]\nmodel = \"./model\"\nid = \"tiny\"\n";
    std::fs::write(world.at("bantam.toml"), format!("{config}\n{model}")).unwrap();
    world
}

#[test]
fn a_program_gets_its_row_and_nothing_else() {
    let world = world("grader_s = 4\ngrader_memory_mb = 512\ndata = \"data\"");
    let server = Server::start(&world, &["--config", "bantam.toml"]);
    let database = world.at("data/bantam.db");
    assert!(database.exists());
    let grade = |source: &str| {
        let body = json!({
            "grader": {"type": "python", "name": "p", "source": source},
            "model_sample": "{\"city\": \"Rome\"}", "item": {"want": "Rome"},
        });
        post(&server, "/v1/fine_tuning/alpha/graders/run", &body)
    };
    let (status, body) = grade(
        "def grade(sample, item):\n    print('noise')\n    return 0.25 + (sample['output_json']['city'] == item['want']) / 2",
    );
    if status == 400 {
        // Refused with the reason, not run in the open.
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains("no place to run programs in"), "{body}");
        eprintln!("not shown here: {message}");
        return;
    }
    assert_eq!((status, &body["reward"]), (200, &json!(0.75)), "{body}");
    let threads = "import threading\ndef grade(sample, item):\n    out = []\n    t = threading.Thread(target=lambda: out.append(1))\n    t.start(); t.join()\n    return out[0]";
    assert_eq!(grade(threads).1["reward"], 1.0, "{}", grade(threads).1);

    let secret = std::env::temp_dir().join(format!("bantam-secret-{}", std::process::id()));
    std::fs::write(&secret, "secret").unwrap();
    let written = std::env::temp_dir().join(format!("bantam-written-{}", std::process::id()));
    let body = |line: &str| {
        format!("import os, socket, subprocess\ndef grade(sample, item):\n    {line}\n    return 1")
    };
    let parent = server.process.0.id();
    for (line, want) in [
        (format!("open({secret:?}).read()"), "PermissionError"),
        (format!("open({database:?}, 'rb').read()"), "PermissionError"),
        (format!("open('/proc/{parent}/environ', 'rb').read()"), "PermissionError"),
        ("open('/etc/shadow').read()".to_string(), "PermissionError"),
        (format!("open({written:?}, 'w').write('x')"), "PermissionError"),
        (format!("os.mkdir({written:?})"), "PermissionError"),
        (format!("os.unlink({secret:?})"), "PermissionError"),
        ("os.listdir('/')".to_string(), "PermissionError"),
        ("socket.socket()".to_string(), "PermissionError"),
        ("socket.socketpair()".to_string(), "PermissionError"),
        ("os.fork()".to_string(), "PermissionError"),
        ("subprocess.run(['/bin/sh', '-c', 'true'])".to_string(), "PermissionError"),
        (format!("os.kill({parent}, 9)"), "PermissionError"),
        ("assert not os.environ.get('BANTAM_API_KEY') and len(os.environ) < 3, os.environ; raise KeyError('clean')".to_string(), "clean"),
        ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))".to_string(), "Error"),
        ("x = bytearray(4 << 30)".to_string(), "MemoryError"),
        ("os.setuid(0); os.chroot('/')".to_string(), "PermissionError"),
        ("while True: pass".to_string(), "more than 4 s"),
        ("import time; time.sleep(60)".to_string(), "more than 4 s"),
        ("return 'a'".to_string(), "finite number"),
        ("return float('nan')".to_string(), "finite number"),
        ("os._exit(0)".to_string(), "without a score"),
        ("os.write(1, b'{\"score\": 9}'); os._exit(1)".to_string(), "without a score"),
    ] {
        let (status, body) = grade(&body(&line));
        assert_eq!(status, 200, "{line}: {body}");
        let errors = &body["metadata"]["errors"];
        assert_eq!(errors["python_grader_runtime_error"], true, "{line}: {body}");
        let told = errors["python_grader_runtime_error_details"].as_str().unwrap();
        // A loop that computes is ended by the limit of computing, one that sleeps by the clock.
        let is_killed = line.contains("pass") && told.contains("signal");
        assert!(told.contains(want) || is_killed, "{line}: {told}");
        assert_eq!(body["reward"], 0.0);
    }
    assert!(!written.exists() && secret.exists());
    std::fs::remove_file(secret).unwrap();
    assert_eq!(get(&server, "/health")["status"], "ok");
}

/// Another server of the OpenAI API, which is busy at first. What it was sent.
fn provider() -> (String, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = Arc::clone(&seen);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, log) = (stream.unwrap(), Arc::clone(&log));
            std::thread::spawn(move || {
                let mut text = String::new();
                let mut piece = [0; 4096];
                while !is_whole(&text) {
                    let n = stream.read(&mut piece).unwrap_or(0);
                    if n == 0 {
                        return;
                    }
                    text.push_str(&String::from_utf8_lossy(&piece[..n]));
                }
                let n = {
                    let mut log = log.lock().unwrap();
                    log.push(text.clone());
                    log.len()
                };
                let (status, more, body) = if n == 1 {
                    (
                        "429 Busy",
                        "retry-after-ms: 30\r\n",
                        json!({"error": {"message": "busy"}}),
                    )
                } else if text.contains("forbidden") {
                    ("401 No", "", json!({"error": {"message": "wrong key"}}))
                } else {
                    (
                        "200 OK",
                        "",
                        json!({
                            "model": "far-1", "usage": {"prompt_tokens": 100, "completion_tokens": 10},
                            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Rome"}}],
                        }),
                    )
                };
                let body = body.to_string();
                let head = format!(
                    "HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{more}connection: close\r\ncontent-length: {}\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all(format!("{head}{body}").as_bytes());
            });
        }
    });
    (format!("http://{address}/v1"), seen)
}

fn is_whole(text: &str) -> bool {
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let length = head.to_lowercase().lines().find_map(|line| {
        let value = line.strip_prefix("content-length:")?;
        value.trim().parse::<usize>().ok()
    });
    body.len() >= length.unwrap_or(0)
}

#[test]
fn another_servers_model_is_judged_remembered_and_paid_for() {
    let (url, seen) = provider();
    let config = format!(
        "data = \"data\"\n[providers.far]\nbase_url = \"{url}/\"\nkey_env = \"FAR_KEY\"\nmodels = [\"far-1\"]\n\
         [providers.far.prices.\"far-1\"]\ninput = 10.0\noutput = 100.0\n"
    );
    let world = world(&config);
    let refused = world.run(&["serve", "--config", "bantam.toml", "--port", "0"]);
    assert!(
        !refused.status.success()
            && String::from_utf8_lossy(&refused.stderr).contains("FAR_KEY is not set"),
        "{refused:?}"
    );
    let server = Server::start_with(
        &world,
        &["--config", "bantam.toml"],
        &[("FAR_KEY", "k-123")],
    );
    let (_, eval) = post(
        &server,
        "/v1/evals",
        &json!({
            "data_source_config": {"type": "custom", "include_sample_schema": true,
                "item_schema": {"type": "object", "properties": {"q": {"type": "string"}}}},
            "testing_criteria": [{"type": "string_check", "name": "right", "operation": "eq",
                "input": "{{sample.output_text}}", "reference": "Rome"}],
        }),
    );
    let runs = format!("/v1/evals/{}/runs", eval["id"].as_str().unwrap());
    let run = |model: &str, questions: &[&str]| -> Value {
        let rows: Vec<Value> = questions
            .iter()
            .map(|q| json!({"item": {"q": q}}))
            .collect();
        let body = json!({"data_source": {
            "type": "completions", "model": model, "source": {"type": "file_content", "content": rows},
            "input_messages": {"type": "template", "template": [{"role": "user", "content": "{{item.q}}"}]},
        }});
        let (status, run) = post(&server, &runs, &body);
        assert_eq!(status, 200, "{run}");
        let path = format!("{runs}/{}", run["id"].as_str().unwrap());
        loop {
            let run = get(&server, &path);
            if run["status"] == "completed" {
                return run;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let first = run("far-1", &["a", "b", "c"]);
    assert_eq!(first["result_counts"]["passed"], 3, "{first}");
    // Three answers and one refusal: (100 · 10 + 10 · 100) dollars a million, each.
    assert_eq!(seen.lock().unwrap().len(), 4);
    let cost = first["statistics"]["cost_usd"].as_f64().unwrap();
    assert!((cost - 3.0 * 0.002).abs() < 1e-9, "{cost}");
    let again = run("far/far-1", &["a", "b", "c"]);
    assert_eq!(again["statistics"]["cost_usd"], 0.0);
    assert_eq!(seen.lock().unwrap().len(), 4, "nothing is asked twice");
    assert_eq!(
        again["statistics"]["comparisons"][0]["pass_rate"]["difference"],
        0.0
    );
    let refused = run("far-1", &["forbidden"]);
    assert_eq!(refused["result_counts"]["errored"], 1);
    assert_eq!(
        seen.lock().unwrap().len(),
        5,
        "a wrong key is not tried again"
    );
    let asked = seen.lock().unwrap()[0].to_lowercase();
    assert!(asked.contains("authorization: bearer k-123"), "{asked}");
    let ledger = std::fs::read_to_string(world.at("data/ledger.jsonl")).unwrap();
    assert_eq!(ledger.lines().count(), 3);
    assert!(!ledger.contains("k-123"));
}
