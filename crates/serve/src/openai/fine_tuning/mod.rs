//! `/v1/fine_tuning/jobs`: making jobs, looking them up, stopping them.
//!
//! A job is a kept object. What happened in its training is not kept a second time: events, metrics and checkpoints
//! are read from the run's own files, so that nothing is lost or told twice when a process dies.

pub(crate) mod events;
mod request;
pub(crate) mod run;

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, Request, State};
use bantam_store::{Object, Scope};
use serde_json::{Value, json};

use super::objects::Kind;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::query::{self, Id};
use crate::server::App;
use crate::training::TrainingConfig;
use run::Stop;

pub(crate) const KIND: Kind = Kind {
    name: "fine_tuning.job",
    noun: "fine-tuning job",
};

/// Who trains here, if anyone does.
fn config(app: &App) -> Result<&TrainingConfig, ApiError> {
    app.config.training.as_ref().ok_or_else(|| {
        let message =
            "this server keeps no files and so does not train; start it with `--data DIR`";
        ApiError::unsupported("model", message)
    })
}

/// `POST /v1/fine_tuning/jobs`
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::with(&http, Scope::Train)?.owner;
    let body = app.read_json(http).await?;
    let asked = request::read(&body)?;
    let trainer = Arc::clone(&config(&app)?.trainer);
    let base = app.model(&asked.model)?.id.clone();
    if let Some(why) = trainer.refusal(&base) {
        return Err(ApiError::invalid("model", why));
    }
    for (param, file) in [
        ("training_file", Some(&asked.training_file)),
        ("validation_file", asked.validation_file.as_ref()),
    ] {
        let Some(id) = file else { continue };
        let file = super::files::KIND
            .find(&app, &owner, id)
            .await
            .map_err(|_| ApiError::invalid(param, format!("no file `{id:.80}` was found")))?;
        if file.label != "fine-tune" {
            let message = format!("`{param}` must be a file whose `purpose` is `fine-tune`");
            return Err(ApiError::invalid(param, message));
        }
    }
    let created = ids::now();
    let id = ids::random("ftjob-");
    let mut object = Object {
        kind: KIND.name.to_string(),
        parent: String::new(),
        id: id.clone(),
        owner,
        created,
        label: "validating_files".to_string(),
        expires: None,
        metadata: asked.metadata.clone(),
        body: asked.body(&id, created),
        extra: json!({"base": base, "suffix": asked.suffix, "notes": []}),
    };
    run::note(&mut object, "info", format!("created job {id}"));
    let (kept, shown) = (object.clone(), object.body.clone());
    app.store(move |store| store.insert(&kept)).await?;
    run::validate(&app, object);
    Ok(Json(shown))
}

/// `GET /v1/fine_tuning/jobs`
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let query = query::list(raw.as_deref(), None, true, false)?;
    KIND.list(&app, owner, query).await
}

/// `GET /v1/fine_tuning/jobs/{id}`
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let job = KIND.find(&app, &owner, &id).await?;
    Ok(Json(events::live(&app, job).await?))
}

/// `POST /v1/fine_tuning/jobs/{id}/cancel`: what was trained so far is left in the job's folder.
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let from = ["validating_files", "queued", "running", "paused"];
    let owner = Caller::with(&request, Scope::Train)?.owner;
    change(
        &app,
        &id,
        owner,
        &from,
        ("cancelled", "cancelled", Stop::Cancel),
    )
    .await
}

/// `POST /v1/fine_tuning/jobs/{id}/pause`
pub(crate) async fn pause(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let from = ["queued", "running"];
    let owner = Caller::with(&request, Scope::Train)?.owner;
    change(&app, &id, owner, &from, ("paused", "paused", Stop::Pause)).await
}

/// `POST /v1/fine_tuning/jobs/{id}/resume`: it goes on from where it was paused, when its turn comes.
pub(crate) async fn resume(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::with(&request, Scope::Train)?.owner;
    change(
        &app,
        &id,
        owner,
        &["paused"],
        ("queued", "resumed", Stop::No),
    )
    .await
}

/// Moves a job from one of some states to another, and stops its training if that is asked for.
async fn change(
    app: &Arc<App>,
    id: &str,
    owner: String,
    from: &[&str],
    (to, word, stop): (&str, &str, Stop),
) -> Result<Json<Value>, ApiError> {
    // One change at a time: the work of a job changes it, too.
    let _turn = app.jobs.turn.lock().await;
    let mut job = KIND.find(app, &owner, id).await?;
    if !from.contains(&job.label.as_str()) {
        let message = format!("the job is `{}` and cannot be {word}", job.label);
        return Err(ApiError::conflict("wrong_state", message));
    }
    run::enter(&mut job, to);
    run::note(&mut job, "info", format!("the job was {word}"));
    app.keep(&job).await?;
    app.jobs.stop(id, stop);
    app.jobs.wake.notify_one();
    Ok(Json(job.body))
}

/// `GET /v1/fine_tuning/checkpoints/{model}/permissions`: there is one project, and it may use all.
pub(crate) async fn permissions(
    State(app): State<Arc<App>>,
    Id(model): Id,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    Caller::with(&request, Scope::Train)?;
    app.model(&model)?;
    query::list(raw.as_deref(), Some("project_id"), false, false)?;
    Ok(Json(query::list_of(Vec::new(), false)))
}

/// `POST /v1/fine_tuning/checkpoints/{model}/permissions`
pub(crate) async fn permit(
    State(app): State<Arc<App>>,
    Id(model): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    Caller::with(&request, Scope::Train)?;
    app.model(&model)?;
    let message = "this server has one project, whose keys may use every checkpoint; there is nothing to share it with";
    Err(ApiError::unsupported("project_ids", message))
}
