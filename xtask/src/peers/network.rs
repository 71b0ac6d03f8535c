//! What others make of the server: their clients, their fuzzer, their questions about tools.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;

use super::report::{Bound, Report};
use super::rows::num;
use super::{Desk, MODEL, serving, text};
use crate::server::Server;
use crate::{clients, sh};

/// What the peers' scripts import.
const PACKAGES: [&str; 3] = [
    "litellm==1.110.2",
    "langchain-openai",
    "lm-eval[api]==0.4.13",
];

/// litellm, langchain-openai and lm-evaluation-harness, told nothing but the address.
pub(super) fn clients(desk: &Desk) -> Result<Report> {
    let python = clients::python_with("pypeers", &PACKAGES)?;
    let work = desk.work("clients")?;
    let server = serving::bantam(desk, MODEL)?;
    let mut command = sh::command(python);
    command
        .arg(script("clients.py"))
        .args([&server.base_url(), "m", text(&work)]);
    let found = sh::last_json(&sh::capture(quiet(&mut command))?)?;
    let mut report = Report::new("clients");
    let failed = found["failed"].as_object().context("no list of failures")?;
    let passed = found["passed"].as_array().context("no list of passes")?;
    report.tell("passed", passed.len() as f64);
    report.must("failed", failed.len() as f64, Bound::Max(0.0));
    report.detail("clients", found.clone());
    Ok(report)
}

/// Requests made up from the OpenAPI document, for so many seconds.
pub(super) fn schemathesis(desk: &Desk, seconds: u64) -> Result<Report> {
    let python = clients::python_with("pyfuzz", &["schemathesis==4.32.5"])?;
    let server = serving::bantam(desk, MODEL)?;
    let address = server.base_url().replace("/v1", "/openapi.json");
    let work = desk.work("schemathesis")?;
    let mut command = sh::command(python);
    command
        .arg(script("schemathesis_run.py"))
        .args([&address, &seconds.to_string()]);
    command.current_dir(&work);
    let found = sh::last_json(&sh::capture(quiet(&mut command))?)?;
    let mut report = Report::new("schemathesis");
    report.tell("requests", num(&found, "requests")?);
    report.tell("seconds", num(&found, "seconds")?);
    report.must(
        "answers of 500 and above",
        num(&found, "server_errors")?,
        Bound::Max(0.0),
    );
    report.must(
        "answers that the document does not allow",
        num(&found, "violations")?,
        Bound::Max(0.0),
    );
    let health = server.get("/health")?;
    let is_well = f64::from(u8::from(health["status"] == "ok"));
    report.must("the server is well", is_well, Bound::Min(1.0));
    report.detail("failures", found["failures"].clone());
    Ok(report)
}

/// Three hundred JSON schemas put to the untrained base at temperature 1.
pub(super) fn schemas(desk: &Desk) -> Result<Report> {
    let python = clients::python()?;
    let server = serving::bantam(desk, MODEL)?;
    let script = sh::root().join("crates/serve/tests/openai_schemas.py");
    let mut command = sh::command(python);
    command.arg(script).args([&server.base_url(), "m"]);
    let told = sh::capture(quiet(&mut command))?;
    let last = told.lines().last().unwrap_or_default();
    let count = |kind: &str| -> f64 {
        let part = last.split(", ").find(|part| part.ends_with(kind));
        let n = part.and_then(|part| part.split(' ').next()?.parse().ok());
        n.unwrap_or(f64::NAN)
    };
    let mut report = Report::new("schemas");
    report.must("wrong answers", count("wrong"), Bound::Max(0.0));
    for kind in ["valid", "cut", "refused"] {
        report.tell(kind, count(kind));
    }
    Ok(report)
}

/// How much of BFCL, and of training on it.
pub(super) struct Bfcl<'a> {
    /// Questions of the test half.
    pub(super) questions: usize,
    /// Rows of the train half to train on; none asks the base alone.
    pub(super) train_rows: Option<usize>,
    /// A finished run to ask instead of training one.
    pub(super) run: Option<&'a Path>,
}

/// Calls of tools: that all are valid, and how many are right, before and after training on the train half.
pub(super) fn bfcl(desk: &Desk, wanted: &Bfcl<'_>) -> Result<Report> {
    let data = desk.home.data("bfcl/split.tsv")?;
    let data = data.parent().context("a file has a folder")?;
    let mut report = Report::new("bfcl");
    ask(desk, data, wanted.questions, MODEL, "before", &mut report)?;
    let run = match (wanted.run, wanted.train_rows) {
        (Some(run), _) => Some(run.to_path_buf()),
        (None, Some(n)) => Some(train(desk, data, n)?),
        (None, None) => None,
    };
    if let Some(run) = run {
        ask(
            desk,
            data,
            wanted.questions,
            text(&run),
            "after",
            &mut report,
        )?;
    }
    Ok(report)
}

fn train(desk: &Desk, data: &Path, rows: usize) -> Result<PathBuf> {
    let work = desk.work("bfcl")?;
    let (file, run) = (work.join("train.jsonl"), work.join("run"));
    let mut command = sh::command(clients::python()?);
    command
        .arg(script("bfcl.py"))
        .args(["rows", text(data), text(&file), &rows.to_string()]);
    sh::run(&mut command)?;
    desk.bantam_json(&[
        "train",
        "--base",
        MODEL,
        "--train",
        text(&file),
        "--out",
        text(&run),
        "--epochs",
        "1",
    ])?;
    Ok(run)
}

fn ask(
    desk: &Desk,
    data: &Path,
    questions: usize,
    model: &str,
    when: &str,
    report: &mut Report,
) -> Result<()> {
    let server: Server = serving::bantam(desk, model)?;
    let mut command = sh::command(clients::python()?);
    command.arg(script("bfcl.py")).args([
        "ask",
        text(data),
        &server.base_url(),
        "m",
        &questions.to_string(),
    ]);
    let found = sh::last_json(&sh::capture(quiet(&mut command))?)?;
    let kinds = &found["kinds"];
    let (rows, valid) = (num(&found, "rows")?, num(kinds, "valid")?);
    report.must(
        format!("{when}: invalid answers"),
        num(kinds, "invalid")?,
        Bound::Max(0.0),
    );
    report.tell(format!("{when}: cut by length"), num(kinds, "cut")?);
    report.tell(
        format!("{when}: refused, most of them too long"),
        num(kinds, "refused")?,
    );
    report.tell(format!("{when}: valid of {rows}"), valid);
    report.tell(
        format!("{when}: right, %"),
        100.0 * num(&found, "right")? / rows,
    );
    report.detail(when, json!(found));
    Ok(())
}

/// A command of the peers' Python that talks to this machine alone.
fn quiet(command: &mut std::process::Command) -> &mut std::process::Command {
    command
        .env("NO_PROXY", "127.0.0.1")
        .env("OPENAI_API_KEY", "none")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("HF_HUB_OFFLINE", "1")
        .env("TOKENIZERS_PARALLELISM", "false")
        .env("LITELLM_LOCAL_MODEL_COST_MAP", "true")
}

fn script(name: &str) -> PathBuf {
    sh::root().join("xtask/peers").join(name)
}
