//! The comparisons themselves: run both sides, set the values against their bounds.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::report::{Bound, Report};
use super::{Desk, text};
use crate::sh;

/// The system prompt of Banking77, the same as the PEFT script's.
const SYSTEM: &str = "Classify the banking customer query into one intent label.";
/// Rank, alpha, peak rate, batch: the PEFT script's.
const TRAINING: [&str; 10] = [
    "--rank", "16", "--alpha", "32", "--lr", "1e-3", "--batch", "16", "--seed", "0",
];
/// The PEFT script's schedule and optimizer, which the flags above do not tell.
const RECIPE: &str = "[optim]\nbetas = [0.9, 0.999]\neps = 1e-8\nweight_decay = 0.0\nclip_norm = 1.0\nwarmup_steps = 30\nschedule = \"cosine\"\n";
/// Accuracy of the PEFT script on Banking77's full test, one epoch, generated freely, as recorded.
const PEFT_BANKING77: f64 = 0.874;
/// Steps over which losses are averaged before they are compared: the two adapters start from different random values.
const WINDOW: usize = 10;

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
    let adapter = adapter_of(desk, run, &work)?;
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
    let adapter = adapter_of(desk, run, &work)?;
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
    let mut command = sh::command(desk.example("merge")?);
    sh::run(
        command
            .arg("--base")
            .arg(desk.home.gguf())
            .arg("--adapter")
            .arg(&adapter)
            .arg("--out")
            .arg(&merged),
    )?;

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

/// The same batches through PEFT and through Bantam: losses (if `judge_losses`), tokens a second, peak memory.
pub(super) fn loss(desk: &Desk, steps: usize, judge_losses: bool) -> Result<Report> {
    let work = desk.work(if judge_losses { "loss" } else { "bench" })?;
    let (base, train) = (desk.home.hf_folder()?, desk.home.banking77("train.jsonl")?);
    let (order, losses) = (work.join("order.json"), work.join("losses.json"));
    let (steps_text, threads) = (steps.to_string(), desk.threads.to_string());
    let mut command = desk.own_script("peft_trace.py");
    command
        .arg(desk.home.script("peft_sft.py")?)
        .arg(&order)
        .arg(&losses);
    command
        .arg("--base")
        .arg(&base)
        .arg("--train")
        .arg(&train)
        .args(["--system", SYSTEM]);
    command
        .args(&TRAINING[..8])
        .args(["--max-steps", &steps_text, "--threads", &threads]);
    let theirs = sh::last_json(&sh::capture(&mut command)?)?;

    let (recipe, out) = (work.join("recipe.toml"), work.join("run"));
    fs::write(&recipe, RECIPE)?;
    let words = [
        "train",
        "--base",
        text(&base),
        "--train",
        text(&train),
        "--recipe",
        text(&recipe),
        "--out",
        text(&out),
    ];
    let more = [
        "--system",
        SYSTEM,
        "--order",
        text(&order),
        "--max-steps",
        &steps_text,
    ];
    let ours = desk.bantam_json(&[&words[..], &more, &TRAINING].concat())?;

    let mut report = Report::new(if judge_losses {
        "loss: training beside PEFT"
    } else {
        "bench: training beside PEFT"
    });
    report.tell("steps", steps as f64);
    if judge_losses {
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
            Bound::Max(0.05),
        );
        report.tell("  in the steps from", at as f64);
        report.tell("mean loss, PEFT", mean(&peft));
        report.tell("mean loss, Bantam", mean(&own));
        report.detail("losses_peft", peft.into());
        report.detail("losses_bantam", own.into());
    }
    let (own_rate, peft_rate) = (num(&ours, "tok_per_s")?, num(&theirs, "tok_per_s")?);
    let (own_peak, peft_peak) = (num(&ours, "peak_rss_mb")?, num(&theirs, "peak_rss_mb")?);
    report.tell("tokens a second, PEFT", peft_rate);
    report.tell("tokens a second, Bantam", own_rate);
    report.must(
        "tokens a second, ratio",
        own_rate / peft_rate,
        Bound::Min(1.5),
    );
    report.tell("peak memory in MB, PEFT", peft_peak);
    report.tell("peak memory in MB, Bantam", own_peak);
    report.must(
        "peak memory, ratio",
        own_peak / peft_peak,
        Bound::Max(1.0 / 3.0),
    );
    report.detail("peft", theirs);
    report.detail("bantam", ours);
    Ok(report)
}

/// One epoch of Banking77 and its full test.
pub(super) fn banking77(desk: &Desk, with_peft: bool) -> Result<Report> {
    let work = desk.work("banking77")?;
    let (base, train, test) = (
        desk.home.hf_folder()?,
        desk.home.banking77("train.jsonl")?,
        desk.home.banking77("test.jsonl")?,
    );
    let (recipe, out, labels) = (
        work.join("recipe.toml"),
        work.join("run"),
        work.join("labels.txt"),
    );
    fs::write(&recipe, RECIPE)?;
    fs::write(&labels, labels_of(&train)?.join("\n") + "\n")?;
    let words = [
        "train",
        "--base",
        text(&base),
        "--train",
        text(&train),
        "--recipe",
        text(&recipe),
        "--out",
        text(&out),
    ];
    let trained = desk.bantam_json(
        &[
            &words[..],
            &["--system", SYSTEM, "--epochs", "1"],
            &TRAINING,
        ]
        .concat(),
    )?;
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
    let free = desk.bantam_json(&[&words[..], &["--metric", "exact"]].concat())?;
    let bound = desk.bantam_json(
        &[
            &words[..],
            &["--metric", "label", "--labels", text(&labels)],
        ]
        .concat(),
    )?;
    let mut report = Report::new("banking77: one epoch, full test");
    let mut peft = PEFT_BANKING77;
    if with_peft {
        let mut command = desk.home.python();
        command
            .arg(desk.home.script("peft_sft.py")?)
            .arg("--base")
            .arg(&base)
            .arg("--train")
            .arg(&train)
            .arg("--test")
            .arg(&test);
        command
            .args(["--system", SYSTEM, "--threads", &desk.threads.to_string()])
            .args(&TRAINING[..8]);
        let found = sh::last_json(&sh::capture(&mut command)?)?;
        peft = num(&found, "exact_match")?;
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
        peft,
    );
    report.must(
        "accuracy, Bantam, generated freely",
        num(&free, "score")?,
        Bound::Min(peft - 0.01),
    );
    report.must(
        "accuracy, Bantam, label-constrained",
        num(&bound, "score")?,
        Bound::Min(peft - 0.01),
    );
    report.tell("training seconds", num(&trained, "train_s")?);
    report.tell("tokens a second of training", num(&trained, "tok_per_s")?);
    report.detail("train", trained);
    report.detail("free", free);
    report.detail("constrained", bound);
    Ok(report)
}

/// The adapter of `run`, or of a short training on Banking77.
fn adapter_of(desk: &Desk, run: Option<&Path>, work: &Path) -> Result<PathBuf> {
    let run = match run {
        Some(run) => run.to_path_buf(),
        None => {
            let (gguf, train, out) = (
                desk.home.gguf(),
                desk.home.banking77("train.jsonl")?,
                work.join("run"),
            );
            let words = [
                "train",
                "--base",
                text(&gguf),
                "--train",
                text(&train),
                "--out",
                text(&out),
                "--system",
                SYSTEM,
            ];
            desk.bantam_json(&[&words[..], &["--max-steps", "60"], &TRAINING].concat())?;
            out
        }
    };
    for folder in [run.join("adapter"), run.clone()] {
        if folder.join("adapter_config.json").is_file() {
            return Ok(folder);
        }
    }
    anyhow::bail!("{} holds no adapter", run.display())
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

/// Every label of rows of `text`/`label`, once, sorted.
fn labels_of(rows: &Path) -> Result<Vec<String>> {
    let rows = json_lines(rows)?;
    let labels: std::collections::BTreeSet<String> = rows
        .iter()
        .filter_map(|row| row["label"].as_str())
        .map(str::to_owned)
        .collect();
    Ok(labels.into_iter().collect())
}

/// `n` rows spread over the whole file, which may be sorted by label.
fn spread_rows(from: &Path, n: usize, to: &Path) -> Result<PathBuf> {
    let all = fs::read_to_string(from)?;
    let lines: Vec<&str> = all.lines().collect();
    let some: Vec<&str> = lines
        .iter()
        .copied()
        .step_by((lines.len() / n).max(1))
        .take(n)
        .collect();
    fs::write(to, some.join("\n") + "\n")?;
    Ok(to.to_path_buf())
}

fn json_lines(path: &Path) -> Result<Vec<Value>> {
    let all = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    all.lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect()
}

fn num(value: &Value, field: &str) -> Result<f64> {
    value[field]
        .as_f64()
        .with_context(|| format!("no number `{field}` in {value}"))
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
