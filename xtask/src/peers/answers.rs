//! Are the answers right? Greedy tokens by transformers, logits by PEFT, a merged model by llama.cpp.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::report::{Bound, Report};
use super::rows::{SYSTEM, json_lines, num, spread_rows};
use super::training::Training;
use super::{Desk, text};
use crate::sh;

/// Every token that Bantam takes greedily is the one on top by transformers.
pub(super) fn greedy(desk: &Desk) -> Result<Report> {
    let probe = desk.probe()?;
    let mut command = desk.own_script("greedy.py");
    command
        .arg("--gguf")
        .arg(desk.home.gguf())
        .arg("--probe")
        .arg(probe)
        .arg("--work")
        .arg(desk.work("greedy")?);
    let found = sh::last_json(&sh::capture(
        command.args(["--threads", &desk.threads.to_string()]),
    )?)?;
    let mut report = Report::new("greedy: Bantam's tokens, judged by transformers in f32");
    report.tell("tokens", num(&found, "tokens")?);
    report.must(
        "tokens that transformers would not take",
        num(&found, "wrong")?,
        Bound::Max(0.0),
    );
    report.tell("ties within 1e-4 of a logit", num(&found, "ties")?);
    report.detail("found", found);
    Ok(report)
}

/// PEFT with our adapter computes our logits.
pub(super) fn adapter(desk: &Desk, run: Option<&Path>) -> Result<Report> {
    let probe = desk.probe()?;
    let work = desk.work("adapter")?;
    let adapter = adapter_in(&run_of(desk, run, &work)?)?;
    let mut command = desk.own_script("adapter.py");
    command
        .arg("--gguf")
        .arg(desk.home.gguf())
        .arg("--adapter")
        .arg(adapter)
        .arg("--probe")
        .arg(probe);
    command
        .arg("--rows")
        .arg(desk.home.banking77("test.jsonl")?)
        .args(["--system", SYSTEM])
        .arg("--work")
        .arg(&work);
    let found = sh::last_json(&sh::capture(
        command.args(["--threads", &desk.threads.to_string()]),
    )?)?;
    let mut report = Report::new("adapter: logits in f32, Bantam's against PEFT's");
    report.must(
        "NMSE, base alone",
        num(&found["base"], "nmse")?,
        Bound::Max(1e-9),
    );
    report.must(
        "NMSE, with the adapter",
        num(&found["adapter"], "nmse")?,
        Bound::Max(1e-9),
    );
    report.must(
        "largest difference of a logit, with the adapter",
        num(&found["adapter"], "max_abs")?,
        Bound::Max(1e-3),
    );
    report.must(
        "largest change of a logit by the adapter",
        num(&found, "adapter_moves_logits_by")?,
        Bound::Min(1.0),
    );
    report.detail("found", found);
    Ok(report)
}

/// llama.cpp answers test rows from our merged GGUF as we do from the same file.
pub(super) fn merge(desk: &Desk, run: Option<&Path>, rows: Option<&Path>) -> Result<Report> {
    let work = desk.work("merge")?;
    let run = run_of(desk, run, &work)?;
    let (rows, system) = match rows {
        Some(rows) => (rows.to_path_buf(), None),
        None => (
            spread_rows(
                &desk.home.banking77("test.jsonl")?,
                200,
                &work.join("rows.jsonl"),
            )?,
            Some(SYSTEM),
        ),
    };
    let merged = work.join("merged.gguf");
    let words = ["export", "--model", text(&run), "--out", text(&merged)];
    desk.bantam_json(&words)?;

    let theirs = work.join("llama.jsonl");
    let mut command = desk.own_script("llama_rows.py");
    command
        .arg("--gguf")
        .arg(&merged)
        .arg("--rows")
        .arg(&rows)
        .arg("--out")
        .arg(&theirs);
    command
        .args(system.iter().flat_map(|s| ["--system", *s]))
        .args(["--threads", &desk.threads.to_string()]);
    sh::last_json(&sh::capture(&mut command)?)?;

    let ours = work.join("bantam.jsonl");
    let mut words = vec![
        "eval",
        "--model",
        text(&merged),
        "--data",
        text(&rows),
        "--metric",
        "exact",
        "--max-tokens",
        "256",
    ];
    words.extend(["--rows-out", text(&ours)]);
    words.extend(system.iter().flat_map(|s| ["--system", *s]));
    let scored = desk.bantam_json(&words)?;

    let (theirs, ours) = (json_lines(&theirs)?, json_lines(&ours)?);
    ensure!(
        theirs.len() == ours.len(),
        "llama.cpp answered {} rows, Bantam {}",
        theirs.len(),
        ours.len()
    );
    let answer = |row: &Value| row["answer"].as_str().unwrap_or_default().trim().to_owned();
    let same = theirs
        .iter()
        .zip(&ours)
        .filter(|(a, b)| answer(a) == answer(b))
        .count();
    let right = theirs
        .iter()
        .filter(|a| answer(a) == a["reference"].as_str().unwrap_or_default().trim())
        .count();
    let (n, ours_score) = (theirs.len() as f64, num(&scored, "score")?);
    let mut report = Report::new("merge: the merged GGUF in llama.cpp and in Bantam");
    report.tell("rows", n);
    report.must(
        "share of rows with the same answer",
        same as f64 / n,
        Bound::Min(0.97),
    );
    report.tell("exact match in Bantam", ours_score);
    report.tell("exact match in llama.cpp", right as f64 / n);
    report.must(
        "difference of the two",
        (right as f64 / n - ours_score).abs(),
        Bound::Max(0.02),
    );
    Ok(report)
}

/// The run given, or that of a short training on Banking77.
fn run_of(desk: &Desk, run: Option<&Path>, work: &Path) -> Result<PathBuf> {
    if let Some(run) = run {
        return Ok(run.to_path_buf());
    }
    let (base, out) = (desk.home.gguf(), work.join("run"));
    Training::new(&base, &out).run(desk, &["--max-steps", "60"])?;
    Ok(out)
}

/// The adapter in a run.
fn adapter_in(run: &Path) -> Result<PathBuf> {
    let places = [run.join("adapter"), run.to_path_buf()];
    let found = places
        .into_iter()
        .find(|place| place.join("adapter_config.json").is_file());
    found.with_context(|| format!("{} holds no adapter", run.display()))
}
