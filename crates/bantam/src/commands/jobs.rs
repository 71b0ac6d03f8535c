//! `bantam jobs`: the fine-tuning jobs of a running server, over its API.

use std::time::Duration;

use anyhow::anyhow;
use serde_json::{Value, json};

use super::Context;
use crate::args::{JobArgs, JobsArgs, JobsCommand, JobsCreateArgs, JobsListArgs};
use crate::client::{Api, text};
use crate::error::advise;
use crate::printer::{Align, Table, thousands};
use crate::progress::Progress;

/// How often a job that is followed is looked at.
const PAUSE: Duration = Duration::from_millis(500);

/// Runs one of them.
pub(crate) fn run(context: &Context, args: JobsArgs) -> anyhow::Result<()> {
    let server = Api::new(&args.server.url, args.server.api_key)?;
    match args.command {
        JobsCommand::List(list_args) => list(context, &server, &list_args),
        JobsCommand::Create(create_args) => create(context, &server, &create_args),
        JobsCommand::Show(job) => {
            let found = server.get(&format!("/fine_tuning/jobs/{}", job.id))?;
            show(context, &job, &found)
        }
        JobsCommand::Follow(job) => follow(context, &server, &job),
        JobsCommand::Cancel(job) => change(context, &server, &job, "cancel"),
        JobsCommand::Pause(job) => change(context, &server, &job, "pause"),
        JobsCommand::Resume(job) => change(context, &server, &job, "resume"),
    }
}

fn list(context: &Context, server: &Api, args: &JobsListArgs) -> anyhow::Result<()> {
    let page = server.get(&format!("/fine_tuning/jobs?limit={}", args.limit))?;
    let jobs = page["data"].as_array().cloned().unwrap_or_default();
    if args.json.json {
        let more = page["has_more"] == true;
        return context
            .printer
            .json(&json!({"jobs": jobs, "has_more": more}));
    }
    let mut table = Table::new([
        ("id", Align::Left),
        ("status", Align::Left),
        ("base", Align::Left),
        ("model", Align::Left),
        ("tokens", Align::Right),
    ]);
    for job in &jobs {
        table.row([
            text(&job["id"]),
            text(&job["status"]),
            text(&job["model"]),
            text(&job["fine_tuned_model"]),
            job["trained_tokens"]
                .as_u64()
                .map_or_else(String::new, thousands),
        ]);
    }
    let rendered = table.render(context.printer.out_style());
    context.printer.line(rendered.trim_end())?;
    if page["has_more"] == true {
        context.printer.note("there are more; --limit shows them");
    }
    Ok(())
}

fn create(context: &Context, server: &Api, args: &JobsCreateArgs) -> anyhow::Result<()> {
    let mut body =
        json!({"model": args.model, "training_file": server.upload_file("fine-tune", &args.rows)?});
    if let Some(valid) = &args.valid {
        body["validation_file"] = json!(server.upload_file("fine-tune", valid)?);
    }
    if let Some(suffix) = &args.suffix {
        body["suffix"] = json!(suffix);
    }
    if let Some(seed) = args.seed {
        body["seed"] = json!(seed);
    }
    let mut hyperparameters = json!({});
    if let Some(epochs) = args.epochs {
        hyperparameters["n_epochs"] = json!(epochs);
    }
    if let Some(rows) = args.batch_rows {
        hyperparameters["batch_size"] = json!(rows);
    }
    body["hyperparameters"] = hyperparameters;
    let job = server.post_json("/fine_tuning/jobs", &body)?;
    let id = text(&job["id"]);
    if args.json.json {
        return context.printer.json(&job);
    }
    context
        .printer
        .note(format!("`bantam jobs follow {id}` shows how it goes"));
    context.printer.line(id)?;
    Ok(())
}

fn show(context: &Context, args: &JobArgs, job: &Value) -> anyhow::Result<()> {
    if args.json.json {
        return context.printer.json(job);
    }
    let mut table = Table::facts();
    for name in [
        "id",
        "status",
        "model",
        "fine_tuned_model",
        "training_file",
        "validation_file",
        "seed",
        "hyperparameters",
        "trained_tokens",
        "error",
    ] {
        let value = match &job[name] {
            Value::Null => continue,
            Value::String(value) => value.clone(),
            value => value.to_string(),
        };
        table.row([name.replace('_', " "), value]);
    }
    let rendered = table.render(context.printer.out_style());
    context.printer.line(rendered.trim_end())?;
    Ok(())
}

fn change(context: &Context, server: &Api, args: &JobArgs, what: &str) -> anyhow::Result<()> {
    let job = server.post_json(&format!("/fine_tuning/jobs/{}/{what}", args.id), &json!({}))?;
    if args.json.json {
        return context.printer.json(&job);
    }
    let status = text(&job["status"]);
    context.printer.note(format!("`{}` is {status}", args.id));
    Ok(())
}

/// Tells what happens in a job until it is over.
fn follow(context: &Context, server: &Api, args: &JobArgs) -> anyhow::Result<()> {
    let path = format!("/fine_tuning/jobs/{}", args.id);
    let mut told: Option<String> = None;
    let mut bar: Option<Progress> = None;
    loop {
        // The job first: what it says is over has no events that are told after.
        let job = server.get(&path)?;
        loop {
            let after = told
                .as_ref()
                .map_or_else(String::new, |id| format!("&after={id}"));
            let page = server.get(&format!("{path}/events?order=asc&limit=1000{after}"))?;
            let events = page["data"].as_array().cloned().unwrap_or_default();
            for event in &events {
                told = Some(text(&event["id"]));
                tell(context, args, event, &mut bar)?;
            }
            if page["has_more"] != true {
                break;
            }
        }
        match job["status"].as_str().unwrap_or_default() {
            "succeeded" => {
                drop(bar);
                return show(context, args, &job);
            }
            "paused" => {
                drop(bar);
                return Err(advise(
                    anyhow!("`{}` is paused", args.id),
                    format!("`bantam jobs resume {}` lets it go on", args.id),
                ));
            }
            status @ ("failed" | "cancelled") => {
                drop(bar);
                if args.json.json {
                    context.printer.json(&job)?;
                }
                let why = job["error"]["message"].as_str().unwrap_or(status);
                return Err(anyhow!("the job did not succeed: {why}"));
            }
            _ => std::thread::sleep(PAUSE),
        }
    }
}

fn tell(
    context: &Context,
    args: &JobArgs,
    event: &Value,
    bar: &mut Option<Progress>,
) -> anyhow::Result<()> {
    let data = &event["data"];
    let (Some(step), Some(total)) = (data["step"].as_u64(), data["total_steps"].as_u64()) else {
        let message = text(&event["message"]);
        match event["level"].as_str() {
            Some("warn" | "error") => context.printer.warn(message),
            _ => context.printer.note(message),
        }
        return Ok(());
    };
    let bar = bar.get_or_insert_with(|| Progress::steps(&context.printer, "training", total));
    bar.set(step);
    if let Some(loss) = data["train_loss"].as_f64() {
        bar.detail(format!("loss {loss:.4}"));
    }
    let is_told = data["valid_loss"].is_number() || step == total;
    // A terminal has the bar; a log gets a line now and then.
    if !args.json.json && !context.printer.shows_progress() && is_told {
        context.printer.note(text(&event["message"]));
    }
    Ok(())
}
