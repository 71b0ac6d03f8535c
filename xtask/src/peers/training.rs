//! Training beside PEFT: losses, tokens and rows a second, memory, and what the trained model is worth.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::report::{Bound, Report};
use super::rows::{SYSTEM, json_lines, labels_of, num};
use super::{Desk, text};
use crate::sh;

/// Rank, alpha, peak rate, batch: the PEFT script's.
const TRAINING: [&str; 10] = [
    "--rank", "16", "--alpha", "32", "--lr", "1e-3", "--batch", "16", "--seed", "0",
];
/// The same where every weight is trained: no adapter, a lower rate.
const FULL_TRAINING: [&str; 6] = ["--lr", "1e-4", "--batch", "16", "--seed", "0"];
/// The PEFT script's schedule and optimizer, which the flags above do not tell. It drops no row, so neither do we.
const RECIPE: &str = "[optim]\nbetas = [0.9, 0.999]\neps = 1e-8\nweight_decay = 0.0\nclip_norm = 1.0\nspike_z = 0.0\nwarmup_steps = 30\nschedule = \"cosine\"\n";
/// Accuracy of the PEFT script on Banking77's full test, one epoch, generated freely, as recorded.
const PEFT_BANKING77: f64 = 0.874;
/// Steps over which losses are averaged before they are compared: single steps scatter with the rounding of bf16.
const WINDOW: usize = 10;

/// A training of Bantam on Banking77 with PEFT's recipe.
pub(super) struct Training {
    base: PathBuf,
    out: PathBuf,
    system: String,
}

impl Training {
    /// Of `base`, into the run directory `out`.
    pub(super) fn new(base: &Path, out: &Path) -> Training {
        Training {
            base: base.to_path_buf(),
            out: out.to_path_buf(),
            system: SYSTEM.to_owned(),
        }
    }

    /// Trains an adapter, with more flags.
    pub(super) fn run(&self, desk: &Desk, more: &[&str]) -> Result<Value> {
        self.run_with(desk, &TRAINING, more)
    }

    fn run_with(&self, desk: &Desk, flags: &[&str], more: &[&str]) -> Result<Value> {
        let recipe = self.out.with_extension("recipe.toml");
        fs::write(&recipe, RECIPE)?;
        let train = desk.home.banking77("train.jsonl")?;
        let words = [
            "train",
            "--base",
            text(&self.base),
            "--train",
            text(&train),
            "--recipe",
            text(&recipe),
            "--out",
            text(&self.out),
            "--system",
            &self.system,
        ];
        desk.bantam_json(&[&words[..], flags, more].concat())
    }
}

/// The number type that PEFT holds the frozen weights in and computes with.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum PeftType {
    /// As a user would train
    Bf16,
    /// As exact as it gets: what a loss curve should be
    F32,
}

impl PeftType {
    /// Its name in torch, and how far windows of the loss curve may differ from ours.
    fn bound(self) -> (&'static str, f64) {
        match self {
            PeftType::Bf16 => ("bfloat16", 0.05),
            PeftType::F32 => ("float32", 0.02),
        }
    }
}

/// The same batches from the same first adapter through PEFT and through Bantam: losses, tokens a second, peak memory.
pub(super) fn loss(desk: &Desk, steps: usize, peft_type: PeftType) -> Result<Report> {
    let (dtype, bound) = peft_type.bound();
    let work = desk.work(&format!("loss-{dtype}"))?;
    let (order, losses) = (work.join("order.json"), work.join("losses.json"));
    let (init, steps_text) = (work.join("init"), steps.to_string());
    let mut command = desk.own_script("peft_trace.py");
    command
        .arg(desk.home.script("peft_sft.py")?)
        .arg(&init)
        .arg(&order)
        .arg(&losses);
    let more = ["--max-steps", &steps_text, "--dtype", dtype];
    let theirs = peft(desk, command, SYSTEM, &more)?;
    let out = work.join("run");
    let training = Training::new(&desk.home.hf_folder()?, &out);
    let more = ["--order", text(&order), "--init-adapter", text(&init)];
    let ours = training.run(desk, &[&more[..], &["--max-steps", &steps_text]].concat())?;

    let mut report = Report::new("loss: training beside PEFT");
    report.tell(format!("steps, PEFT in {dtype}"), steps as f64);
    let peft: Vec<f64> = serde_json::from_str(&fs::read_to_string(&losses)?)?;
    let own = losses_of(&out)?;
    ensure!(
        own.len() == peft.len(),
        "PEFT made {} steps, Bantam {}",
        peft.len(),
        own.len()
    );
    let (worst, at) = worst_window(&own, &peft);
    report.must(
        format!("loss, worst relative difference over {WINDOW} steps"),
        worst,
        Bound::Max(bound),
    );
    report.tell("  in the steps from", at as f64);
    report.tell("mean loss, PEFT", mean(&peft));
    report.tell("mean loss, Bantam", mean(&own));
    report.detail("losses_peft", peft.into());
    report.detail("losses_bantam", own.into());
    cost(
        &mut report,
        "training",
        ("tok_per_s", 2.5, 3.5),
        Some((1.0 / 6.0, 1.0 / 10.0)),
        &ours,
        &theirs,
    )?;
    report.detail("peft", theirs);
    report.detail("bantam", ours);
    Ok(report)
}

/// One comparison of speed and memory.
struct Case {
    what: &'static str,
    /// Whether all labels are listed in the system prompt.
    lists_labels: bool,
    /// The opponent's steps, and flags of its own.
    theirs: (usize, &'static [&'static str]),
    /// Our flags.
    ours: &'static [&'static str],
    /// Speed: the field, the target, the stretch.
    speed: (&'static str, f64, f64),
    /// Most memory as a share of the opponent's, and the stretch.
    memory: Option<(f64, f64)>,
}

/// Speed and memory alone, over a few steps: each row whole, shared beginnings, all labels listed, every weight.
pub(super) fn train(desk: &Desk, steps: usize) -> Result<Report> {
    let adapter = Some((1.0 / 6.0, 1.0 / 10.0));
    let cases = [
        Case {
            what: "each row whole",
            lists_labels: false,
            theirs: (steps, &[]),
            ours: &["--no-share-prefixes"],
            speed: ("tok_per_s", 2.5, 3.5),
            memory: adapter,
        },
        Case {
            what: "shared beginnings",
            lists_labels: false,
            theirs: (steps, &[]),
            ours: &[],
            speed: ("rows_per_s", 4.0, 6.0),
            memory: adapter,
        },
        Case {
            what: "77 labels in the system prompt",
            lists_labels: true,
            // Whole batches do not fit; a step takes it a minute.
            theirs: (2, &["--micro", "2"]),
            ours: &[],
            speed: ("rows_per_s", 25.0, 40.0),
            memory: None,
        },
        Case {
            what: "every weight",
            lists_labels: false,
            theirs: (steps, &[]),
            ours: &["--method", "full", "--no-share-prefixes"],
            speed: ("tok_per_s", 2.0, 3.0),
            memory: None,
        },
    ];
    let work = desk.work("train")?;
    let base = desk.home.hf_folder()?;
    let labels = labels_of(&desk.home.banking77("train.jsonl")?)?.join(", ");
    let long = format!("{SYSTEM} The labels are: {labels}.");
    let mut report = Report::new("train: speed of training beside PEFT");
    let steps_text = steps.to_string();
    // The same opponent once.
    let mut met: Vec<((bool, bool), Value)> = Vec::new();
    for (i, case) in cases.iter().enumerate() {
        let system = if case.lists_labels { &long } else { SYSTEM };
        let is_full = case.ours.contains(&"full");
        let opponent = (case.lists_labels, is_full);
        let theirs = match met.iter().find(|(which, _)| *which == opponent) {
            Some((_, found)) => found.clone(),
            None => {
                let (peft_steps, more) = (case.theirs.0.to_string(), case.theirs.1);
                let more = [&["--max-steps", &peft_steps], more].concat();
                let found = if is_full {
                    full(desk, system, &more)?
                } else {
                    let mut command = desk.home.python();
                    command.arg(desk.home.script("peft_sft.py")?);
                    peft(desk, command, system, &more)?
                };
                met.push((opponent, found.clone()));
                found
            }
        };
        let mut training = Training::new(&base, &work.join(format!("run-{i}")));
        training.system = system.to_owned();
        let more = [&["--max-steps", &steps_text], case.ours].concat();
        let ours = if is_full {
            training.run_with(desk, &FULL_TRAINING, &more)?
        } else {
            training.run(desk, &more)?
        };
        cost(
            &mut report,
            case.what,
            case.speed,
            case.memory,
            &ours,
            &theirs,
        )?;
        report.detail(&format!("peft, {}", case.what), theirs);
        report.detail(&format!("bantam, {}", case.what), ours);
    }
    Ok(report)
}

/// Runs the loop that trains every weight with transformers alone, on the same rows.
fn full(desk: &Desk, system: &str, more: &[&str]) -> Result<Value> {
    let mut command = desk.own_script("full_sft.py");
    command
        .arg("--base")
        .arg(desk.home.hf_folder()?)
        .arg("--train")
        .arg(desk.home.banking77("train.jsonl")?)
        .args(["--system", system])
        .args(&FULL_TRAINING[..4])
        .args(["--threads", &desk.threads.to_string()])
        .args(more);
    sh::last_json(&sh::capture(&mut command)?)
}

/// Runs the PEFT script in `command`, on the same rows with the same recipe.
fn peft(desk: &Desk, mut command: Command, system: &str, more: &[&str]) -> Result<Value> {
    command
        .arg("--base")
        .arg(desk.home.hf_folder()?)
        .arg("--train")
        .arg(desk.home.banking77("train.jsonl")?)
        .args(["--system", system])
        .args(&TRAINING[..8])
        .args(["--threads", &desk.threads.to_string()])
        .args(more);
    sh::last_json(&sh::capture(&mut command)?)
}

/// Speed (a field, the target, the stretch) and memory of both.
fn cost(
    report: &mut Report,
    what: &str,
    (field, target, stretch): (&str, f64, f64),
    memory: Option<(f64, f64)>,
    ours: &Value,
    theirs: &Value,
) -> Result<()> {
    let title = format!(
        "{what}, {}",
        field.replace("_per_", " a ").replace("tok", "tokens")
    );
    let sides = |field: &str| Ok::<_, anyhow::Error>((num(ours, field)?, num(theirs, field)?));
    report.ratio(&title, sides(field)?, target, stretch);
    let title = format!("{what}, peak memory in MB");
    let sides = sides("peak_rss_mb")?;
    match memory {
        Some((most, stretch)) => report.share(title, sides, most, stretch),
        None => {
            report.tell(format!("{title}, PEFT"), sides.1);
            report.tell(format!("{title}, Bantam"), sides.0);
        }
    }
    Ok(())
}

/// One epoch of Banking77 and its full test.
pub(super) fn banking77(desk: &Desk, with_peft: bool) -> Result<Report> {
    let work = desk.work("banking77")?;
    let (train, test) = (
        desk.home.banking77("train.jsonl")?,
        desk.home.banking77("test.jsonl")?,
    );
    let (out, labels) = (work.join("run"), work.join("labels.txt"));
    fs::write(&labels, labels_of(&train)?.join("\n") + "\n")?;
    let training = Training::new(&desk.home.hf_folder()?, &out);
    let began = Instant::now();
    let trained = training.run(desk, &["--epochs", "1"])?;
    let words = [
        "eval",
        "--model",
        text(&out),
        "--data",
        text(&test),
        "--system",
        SYSTEM,
        "--max-tokens",
        "16",
    ];
    let bound = desk.bantam_json(
        &[
            &words[..],
            &["--metric", "label", "--labels", text(&labels)],
        ]
        .concat(),
    )?;
    let minutes = began.elapsed().as_secs_f64() / 60.0;
    let free = desk.bantam_json(&[&words[..], &["--metric", "exact"]].concat())?;
    let mut report = Report::new("banking77: one epoch, full test");
    let mut accuracy = PEFT_BANKING77;
    if with_peft {
        let mut command = desk.home.python();
        command.arg(desk.home.script("peft_sft.py")?);
        let found = peft(desk, command, SYSTEM, &["--test", text(&test)])?;
        accuracy = num(&found, "exact_match")?;
        report.tell(
            "tokens a second of training, PEFT",
            num(&found, "tok_per_s")?,
        );
        report.detail("peft", found);
    }
    report.tell(
        if with_peft {
            "accuracy, PEFT"
        } else {
            "accuracy, PEFT (recorded)"
        },
        accuracy,
    );
    report.must(
        "accuracy, Bantam, generated freely",
        num(&free, "score")?,
        Bound::Min(accuracy - 0.01),
    );
    report.must(
        "accuracy, Bantam, label-constrained",
        num(&bound, "score")?,
        Bound::Min(accuracy - 0.01),
    );
    report.must(
        "minutes, an epoch and the full test scored",
        minutes,
        Bound::Max(10.0),
    );
    report.tell("training seconds", num(&trained, "train_s")?);
    report.tell("tokens a second of training", num(&trained, "tok_per_s")?);
    report.detail("train", trained);
    report.detail("free", free);
    report.detail("constrained", bound);
    Ok(report)
}

/// The largest relative difference between the means of any `WINDOW` steps in a row, and where it begins.
fn worst_window(own: &[f64], peft: &[f64]) -> (f64, usize) {
    let window = WINDOW.min(own.len()).max(1);
    let relative = |(a, b): (&[f64], &[f64])| {
        let difference = (mean(a) - mean(b)).abs() / mean(b);
        if difference.is_nan() {
            f64::INFINITY
        } else {
            difference
        }
    };
    let each = own.windows(window).zip(peft.windows(window)).map(relative);
    let worst = |best: (f64, usize), (at, value): (usize, f64)| {
        if value <= best.0 { best } else { (value, at) }
    };
    each.enumerate().fold((0.0, 0), worst)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The loss of each step, from the run's event log.
fn losses_of(run: &Path) -> Result<Vec<f64>> {
    let events = json_lines(&run.join("events.jsonl"))?;
    Ok(events
        .iter()
        .filter(|e| e["event"] == "step")
        .filter_map(|e| e["loss"].as_f64())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_window_is_found_and_nan_is_worst() {
        let peft = vec![1.0; 30];
        let mut own = peft.clone();
        assert_eq!(worst_window(&own, &peft).0, 0.0);
        own[25] = 2.0;
        let (worst, at) = worst_window(&own, &peft);
        assert!((worst - 0.1).abs() < 1e-12 && at == 16, "{worst} at {at}");
        own[3] = f64::NAN;
        assert_eq!(worst_window(&own, &peft).0, f64::INFINITY);
    }
}
