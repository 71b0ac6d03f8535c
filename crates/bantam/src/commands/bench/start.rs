//! From the start of a process to its first token: each time in a process of its own, files in the page cache.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, ensure};
use bantam_kernels::Compute;
use bantam_lab::train::peak_rss_mb;
use serde::{Deserialize, Serialize};

use super::load::{Load, Measure};
use crate::commands::Context;
use crate::interrupt;
use crate::loader::Loaded;
use crate::settings::BenchSettings;

/// What the process says as soon as it has a token.
#[derive(Serialize, Deserialize)]
struct FirstToken {
    load_ms: f64,
}

/// What it says at the end, after a prompt of 512 tokens and an answer of 128.
#[derive(Serialize, Deserialize)]
struct AtTheEnd {
    peak_rss_mb: u64,
}

/// One start, seen from outside.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    /// From opening the files to weights that can be used.
    pub(crate) load_ms: f64,
    /// From the start of the process to the first token.
    pub(crate) first_token_ms: f64,
    /// The most memory that the process held.
    pub(crate) peak_rss_mb: f64,
}

/// Runs a process that loads the model and answers, and takes its times.
pub(crate) fn measure(settings: &BenchSettings) -> anyhow::Result<Start> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args([
            "bench",
            "--quiet",
            "--one-answer",
            "--model",
            &settings.model,
        ])
        .args(["--threads", &settings.threads.to_string()])
        .args(["--weights", settings.weights.name()])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let began = Instant::now();
    let mut child = command.spawn().context("could not start a process")?;
    let out = child.stdout.take().context("its output is piped")?;
    let mut lines = BufReader::new(out).lines();
    let mut line = || {
        lines
            .next()
            .context("the process ended before its answer")?
            .map_err(anyhow::Error::from)
    };
    let first = line()?;
    let first_token_ms = began.elapsed().as_secs_f64() * 1e3;
    let last = line()?;
    ensure!(child.wait()?.success(), "the process failed");
    let first: FirstToken = serde_json::from_str(&first)?;
    let last: AtTheEnd = serde_json::from_str(&last)?;
    Ok(Start {
        load_ms: first.load_ms,
        first_token_ms,
        peak_rss_mb: last.peak_rss_mb as f64,
    })
}

/// The process: loads, answers, and says so.
pub(crate) fn answer(context: &Context, settings: &BenchSettings) -> anyhow::Result<()> {
    let began = Instant::now();
    let cancel = interrupt::watch()?;
    let compute = Compute::new(settings.threads);
    let (loaded, model) = Loaded::open_and_load(
        context,
        &settings.model,
        &cancel,
        &compute,
        settings.weights,
    )?;
    let mut load = Load::new(model, loaded.base.chat.clone(), None)?;
    let load_ms = began.elapsed().as_secs_f64() * 1e3;
    load.first_token()?;
    context.printer.json(&FirstToken { load_ms })?;
    for measure in [Measure::Prefill(512), Measure::Decode] {
        if load.fits(measure) {
            load.measure(measure)?;
        }
    }
    context.printer.json(&AtTheEnd {
        peak_rss_mb: peak_rss_mb(),
    })
}
