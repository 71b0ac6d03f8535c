//! Preferences of people: pairs of answers that three annotators judged, learnt by direct preference optimisation.
//!
//! PandaLM's test set has 999 pairs. The majority decides; ties, and pairs without an instruction or one of the answers, are left out. Pairs
//! are split by the hash of their instruction, so that no instruction is learnt and judged.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::report::{Bound, Report};
use super::rows::num;
use super::{Desk, MODEL, text};

/// Of ten parts, those that are judged on.
const TEST_PARTS: u64 = 4;
/// What is not left to the automatic rules.
const FLAGS: [&str; 8] = [
    "--method", "dpo", "--beta", "0.1", "--epochs", "3", "--seed", "0",
];

/// Held-out preference accuracy before and after.
pub(super) fn dpo(desk: &Desk) -> Result<Report> {
    let work = desk.work("dpo")?;
    let (train, test, out) = (
        work.join("train.jsonl"),
        work.join("test.jsonl"),
        work.join("run"),
    );
    let pairs = fs::read_to_string(desk.home.data("pandalm_judge/testset-v1.json")?)?;
    let split = split(&serde_json::from_str(&pairs)?)?;
    write(&train, &split[0])?;
    write(&test, &split[1])?;
    let words = [
        "train",
        "--base",
        MODEL,
        "--train",
        text(&train),
        "--out",
        text(&out),
    ];
    let trained = desk.bantam_json(&[&words[..], &FLAGS].concat())?;
    let eval = |data: &Path| {
        let (model, data) = (text(&out), text(data));
        let words = ["eval", "--metric", "preference", "--model", model];
        desk.bantam_json(&[&words[..], &["--data", data]].concat())
    };
    let (held_out, seen) = (eval(&test)?, eval(&train)?);

    let mut report =
        Report::new("dpo: preferences of people, learnt and judged on other instructions");
    report.tell("pairs learnt from", split[0].len() as f64);
    report.tell("pairs judged", split[1].len() as f64);
    report.tell("seconds of training", num(&trained, "train_s")?);
    report.tell("peak MiB of training", num(&trained, "peak_rss_mb")?);
    for (what, field) in [
        ("base: likelier a token", "base_likelihood"),
        ("trained: likelier a token", "likelihood"),
        ("trained: gains more on the base", "reward"),
        ("trained minus base", "difference"),
    ] {
        let of = &held_out[field];
        report.tell(what, num(of, "accuracy")?);
        let [low, high] = [0, 1].map(|end| of["ci95"][end].as_f64().unwrap_or(f64::NAN));
        report.tell(format!("{what}, from"), low);
        report.tell(format!("{what}, to"), high);
    }
    report.tell(
        "p of the difference",
        num(&held_out["difference"], "p_value")?,
    );
    report.tell("lead in gain, nats", num(&held_out, "mean_margin")?);
    report.tell(
        "on the pairs learnt from: gains more",
        num(&seen["reward"], "accuracy")?,
    );
    let reward = held_out["reward"]["ci95"][0].as_f64().unwrap_or(f64::NAN);
    report.must(
        "gains more on the base: better than chance",
        reward,
        Bound::Min(0.5),
    );
    report.detail("train", trained);
    report.detail("held_out", held_out);
    report.detail("seen", seen);
    Ok(report)
}

/// Pairs to learn from, and pairs to judge on.
fn split(all: &Value) -> Result<[Vec<Value>; 2]> {
    let mut sides = [Vec::new(), Vec::new()];
    for item in all.as_array().context("the pairs are a list")? {
        let Some(preferred) = majority(item) else {
            continue;
        };
        let said = |field: &str| {
            item[field]
                .as_str()
                .map(str::trim)
                .filter(|s| !s.is_empty())
        };
        let (Some(first), Some(second)) = (said("response1"), said("response2")) else {
            continue;
        };
        if first == second {
            continue;
        }
        let (chosen, rejected) = match preferred {
            1 => (first, second),
            _ => (second, first),
        };
        let Some(instruction) = said("instruction") else {
            continue;
        };
        let prompt = match said("input") {
            Some(input) => format!("{instruction}\n\n{input}"),
            None => instruction.to_owned(),
        };
        let turn = |role: &str, text: &str| json!([{"role": role, "content": text}]);
        let is_test = fnv(instruction.as_bytes()) % 10 < TEST_PARTS;
        sides[usize::from(is_test)].push(json!({
            "input": {"messages": turn("user", &prompt)},
            "preferred_output": turn("assistant", chosen),
            "non_preferred_output": turn("assistant", rejected),
        }));
    }
    ensure!(
        sides.iter().all(|side| !side.is_empty()),
        "one side of the split is empty"
    );
    Ok(sides)
}

/// What at least two of three annotators said, unless it is that neither answer is better.
fn majority(item: &Value) -> Option<u64> {
    let mut votes = BTreeMap::new();
    for annotator in ["annotator1", "annotator2", "annotator3"] {
        *votes.entry(item[annotator].as_u64()?).or_insert(0) += 1;
    }
    let (vote, n) = votes.into_iter().max_by_key(|(_, n)| *n)?;
    (n >= 2 && vote > 0).then_some(vote)
}

/// FNV-1a, 64 bits, its upper half folded into the lower: the last bits of FNV alone are those of the text.
fn fnv(bytes: &[u8]) -> u64 {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash ^ (hash >> 32)
}

fn write(path: &Path, rows: &[Value]) -> Result<()> {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    Ok(fs::write(path, lines)?)
}
