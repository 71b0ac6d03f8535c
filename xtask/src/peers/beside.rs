//! Serving beside a fine-tuning job: how long short chats take, alone and while a model is trained.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::report::Report;
use super::rows::{SYSTEM, json_lines, spread_rows};
use super::{Desk, MODEL, text};
use crate::http::Connection;
use crate::server::{Server, free_port};

/// Chats of a measurement, one after the other; no text is asked twice.
const CHATS: usize = 250;
const MAX_TOKENS: usize = 8;

/// Latencies of chats with no job, and with one on one thread and on as many as it takes by itself.
pub(super) fn beside(desk: &Desk) -> Result<Report> {
    let dir = desk.work("beside")?;
    let rows = json_lines(&desk.home.banking77("test.jsonl")?)?;
    let chats: Vec<String> = rows
        .iter()
        .take(2 * CHATS)
        .map(|row| {
            let messages = json!([
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": row["text"]},
            ]);
            let body = json!({
                "model": MODEL, "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0,
            });
            body.to_string()
        })
        .collect();
    let train = spread_rows(
        &desk.home.banking77("train.jsonl")?,
        2000,
        &dir.join("train.jsonl"),
    )?;
    let mut report = Report::new("beside");
    for (what, flags) in [
        ("job on 1 thread", &["--train-threads", "1"][..]),
        ("job on all threads", &[]),
    ] {
        let (port, data) = (free_port()?, dir.join(what.replace(' ', "-")));
        let (port_text, threads) = (port.to_string(), desk.threads.to_string());
        let words = [
            &["serve", "--quiet", "--model", MODEL, "--model-id", MODEL][..],
            &["--threads", &threads, "--port", &port_text],
            &["--data", text(&data)],
            flags,
        ];
        let server = Server::start(&mut desk.bantam.command_with_cache(&words.concat()), port)?;
        ensure!(
            chats.len() == 2 * CHATS,
            "there are only {} rows",
            chats.len()
        );
        let (alone, busy) = chats.split_at(CHATS);
        let alone = latencies(port, alone)?;
        let url = server.base_url();
        let job = |words: &[&str]| -> Result<Value> {
            let words = [&["jobs", "--url", &url][..], words, &["--json"]].concat();
            let told = crate::sh::capture(&mut desk.bantam.command_with_cache(&words))?;
            crate::sh::last_json(&told)
        };
        let made = job(&["create", text(&train), "--model", MODEL, "--epochs", "50"])?;
        let id = made["id"].as_str().context("a job has a name")?.to_owned();
        let began = Instant::now();
        while steps(&server, &id)? == 0 {
            ensure!(
                began.elapsed() < Duration::from_secs(300),
                "the job does not begin"
            );
            thread::sleep(Duration::from_millis(200));
        }
        let (before, since) = (steps(&server, &id)?, Instant::now());
        let busy = latencies(port, busy)?;
        let made = steps(&server, &id)? - before;
        let rate = made as f64 / since.elapsed().as_secs_f64();
        job(&["cancel", &id])?;
        for (name, percent) in [("p50", 0.5), ("p95", 0.95)] {
            let (alone, busy) = (at(&alone, percent), at(&busy, percent));
            report.tell(format!("{what}: {name} alone, ms"), alone);
            report.tell(format!("{what}: {name} beside it, ms"), busy);
            report.tell(format!("{what}: {name}, ratio"), busy / alone);
        }
        report.tell(format!("{what}: updates a second meanwhile"), rate);
    }
    Ok(report)
}

/// Updates that a job has made.
fn steps(server: &Server, id: &str) -> Result<u64> {
    let events = server.get(&format!("/v1/fine_tuning/jobs/{id}/events?limit=10000"))?;
    let all = events["data"].as_array().cloned().unwrap_or_default();
    Ok(all
        .iter()
        .filter_map(|event| event["data"]["step"].as_u64())
        .max()
        .unwrap_or(0))
}

/// Milliseconds of each chat, sorted.
fn latencies(port: u16, bodies: &[String]) -> Result<Vec<f64>> {
    let mut connection = Connection::open(port, Duration::from_secs(120))?;
    let mut all = Vec::with_capacity(bodies.len());
    for body in bodies {
        let began = Instant::now();
        let head = connection.send("POST", "/v1/chat/completions", body)?;
        ensure!(head.status == 200, "status {}", head.status);
        connection.json(head)?;
        all.push(began.elapsed().as_secs_f64() * 1000.0);
    }
    all.sort_by(f64::total_cmp);
    Ok(all)
}

fn at(sorted: &[f64], percent: f64) -> f64 {
    let rank = (percent * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}
