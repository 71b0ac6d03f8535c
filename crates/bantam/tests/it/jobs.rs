//! Fine-tuning jobs of a running server: files, queue, kills, and what clients see of it.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use bantam_testkit::tiny;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Server, World, report};

/// How long anything here may take on a slow machine.
const PATIENCE: Duration = Duration::from_secs(240);

pub(crate) fn world() -> World {
    let world = World::empty();
    tiny::write_model(&world.at("model"), 0);
    tiny::write_rows(&world.at("train.jsonl"), 300, 1);
    tiny::write_rows(&world.at("valid.jsonl"), 20, 2);
    world
}

fn start(world: &World) -> Server {
    Server::start(world, &["--model", "./model", "--data", "data"])
}

/// Status and body of an answer.
pub(crate) fn call(server: &Server, what: &str, kind: &str, body: &[u8]) -> (u16, Value) {
    let mut stream = TcpStream::connect(&server.address).unwrap();
    let head = format!(
        "{what} HTTP/1.1\r\nhost: {}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        server.address,
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer[9..12].parse().unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    (status, serde_json::from_str(body).unwrap_or(json!(body)))
}

pub(crate) fn get(server: &Server, path: &str) -> Value {
    let (status, body) = call(server, &format!("GET {path}"), "application/json", b"");
    assert_eq!(status, 200, "{body}");
    body
}

pub(crate) fn post(server: &Server, path: &str, body: &Value) -> (u16, Value) {
    let body = body.to_string();
    call(
        server,
        &format!("POST {path}"),
        "application/json",
        body.as_bytes(),
    )
}

fn upload(server: &Server, bytes: &[u8]) -> (u16, Value) {
    let mut body =
        b"--x\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\nfine-tune\r\n--x\r\n\
        content-disposition: form-data; name=\"file\"; filename=\"rows.jsonl\"\r\n\r\n"
            .to_vec();
    body.extend_from_slice(bytes);
    body.extend_from_slice(b"\r\n--x--\r\n");
    call(
        server,
        "POST /v1/files",
        "multipart/form-data; boundary=x",
        &body,
    )
}

pub(crate) fn file(server: &Server, world: &World, name: &str) -> String {
    let (status, body) = upload(server, &std::fs::read(world.at(name)).unwrap());
    assert_eq!(status, 200, "{body}");
    body["id"].as_str().unwrap().to_string()
}

pub(crate) fn create(server: &Server, body: &Value) -> String {
    let (status, job) = post(server, "/v1/fine_tuning/jobs", body);
    assert_eq!(status, 200, "{job}");
    assert_eq!(job["status"], "validating_files");
    job["id"].as_str().unwrap().to_string()
}

/// Waits until a job is as `is` wants it.
pub(crate) fn until(server: &Server, id: &str, is: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let job = get(server, &format!("/v1/fine_tuning/jobs/{id}"));
        if is(&job) {
            return job;
        }
        assert!(
            job["status"] != "failed" && began.elapsed() < PATIENCE,
            "{job}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn events(server: &Server, id: &str) -> Vec<Value> {
    let all = get(
        server,
        &format!("/v1/fine_tuning/jobs/{id}/events?limit=10000&order=asc"),
    );
    all["data"].as_array().unwrap().clone()
}

/// The steps that the events tell of.
fn steps(events: &[Value]) -> Vec<u64> {
    events
        .iter()
        .filter_map(|event| event["data"]["step"].as_u64())
        .collect()
}

/// The training that a server has started.
fn worker(server: &Server) -> Option<Pid> {
    let parent = server.process.0.id().to_string();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.into_iter().find_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // After the name, which may hold anything: state, parent.
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        (fields[0] != "Z" && fields[1] == parent).then(|| Pid::from_raw(pid))?
    })
}

fn result(world: &World, id: &str) -> Value {
    let path = world.at(&format!("data/jobs/{id}/run/result.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The same training by hand, undisturbed.
fn by_hand(world: &World, id: &str) -> Value {
    let recipe = format!("data/jobs/{id}/recipe.toml");
    let out = format!("by-hand-{id}");
    report(&world.run(&["train", "--recipe", &recipe, "--out", &out, "--json"]))
}

#[test]
fn killed_jobs_and_servers_go_on_to_the_same_bytes() {
    let world = world();
    let mut server = start(&world);
    let rows = file(&server, &world, "train.jsonl");
    let ask = |seed: u64| {
        json!({"model": "model", "training_file": rows, "seed": seed,
               "hyperparameters": {"n_epochs": 8, "batch_size": 2}})
    };
    let jobs: Vec<String> = (1..=3).map(|seed| create(&server, &ask(seed))).collect();
    // Ten times, at moments that are random and the same each time: the worker, or the server and its worker with it.
    let mut random: u64 = 7;
    for kill in 0..10 {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        std::thread::sleep(Duration::from_millis(100 + (random >> 33) % 600));
        if kill % 2 == 0 {
            if let Some(pid) = worker(&server) {
                let _ = kill_process(pid, Signal::KILL);
            }
        } else {
            server.signal(Signal::KILL);
            server.process.0.wait().unwrap();
            server = start(&world);
        }
    }
    for id in &jobs {
        let job = until(&server, id, |job| job["status"] == "succeeded");
        let all = events(&server, id);
        let names: std::collections::HashSet<&str> = all
            .iter()
            .filter_map(|event| event["id"].as_str())
            .collect();
        assert_eq!(names.len(), all.len(), "no event is told twice");
        let told = steps(&all);
        assert_eq!(
            told,
            (1..=1200).collect::<Vec<u64>>(),
            "no step is lost or told twice"
        );
        assert_eq!(result(&world, id)["sha256"], by_hand(&world, id)["sha256"]);
        let model = job["fine_tuned_model"].as_str().unwrap();
        let (status, answer) = post(
            &server,
            "/v1/chat/completions",
            &json!({"model": model, "max_tokens": 4, "messages": [{"role": "user", "content": "rain"}]}),
        );
        assert_eq!(status, 200, "{answer}");
    }
    // What was trained is served by the next server too.
    let models = get(&server, "/v1/models").to_string();
    server.stop();
    let server = start(&world);
    let again = get(&server, "/v1/models").to_string();
    for id in &jobs {
        let short = &id["ftjob-".len()..][..8];
        assert!(models.contains(short) && again.contains(short), "{again}");
    }
    server.stop();
}

#[test]
fn jobs_pause_go_on_are_cancelled_and_leave_their_checkpoints() {
    let world = world();
    let server = start(&world);
    let (rows, valid) = (
        file(&server, &world, "train.jsonl"),
        file(&server, &world, "valid.jsonl"),
    );
    let ask = json!({"model": "model", "training_file": rows, "validation_file": valid, "suffix": "a.b",
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 10, "batch_size": 2}}}});
    let first = create(&server, &ask);
    let second = create(&server, &ask);
    until(&server, &first, |job| job["status"] == "running");
    let act = |id: &str, what: &str| {
        post(
            &server,
            &format!("/v1/fine_tuning/jobs/{id}/{what}"),
            &json!({}),
        )
    };
    let (status, job) = act(&first, "pause");
    assert_eq!((status, &job["status"]), (200, &json!("paused")));
    // The other one's turn comes meanwhile.
    until(&server, &second, |job| job["status"] == "running");
    assert_eq!(act(&second, "cancel").1["status"], "cancelled");
    let (status, error) = act(&second, "cancel");
    assert_eq!(
        (status, &error["error"]["code"]),
        (400, &json!("wrong_state"))
    );
    assert_eq!(act(&first, "resume").0, 200);
    let job = until(&server, &first, |job| job["status"] == "succeeded");
    assert_eq!(
        job["fine_tuned_model"],
        format!("ft:model:bantam:a.b:{}", &first[6..14])
    );
    let told = events(&server, &first);
    let words: Vec<&str> = told.iter().filter_map(|e| e["message"].as_str()).collect();
    assert!(words[0].starts_with("created job") && words.last().unwrap().contains("served as"));
    for word in [
        "the job was paused",
        "the training goes on",
        "validation loss",
    ] {
        assert!(words.iter().any(|w| w.contains(word)), "{word}: {words:?}");
    }
    let checkpoints = get(
        &server,
        &format!("/v1/fine_tuning/jobs/{first}/checkpoints"),
    );
    let last = &checkpoints["data"][0];
    assert!(last["metrics"]["train_loss"].is_number(), "{last}");
    let name = last["fine_tuned_model_checkpoint"].as_str().unwrap();
    let body =
        json!({"model": name, "max_tokens": 2, "messages": [{"role": "user", "content": "rain"}]});
    assert_eq!(post(&server, "/v1/chat/completions", &body).0, 200);
    let csv = job["result_files"][0].as_str().unwrap();
    let (_, text) = call(
        &server,
        &format!("GET /v1/files/{csv}/content"),
        "text/plain",
        b"",
    );
    assert!(
        text.as_str().unwrap().starts_with("step,train_loss,"),
        "{text}"
    );
    // A model that was trained here can be trained on.
    let more = json!({"model": job["fine_tuned_model"], "training_file": rows, "hyperparameters": {"n_epochs": 1}});
    let third = create(&server, &more);
    let third = until(&server, &third, |job| job["status"] == "succeeded");
    assert!(
        third["fine_tuned_model"]
            .as_str()
            .unwrap()
            .starts_with("ft:model:bantam:"),
        "{third}"
    );
    server.stop();
}

#[test]
fn what_is_wrong_is_named_and_leaves_nothing() {
    let world = world();
    let server = start(&world);
    let rows = file(&server, &world, "train.jsonl");
    let good = json!({"model": "model", "training_file": rows});
    let with = |name: &str, value: Value| {
        let mut body = good.clone();
        body[name] = value;
        body
    };
    let hyper = |name: &str, value: Value| with("hyperparameters", json!({name: value}));
    let bad = [
        (json!({"training_file": rows}), "model"),
        (json!({"model": "model"}), "training_file"),
        (with("model", json!("nobody")), "model"),
        (with("model", json!("all-minilm-l6-v2")), "model"),
        (with("training_file", json!("file-none")), "training_file"),
        (with("training_file", json!(7)), "training_file"),
        (
            with("validation_file", json!("file-none")),
            "validation_file",
        ),
        (with("suffix", json!("")), "suffix"),
        (with("suffix", json!("a/b")), "suffix"),
        (with("suffix", json!("x".repeat(65))), "suffix"),
        (with("seed", json!("seven")), "seed"),
        (with("metadata", json!({"k": "v".repeat(513)})), "metadata"),
        (with("metadata", json!([1])), "metadata"),
        (with("colour", json!("red")), "colour"),
        (
            with(
                "integrations",
                json!([{"type": "wandb", "wandb": {"project": "p"}}]),
            ),
            "integrations",
        ),
        (
            with("method", json!({"type": "reinforcement"})),
            "method.type",
        ),
        (with("method", json!({"type": "magic"})), "method.type"),
        (with("method", json!({})), "method.type"),
        (
            with(
                "method",
                json!({"type": "supervised", "supervised": {"x": 1}}),
            ),
            "method.supervised.x",
        ),
        (hyper("n_epochs", json!(0)), "hyperparameters.n_epochs"),
        (hyper("n_epochs", json!(1e9)), "hyperparameters.n_epochs"),
        (hyper("n_epochs", json!("many")), "hyperparameters.n_epochs"),
        (hyper("batch_size", json!(-1)), "hyperparameters.batch_size"),
        (
            hyper("batch_size", json!(257)),
            "hyperparameters.batch_size",
        ),
        (
            hyper("learning_rate_multiplier", json!(0)),
            "hyperparameters.learning_rate_multiplier",
        ),
        (
            hyper("learning_rate_multiplier", json!("fast")),
            "hyperparameters.learning_rate_multiplier",
        ),
        (hyper("beta", json!(0.1)), "hyperparameters.beta"),
    ];
    for (body, param) in bad {
        let (status, answer) = post(&server, "/v1/fine_tuning/jobs", &body);
        let error = &answer["error"];
        assert!(matches!(status, 400 | 404), "{body}: {answer}");
        assert_eq!(error["param"], param, "{body}: {answer}");
        assert!(error["message"].as_str().unwrap().len() > 10, "{answer}");
    }
    for what in [
        "GET /v1/fine_tuning/jobs/ftjob-none",
        "POST /v1/fine_tuning/jobs/ftjob-none/cancel",
        "GET /v1/fine_tuning/jobs/ftjob-none/events",
        "GET /v1/fine_tuning/jobs/ftjob-none/checkpoints",
        "GET /v1/fine_tuning/jobs?after=ftjob-none",
        "GET /v1/fine_tuning/jobs?limit=0",
        "GET /v1/fine_tuning/jobs?colour=red",
        "GET /v1/fine_tuning/checkpoints/nobody/permissions",
    ] {
        let (status, answer) = call(&server, what, "application/json", b"{}");
        assert!(matches!(status, 400 | 404), "{what}: {answer}");
        assert!(answer["error"]["message"].is_string(), "{what}: {answer}");
    }
    assert_eq!(get(&server, "/v1/fine_tuning/jobs")["data"], json!([]));
    assert!(!world.at("data/jobs").exists(), "nothing was begun");
    server.stop();
    // A server that keeps nothing says so.
    let server = Server::start(&world, &["--model", "./model"]);
    let (status, answer) = post(&server, "/v1/fine_tuning/jobs", &good);
    assert_eq!(status, 400);
    assert!(
        answer["error"]["message"]
            .as_str()
            .unwrap()
            .contains("--data"),
        "{answer}"
    );
    server.stop();
}

/// Pairs over the words that the tiny model knows: one answer counts as good, the other as bad.
fn write_pairs(world: &World, name: &str, n: usize) {
    let line = |i: usize| {
        let (good, bad) = (["sun", "rain"][i % 2], ["wind", "snow"][i / 2 % 2]);
        let turn = |role: &str, text: &str| json!([{"role": role, "content": text}]);
        json!({"input": {"messages": turn("user", &format!("day {i}"))},
               "preferred_output": turn("assistant", good), "non_preferred_output": turn("assistant", bad)})
    };
    let lines: String = (0..n).map(|i| format!("{}\n", line(i))).collect();
    std::fs::write(world.at(name), lines).unwrap();
}

#[test]
fn a_job_learns_preferences() {
    let world = world();
    write_pairs(&world, "pairs.jsonl", 24);
    write_pairs(&world, "held-out.jsonl", 8);
    let server = start(&world);
    let (pairs, held_out) = (
        file(&server, &world, "pairs.jsonl"),
        file(&server, &world, "held-out.jsonl"),
    );
    let method = |hyper: Value| json!({"type": "dpo", "dpo": {"hyperparameters": hyper}});
    let ask = |method: Value, file: &str| json!({"model": "model", "training_file": file, "validation_file": held_out, "seed": 1, "method": method});
    let hyper = json!({"beta": 0.2, "n_epochs": 3, "batch_size": 4});
    let id = create(&server, &ask(method(hyper.clone()), &pairs));
    let job = until(&server, &id, |job| job["status"] == "succeeded");
    assert_eq!(job["method"]["type"], "dpo");
    let shown = &job["method"]["dpo"]["hyperparameters"];
    assert_eq!(
        (&shown["beta"], &shown["n_epochs"], &shown["batch_size"]),
        (&json!(0.2), &json!(3), &json!(4))
    );
    assert_eq!(steps(&events(&server, &id)), (1..=18).collect::<Vec<u64>>());
    let recipe = std::fs::read_to_string(world.at(&format!("data/jobs/{id}/recipe.toml"))).unwrap();
    assert!(
        recipe.contains("method = \"dpo\"") && recipe.contains("beta = 0.2"),
        "{recipe}"
    );
    let ended = result(&world, &id);
    assert_eq!(ended["sha256"], by_hand(&world, &id)["sha256"]);
    assert_eq!(ended["valid_preference"]["examples"], 8);

    // What is chosen for `auto` is shown; rows without preferences are refused before anything is trained.
    let id = create(
        &server,
        &ask(method(json!({"beta": "auto", "n_epochs": 1})), &pairs),
    );
    let job = until(&server, &id, |job| job["status"] == "succeeded");
    assert_eq!(job["method"]["dpo"]["hyperparameters"]["beta"], 0.1);
    let rows = file(&server, &world, "train.jsonl");
    let (_, job) = post(
        &server,
        "/v1/fine_tuning/jobs",
        &ask(method(json!({})), &rows),
    );
    let began = Instant::now();
    let failed = loop {
        let job = get(
            &server,
            &format!("/v1/fine_tuning/jobs/{}", job["id"].as_str().unwrap()),
        );
        if job["status"] == "failed" {
            break job;
        }
        assert!(began.elapsed() < PATIENCE, "{job}");
        std::thread::sleep(Duration::from_millis(20));
    };
    let message = failed["error"]["message"].as_str().unwrap();
    assert!(
        message.starts_with("line:1: a row that prefers nothing"),
        "{message}"
    );
    let (status, refused) = post(
        &server,
        "/v1/fine_tuning/jobs",
        &ask(method(json!({"beta": -1})), &pairs),
    );
    assert_eq!(status, 400);
    assert!(
        refused["error"]["message"]
            .as_str()
            .unwrap()
            .contains("`method.dpo.hyperparameters.beta`"),
        "{refused}"
    );
    server.stop();
}

#[test]
fn a_job_that_takes_more_than_its_memory_dies_alone() {
    let world = world();
    // Less than the command line takes: enough for the smallest model there is.
    let config =
        "data = \"data\"\ntrain_memory_mb = 24\n[[model]]\nmodel = \"./model\"\nid = \"model\"\n";
    std::fs::write(world.at("bantam.toml"), config).unwrap();
    let server = Server::start(&world, &["--config", "bantam.toml"]);
    let rows = file(&server, &world, "train.jsonl");
    let ask = json!({"model": "model", "training_file": rows, "hyperparameters": {"n_epochs": 1}});
    let jobs = [create(&server, &ask), create(&server, &ask)];
    let chat = json!({"model": "model", "max_tokens": 4, "messages": [{"role": "user", "content": "rain"}]});
    for id in &jobs {
        let began = Instant::now();
        loop {
            // Serving goes on all the while.
            assert_eq!(post(&server, "/v1/chat/completions", &chat).0, 200);
            let job = get(&server, &format!("/v1/fine_tuning/jobs/{id}"));
            if job["status"] == "failed" {
                let message = job["error"]["message"].as_str().unwrap();
                assert!(message.contains("24 MiB"), "{message}");
                assert!(message.contains("--train-memory-mb"), "{message}");
                break;
            }
            assert!(
                job["status"] != "succeeded" && began.elapsed() < PATIENCE,
                "{job}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    server.stop();
}
