//! `bantam train` as a user runs it, on the tiny model: previews, errors, results, stopping and going on.

use std::process::{Command, Output, Stdio};

use bantam_testkit::tiny;

use crate::support::{World, report as json, said};

/// The tiny model and rows for it.
fn world() -> World {
    let world = World::empty();
    tiny::write_model(&world.at("model"), 0);
    tiny::write_rows(&world.at("train.jsonl"), 64, 1);
    tiny::write_rows(&world.at("valid.jsonl"), 16, 2);
    world
}

fn train(world: &World, arguments: &[&str]) -> Command {
    let base = [
        "train",
        "--base",
        "./model",
        "--train",
        "train.jsonl",
        "--system",
        tiny::SYSTEM,
    ];
    world.command(&[&base, arguments].concat())
}

#[test]
fn a_preview_shows_the_mask() {
    let world = world();
    let output = train(&world, &["--preview=2"]).output().unwrap();
    insta::assert_snapshot!("preview", world.transcript(&output));
}

#[test]
fn bad_rows_are_named_by_file_and_line() {
    let world = world();
    let good = "{\"text\": \"a\", \"label\": \"b\"}\n";
    std::fs::write(
        world.at("train.jsonl"),
        format!("{good}{{\"text\": \"a\", \"lable\": \"b\"}}\n"),
    )
    .unwrap();
    let misspelt = train(&world, &["--out", "run"]).output().unwrap();
    std::fs::write(world.at("train.jsonl"), "").unwrap();
    let empty = train(&world, &["--out", "run"]).output().unwrap();
    std::fs::remove_file(world.at("train.jsonl")).unwrap();
    let missing = train(&world, &["--out", "run"]).output().unwrap();
    let long = serde_json::json!({"text": "a ".repeat(600), "label": "b"});
    std::fs::write(world.at("train.jsonl"), format!("{good}{long}\n")).unwrap();
    let too_long = train(&world, &["--out", "run"]).output().unwrap();
    std::fs::write(world.at("recipe.toml"), "[optim]\nlearning_rate = 1\n").unwrap();
    let recipe = train(&world, &["--out", "run", "--recipe", "recipe.toml"])
        .output()
        .unwrap();
    let all = [misspelt, empty, missing, too_long, recipe];
    insta::assert_snapshot!(
        "bad_rows",
        all.map(|output| world.transcript(&output)).join("\n")
    );
}

#[test]
fn the_report_has_the_documented_fields_and_an_adapter() {
    let world = world();
    let arguments = [
        "--valid",
        "valid.jsonl",
        "--out",
        "run",
        "--max-steps",
        "6",
        "--batch",
        "8",
        "--json",
    ];
    let report = json(&train(&world, &arguments).output().unwrap());
    let keys: Vec<&str> = report
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "rows",
            "tokens",
            "computed_tokens",
            "train_s",
            "valid_s",
            "checkpoint_s",
            "tok_per_s",
            "computed_tok_per_s",
            "rows_per_s",
            "last_loss",
            "valid_loss",
            "dropped",
            "peak_rss_mb",
            "adapter",
            "sha256"
        ]
    );
    assert_eq!(report["rows"], 48);
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "bantam.json",
    ] {
        assert!(world.at("run/adapter").join(file).is_file(), "{file}");
    }
    let again = json(&train(&world, &arguments).output().unwrap());
    assert_eq!(
        again["sha256"], report["sha256"],
        "a finished run is reported again"
    );
    let other = train(
        &world,
        &[
            "--out",
            "run",
            "--max-steps",
            "6",
            "--batch",
            "8",
            "--rank",
            "4",
        ],
    )
    .output()
    .unwrap();
    let text = said(&other);
    assert_eq!(other.status.code(), Some(1));
    assert!(text.contains("was started with"), "{text}");
}

#[test]
fn ctrl_c_checkpoints_and_the_same_command_goes_on_to_the_same_bytes() {
    stopped_by(rustix::process::Signal::INT);
}

#[test]
fn a_polite_kill_checkpoints_and_the_same_command_goes_on_to_the_same_bytes() {
    stopped_by(rustix::process::Signal::TERM);
}

fn stopped_by(signal: rustix::process::Signal) {
    let world = world();
    let arguments = |out| ["--out", out, "--max-steps", "150", "--batch", "4", "--json"];
    let whole = json(&train(&world, &arguments("whole")).output().unwrap());
    let mut child = train(&world, &arguments("cut"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let events = || std::fs::read_to_string(world.at("cut/events.jsonl")).unwrap_or_default();
    while events().lines().count() < 20 {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it could be stopped"
        );
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    let process = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(process, signal).unwrap();
    let stopped = child.wait_with_output().unwrap();
    let text = said(&stopped);
    assert_eq!(stopped.status.code(), Some(130), "{text}");
    assert!(text.contains("a checkpoint is in `cut`"), "{text}");
    assert!(
        text.contains("hint: run the same command again to go on from there"),
        "{text}"
    );
    let output = train(&world, &arguments("cut")).output().unwrap();
    assert!(said(&output).contains("going on after step"), "it resumes");
    assert_eq!(json(&output)["sha256"], whole["sha256"]);
}

#[test]
fn a_run_begins_from_the_adapter_it_is_given() {
    let world = world();
    let arguments = |out, steps, more: &[&'static str]| {
        let all = ["--out", out, "--max-steps", steps, "--lr", "1e-2", "--json"];
        let all = [&all[..], &["--rank", "4", "--batch", "8"], more].concat();
        train(&world, &all).output().unwrap()
    };
    let first = json(&arguments("first", "30", &[]));
    // The run and the adapter's own folder are the same adapter; it is no worse than where it began.
    let by_run = json(&arguments("second", "1", &["--init-adapter", "first"]));
    let by_folder = json(&arguments(
        "third",
        "1",
        &["--init-adapter", "first/adapter"],
    ));
    assert_eq!(by_run["sha256"], by_folder["sha256"]);
    let fresh = json(&arguments("fourth", "1", &[]));
    let loss = |report: &serde_json::Value| report["last_loss"].as_f64().unwrap();
    assert!(loss(&by_run) < 0.8 * loss(&fresh), "{by_run} {fresh}");
    assert!(loss(&by_run) < 1.5 * loss(&first), "{by_run} {first}");
    let say = |output: Output| {
        assert_eq!(output.status.code(), Some(1));
        said(&output)
    };
    let other = say(arguments("second", "1", &[]));
    assert!(
        other.contains("was started with `lora.init_sha256`"),
        "{other}"
    );
    let missing = say(arguments("fifth", "1", &["--init-adapter", "train.jsonl"]));
    assert!(
        missing.contains("there is no adapter in `train.jsonl`"),
        "{missing}"
    );
    let alpha = ["--init-adapter", "first", "--alpha", "3"];
    let differs = say(arguments("fifth", "1", &alpha));
    assert!(
        differs.contains("`lora.alpha` is 3, but the adapter to begin from has 8"),
        "{differs}"
    );
}

#[test]
fn a_poisoned_row_is_named_and_the_run_is_the_one_without_it() {
    let world = world();
    // Sixty-three rows that agree, and one of noise, which is first met when the others are learnt.
    let rows = std::fs::read_to_string(world.at("train.jsonl")).unwrap();
    let mut rows: Vec<String> = rows.lines().map(str::to_owned).collect();
    let noise: String = (0..40u32)
        .map(|i| char::from(b'!' + (i * 53 % 90) as u8))
        .collect();
    rows[63] = serde_json::json!({"text": "where is the rain?", "label": noise}).to_string();
    std::fs::write(world.at("train.jsonl"), rows.join("\n") + "\n").unwrap();
    let mut order: Vec<Vec<usize>> = (0..80)
        .map(|step| (0..8).map(|i| (8 * step + i) % 63).collect())
        .collect();
    order.extend([vec![0, 9, 63, 20], vec![1, 2, 3, 63, 4]]);
    order.extend(order[..4].to_vec());
    std::fs::write(
        world.at("order.json"),
        serde_json::to_string(&order).unwrap(),
    )
    .unwrap();
    std::fs::write(world.at("skip.toml"), "[data]\nskip_lines = [64]\n").unwrap();
    let arguments = |out, threads, more: &[&'static str]| {
        let all = [
            "--out",
            out,
            "--order",
            "order.json",
            "--lr",
            "1e-2",
            "--json",
        ];
        let all = [&all[..], &["--rank", "4", "--threads", threads], more].concat();
        train(&world, &all).output().unwrap()
    };
    let output = arguments("poisoned", "1", &[]);
    let words = said(&output);
    assert!(
        words.contains("train.jsonl:64: left out from now on (step 81): its loss is "),
        "{words}"
    );
    let poisoned = json(&output);
    assert_eq!(poisoned["dropped"], serde_json::json!(["train.jsonl:64"]));
    let without = json(&arguments("without", "2", &["--recipe", "skip.toml"]));
    assert_eq!(without["dropped"], serde_json::json!([]));
    assert_eq!(poisoned["sha256"], without["sha256"]);
}

#[test]
fn a_dry_run_estimates_and_leaves_nothing() {
    let world = world();
    let arguments = [
        "--valid",
        "valid.jsonl",
        "--epochs",
        "2",
        "--batch",
        "8",
        "--dry-run",
    ];
    let report = json(
        &train(&world, &[&arguments[..], &["--json"]].concat())
            .output()
            .unwrap(),
    );
    let keys: Vec<&str> = report
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "steps",
            "rows",
            "tokens",
            "computed_tokens",
            "params",
            "micro_tokens",
            "tok_per_s",
            "train_s",
            "valid_s",
            "peak_rss_mb"
        ]
    );
    assert_eq!(
        (report["steps"].as_u64(), report["rows"].as_u64()),
        (Some(16), Some(128))
    );
    let n = |key: &str| report[key].as_f64().unwrap();
    assert!(n("computed_tokens") < n("tokens") && n("train_s") > 0.0 && n("valid_s") > 0.0);
    // Counted, not guessed: the run itself computes as many.
    let run = [&arguments[..6], &["--out", "run", "--json"]].concat();
    let run = json(&train(&world, &run).output().unwrap());
    assert_eq!(run["tokens"], report["tokens"]);
    let off = run["computed_tokens"].as_f64().unwrap() / n("computed_tokens");
    assert!((0.9..1.1).contains(&off), "{off}");
    let words = train(&world, &arguments).output().unwrap();
    let words = String::from_utf8_lossy(&words.stdout).into_owned();
    assert!(words.starts_with("16 steps over 128 rows of "), "{words}");
    // What rows share is computed once, unless the user does not want it.
    let plain = json(
        &train(
            &world,
            &[&arguments[..], &["--json", "--no-share-prefixes"]].concat(),
        )
        .output()
        .unwrap(),
    );
    assert!(plain["computed_tokens"].as_f64().unwrap() > 1.5 * n("computed_tokens"));
}
