//! What happened in a job, read from its notes and from the run's own log.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, Request, State};
use bantam_store::Object;
use serde_json::{Value, json};

use super::KIND;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::query::{self, Id};
use crate::server::App;
use crate::training::{Chosen, TrainingEvent};

/// A job's log and the ends of its epochs, as the trainer tells them.
pub(super) struct Told {
    pub(super) events: Vec<TrainingEvent>,
    chosen: Option<Chosen>,
    pub(super) epochs: Vec<(usize, std::path::PathBuf)>,
}

/// Asks the trainer, where that delays no connection.
pub(super) async fn told(app: &App, id: &str) -> Result<Told, ApiError> {
    let Some(config) = app.config.training.clone() else {
        return Ok(Told {
            events: Vec::new(),
            chosen: None,
            epochs: Vec::new(),
        });
    };
    let run = config.folder.join(id).join("run");
    let asked = tokio::task::spawn_blocking(move || Told {
        events: config.trainer.events(&run),
        chosen: config.trainer.chosen(&run),
        epochs: config.trainer.epochs(&run),
    });
    asked
        .await
        .map_err(|_| ApiError::internal("the job's log could not be read"))
}

impl Told {
    /// Updates so far, updates in all, and the seconds they took.
    pub(super) fn progress(&self) -> Option<(usize, usize, f64)> {
        self.events.iter().rev().find_map(|event| match event {
            TrainingEvent::Step {
                step,
                total,
                elapsed_s,
                ..
            } => Some((*step, *total, *elapsed_s)),
            _ => None,
        })
    }

    /// Tokens of the rows that were learnt from, counted as often as they were seen.
    pub(super) fn tokens(&self) -> u64 {
        self.events
            .iter()
            .map(|event| match event {
                TrainingEvent::Step { tokens, .. } => *tokens,
                _ => 0,
            })
            .sum()
    }

    /// The loss on the validation rows after an update, if they were scored then.
    fn valid_loss(&self, at: usize) -> Option<f64> {
        self.events.iter().find_map(|event| match event {
            TrainingEvent::Valid { step, loss } if *step == at => Some(*loss),
            _ => None,
        })
    }

    /// The result file: a line for each update.
    pub(super) fn csv(&self) -> String {
        let mut out =
            "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n".to_string();
        for event in &self.events {
            if let TrainingEvent::Step { step, loss, .. } = event {
                let valid = self
                    .valid_loss(*step)
                    .map_or(String::new(), |l| l.to_string());
                out.push_str(&format!("{step},{loss},,{valid},\n"));
            }
        }
        out
    }

    /// The metrics of an update; what is not measured is not there.
    fn metrics(&self, at: usize) -> Value {
        let mut metrics = json!({"step": at});
        for event in &self.events {
            if let TrainingEvent::Step { step, loss, .. } = event
                && *step == at
            {
                metrics["train_loss"] = json!(loss);
            }
        }
        if let Some(loss) = self.valid_loss(at) {
            metrics["valid_loss"] = json!(loss);
            metrics["full_valid_loss"] = json!(loss);
        }
        metrics
    }
}

/// The job as it is now.
pub(super) async fn live(app: &App, job: Object) -> Result<Value, ApiError> {
    let mut body = job.body;
    if !matches!(job.label.as_str(), "running" | "paused") {
        return Ok(body);
    }
    let told = told(app, &job.id).await?;
    choose(&mut body, &told);
    if let (Some((step, total, seconds)), "running") = (told.progress(), job.label.as_str()) {
        let left = seconds / step.max(1) as f64 * total.saturating_sub(step) as f64;
        body["estimated_finish"] = json!(ids::now() + left.ceil() as u64);
    }
    Ok(body)
}

/// Shows what was chosen where the hyper-parameters are `auto`.
pub(super) fn choose(body: &mut Value, told: &Told) {
    let Some(chosen) = told.chosen else { return };
    for (name, value) in [
        ("n_epochs", chosen.epochs),
        ("batch_size", chosen.batch_rows),
    ] {
        body["hyperparameters"][name] = json!(value);
    }
    if body["hyperparameters"]["learning_rate_multiplier"] == "auto" {
        body["hyperparameters"]["learning_rate_multiplier"] = json!(1.0);
    }
    let kind = match body["method"]["type"].as_str() {
        Some("dpo") => "dpo",
        _ => "supervised",
    };
    let mut hyper = body["hyperparameters"].clone();
    let beta = &body["method"][kind]["hyperparameters"]["beta"];
    match (beta, chosen.beta) {
        (Value::Null, _) => {}
        (Value::String(_), Some(beta)) => hyper["beta"] = json!(beta),
        (given, _) => hyper["beta"] = given.clone(),
    }
    body["method"][kind]["hyperparameters"] = hyper;
}

/// `GET /v1/fine_tuning/jobs/{id}/events`
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Id(id): Id,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let query = query::list(raw.as_deref(), None, false, false)?;
    let job = KIND.find(&app, &owner, &id).await?;
    let told = told(&app, &id).await?;
    query::slice(all(&job, &told), &query).map(Json)
}

/// Every event of a job, oldest first. An event's name says what it is about, so it keeps it when a training goes
/// on from a checkpoint and makes an update again.
fn all(job: &Object, told: &Told) -> Vec<Value> {
    let notes = job.extra["notes"].as_array().cloned().unwrap_or_default();
    let event = |name: String, at: u64, level: &str, message: String| {
        json!({
            "id": format!("ftevent-{}-{name}", job.id.trim_start_matches("ftjob-")),
            "object": "fine_tuning.job.event", "created_at": at, "level": level,
            "message": message, "type": "message", "data": null,
        })
    };
    let began = job.extra["began"].as_u64();
    let ended = job.body["finished_at"].as_u64();
    // What was noted before the training comes first, what was noted at its end last, the rest by its time.
    let noted: Vec<((u64, u8), Value)> = notes
        .iter()
        .enumerate()
        .map(|(i, note)| {
            let at = note["at"].as_u64().unwrap_or_default();
            let level = note["level"].as_str().unwrap_or("info");
            let message = note["message"].as_str().unwrap_or_default().to_string();
            let key = match note["part"].as_u64() {
                Some(0) => (0, 0),
                Some(1) => (at, 2),
                _ => (u64::MAX, 3),
            };
            (key, event(format!("note-{i}"), at, level, message))
        })
        .collect();
    let steps = told.events.iter().enumerate().map(|(i, one)| {
        let since = |seconds: f64| began.unwrap_or(job.created) + seconds as u64;
        match one {
            TrainingEvent::Step {
                step,
                total,
                loss,
                elapsed_s,
                ..
            } => {
                let at = since(*elapsed_s).min(ended.unwrap_or(u64::MAX));
                let message = format!("step {step}/{total}: training loss={loss:.4}");
                let mut event = event(format!("step-{step}"), at, "info", message);
                event["type"] = json!("metrics");
                event["data"] = told.metrics(*step);
                event["data"]["total_steps"] = json!(total);
                (at, event)
            }
            TrainingEvent::Valid { step, loss } => {
                let message = format!("step {step}: validation loss={loss:.4}");
                (0, event(format!("valid-{step}"), 0, "info", message))
            }
            TrainingEvent::Warning { message, .. } => {
                (0, event(format!("warning-{i}"), 0, "warn", message.clone()))
            }
        }
    });
    // A log line without a time of its own has that of the one before it.
    let mut last = began.unwrap_or(job.created);
    let steps: Vec<(u64, Value)> = steps
        .map(|(at, mut event)| {
            last = last.max(at);
            event["created_at"] = json!(last);
            (last, event)
        })
        .collect();
    let mut all: Vec<((u64, u8), Value)> = noted
        .into_iter()
        .chain(steps.into_iter().map(|(at, event)| ((at, 1), event)))
        .collect();
    all.sort_by_key(|(key, _)| *key);
    all.into_iter().map(|(_, event)| event).collect()
}

/// `GET /v1/fine_tuning/jobs/{id}/checkpoints`: the ends of epochs, each a model of its own.
pub(crate) async fn checkpoints(
    State(app): State<Arc<App>>,
    Id(id): Id,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let query = query::list(raw.as_deref(), None, false, false)?;
    let job = KIND.find(&app, &owner, &id).await?;
    let told = told(&app, &id).await?;
    let all = told
        .epochs
        .iter()
        .map(|(step, folder)| {
            let made = std::fs::metadata(folder)
                .and_then(|meta| meta.modified())
                .ok();
            let made = made.and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
            json!({
                "id": format!("ftckpt-{}-{step}", id.trim_start_matches("ftjob-")),
                "object": "fine_tuning.job.checkpoint",
                "created_at": made.map_or(job.created, |time| time.as_secs()),
                "fine_tuning_job_id": id,
                "fine_tuned_model_checkpoint": super::run::checkpoint_name(&job, *step),
                "step_number": step, "metrics": told.metrics(*step),
            })
        })
        .collect();
    query::slice(all, &query).map(Json)
}
