//! `cargo xtask test`: what CI runs, from a fresh clone, with nothing installed outside `target/`.
//!
//! In order: formatting, lints, house rules; every test of the workspace; then the binary as its users have it:
//! it trains the tiny model, judges it, serves it to the official clients, is killed and goes on. A failing
//! part does not stop the next one. The last line of stdout is `N passed, N failed`.

use std::process::Stdio;

use anyhow::{Result, ensure};
use bantam_testkit::tiny;

use crate::bantam::{self, Bantam};
use crate::tally::Tally;
use crate::{clients, resume, sh, tidy};

/// `cargo xtask test`
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Run one part only
    #[arg(long, value_enum)]
    only: Option<Part>,
}

/// The parts, in their order.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// `cargo fmt --check`, clippy, tidy
    Lint,
    /// `cargo test --workspace`
    Unit,
    /// The binary on the tiny model: train, eval, serve, official clients
    Clients,
    /// `kill -9` and resume
    Resume,
}

/// Runs the parts; whether all passed.
pub(crate) fn run(args: &Args) -> Result<bool> {
    let mut tally = Tally::default();
    let wants = |part| args.only.is_none_or(|only| only == part);
    if wants(Part::Lint) {
        lint(&mut tally);
    }
    if wants(Part::Unit) {
        unit(&mut tally)?;
    }
    if wants(Part::Clients) || wants(Part::Resume) {
        let mut built = None;
        tally.check("the binary builds", || {
            built = Some(Bantam::build("dev")?);
            Ok(())
        });
        if let Some(bantam) = built {
            if wants(Part::Clients) {
                serve_to_clients(&mut tally, &bantam);
            }
            if wants(Part::Resume) {
                kill_and_resume(&mut tally, &bantam);
            }
        }
    }
    Ok(tally.close())
}

fn lint(tally: &mut Tally) {
    if has_cargo_tool("fmt") {
        tally.check("formatting", || {
            sh::run(sh::cargo().args(["fmt", "--all", "--check"]))
        });
    }
    if has_cargo_tool("clippy") {
        let words = [
            "clippy",
            "--workspace",
            "--all-targets",
            "--quiet",
            "--",
            "-D",
            "warnings",
        ];
        tally.check("lints", || sh::run(sh::cargo().args(words)));
    }
    tally.check("house rules", || {
        ensure!(tidy::run()?, "see above");
        Ok(())
    });
}

/// Toolchains can be installed without these two.
fn has_cargo_tool(name: &str) -> bool {
    let probe = sh::cargo()
        .args([name, "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let has = probe.is_ok_and(|status| status.success());
    if !has {
        eprintln!(
            "\n==> skipped: `cargo {name}` is not installed (`rustup component add` brings it)"
        );
    }
    has
}

fn unit(tally: &mut Tally) -> Result<()> {
    eprintln!("\n==> unit and integration tests");
    let before = tally.failed();
    let mut cargo = sh::cargo();
    cargo.args(["test", "--workspace", "--no-fail-fast"]);
    let passed = sh::stream(&mut cargo, |line| tally.read_cargo_line(line))?;
    if !passed && tally.failed() == before {
        tally.fail("`cargo test` did not get as far as its tests");
    }
    Ok(())
}

fn serve_to_clients(tally: &mut Tally, bantam: &Bantam) {
    let mut world = None;
    tally.check(
        "the tiny model trains for three steps and is judged",
        || {
            let dir = bantam::tiny_world("clients")?;
            let path = |name: &str| dir.join(name).to_string_lossy().into_owned();
            let (base, train, test, run) = (
                path("model"),
                path("train.jsonl"),
                path("test.jsonl"),
                path("run"),
            );
            let words = [
                "train",
                "--base",
                &base,
                "--train",
                &train,
                "--out",
                &run,
                "--system",
                tiny::SYSTEM,
            ];
            let report = bantam.json(
                &[
                    &words[..],
                    &["--rank", "4", "--batch", "4", "--max-steps", "3"],
                ]
                .concat(),
            )?;
            for field in [
                "rows",
                "tokens",
                "train_s",
                "tok_per_s",
                "rows_per_s",
                "last_loss",
                "peak_rss_mb",
                "adapter",
                "sha256",
            ] {
                ensure!(
                    !report[field].is_null(),
                    "`train --json` tells no `{field}`: {report}"
                );
            }
            let report = bantam.json(&[
                "eval", "--model", &run, "--data", &test, "--metric", "label", "--limit", "8",
            ])?;
            for field in [
                "rows",
                "metric",
                "score",
                "ci95",
                "tok_per_s",
                "p50_ms",
                "p95_ms",
                "peak_rss_mb",
            ] {
                ensure!(
                    !report[field].is_null(),
                    "`eval --json` tells no `{field}`: {report}"
                );
            }
            world = Some(dir);
            Ok(())
        },
    );
    let Some(dir) = world else { return };
    let mut server = None;
    tally.check("the trained model is served", || {
        server = Some(bantam.serve(&dir.join("run"), clients::MODEL_ID, &dir.join("keys.db"))?);
        Ok(())
    });
    let Some(server) = server else { return };
    tally.check("the official Python client", || {
        clients::run_python(&server, &clients::python()?, "openai_client.py")
    });
    tally.check("fine-tuning by the official Python client", || {
        clients::run_python(&server, &clients::python()?, "fine_tuning_client.py")
    });
    tally.check("evals by the official Python client", || {
        clients::run_python(&server, &clients::python()?, "evals_client.py")
    });
    tally.check("answers of three hundred schemas are valid", || {
        clients::run_python(&server, &clients::python()?, "openai_schemas.py")
    });
    if sh::exists("node") && sh::exists("npm") {
        tally.check("the official Node client", || {
            clients::run_node(&server, &clients::node_packages()?, "openai_client.mjs")
        });
        tally.check("fine-tuning by the official Node client", || {
            let name = "fine_tuning_client.mjs";
            clients::run_node(&server, &clients::node_packages()?, name)
        });
        tally.check("evals by the official Node client", || {
            clients::run_node(&server, &clients::node_packages()?, "evals_client.mjs")
        });
    } else {
        eprintln!("\n==> skipped: the official Node client (no `node` or no `npm` here)");
    }
}

fn kill_and_resume(tally: &mut Tally, bantam: &Bantam) {
    let mut reference = None;
    tally.check("the tiny model trains to the end", || {
        let task = resume::Task::tiny(&bantam::tiny_world("resume")?);
        reference = Some(resume::uninterrupted(bantam, task)?);
        Ok(())
    });
    let Some(reference) = reference else { return };
    for threads in [2, 4] {
        tally.check(
            &format!("{threads} threads give the same bytes as one"),
            || resume::same_bits_with_threads(bantam, &reference, threads),
        );
    }
    for (threads, seed) in [(1, 1), (2, 2), (4, 3)] {
        tally.check(
            &format!("killed and resumed with {threads} threads, seed {seed}: the same bytes"),
            || resume::killed_and_resumed(bantam, &reference, threads, seed),
        );
    }
}
