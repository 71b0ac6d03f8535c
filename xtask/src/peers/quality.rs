//! What the arithmetic costs in quality: each type of weights against the same weights computed in f32.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::report::{Bound, Report};
use super::rows::num;
use super::serving::llama_program;
use super::{Desk, text};
use crate::sh;

/// Windows of 512 tokens of the test text.
const WINDOWS: &str = "8";
/// Types that the peers' Python writes.
const PLAIN: [&str; 4] = ["Q4_0", "Q8_0", "Q4_1", "BF16"];
/// Types that llama.cpp's own program writes, where a row is whole blocks; it takes a neighbouring type elsewhere.
const MIXED: [&str; 2] = ["Q4_K_M", "Q6_K"];

/// Perplexity of every type, or of those named.
pub(super) fn quality(desk: &Desk, only: &[String]) -> Result<Report> {
    let data = desk.home.data("lm_wikitext2/test.txt")?;
    let mut report = Report::new("quality: perplexity against f32 on the same weights");
    let wanted = |name: &str| only.is_empty() || only.iter().any(|o| o.eq_ignore_ascii_case(name));
    for name in PLAIN.into_iter().chain(MIXED).filter(|name| wanted(name)) {
        let gguf = gguf(desk, name)?;
        let words = [
            "eval",
            "--metric",
            "perplexity",
            "--against-f32",
            "--model",
            text(&gguf),
            "--data",
            text(&data),
            "--limit",
            WINDOWS,
        ];
        let found = desk.bantam_json(&words)?;
        let against = &found["against_f32"];
        report.tell(format!("{name}: perplexity"), num(&found, "perplexity")?);
        report.must(
            format!("{name}: relative difference from f32"),
            num(against, "difference")?.abs(),
            Bound::Max(0.003),
        );
        report.tell(
            format!("{name}: mean KL from f32, nats"),
            num(against, "mean_kl")?,
        );
        report.tell(
            format!("{name}: same token first, share"),
            num(against, "greedy_agreement")?,
        );
        report.detail(name, found);
    }
    Ok(report)
}

/// The base model in a type.
fn gguf(desk: &Desk, name: &str) -> Result<PathBuf> {
    let dir = desk.home.peers.join("gguf");
    if PLAIN.contains(&name) {
        return desk.home.requantised(&desk.home.gguf(), name, &dir);
    }
    let plain = desk.home.requantised(&desk.home.gguf(), "F16", &dir)?;
    let out = dir.join(format!("SmolLM2-135M-Instruct.{name}.gguf"));
    if !out.is_file() {
        let mut command = sh::command(llama_program(desk, "llama-quantize")?);
        sh::capture(command.arg(&plain).arg(&out).arg(name))
            .context("llama-quantize comes with llama.cpp's server")?;
    }
    Ok(out)
}
