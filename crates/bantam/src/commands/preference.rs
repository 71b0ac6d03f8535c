//! `bantam eval --metric preference`: how often a model finds the preferred answer of a pair the likelier one.

use std::time::Instant;

use anyhow::{Context as _, anyhow};
use bantam_kernels::Compute;
use bantam_lab::data::RowOptions;
use bantam_lab::eval::preference::{PreferenceOutcome, Share, judge_pairs, score_pairs};
use bantam_lab::recipe::Lines;
use bantam_lab::train::peak_rss_mb;
use serde::Serialize;

use super::Context;
use crate::cache::write_atomic;
use crate::error::advise;
use crate::interrupt;
use crate::loader::{Loaded, rows};
use crate::printer::{Printer, Table, duration, thousands};
use crate::progress::Progress;
use crate::settings::PreferenceSettings;

/// The `--json` object.
#[derive(Serialize)]
struct Report<'a> {
    metric: &'static str,
    model: &'a str,
    base: &'a str,
    weights: &'static str,
    #[serde(flatten)]
    outcome: PreferenceOutcome,
    wall_s: f64,
    peak_rss_mb: u64,
}

/// Scores every pair and reports.
pub(crate) fn run(context: &Context, settings: &PreferenceSettings) -> anyhow::Result<()> {
    let printer = &context.printer;
    let cancel = interrupt::watch()?;
    let loaded = Loaded::open(context, &settings.model, &cancel)?;
    interrupt::end_at_once(&cancel);
    let path = &settings.data;
    let system = settings.system.or(loaded.system()).map(str::to_owned);
    let mut pairs = rows::load(Lines::Pairs, path, &RowOptions { system })?;
    pairs.truncate(settings.limit.saturating_mul(2));
    let pairs = rows::train_rows(&loaded.base.chat, &pairs, path)?;
    let longest = loaded.max_context()?;
    if let Some(row) = pairs.iter().find(|row| row.tokens.len() > longest) {
        return Err(advise(
            anyhow!(
                "{}:{}: an answer with its prompt has {} tokens, the model reads {longest}",
                path.display(),
                row.line,
                row.tokens.len()
            ),
            "shorten it or leave the pair out",
        ));
    }
    let spinner = Progress::spinner(printer, format!("loading {}", loaded.base.name));
    let compute = Compute::new(settings.threads);
    let model = loaded.base.weights_as(&compute, settings.weights, false)?;
    let lora = loaded.lora(model.config());
    drop(spinner);

    let bar = Progress::steps(
        printer,
        format!("reading {}", path.display()),
        (pairs.len() / 2) as u64,
    );
    let began = Instant::now();
    let mut done = |n: usize| bar.set(n as u64);
    let scores = score_pairs(&model, lora.as_ref(), &pairs, &compute, &mut done);
    let wall_s = began.elapsed().as_secs_f64();
    drop(bar);
    anyhow::ensure!(
        scores
            .iter()
            .all(|s| s.log_probs.iter().all(|x| x.is_finite())),
        "the model's logits are not finite numbers"
    );
    if let Some(path) = &settings.rows_out {
        let mut text = String::new();
        for score in &scores {
            text += &serde_json::to_string(score)?;
            text.push('\n');
        }
        write_atomic(path, text.as_bytes())
            .with_context(|| format!("could not write `{}`", path.display()))?;
    }
    let report = Report {
        metric: "preference",
        model: &settings.model,
        base: &loaded.base.name,
        weights: settings.weights.name(),
        outcome: judge_pairs(&scores),
        wall_s,
        peak_rss_mb: peak_rss_mb(),
    };
    if settings.json {
        return printer.json(&report);
    }
    show(printer, &report, settings)
}

fn show(
    printer: &Printer,
    report: &Report<'_>,
    settings: &PreferenceSettings,
) -> anyhow::Result<()> {
    let percent = |x: f64| format!("{:.1}%", 100.0 * x);
    let with_range = |share: &Share| {
        let [low, high] = share.ci95.map(percent);
        format!("{} (95% interval {low} to {high})", percent(share.accuracy))
    };
    let style = printer.out_style();
    let heading = format!("{} on {}", settings.model, settings.data.display());
    printer.line(style.bold(&heading))?;
    let outcome = &report.outcome;
    let mut table = Table::facts();
    table.row(["pairs", &thousands(outcome.pairs as u64)]);
    table.row(["likelier a token", &with_range(&outcome.likelihood)]);
    if let Some(base) = &outcome.base_likelihood {
        table.row(["the same of the base", &with_range(base)]);
    }
    if let Some(of) = &outcome.difference {
        let points = |x: f64| format!("{:+.1}", 100.0 * x);
        let [low, high] = of.ci95.map(points);
        let text = format!(
            "{} points (95% interval {low} to {high}, p = {:.2e})",
            points(of.accuracy),
            of.p_value
        );
        table.row(["difference", &text]);
    }
    if let Some(reward) = &outcome.reward {
        table.row(["gains more on the base", &with_range(reward)]);
    }
    if let Some(margin) = outcome.mean_margin {
        table.row(["mean lead in gain", &format!("{margin:.2} nats")]);
    }
    table.row(["time", &duration(report.wall_s)]);
    table.row(["peak memory", &format!("{} MiB", report.peak_rss_mb)]);
    printer.line(table.render(style))?;
    if let Some(path) = &settings.rows_out {
        printer.note(format!("every pair is in `{}`", path.display()));
    }
    Ok(())
}
