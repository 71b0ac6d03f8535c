//! `kill -9` at any moment, then the same command: the run ends with the bytes of an uninterrupted one.
//!
//! A model is trained to the end once. Then the same training is killed again and again, each time a
//! random number of steps after it went on, until it ends by itself; the adapter's sha256 must agree, at one
//! thread and at two.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bantam_testkit::rng::Rng;
use bantam_testkit::tiny;
use serde_json::Value;

use crate::bantam::Bantam;
use crate::peers;
use crate::sh;

/// Kills in a run, if it does not end before.
const KILLS: usize = 5;

/// Checkpoints every third step, so that most kills lose some work.
const RECIPE: &str = "[checkpoint]\nevery_steps = 3\n";

/// A training that is done again and again.
pub(crate) struct Task {
    /// Where the runs go.
    dir: PathBuf,
    base: String,
    train: PathBuf,
    system: &'static str,
    rank: usize,
    lr: &'static str,
    /// Steps of each run; enough that every kill lands in the middle.
    steps: u64,
    /// Whether the base is in the user's cache.
    with_cache: bool,
}

impl Task {
    /// The tiny model on the tiny rows in `world`.
    pub(crate) fn tiny(world: &Path) -> Task {
        Task {
            dir: world.to_path_buf(),
            base: world.join("model").to_string_lossy().into_owned(),
            train: world.join("train.jsonl"),
            system: tiny::SYSTEM,
            rank: 4,
            lr: "1e-2",
            steps: 40,
            with_cache: false,
        }
    }

    /// A real model on the first steps of Banking77.
    pub(crate) fn banking77(base: &str) -> Result<Task> {
        let dir = sh::target().join("xtask").join("exact");
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot clear {}", dir.display()))?;
        }
        fs::create_dir_all(&dir)?;
        Ok(Task {
            dir,
            base: base.to_owned(),
            train: peers::banking77_rows()?,
            system: peers::BANKING77_SYSTEM,
            rank: 16,
            lr: "1e-3",
            steps: 16,
            with_cache: true,
        })
    }

    fn command(&self, bantam: &Bantam, out: &Path, threads: usize) -> Command {
        let (train, recipe) = (self.train.to_string_lossy(), self.dir.join("recipe.toml"));
        let (recipe, out) = (recipe.to_string_lossy(), out.to_string_lossy());
        let [rank, steps, threads] =
            [self.rank as u64, self.steps, threads as u64].map(|n| n.to_string());
        let words = [
            "train",
            "--base",
            &self.base,
            "--train",
            &train,
            "--recipe",
            &recipe,
            "--out",
            &out,
            "--system",
            self.system,
            "--rank",
            &rank,
            "--lr",
            self.lr,
            "--batch",
            "8",
            "--epochs",
            "4",
            "--max-steps",
            &steps,
            "--seed",
            "0",
            "--threads",
            &threads,
        ];
        if self.with_cache {
            bantam.command_with_cache(&words)
        } else {
            bantam.command(&words)
        }
    }

    /// Runs the training to its end; the sha256 of the adapter, as reported.
    fn finish(&self, bantam: &Bantam, out: &Path, threads: usize) -> Result<String> {
        let mut command = self.command(bantam, out, threads);
        let report = sh::last_json(&sh::capture(command.arg("--json"))?)?;
        let sha256 = report["sha256"]
            .as_str()
            .with_context(|| format!("no sha256 in {report}"))?;
        Ok(sha256.to_owned())
    }
}

/// What a killed training must agree with.
pub(crate) struct Reference {
    task: Task,
    sha256: String,
}

impl Reference {
    /// The digest of the adapter.
    pub(crate) fn sha256(&self) -> &str {
        &self.sha256
    }
}

/// Trains to the end with one thread.
pub(crate) fn uninterrupted(bantam: &Bantam, task: Task) -> Result<Reference> {
    fs::write(task.dir.join("recipe.toml"), RECIPE)?;
    let sha256 = task.finish(bantam, &task.dir.join("whole"), 1)?;
    Ok(Reference { task, sha256 })
}

/// So many threads, no kill: the same bytes.
pub(crate) fn same_bits_with_threads(
    bantam: &Bantam,
    reference: &Reference,
    threads: usize,
) -> Result<()> {
    let task = &reference.task;
    let out = task.dir.join(format!("whole-{threads}"));
    let sha256 = task.finish(bantam, &out, threads)?;
    ensure!(
        sha256 == reference.sha256,
        "one thread gives {}, {threads} give {sha256}",
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
    let task = &reference.task;
    let out = task.dir.join(format!("killed-{threads}-{seed}"));
    let mut rng = Rng::new(seed);
    let mut n_killed = 0;
    for _ in 0..KILLS {
        let before = steps_done(&out);
        let kill_at = before + 1 + rng.below(task.steps as usize / 4) as u64;
        if !kill_at_step(task, bantam, &out, threads, kill_at)? {
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
    let sha256 = task.finish(bantam, &out, threads)?;
    ensure!(
        sha256 == reference.sha256,
        "uninterrupted: {}, killed {n_killed} times: {sha256}",
        reference.sha256
    );
    let steps: Vec<u64> = events(&out)?.iter().filter_map(step_of).collect();
    ensure!(
        steps.iter().copied().eq(1..=task.steps),
        "events.jsonl tells the steps {steps:?}"
    );
    Ok(())
}

/// Starts the training and kills it as soon as its event log tells of step `kill_at`; false if it ended first.
fn kill_at_step(
    task: &Task,
    bantam: &Bantam,
    out: &Path,
    threads: usize,
    kill_at: u64,
) -> Result<bool> {
    let mut command = task.command(bantam, out, threads);
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
