//! Speed of answering beside llama.cpp's server: the same GGUF, the same threads, taking turns in one run.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use serde_json::{Value, json};

use super::report::{Bound, Report};
use super::rows::{SYSTEM, json_lines, labels_of, num};
use super::serving::{self, Answered, LlamaRates, median};
use super::{Desk, text};
use crate::sh;

/// Types of weights, each in a file of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kind {
    /// Every matrix in Q4_0
    #[value(name = "q4_0")]
    Q4_0,
    /// Every matrix in Q8_0
    #[value(name = "q8_0")]
    Q8_0,
    /// The file as it is published
    #[value(name = "q4_1")]
    Q4_1,
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Piece {
    /// Prefill of 512 tokens, decode of one stream and of 16
    Raw,
    /// The demo's test rows to JSON, with its schema, from 1 and 16 clients
    Json,
    /// Banking77's test rows to labels, from 16 clients
    Labels,
    /// From the start of the server to the first token, and its memory
    Start,
}

impl Kind {
    /// All of them.
    pub(crate) const ALL: [Kind; 3] = [Kind::Q4_0, Kind::Q8_0, Kind::Q4_1];

    /// As ggml says it.
    fn name(self) -> &'static str {
        match self {
            Kind::Q4_0 => "Q4_0",
            Kind::Q8_0 => "Q8_0",
            Kind::Q4_1 => "Q4_1",
        }
    }

    /// The base model in this type.
    fn base(self, desk: &Desk) -> Result<PathBuf> {
        match self {
            Kind::Q4_1 => Ok(desk.home.gguf()),
            _ => desk.home.requantised(
                &desk.home.gguf(),
                self.name(),
                &desk.home.peers.join("gguf"),
            ),
        }
    }

    /// Targets and stretches of prefill, decode and 16 streams, where there are any.
    fn targets(self) -> [Option<(f64, f64)>; 3] {
        match self {
            Kind::Q4_0 => [Some((3.0, 4.0)), Some((1.5, 1.75)), Some((2.5, 4.0))],
            Kind::Q8_0 => [Some((3.0, 4.0)), None, None],
            Kind::Q4_1 => [Some((5.0, 8.0)), Some((2.5, 3.0)), None],
        }
    }
}

/// The comparisons of `kinds` and `pieces`, in one report.
pub(super) fn bench(
    desk: &Desk,
    kinds: &[Kind],
    pieces: &[Piece],
    demo: Option<&Path>,
) -> Result<Report> {
    let mut report = Report::new("bench: answering beside llama.cpp");
    for &kind in kinds {
        for piece in pieces {
            match piece {
                Piece::Raw => raw(desk, kind, &mut report)?,
                Piece::Json => extraction(desk, kind, demo, &mut report)?,
                Piece::Labels => labels(desk, kind, &mut report)?,
                Piece::Start => start(desk, kind, &mut report)?,
            }
        }
    }
    Ok(report)
}

/// Prefill, decode, streams: llama.cpp before and after Bantam.
fn raw(desk: &Desk, kind: Kind, report: &mut Report) -> Result<()> {
    let gguf = kind.base(desk)?;
    let server = serving::llama(desk, &gguf)?;
    let mut theirs = LlamaRates::default();
    theirs.measure(&server)?;
    let words = [
        "bench",
        "--quick",
        "--model",
        text(&gguf),
        "--only",
        "prefill,decode,streams",
    ];
    let ours = desk.bantam_json(&words)?;
    theirs.measure(&server)?;
    let name = kind.name();
    let figures = [
        ("prefill 512, tok/s", "prefill_512_tok_s", &theirs.prefill),
        ("decode, tok/s", "decode_tok_s", &theirs.decode),
        (
            "16 streams, tok/s",
            "decode_16_streams_tok_s",
            &theirs.streams,
        ),
    ];
    for ((what, field, peer), target) in figures.into_iter().zip(kind.targets()) {
        let sides = (num(&ours, field)?, median(peer));
        match target {
            Some((target, stretch)) => {
                report.ratio(format!("{name}: {what}"), sides, target, stretch)
            }
            None => report.beside(format!("{name}: {what}"), sides),
        }
    }
    report.detail(&format!("{name} raw"), ours);
    Ok(())
}

/// Addresses to JSON with the demo's model, merged.
fn extraction(desk: &Desk, kind: Kind, demo: Option<&Path>, report: &mut Report) -> Result<()> {
    let demo = Demo::find(desk, demo)?;
    let gguf = demo.merged(desk, kind)?;
    let rows = json_lines(&demo.folder.join("test.jsonl"))?;
    let schema = json!({"type": "json_schema", "json_schema": {"name": "address", "schema": demo_schema(&rows)}});
    let request = |row: &Value| {
        let turns = row["messages"].as_array().map_or(&[][..], Vec::as_slice);
        let mut body = serving::chat(&turns[..turns.len() - 1].into(), 256);
        body["response_format"] = schema.clone();
        body
    };
    let requests: Vec<Value> = rows.iter().map(request).collect();
    let wanted: Vec<&str> = rows
        .iter()
        .map(|row| row["messages"].as_array().and_then(|turns| turns.last()))
        .map(|turn| {
            turn.and_then(|turn| turn["content"].as_str())
                .unwrap_or_default()
        })
        .collect();
    let (ours, theirs) = (
        serving::bantam(desk, text(&gguf))?,
        serving::llama(desk, &gguf)?,
    );
    for server in [&ours, &theirs] {
        serving::ask(server, &requests[..1], 1)?;
    }
    let name = kind.name();
    // Each row is asked once, so that no answer comes out of a cache of questions.
    for (clients, rows) in [(1, 1..25), (16, 25..137)] {
        let half = (rows.start + rows.end) / 2;
        let turns = [rows.start..half, half..rows.end];
        let mut found = [Turns::default(), Turns::default()];
        for rows in turns {
            for (turns, server) in found.iter_mut().zip([&ours, &theirs]) {
                let answered = serving::ask(server, &requests[rows.clone()], clients)?;
                turns.add(answered, &wanted[rows.clone()]);
            }
        }
        let [ours, theirs] = &found;
        let what = format!("{name}: JSON, {clients} clients, requests/s");
        report.ratio(what, (ours.rate(), theirs.rate()), 4.0, 8.0);
        let what = format!("{name}: JSON, {clients} clients, right answers of each");
        report.beside(what, (ours.right(), theirs.right()));
        let what = format!("{name}: JSON, {clients} clients, tokens an answer");
        report.beside(what, (ours.tokens(), theirs.tokens()));
    }
    Ok(())
}

/// Labels, held to the list in Bantam, free for 8 tokens in llama.cpp.
fn labels(desk: &Desk, kind: Kind, report: &mut Report) -> Result<()> {
    const ROWS: usize = 192;
    let gguf = kind.base(desk)?;
    let all = json_lines(&desk.home.banking77("test.jsonl")?)?;
    let rows: Vec<&Value> = all.iter().step_by(all.len() / ROWS).take(ROWS).collect();
    let choice = labels_of(&desk.home.banking77("train.jsonl")?)?;
    let request = |row: &&Value| {
        serving::chat(
            &json!([{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["text"]}]),
            8,
        )
    };
    let free: Vec<Value> = rows.iter().map(request).collect();
    let held: Vec<Value> = free
        .iter()
        .map(|request| {
            let mut request = request.clone();
            request["guided_choice"] = json!(choice);
            request["max_tokens"] = json!(32);
            request
        })
        .collect();
    let (ours, theirs) = (
        serving::bantam(desk, text(&gguf))?,
        serving::llama(desk, &gguf)?,
    );
    for (server, requests) in [(&ours, &held), (&theirs, &free)] {
        serving::ask(server, &requests[..16], 16)?;
    }
    let (mut bantam, mut llama) = (Vec::new(), Vec::new());
    for rows in [16..104, 104..192] {
        bantam.push(serving::ask(&ours, &held[rows.clone()], 16)?);
        llama.push(serving::ask(&theirs, &free[rows], 16)?);
    }
    let is_label = |text: &String| choice.contains(text);
    let rate = |turns: &[Answered]| median(&turns.iter().map(|t| t.rate).collect::<Vec<_>>());
    let strays = bantam
        .iter()
        .flat_map(|t| &t.texts)
        .filter(|text| !is_label(text));
    let name = kind.name();
    report.must(
        format!("{name}: answers of Bantam that are no label"),
        strays.count() as f64,
        Bound::Max(0.0),
    );
    report.ratio(
        format!("{name}: labels, 16 clients, requests/s"),
        (rate(&bantam), rate(&llama)),
        5.0,
        10.0,
    );
    Ok(())
}

/// From the start of the server to an answer of one token, over HTTP, taking turns; memory after a prompt of 512.
fn start(desk: &Desk, kind: Kind, report: &mut Report) -> Result<()> {
    let gguf = kind.base(desk)?;
    let hello = serving::chat(&json!([{"role": "user", "content": "Hello"}]), 1);
    let long = serving::chat(
        &json!([{"role": "user", "content": "word ".repeat(512)}]),
        128,
    );
    let (mut ms, mut mb) = ([vec![], vec![]], [vec![], vec![]]);
    for _ in 0..5 {
        for side in [0, 1] {
            let began = Instant::now();
            let server = match side {
                0 => serving::bantam(desk, text(&gguf))?,
                _ => serving::llama(desk, &gguf)?,
            };
            server.post("/v1/chat/completions", &hello)?;
            ms[side].push(began.elapsed().as_secs_f64() * 1e3);
            server.post("/v1/chat/completions", &long)?;
            mb[side].push(server.peak_rss_mb()?);
        }
    }
    let name = kind.name();
    let [ours, theirs] = ms.map(|values| median(&values));
    report.must(
        format!("{name}: start of the server to the first token, ms"),
        ours,
        Bound::Max(200.0),
    );
    report.tell(format!("{name}: the same, llama.cpp"), theirs);
    let [ours, theirs] = mb.map(|values| median(&values));
    let weights = std::fs::metadata(&gguf)?.len() as f64 / f64::from(1 << 20);
    // Keys and values of 660 tokens in 16 bits: 30 layers of 3 heads of 64, twice.
    let kv = 660.0 * 30.0 * 2.0 * 192.0 * 2.0 / f64::from(1 << 20);
    report.must(
        format!("{name}: peak memory, MiB"),
        ours,
        Bound::Max(weights * 1.3 + kv),
    );
    report.tell(format!("{name}: the same, llama.cpp"), theirs);
    Ok(())
}

/// Turns of one side.
#[derive(Default)]
struct Turns {
    rates: Vec<f64>,
    tokens: Vec<f64>,
    n: usize,
    n_right: usize,
}

impl Turns {
    fn add(&mut self, answered: Answered, wanted: &[&str]) {
        self.rates.push(answered.rate);
        self.tokens.push(answered.tokens);
        let value = |text: &str| serde_json::from_str::<Value>(text).ok();
        self.n += wanted.len();
        self.n_right += (answered.texts.iter())
            .zip(wanted)
            .filter(|(text, wanted)| value(text).is_some_and(|v| Some(v) == value(wanted)))
            .count();
    }

    fn rate(&self) -> f64 {
        self.rates.iter().sum::<f64>() / self.rates.len() as f64
    }

    fn tokens(&self) -> f64 {
        self.tokens.iter().sum::<f64>() / self.tokens.len() as f64
    }

    fn right(&self) -> f64 {
        self.n_right as f64 / self.n as f64
    }
}

/// A finished `bantam demo`.
struct Demo {
    folder: PathBuf,
}

impl Demo {
    /// The one given, or one of our own, which takes some minutes the first time.
    fn find(desk: &Desk, given: Option<&Path>) -> Result<Demo> {
        if let Some(folder) = given {
            return Ok(Demo {
                folder: folder.to_path_buf(),
            });
        }
        let folder = sh::target().join("xtask/peers/bantam-demo");
        if !folder.join("run/adapter/adapter_config.json").is_file() {
            desk.bantam_json(&["demo", "--limit", "20", "--out", text(&folder)])?;
        }
        Ok(Demo { folder })
    }

    /// Its model, merged, in this type of weights.
    fn merged(&self, desk: &Desk, kind: Kind) -> Result<PathBuf> {
        let run = self.folder.join("run");
        let result = std::fs::read_to_string(run.join("result.json"))?;
        let result: Value = serde_json::from_str(&result)?;
        let digest = result["sha256"].as_str().unwrap_or_default();
        let dir = sh::target().join("xtask/peers/merged").join(digest);
        std::fs::create_dir_all(&dir)?;
        let plain = dir.join("demo.F16.gguf");
        if !plain.is_file() {
            let words = [
                "export",
                "--model",
                text(&run),
                "--out",
                text(&plain),
                "--json",
            ];
            sh::run(&mut desk.bantam.command_with_cache(&words))?;
        }
        desk.home.requantised(&plain, kind.name(), &dir)
    }
}

/// What the demo's answers obey, with every key spelt out: llama.cpp does not know `patternProperties`.
fn demo_schema(rows: &[Value]) -> Value {
    let mut properties = serde_json::Map::new();
    let part = json!({"type": "string"});
    let value = json!({"anyOf": [part, {"type": "array", "items": part, "minItems": 2}]});
    for row in rows {
        let turns = row["messages"].as_array();
        let answer = turns.and_then(|turns| turns.last()?["content"].as_str());
        let answer: Option<Value> = answer.and_then(|text| serde_json::from_str(text).ok());
        for key in answer
            .iter()
            .filter_map(Value::as_object)
            .flat_map(|o| o.keys())
        {
            properties
                .entry(key.as_str())
                .or_insert_with(|| value.clone());
        }
    }
    json!({"type": "object", "properties": properties, "additionalProperties": false})
}
