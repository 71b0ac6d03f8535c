//! `bantam train`: a base model and rows become a run directory, resumable at any step.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bantam_kernels::{Compute, Isa};
use bantam_lab::data::{Row, RowOptions};
use bantam_lab::events::{DroppedRow, RunEvent};
use bantam_lab::export::AdapterIdentity;
use bantam_lab::recipe::{Lines, MachineSettings, Recipe};
use bantam_lab::train::{
    self, BatchOrder, Estimate, FullTrainer, LoraTrainer, Outcome, PlanInput, PreferenceStats,
    TrainError, TrainPlan, TrainResult, Trainable, Verdict,
};

use bantam_model::Model;

use super::Context;
use crate::error::{Interrupted, advise};
use crate::interrupt;
use crate::jobs::{GRACE, become_worker};
use crate::loader::{Base, rows};
use crate::printer::{self, Printer, Table, duration, thousands};
use crate::progress::Progress;
use crate::settings::{TrainMode, TrainSettings};

/// Trains, or shows what would be trained on.
pub(crate) fn run(context: &Context, settings: &TrainSettings) -> anyhow::Result<()> {
    let cancel = interrupt::watch()?;
    if let Some(memory_mb) = settings.worker {
        become_worker(memory_mb, &cancel)?;
    }
    let base = Base::open(context, &settings.base, &cancel)?;
    match &settings.mode {
        TrainMode::Preview(n) => preview(&context.printer, &base, settings, *n),
        TrainMode::DryRun => dry_run(&context.printer, &base, settings),
        TrainMode::Run(out) => {
            let began = Instant::now();
            let result = loop {
                let done = fit(&context.printer, &base, settings, out, &cancel);
                let is_locked = done.as_ref().is_err_and(|error| {
                    let error = error.downcast_ref::<TrainError>();
                    matches!(error, Some(TrainError::Locked { .. }))
                });
                // The training of a server that was killed saves its state before it lets go of the run.
                let waits = settings.worker.is_some() && began.elapsed() < GRACE;
                if !(is_locked && waits) || cancel.load(Ordering::Relaxed) {
                    break done?;
                }
                std::thread::sleep(Duration::from_millis(200));
            };
            tell(&context.printer, settings, &result, out)
        }
        TrainMode::Replay { out, order } => {
            let plan = plan(&base, settings, out, Some(order))?;
            let result = carry_out(&context.printer, &base, settings, &plan, &cancel)?;
            tell(&context.printer, settings, &result, out)
        }
    }
}

fn tell(
    printer: &Printer,
    settings: &TrainSettings,
    result: &TrainResult,
    out: &Path,
) -> anyhow::Result<()> {
    if settings.json {
        printer.json(result)
    } else {
        show(printer, result, out)
    }
}

/// Prints rows as the model will see them, the loss mask visible.
fn preview(
    printer: &Printer,
    base: &Base,
    settings: &TrainSettings,
    n: usize,
) -> anyhow::Result<()> {
    let rows = load(&settings.recipe, &settings.train)?;
    let style = printer.out_style();
    let per_line = per_line(&settings.recipe);
    for (row, verdict) in rows.iter().take(n * per_line) {
        let example = rows::example(&base.chat, row, &settings.train)?;
        let trained = example.trained.iter().filter(|t| **t).count();
        let what = match verdict {
            Verdict::Taught | Verdict::Mismatched => "",
            Verdict::Chosen => ", chosen",
            Verdict::Rejected => ", rejected",
        };
        let heading = format!(
            "line {}{what}: {} tokens, {trained} of them trained",
            row.line,
            example.tokens.len()
        );
        printer.line(style.bold(&heading))?;
        printer.line(base.chat.preview(&example))?;
        printer.line("")?;
    }
    if settings.json {
        let rows = rows.len() / per_line;
        printer.json(&serde_json::json!({"rows": rows, "shown": n.min(rows)}))?;
    }
    Ok(())
}

/// Carries out a training, from the rows to the result.
pub(crate) fn fit(
    printer: &Printer,
    base: &Base,
    settings: &TrainSettings,
    out: &Path,
    cancel: &AtomicBool,
) -> anyhow::Result<TrainResult> {
    let plan = plan(base, settings, out, None)?;
    carry_out(printer, base, settings, &plan, cancel)
}

/// Says what a run would take.
fn dry_run(printer: &Printer, base: &Base, settings: &TrainSettings) -> anyhow::Result<()> {
    let plan = plan(base, settings, Path::new(""), None)?;
    for choice in &plan.chosen {
        printer.note(format!("chosen: {choice}"));
    }
    let mut model = load_weights(printer, base)?;
    let mut trainer = trainer(&mut model, base, settings, &plan)?;
    let began = Instant::now();
    let estimate = train::estimate(&plan, trainer.as_mut(), &|| began.elapsed())?;
    if settings.json {
        return printer.json(&estimate);
    }
    Ok(printer.line(words(&estimate))?)
}

/// An estimate in a sentence.
fn words(estimate: &Estimate) -> String {
    let Estimate {
        steps,
        rows,
        tokens,
        computed_tokens,
        tok_per_s,
        train_s,
        valid_s,
        peak_rss_mb,
        ..
    } = estimate;
    let validating = if *valid_s > 0.0 {
        format!(" and {} of validation", duration(*valid_s))
    } else {
        String::new()
    };
    format!(
        "{} steps over {} rows of {} tokens ({} of them computed): about {} of training{validating}, at {tok_per_s:.0} tok/s; \
         peak memory about {} MiB",
        thousands(*steps as u64),
        thousands(*rows),
        thousands(*tokens),
        thousands(*computed_tokens),
        duration(*train_s),
        thousands(*peak_rss_mb),
    )
}

fn load_weights(printer: &Printer, base: &Base) -> anyhow::Result<Model<f32>> {
    let _spinner = Progress::spinner(printer, format!("loading {}", base.name));
    base.weights(true)
}

/// What the recipe trains, on `model`.
fn trainer<'a>(
    model: &'a mut Model<f32>,
    base: &'a Base,
    settings: &TrainSettings,
    plan: &TrainPlan,
) -> anyhow::Result<Box<dyn Trainable + 'a>> {
    let identity = AdapterIdentity {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        base: base.reference.clone(),
        base_sha256: base.sha256()?.to_owned(),
        system: settings.recipe.data.system.clone().unwrap_or_default(),
        chat_template: Some(base.chat.template().source().to_owned()),
    };
    let (compute, recompute) = (Compute::new(settings.threads), plan.recompute);
    Ok(match &plan.settings.lora {
        Some(lora) => Box::new(LoraTrainer::new(model, lora, compute, identity, recompute)),
        None => {
            let files = &base.files;
            Box::new(FullTrainer::new(files, model, compute, identity, recompute))
        }
    })
}

fn carry_out(
    printer: &Printer,
    base: &Base,
    settings: &TrainSettings,
    plan: &TrainPlan,
    cancel: &AtomicBool,
) -> anyhow::Result<TrainResult> {
    for choice in &plan.chosen {
        printer.note(format!("chosen: {choice}"));
    }
    let mut model = load_weights(printer, base)?;
    let mut trainer = trainer(&mut model, base, settings, plan)?;
    let mut teller = Teller { printer, bar: None };
    let began = Instant::now();
    if !plan.out.join("settings.json").exists() {
        let estimate = train::estimate(plan, trainer.as_mut(), &|| began.elapsed())?;
        printer.note(words(&estimate));
    }
    let outcome = train::train(
        plan,
        trainer.as_mut(),
        &|| began.elapsed(),
        &mut |event| teller.tell(event),
        cancel,
    )?;
    teller.bar = None;
    match outcome {
        Outcome::Finished(result) => Ok(result),
        Outcome::AlreadyFinished(result) => {
            printer.note(format!(
                "`{}` is finished already; nothing was trained",
                plan.out.display()
            ));
            Ok(result)
        }
        Outcome::Interrupted { step } => Err(advise(
            anyhow::Error::new(Interrupted).context(format!(
                "stopped after step {step} of {}; a checkpoint is in `{}`",
                plan.settings.optim.steps,
                plan.out.display()
            )),
            "run the same command again to go on from there",
        )),
    }
}

/// Tokenised rows and resolved settings.
fn plan(
    base: &Base,
    settings: &TrainSettings,
    out: &Path,
    order: Option<&Path>,
) -> anyhow::Result<TrainPlan> {
    let recipe = &settings.recipe;
    let train = rows::train_rows(&base.chat, &load(recipe, &settings.train)?, &settings.train)?;
    let valid = match &recipe.data.valid {
        Some(path) => rows::train_rows(&base.chat, &load(recipe, path)?, path)?,
        None => Vec::new(),
    };
    let order = match order {
        Some(path) => BatchOrder::read(path, train.len() / per_line(recipe))?,
        None => BatchOrder::Seeded,
    };
    Ok(TrainPlan::new(PlanInput {
        recipe: recipe.clone(),
        train,
        valid,
        base_name: base.name.clone(),
        base_sha256: base.sha256()?.to_owned(),
        max_context: base.max_context()?,
        model: Some(base.config()?),
        order,
        init: recipe
            .lora
            .init
            .as_deref()
            .map(|path| base.adapter(path))
            .transpose()?,
        machine: MachineSettings {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            isa: Isa::detect().name().to_owned(),
        },
        allow_other_machine: settings.allow_other_machine,
        out: out.to_path_buf(),
    })?)
}

fn load(recipe: &Recipe, path: &Path) -> anyhow::Result<Vec<(Row, Verdict)>> {
    let options = RowOptions {
        system: recipe.data.system.clone(),
    };
    rows::load(lines(recipe), path, &options)
}

/// Rows that a line becomes.
fn per_line(recipe: &Recipe) -> usize {
    match lines(recipe) {
        Lines::Pairs => 2,
        Lines::Rows | Lines::Judged => 1,
    }
}

/// What the recipe's method learns from.
fn lines(recipe: &Recipe) -> Lines {
    recipe.method.unwrap_or_default().lines()
}

/// Turns a run's events into a bar and notes.
pub(crate) struct Teller<'a> {
    /// Where they go.
    pub(crate) printer: &'a Printer,
    /// The bar, from the first event to the last.
    pub(crate) bar: Option<Progress>,
}

impl Teller<'_> {
    /// Shows an event.
    pub(crate) fn tell(&mut self, event: &RunEvent) {
        match event {
            RunEvent::RunStarted {
                rows,
                tokens,
                trained_tokens,
                valid_rows,
                params,
                total,
            } => {
                self.printer.note(format!(
                    "training {} parameters on {} rows ({} tokens, {} of them answers) for {} steps{}",
                    printer::parameters(*params as u64),
                    thousands(*rows as u64),
                    thousands(*tokens),
                    thousands(*trained_tokens),
                    thousands(*total as u64),
                    if *valid_rows > 0 { format!(", validating on {valid_rows}") } else { String::new() },
                ));
                self.bar = Some(Progress::steps(self.printer, "training", *total as u64));
            }
            RunEvent::Resumed { step, total } => {
                self.printer
                    .note(format!("going on after step {step} of {total}"));
                let bar = Progress::steps(self.printer, "training", *total as u64);
                bar.resume_at(*step as u64);
                self.bar = Some(bar);
            }
            RunEvent::Step {
                step,
                loss,
                tok_per_s,
                preference,
                ..
            } => {
                if let Some(bar) = &self.bar {
                    bar.set(*step as u64);
                    let margin = preference.and_then(|of| of.rewards_margin);
                    let margin = margin.map_or(String::new(), |m| format!("  margin {m:.3}"));
                    bar.detail(format!("loss {loss:.4}{margin}  {tok_per_s:.0} tok/s"));
                }
            }
            RunEvent::Valid {
                step,
                loss,
                best,
                preference,
            } => {
                let mark = if *best { " (best so far)" } else { "" };
                let told_apart = preference.map_or(String::new(), |of| {
                    format!(", {} of {} told apart", accuracy(&of), of.examples)
                });
                self.printer.note(format!(
                    "step {step}: validation loss {loss:.4}{told_apart}{mark}"
                ));
            }
            RunEvent::EarlyStop {
                step,
                best_step,
                best_loss,
            } => {
                self.printer.note(format!(
                    "stopped early at step {step}: the best validation loss, {best_loss:.4}, was at step {best_step}"
                ));
            }
            RunEvent::StepSkipped { step, .. } => {
                if let Some(bar) = &self.bar {
                    bar.set(*step as u64);
                }
            }
            RunEvent::RowsDropped {
                step,
                rows,
                for_good,
            } => {
                let when = if *for_good {
                    "from now on"
                } else {
                    "this once"
                };
                for DroppedRow { place, reason } in rows {
                    self.printer
                        .warn(format!("{place}: left out {when} (step {step}): {reason}"));
                }
            }
            RunEvent::RolledBack {
                step,
                to,
                reason,
                rows,
            } => {
                self.printer.warn(format!(
                    "step {step} is taken back, {reason}; its rows were {}; going on after step {to}",
                    rows.join(", ")
                ));
                if let Some(bar) = &self.bar {
                    bar.set(*to as u64);
                }
            }
            RunEvent::Warning { message } => self.printer.warn(message),
            RunEvent::Checkpoint { step } => tracing::debug!(step, "checkpoint"),
            RunEvent::Finished { .. } => self.bar = None,
        }
    }
}

/// How well answers are told apart, with the interval where there is one.
fn accuracy(preference: &PreferenceStats) -> String {
    let percent = |x: f64| format!("{:.1}%", 100.0 * x);
    let share = percent(preference.accuracy);
    match preference.accuracy_ci95 {
        None => share,
        Some([low, high]) => format!(
            "{share} (95% interval {} to {})",
            percent(low),
            percent(high)
        ),
    }
}

fn show(printer: &Printer, result: &TrainResult, out: &Path) -> anyhow::Result<()> {
    let style = printer.out_style();
    printer.line(style.bold(&format!("trained `{}`", out.display())))?;
    let mut table = Table::facts();
    let speed = format!(
        "{:.0} tok/s, {:.1} rows/s",
        result.tok_per_s, result.rows_per_s
    );
    table.row([
        "seen",
        &format!(
            "{} rows, {} tokens",
            thousands(result.rows),
            thousands(result.tokens)
        ),
    ]);
    table.row(["time", &format!("{} ({speed})", duration(result.train_s))]);
    table.row(["last loss", &format!("{:.4}", result.last_loss)]);
    if let Some(loss) = result.valid_loss {
        table.row(["validation loss", &format!("{loss:.4}")]);
    }
    if let Some(preference) = &result.valid_preference {
        table.row(["preference accuracy", &accuracy(preference)]);
    }
    table.row(["peak memory", &format!("{} MiB", result.peak_rss_mb)]);
    let what = result.adapter.file_name().unwrap_or_default();
    table.row([
        &what.to_string_lossy(),
        &result.adapter.display().to_string() as &str,
    ]);
    table.row(["sha256", &result.sha256]);
    printer.line(table.render(style))?;
    let run = out.display();
    printer.note(format!(
        "next: `bantam eval --model {run} --data FILE`, `bantam serve --model {run}`"
    ));
    Ok(())
}
