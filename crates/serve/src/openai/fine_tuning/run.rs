//! The work of jobs: files are checked as they come, trainings run one at a time, oldest first, and go on where they
//! were when the server or a training dies.

use std::collections::HashSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bantam_store::Object;
use serde_json::{Value, json};

use super::KIND;
use super::events::{choose, told};
use super::request::method_of;
use crate::apart::apart;
use crate::error::ApiError;
use crate::ids;
use crate::openai::files::Draft;
use crate::server::App;
use crate::training::{Ended, TrainingConfig, TrainingJob};

/// How often a training whose process died is started again without having come any further.
const ATTEMPTS: u32 = 5;
/// The states of jobs that the work is for.
const WAITING: [&str; 3] = ["running", "queued", "validating_files"];
/// The most notes of a job.
const NOTES_MAX: usize = 1000;

/// What a training was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    No,
    Pause,
    Cancel,
}

/// What the endpoints and the work share.
#[derive(Default)]
pub(crate) struct Jobs {
    /// There may be something to do.
    pub(crate) wake: tokio::sync::Notify,
    /// Held while a job is read, changed and kept.
    pub(crate) turn: tokio::sync::Mutex<()>,
    /// The job that is trained now, and what it was told.
    running: Mutex<Option<(String, Arc<Told>)>>,
}

/// Whether a training is to stop, and why.
#[derive(Debug, Default)]
struct Told {
    stop: AtomicBool,
    why: AtomicU8,
}

impl Jobs {
    /// Stops the training of a job, if it is the one that runs.
    pub(crate) fn stop(&self, id: &str, why: Stop) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((job, told)) = &*running
            && job == id
            && why != Stop::No
        {
            told.why.store(why as u8, Ordering::Relaxed);
            told.stop.store(true, Ordering::Relaxed);
        }
    }

    fn set_running(&self, job: Option<(String, Arc<Told>)>) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) = job;
    }
}

impl Drop for Jobs {
    /// The server ends: a training that runs saves its state, and goes on with the next server.
    fn drop(&mut self) {
        let running = self
            .running
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((_, told)) = running {
            told.stop.store(true, Ordering::Relaxed);
        }
    }
}

/// Changes a job's state.
pub(super) fn enter(job: &mut Object, status: &str) {
    job.label = status.to_string();
    job.body["status"] = json!(status);
    if matches!(status, "succeeded" | "failed" | "cancelled") {
        job.body["finished_at"] = json!(ids::now());
        job.body["estimated_finish"] = Value::Null;
    }
}

/// Notes what happened to a job: before its training (part 0), during it, or at its end (2).
pub(super) fn note(job: &mut Object, level: &str, message: String) {
    let part = match (&job.body["finished_at"], &job.extra["began"]) {
        (Value::Null, Value::Null) => 0,
        (Value::Null, _) => 1,
        _ => 2,
    };
    if let Some(notes) = job.extra["notes"].as_array_mut()
        && notes.len() < NOTES_MAX
    {
        notes.push(json!({"at": ids::now(), "level": level, "message": message, "part": part}));
    }
}

/// What a job's model is called.
fn model_name(job: &Object) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_string();
    let base = text(&job.extra["base"]);
    // A model that was tuned before keeps the name of its base.
    let base = base
        .strip_prefix("ft:")
        .map_or(base.as_str(), |rest| rest.split(':').next().unwrap_or(rest));
    let id = job.id.trim_start_matches("ftjob-");
    let short: String = id.chars().take(8).collect();
    format!("ft:{base}:bantam:{}:{short}", text(&job.extra["suffix"]))
}

/// What a checkpoint of a job is called.
pub(super) fn checkpoint_name(job: &Object, step: usize) -> String {
    format!("{}:ckpt-step-{step}", model_name(job))
}

/// Checks a job's files, and puts it into the queue.
pub(super) fn validate(app: &Arc<App>, job: Object) {
    let app = Arc::clone(app);
    tokio::spawn(async move {
        let Some(config) = app.config.training.clone() else {
            return;
        };
        let checked = check_files(&app, &config, &job).await;
        let done = update(
            &app,
            &job.id,
            &job.owner,
            "validating_files",
            |job| match checked {
                Ok(rows) => {
                    note(
                        job,
                        "info",
                        format!("the files were checked: {rows} rows to learn from"),
                    );
                    enter(job, "queued");
                }
                Err(error) => fail(
                    job,
                    "invalid_training_file",
                    &error.message,
                    error.param.as_deref(),
                ),
            },
        );
        if let Err(error) = done.await {
            tracing::error!(id = job.id, message = error.message, "a job was not queued");
        }
        app.jobs.wake.notify_one();
    });
}

fn fail(job: &mut Object, code: &str, message: &str, param: Option<&str>) {
    job.body["error"] = json!({"code": code, "message": message, "param": param});
    enter(job, "failed");
    note(job, "error", message.to_string());
}

/// Changes a job that is still in the state it is thought to be in; `None` if it is not.
async fn update(
    app: &Arc<App>,
    id: &str,
    owner: &str,
    from: &str,
    change: impl FnOnce(&mut Object),
) -> Result<Option<Object>, ApiError> {
    let _turn = app.jobs.turn.lock().await;
    let mut job = KIND.find(app, owner, id).await?;
    if job.label != from {
        return Ok(None);
    }
    change(&mut job);
    app.keep(&job).await?;
    Ok(Some(job))
}

/// Copies a job's files into its folder and has the trainer look at them. Tells how many rows there are to learn from.
async fn check_files(
    app: &Arc<App>,
    config: &TrainingConfig,
    job: &Object,
) -> Result<usize, ApiError> {
    let mut rows = 0;
    for (param, name) in [
        ("training_file", "train.jsonl"),
        ("validation_file", "valid.jsonl"),
    ] {
        let Some(file) = job.body[param].as_str().map(str::to_string) else {
            continue;
        };
        let (app, trainer) = (Arc::clone(app), Arc::clone(&config.trainer));
        let path = config.folder.join(&job.id).join(name);
        let method = method_of(&job.body);
        let checked = tokio::task::spawn_blocking(move || {
            copy(&app, &file, &path)?;
            trainer
                .check(&path, method)
                .map_err(|why| ApiError::invalid(param, why))
        });
        let found = checked
            .await
            .map_err(|_| ApiError::internal("the file could not be checked"))??;
        if param == "training_file" {
            rows = found;
        }
    }
    Ok(rows)
}

/// Writes a file of the API's to disk.
fn copy(app: &App, file: &str, path: &Path) -> Result<(), ApiError> {
    let failed = |e: std::io::Error| ApiError::internal(format!("{}: {e}", path.display()));
    let store = app.store_now();
    std::fs::create_dir_all(path.parent().unwrap_or(Path::new(""))).map_err(failed)?;
    let mut out = std::fs::File::create(path).map_err(failed)?;
    for n in 0.. {
        match store.chunk(file, n).map_err(ApiError::store)? {
            Some(piece) => out.write_all(&piece).map_err(failed)?,
            None => break,
        }
    }
    out.sync_all().map_err(failed)
}

/// Serves what was trained before, so that it is there with the first request.
pub(crate) async fn restore(app: &Arc<App>) {
    let Some(config) = app.config.training.clone() else {
        return;
    };
    let finished = app.store(|store| store.unfinished(KIND.name, &["succeeded"]));
    for job in finished.await.unwrap_or_default() {
        if job.extra["deleted"] != true {
            serve_again(app, &config, &job).await;
        }
    }
}

/// Takes up what the last server left, and then works on jobs as they come, for as long as the server runs.
pub(crate) async fn work(app: Arc<App>) {
    let Some(config) = app.config.training.clone() else {
        return;
    };
    let left = app.store(|store| store.unfinished(KIND.name, &["validating_files"]));
    for job in left.await.unwrap_or_default() {
        validate(&app, job);
    }
    loop {
        let waiting = app.store(|store| store.unfinished(KIND.name, &WAITING));
        let mut jobs = waiting.await.unwrap_or_default();
        // One that was interrupted goes on before another begins.
        jobs.sort_by_key(|job| job.label != "running");
        match jobs.into_iter().next() {
            // A file that takes long to check does not cost a job its turn.
            Some(job) if job.label != "validating_files" => {
                let id = job.id.clone();
                if let Err(error) = train(&app, &config, job).await {
                    tracing::error!(id, message = error.message, "a job was not worked on");
                    tokio::time::sleep(Duration::from_secs(5)).await;
                }
                app.jobs.set_running(None);
            }
            _ => app.jobs.wake.notified().await,
        }
    }
}

/// Serves a finished job's models again.
async fn serve_again(app: &Arc<App>, config: &TrainingConfig, job: &Object) {
    if let Ok(told) = told(app, &job.id).await {
        for (step, folder) in &told.epochs {
            let _ = serve(config, folder.clone(), checkpoint_name(job, *step)).await;
        }
    }
    let run = config.folder.join(&job.id).join("run");
    if let Err(why) = serve(config, run, model_name(job)).await {
        tracing::warn!(id = job.id, why, "a tuned model is not served");
    }
}

async fn serve(config: &TrainingConfig, folder: PathBuf, name: String) -> Result<(), String> {
    let trainer = Arc::clone(&config.trainer);
    let served = tokio::task::spawn_blocking(move || trainer.serve(&folder, &name));
    served.await.map_err(|error| error.to_string())?
}

/// Trains a job until it is over, paused or cancelled.
async fn train(app: &Arc<App>, config: &TrainingConfig, job: Object) -> Result<(), ApiError> {
    let folder = config.folder.join(&job.id);
    let number = |name: &str| {
        job.body["hyperparameters"][name]
            .as_u64()
            .map(|n| n as usize)
    };
    let training = TrainingJob {
        id: job.id.clone(),
        base: job.extra["base"].as_str().unwrap_or_default().to_string(),
        run: folder.join("run"),
        train: folder.join("train.jsonl"),
        valid: job.body["validation_file"]
            .is_string()
            .then(|| folder.join("valid.jsonl")),
        method: method_of(&job.body),
        seed: job.body["seed"].as_u64().unwrap_or_default(),
        epochs: number("n_epochs"),
        batch_rows: number("batch_size"),
        lr_multiplier: job.body["hyperparameters"]["learning_rate_multiplier"].as_f64(),
    };
    let told_stop = Arc::new(Told::default());
    app.jobs
        .set_running(Some((job.id.clone(), Arc::clone(&told_stop))));
    let (id, owner) = (job.id.clone(), job.owner.clone());
    let label = job.label.clone();
    let begun = update(app, &id, &owner, &label, |job| {
        if job.extra["began"].is_null() {
            note(job, "info", "the training began".to_string());
            job.extra["began"] = json!(ids::now());
        } else {
            note(job, "info", "the training goes on".to_string());
        }
        enter(job, "running");
    });
    if begun.await?.is_none() {
        return Ok(());
    }
    let (mut reached, mut attempts) = (0, 0);
    let mut served = HashSet::new();
    let ended = loop {
        let (trainer, training, stop) = (
            Arc::clone(&config.trainer),
            training.clone(),
            Arc::clone(&told_stop),
        );
        let mut receive = apart("job", move || trainer.train(&training, &stop.stop))
            .map_err(|error| ApiError::internal(format!("a thread for the job: {error}")))?;
        let ended = loop {
            tokio::select! {
                ended = &mut receive => break ended.unwrap_or_else(|_| Ended::Died("it panicked".to_string())),
                () = tokio::time::sleep(Duration::from_millis(500)) => {
                    serve_epochs(app, config, &job, &mut served).await;
                }
            }
        };
        let Ended::Died(why) = ended else { break ended };
        let progress = told(app, &id)
            .await?
            .progress()
            .map_or(0, |(step, ..)| step);
        attempts = if progress > reached { 1 } else { attempts + 1 };
        reached = progress;
        if attempts > ATTEMPTS {
            break Ended::Failed(format!(
                "the training's process died {attempts} times at the same place: {why}"
            ));
        }
        tracing::warn!(id, why, "a training died and is started again");
        tokio::time::sleep(Duration::from_millis(200 * u64::from(attempts))).await;
    };
    serve_epochs(app, config, &job, &mut served).await;
    match ended {
        Ended::Finished => finish(app, config, &job).await,
        Ended::Failed(why) => {
            update(app, &id, &owner, "running", |job| {
                fail(job, "training_failed", &why, None)
            })
            .await?;
            Ok(())
        }
        // Why it stopped was kept when it was told to; if it was not, the server ends.
        Ended::Stopped | Ended::Died(_) => {
            if told_stop.why.load(Ordering::Relaxed) == Stop::No as u8 {
                std::future::pending::<()>().await;
            }
            Ok(())
        }
    }
}

/// Serves the models of epochs that ended meanwhile.
async fn serve_epochs(
    app: &Arc<App>,
    config: &TrainingConfig,
    job: &Object,
    served: &mut HashSet<usize>,
) {
    let Ok(told) = told(app, &job.id).await else {
        return;
    };
    for (step, folder) in told.epochs {
        if served.insert(step)
            && let Err(why) = serve(config, folder, checkpoint_name(job, step)).await
        {
            tracing::warn!(id = job.id, step, why, "a checkpoint is not served");
        }
    }
}

/// The model is there: it is served, and then the job has succeeded.
async fn finish(app: &Arc<App>, config: &TrainingConfig, job: &Object) -> Result<(), ApiError> {
    let name = model_name(job);
    let run = config.folder.join(&job.id).join("run");
    let served = serve(config, run, name.clone()).await;
    let told = told(app, &job.id).await?;
    let mut csv = Draft::new(app);
    csv.write(told.csv().as_bytes()).await?;
    let file = csv
        .finish(&job.owner, "step_metrics.csv", "fine-tune-results", None)
        .await?;
    update(app, &job.id, &job.owner, "running", |job| {
        choose(&mut job.body, &told);
        job.body["fine_tuned_model"] = json!(name);
        job.body["trained_tokens"] = json!(told.tokens());
        job.body["result_files"] = json!([file["id"]]);
        enter(job, "succeeded");
        match &served {
            Ok(()) => note(job, "info", format!("the model is served as {name}")),
            Err(why) => note(
                job,
                "warn",
                format!("the model is trained, but not served: {why}"),
            ),
        }
    })
    .await?;
    Ok(())
}

/// A tuned model was deleted: it is not served again when the server starts.
pub(crate) async fn forget_model(app: &Arc<App>, name: &str) {
    let finished = app.store(|store| store.unfinished(KIND.name, &["succeeded"]));
    for mut job in finished.await.unwrap_or_default() {
        if job.body["fine_tuned_model"] == name {
            job.extra["deleted"] = json!(true);
            let _ = app.store(move |store| store.update(&job)).await;
        }
    }
}
