//! A trained run answers: `bantam eval`, `chat` and `serve` as a user runs them, on the tiny model.

use bantam_testkit::tiny;
use serde_json::json;

use crate::support::{Server, World, request, succeeded};

/// The tiny model, a run trained on it, and test rows.
fn world() -> World {
    let world = World::empty();
    tiny::write_model(&world.at("model"), 0);
    tiny::write_rows(&world.at("train.jsonl"), 300, 1);
    tiny::write_rows(&world.at("test.jsonl"), 30, 2);
    std::fs::write(world.at("labels.txt"), "money\nweather\nfood\n").unwrap();
    let train = [
        "train",
        "--base",
        "./model",
        "--train",
        "train.jsonl",
        "--system",
        tiny::SYSTEM,
    ];
    let how = [
        "--out",
        "run",
        "--max-steps",
        "120",
        "--batch",
        "8",
        "--lr",
        "1e-2",
    ];
    succeeded(&world.run(&[&train[..], &how].concat()));
    world
}

/// It is a model of its own: its base may go. It answers, and is exported, like an adapter's run.
#[test]
fn a_run_that_trained_every_weight_is_a_model_of_its_own() {
    let world = World::empty();
    tiny::write_model(&world.at("base"), 0);
    tiny::write_rows(&world.at("train.jsonl"), 300, 1);
    tiny::write_rows(&world.at("test.jsonl"), 30, 2);
    let train = [
        "train",
        "--base",
        "./base",
        "--train",
        "train.jsonl",
        "--system",
        tiny::SYSTEM,
        "--out",
        "run",
        "--method",
        "full",
        "--max-steps",
        "120",
        "--batch",
        "8",
        "--lr",
        "3e-3",
    ];
    succeeded(&world.run(&train));
    std::fs::remove_dir_all(world.at("base")).unwrap();
    let score = |model: &str, more: &[&str]| {
        let words = [
            "eval",
            "--model",
            model,
            "--data",
            "test.jsonl",
            "--metric",
            "label",
        ];
        let report = world.json(&[&words[..], more, &["--json"]].concat());
        report["score"].as_f64().unwrap()
    };
    // The system message is the run's.
    let own = score("run", &[]);
    assert!(own > 0.8, "it has learnt the labels: {own}");
    world.json(&[
        "export", "--model", "run", "--out", "out.gguf", "--type", "f32", "--json",
    ]);
    let exported = score("./out.gguf", &["--system", tiny::SYSTEM]);
    assert!((own - exported).abs() < 0.1, "{own} and {exported}");
}

/// One run, all commands: training it anew for each would be most of the time.
#[test]
fn a_run_is_judged_talked_to_and_served() {
    let world = world();
    eval(&world);
    chat(&world);
    serve(&world);
    serve_from_a_file(&world);
    export(&world);
}

/// Merged, the run answers as it did with its adapter apart.
fn export(world: &World) {
    let score = |model: &str| {
        let words = [
            "eval",
            "--model",
            model,
            "--data",
            "test.jsonl",
            "--metric",
            "label",
            "--json",
        ];
        world.json(&[&words[..], &["--system", tiny::SYSTEM]].concat())["score"]
            .as_f64()
            .unwrap()
    };
    let apart = score("run");
    for (out, kind) in [("merged", "f32"), ("merged.gguf", "f16")] {
        let report = world.json(&[
            "export", "--model", "run", "--out", out, "--type", kind, "--json",
        ]);
        assert!(report["bytes"].as_u64().unwrap() > 0, "{report}");
        let merged = score(&format!("./{out}"));
        assert!((merged - apart).abs() < 0.1, "{out}: {merged} and {apart}");
    }
    let message = world.fails(&["export", "--model", "./model", "--out", "again"]);
    assert!(message.contains("nothing to merge"), "{message}");
    let message = world.fails(&[
        "export", "--model", "run", "--out", "folder", "--type", "q8_0",
    ]);
    assert!(message.contains("cannot be written"), "{message}");
}

fn eval(world: &World) {
    let base = ["eval", "--model", "run", "--data", "test.jsonl", "--json"];
    let free = world.json(
        &[
            &base[..],
            &["--metric", "label", "--rows-out", "rows.jsonl"],
        ]
        .concat(),
    );
    let keys: Vec<&str> = free
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .take(8)
        .collect();
    assert_eq!(
        keys,
        [
            "rows",
            "metric",
            "score",
            "ci95",
            "tok_per_s",
            "p50_ms",
            "p95_ms",
            "peak_rss_mb"
        ]
    );
    assert_eq!(
        (&free["rows"], &free["metric"]),
        (&json!(30), &json!("label"))
    );
    assert!(
        free["score"].as_f64().unwrap() > 0.8,
        "it has learnt the labels: {free}"
    );
    let rows = std::fs::read_to_string(world.at("rows.jsonl")).unwrap();
    assert_eq!(rows.lines().count(), 30);

    let held = world.json(&[&base[..], &["--labels", "labels.txt", "--limit", "10"]].concat());
    assert_eq!(
        (&held["rows"], &held["metric"], &held["constraint"]),
        (&json!(10), &json!("label"), &json!("labels"))
    );
    let untrained = world.json(&[
        "eval",
        "--model",
        "./model",
        "--data",
        "test.jsonl",
        "--max-tokens",
        "8",
        "--json",
    ]);
    assert_eq!(
        (&untrained["metric"], &untrained["score"]),
        (&json!("exact"), &json!(0.0))
    );

    std::fs::write(world.at("labels.txt"), "money\nweather\n").unwrap();
    insta::assert_snapshot!(
        "stray_label",
        world.fails(&[&base[..], &["--labels", "labels.txt"]].concat())
    );
    std::fs::write(world.at("schema.json"), "{\"type\": 3}").unwrap();
    insta::assert_snapshot!(
        "bad_schema",
        world.fails(&[&base[..], &["--schema", "schema.json", "--metric", "exact"]].concat())
    );
    std::fs::create_dir(world.at("begun")).unwrap();
    std::fs::write(world.at("begun/settings.json"), "{}").unwrap();
    std::fs::write(world.at("begun/recipe.toml"), "").unwrap();
    insta::assert_snapshot!(
        "unfinished_run",
        world.fails(&["eval", "--model", "begun", "--data", "test.jsonl"])
    );
}

fn chat(world: &World) {
    let said = succeeded(&world.run_with(
        &["chat", "--model", "run"],
        "tell me about rain\n\nwhere is the soup?\n",
    ));
    let answers: Vec<&str> = said.lines().collect();
    assert_eq!(answers.len(), 2, "one line an answer: {said}");
    assert_eq!(
        answers[0], "weather",
        "the run's own system message is used"
    );
    let cut = succeeded(&world.run_with(
        &["chat", "--model", "run", "--max-tokens", "1"],
        "tell me about rain\n",
    ));
    assert!(cut.trim_end().len() < "weather".len(), "{cut}");
}

/// The models as listed.
fn models(server: &Server) -> String {
    request(&server.address, "GET /v1/models", "")
}

/// What a model makes of a sentence about rain.
fn says(server: &Server, model: &str) -> String {
    let body = json!({
        "model": model,
        "temperature": 0,
        "max_tokens": 8,
        "messages": [{"role": "system", "content": tiny::SYSTEM}, {"role": "user", "content": "tell me about rain"}],
    });
    request(
        &server.address,
        "POST /v1/chat/completions",
        &body.to_string(),
    )
}

const SAYS_WEATHER: &str = "\"content\":\"weather\"";

fn serve(world: &World) {
    let server = Server::start(world, &["--model", "run"]);
    let models = models(&server);
    assert!(models.contains("\"id\":\"run\""), "{models}");
    assert!(!models.contains("(base)"), "{models}");
    for name in ["run", "ft:model:run"] {
        let answer = says(&server, name);
        assert!(answer.contains(SAYS_WEATHER), "{answer}");
    }
    server.stop();
}

/// The configuration is read again: a run joins its base, and leaves, while the server goes on.
fn serve_from_a_file(world: &World) {
    let file = world.at("bantam.toml");
    let base = "[[model]]\nmodel = \"model\"\nid = \"base\"\n";
    let run = "[[model]]\nmodel = \"run\"\nid = \"labels\"\naliases = [\"gpt-4o\"]\n";
    std::fs::write(&file, base).unwrap();
    let mut server = Server::start(world, &["--config", "bantam.toml"]);
    let reload = |server: &mut Server, text: String| {
        std::fs::write(&file, text).unwrap();
        server.signal(rustix::process::Signal::HUP);
        server.line("now serving")
    };
    assert!(says(&server, "labels").contains("model_not_found"));
    let line = reload(&mut server, format!("{base}{run}"));
    assert!(line.contains("`base`, `labels`"), "{line}");
    for name in ["labels", "gpt-4o", "ft:model:labels"] {
        let answer = says(&server, name);
        assert!(answer.contains(SAYS_WEATHER), "{answer}");
    }
    assert!(!says(&server, "base").contains(SAYS_WEATHER));
    let health = request(&server.address, "GET /health", "");
    assert!(health.contains("\"base\":\"base\""), "one engine: {health}");
    // What cannot be served is told, and the rest stays.
    let broken = "[[model]]\nmodel = \"nowhere\"\n";
    let line = reload(&mut server, format!("{base}{run}{broken}"));
    assert!(line.contains("`base`, `labels`"), "{line}");
    let line = reload(&mut server, base.to_string());
    assert!(!line.contains("labels"), "{line}");
    assert!(says(&server, "gpt-4o").contains("model_not_found"));
    server.stop();
}
