//! `kill -9` at any moment, then the same command: the run ends with the bytes of an uninterrupted one.
//!
//! The tiny model is trained to the end once. Then the same training is killed again and again, each time a
//! random number of steps after it went on, until it ends by itself; the adapter's sha256 must agree, at one
//! thread and at two.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bantam_testkit::rng::Rng;
use bantam_testkit::tiny;
use serde_json::Value;

use crate::bantam::Bantam;
use crate::sh;

/// Steps of each run; enough that every kill lands in the middle.
const STEPS: u64 = 40;
/// Kills in a run, if it does not end before.
const KILLS: usize = 5;

/// Checkpoints every third step, so that most kills lose some work.
const RECIPE: &str = "[checkpoint]\nevery_steps = 3\n";

/// What a killed training must agree with.
pub(crate) struct Reference {
    world: PathBuf,
    sha256: String,
}

/// Trains to the end with one thread.
pub(crate) fn uninterrupted(bantam: &Bantam, world: &Path) -> Result<Reference> {
    fs::write(world.join("recipe.toml"), RECIPE)?;
    let sha256 = finish(bantam, world, &world.join("whole"), 1)?;
    Ok(Reference {
        world: world.to_path_buf(),
        sha256,
    })
}

/// Two threads, no kill: the same bytes.
pub(crate) fn same_bits_with_two_threads(bantam: &Bantam, reference: &Reference) -> Result<()> {
    let sha256 = finish(
        bantam,
        &reference.world,
        &reference.world.join("whole-2"),
        2,
    )?;
    ensure!(
        sha256 == reference.sha256,
        "one thread gives {}, two give {sha256}",
        reference.sha256
    );
    Ok(())
}

/// Kills the same training up to five times, goes on after each, and compares the end.
pub(crate) fn killed_and_resumed(
    bantam: &Bantam,
    reference: &Reference,
    threads: usize,
    seed: u64,
) -> Result<()> {
    let out = reference.world.join(format!("killed-{threads}-{seed}"));
    let mut rng = Rng::new(seed);
    let mut n_killed = 0;
    for _ in 0..KILLS {
        let before = steps_done(&out);
        let kill_at = before + 1 + rng.below(STEPS as usize / 4) as u64;
        if !kill_at_step(bantam, &reference.world, &out, threads, kill_at)? {
            break; // It was faster than the eye on it.
        }
        n_killed += 1;
        eprintln!(
            "    killed in step {} (resumed from about {before})",
            steps_done(&out)
        );
    }
    ensure!(
        n_killed > 0,
        "the training ended before it could be killed once"
    );
    let sha256 = finish(bantam, &reference.world, &out, threads)?;
    ensure!(
        sha256 == reference.sha256,
        "uninterrupted: {}, killed {n_killed} times: {sha256}",
        reference.sha256
    );
    let steps: Vec<u64> = events(&out)?.iter().filter_map(step_of).collect();
    ensure!(
        steps.iter().copied().eq(1..=STEPS),
        "events.jsonl tells the steps {steps:?}"
    );
    Ok(())
}

fn arguments(world: &Path, out: &Path, threads: usize) -> Vec<String> {
    let path = |name: &str| world.join(name).to_string_lossy().into_owned();
    let words = [
        "train",
        "--base",
        &path("model"),
        "--train",
        &path("train.jsonl"),
        "--recipe",
        &path("recipe.toml"),
    ];
    let mut all: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
    for (flag, value) in [
        ("--out", out.to_string_lossy().into_owned()),
        ("--system", tiny::SYSTEM.to_owned()),
        ("--rank", "4".into()),
        ("--lr", "1e-2".into()),
        ("--batch", "8".into()),
        ("--epochs", "4".into()),
        ("--max-steps", STEPS.to_string()),
        ("--seed", "0".into()),
        ("--threads", threads.to_string()),
    ] {
        all.extend([flag.to_owned(), value]);
    }
    all
}

/// Runs the training to its end; the sha256 of the adapter, as reported.
fn finish(bantam: &Bantam, world: &Path, out: &Path, threads: usize) -> Result<String> {
    let words = arguments(world, out, threads);
    let report = bantam.json(&words.iter().map(String::as_str).collect::<Vec<_>>())?;
    let sha256 = report["sha256"]
        .as_str()
        .with_context(|| format!("no sha256 in {report}"))?;
    Ok(sha256.to_owned())
}

/// Starts the training and kills it as soon as its event log tells of step `kill_at`; false if it ended first.
fn kill_at_step(
    bantam: &Bantam,
    world: &Path,
    out: &Path,
    threads: usize,
    kill_at: u64,
) -> Result<bool> {
    let words = arguments(world, out, threads);
    let mut command = bantam.command(&words.iter().map(String::as_str).collect::<Vec<_>>());
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let began = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            if status.success() {
                return Ok(false);
            }
            let mut words = String::new();
            if let Some(mut stderr) = child.stderr.take() {
                std::io::Read::read_to_string(&mut stderr, &mut words)?;
            }
            bail!("`{}` failed: {status}\n{words}", sh::show(&command));
        }
        if steps_done(out) >= kill_at {
            child.kill()?; // SIGKILL: nothing gets a chance to tidy up.
            child.wait()?;
            return Ok(true);
        }
        if began.elapsed() > Duration::from_secs(120) {
            child.kill()?;
            child.wait()?;
            bail!("step {kill_at} was not reached within two minutes");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The last step that the run's log tells of; 0 before there is one.
fn steps_done(out: &Path) -> u64 {
    events(out).map_or(0, |all| {
        all.iter().filter_map(step_of).next_back().unwrap_or(0)
    })
}

fn step_of(event: &Value) -> Option<u64> {
    if event["event"] == "step" {
        event["step"].as_u64()
    } else {
        None
    }
}

/// Every whole line of the run's event log.
fn events(out: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(out.join("events.jsonl"))?;
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect()
}
