//! Speed lost at the door: the same chats through HTTP and through the engine alone.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use serde_json::{Value, json};

use super::report::{Bound, Report};
use super::rows::{SYSTEM, json_lines};
use super::serving::median;
use super::{Desk, MODEL, serving, text};
use crate::http::Connection;

/// As many as `bantam bench` has.
const CLIENTS: usize = 16;
const CHATS: usize = 64;
const MAX_TOKENS: usize = 8;
/// Both sides take turns, so that a machine that slows down slows down both.
const TURNS: usize = 3;
const ROUNDS: usize = 3;

/// Requests a second through HTTP over those of the engine.
pub(super) fn door(desk: &Desk) -> Result<Report> {
    let dir = desk.work("door")?;
    let rows = json_lines(&desk.home.banking77("test.jsonl")?)?;
    let chats: Vec<Value> = rows
        .iter()
        .take(CHATS)
        .map(|row| {
            let messages = json!([
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": row["text"]},
            ]);
            json!({"model": "m", "messages": messages, "max_tokens": MAX_TOKENS, "temperature": 0})
        })
        .collect();
    ensure!(chats.len() == CHATS, "there are only {} rows", chats.len());
    let lines: String = chats.iter().map(|chat| format!("{chat}\n")).collect();
    let file = dir.join("chats.jsonl");
    std::fs::write(&file, lines)?;
    let (mut engine, mut http) = (Vec::new(), Vec::new());
    for _ in 0..TURNS {
        let words = [
            "bench",
            "--quick",
            "--only",
            "chat",
            "--chats",
            text(&file),
            "--model",
            MODEL,
        ];
        let found = desk.bantam_json(&words)?;
        let rate = found["chat_requests_per_s"].as_f64();
        engine.push(rate.ok_or_else(|| anyhow!("`bantam bench` tells no rate of chats"))?);
        let server = serving::bantam(desk, MODEL)?;
        let bodies: Vec<String> = chats.iter().map(Value::to_string).collect();
        let rounds: Result<Vec<f64>> = (0..ROUNDS).map(|_| round(server.port(), &bodies)).collect();
        http.push(median(&rounds?));
    }
    let mut report = Report::new("door");
    report.tell("engine, requests/s", median(&engine));
    report.tell("through HTTP, requests/s", median(&http));
    let share = median(&http) / median(&engine);
    report.must("through HTTP over engine", share, Bound::Min(0.95));
    report.detail("engine", json!(engine));
    report.detail("http", json!(http));
    Ok(report)
}

/// Asks all once; requests a second.
fn round(port: u16, bodies: &[String]) -> Result<f64> {
    let next = AtomicUsize::new(0);
    let client = || -> Result<()> {
        let mut connection = Connection::open(port, Duration::from_secs(60))?;
        while let Some(body) = bodies.get(next.fetch_add(1, Ordering::Relaxed)) {
            let head = connection.send("POST", "/v1/chat/completions", body)?;
            ensure!(head.status == 200, "status {}", head.status);
            connection.json(head)?;
        }
        Ok(())
    };
    let began = Instant::now();
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(client)).collect();
        for client in clients {
            client.join().map_err(|_| anyhow!("a client panicked"))??;
        }
        Ok::<_, anyhow::Error>(())
    })?;
    Ok(bodies.len() as f64 / began.elapsed().as_secs_f64())
}
