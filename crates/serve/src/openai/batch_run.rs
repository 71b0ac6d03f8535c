//! The work of a batch: a task of its own, which goes on where it stopped if the server does.
//!
//! Answers are kept line by line as they come, so after a restart only what is missing is asked again. A batch's
//! requests are under the limits of its owner's key, and wait where someone else's would be refused.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bantam_store::{Line, Object};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::completions::CompletionRequest;
use super::files::{Draft, Lines};
use super::{chat, completions, embeddings, responses};
use crate::error::ApiError;
use crate::ids;
use crate::server::App;

/// What a batch may ask.
pub(crate) const ENDPOINTS: [&str; 4] = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
];

/// The most lines of a batch, and the most errors that are told of one that is refused.
pub(crate) const LINES_MAX: u64 = 50_000;
const ERRORS_MAX: usize = 20;
/// Lines that are asked at the same time.
const AT_ONCE: usize = 4;

/// Takes up all batches that were not finished when the server stopped.
pub(crate) async fn resume(app: &Arc<App>) {
    let labels = ["validating", "in_progress", "finalizing", "cancelling"];
    let left = app.store(move |store| store.unfinished(super::batches::KIND.name, &labels));
    match left.await {
        Ok(batches) => batches.into_iter().for_each(|batch| start(app, batch)),
        Err(error) => tracing::error!(message = error.message, "batches were not taken up"),
    }
}

/// Starts the task.
pub(crate) fn start(app: &Arc<App>, batch: Object) {
    let id = batch.id.clone();
    let stop = app.batches.begin(&id, batch.label == "cancelling");
    let app = Arc::clone(app);
    tokio::spawn(async move {
        let mut work = Work {
            app: Arc::clone(&app),
            batch,
            stop,
        };
        if let Err(error) = work.run().await {
            tracing::error!(id, message = error.message, "a batch failed");
            let _ = work.fail(vec![fault(None, &error)]).await;
        }
        app.batches.end(&id);
    });
}

struct Work {
    app: Arc<App>,
    batch: Object,
    stop: Arc<AtomicBool>,
}

/// A line of the input.
pub(crate) struct Ask {
    n: u64,
    pub(crate) custom_id: String,
    pub(crate) url: String,
    body: Vec<u8>,
}

fn fault(line: Option<u64>, error: &ApiError) -> Value {
    json!({
        "code": error.code.unwrap_or("invalid_request"), "line": line, "message": error.message,
        "param": error.param,
    })
}

impl Work {
    async fn run(&mut self) -> Result<(), ApiError> {
        if self.batch.label == "validating" {
            let faults = self.validate().await?;
            if !faults.is_empty() {
                return self.fail(faults).await;
            }
            self.enter("in_progress", "in_progress_at").await?;
        }
        let end = if self.batch.label == "finalizing" {
            self.batch.extra["end"]
                .as_str()
                .unwrap_or("completed")
                .to_string()
        } else {
            self.answer().await?.to_string()
        };
        self.finish(&end).await
    }

    /// Changes the status and notes the time.
    async fn enter(&mut self, status: &str, at: &str) -> Result<(), ApiError> {
        self.batch.label = status.to_string();
        self.batch.body["status"] = json!(status);
        self.batch.body[at] = json!(ids::now());
        self.keep().await
    }

    async fn keep(&self) -> Result<(), ApiError> {
        self.app.keep(&self.batch).await.map(drop)
    }

    async fn fail(&mut self, faults: Vec<Value>) -> Result<(), ApiError> {
        self.batch.body["errors"] = json!({"object": "list", "data": faults});
        self.enter("failed", "failed_at").await
    }

    fn endpoint(&self) -> &str {
        self.batch.body["endpoint"].as_str().unwrap_or_default()
    }

    fn lines(&self) -> Lines {
        let id = self.batch.body["input_file_id"].as_str();
        Lines::new(&self.app, id.unwrap_or_default())
    }

    /// Reads all lines; what is wrong with them.
    async fn validate(&mut self) -> Result<Vec<Value>, ApiError> {
        let mut lines = self.lines();
        let mut faults = Vec::new();
        let mut seen = HashSet::new();
        let mut n = 0;
        while let Some(line) = lines.next().await? {
            n += 1;
            if n > LINES_MAX {
                let message = format!("a batch has at most {LINES_MAX} lines");
                return Ok(vec![fault(
                    None,
                    &ApiError::invalid("input_file_id", message),
                )]);
            }
            let checked = read(n - 1, &line).and_then(|ask| {
                if ask.url != self.endpoint() {
                    let endpoint = self.endpoint();
                    let message = format!("`url` must be the batch's endpoint, `{endpoint}`");
                    return Err(ApiError::invalid("url", message));
                }
                let custom_id = ask.custom_id;
                if seen.insert(custom_id.clone()) {
                    return Ok(());
                }
                let message = format!("`custom_id` {custom_id:?} is there twice");
                Err(ApiError::invalid("custom_id", message))
            });
            if let Err(error) = checked {
                faults.push(fault(Some(n), &error));
                if faults.len() == ERRORS_MAX {
                    break;
                }
            }
        }
        if n == 0 {
            let message = "the input file is empty";
            faults.push(fault(None, &ApiError::invalid("input_file_id", message)));
        }
        self.batch.body["request_counts"]["total"] = json!(n);
        Ok(faults)
    }

    /// Asks what has no answer yet; how it ended.
    async fn answer(&mut self) -> Result<&'static str, ApiError> {
        let id = self.batch.id.clone();
        let answered = self.app.store(move |store| store.answered(&id)).await?;
        let mut counts = [0u64; 2];
        for (_, failed) in &answered {
            counts[usize::from(*failed)] += 1;
        }
        let answered: HashSet<u64> = answered.into_iter().map(|(n, _)| n).collect();
        let expires = self.batch.body["expires_at"].as_u64().unwrap_or(u64::MAX);
        let mut lines = self.lines();
        let mut n = 0;
        let mut tasks: JoinSet<Result<Line, ApiError>> = JoinSet::new();
        let mut end = "completed";
        loop {
            let is_late = ids::now() >= expires;
            if self.stop.load(Ordering::Relaxed) || is_late {
                end = if is_late { "expired" } else { "cancelled" };
            }
            let next = if end == "completed" && tasks.len() < AT_ONCE {
                lines.next().await?
            } else {
                None
            };
            if let Some(line) = next {
                n += 1;
                if !answered.contains(&(n - 1)) {
                    let ask = read(n - 1, &line)?;
                    let (app, endpoint) = (Arc::clone(&self.app), self.endpoint().to_string());
                    let (owner, stop) = (self.batch.owner.clone(), Arc::clone(&self.stop));
                    tasks.spawn(
                        async move { one(&app, &owner, &endpoint, ask, &stop, expires).await },
                    );
                }
                continue;
            }
            let Some(done) = tasks.join_next().await else {
                break;
            };
            let line = done.map_err(|_| ApiError::internal("a line's task failed"))??;
            counts[usize::from(line.failed)] += 1;
            let id = self.batch.id.clone();
            self.app
                .store(move |store| store.put_line(&id, &line))
                .await?;
            self.batch.body["request_counts"]["completed"] = json!(counts[0]);
            self.batch.body["request_counts"]["failed"] = json!(counts[1]);
            self.keep().await?;
        }
        if end == "expired" {
            self.expire().await?;
        }
        Ok(end)
    }

    /// Says of every line without an answer that the time was over.
    async fn expire(&mut self) -> Result<(), ApiError> {
        let id = self.batch.id.clone();
        let answered = self.app.store(move |store| store.answered(&id)).await?;
        let answered: HashSet<u64> = answered.into_iter().map(|(n, _)| n).collect();
        let mut lines = self.lines();
        let mut n = 0;
        while let Some(line) = lines.next().await? {
            n += 1;
            if answered.contains(&(n - 1)) {
                continue;
            }
            let ask = read(n - 1, &line)?;
            let body = json!({
                "id": ids::random("batch_req_"), "custom_id": ask.custom_id, "response": null,
                "error": {"code": "batch_expired", "message": "the batch's time was over before this request was answered"},
            });
            let line = Line {
                n: ask.n,
                failed: true,
                tokens: 0,
                body: body.to_string(),
            };
            let id = self.batch.id.clone();
            self.app
                .store(move |store| store.put_line(&id, &line))
                .await?;
        }
        Ok(())
    }

    /// Writes the files.
    async fn finish(&mut self, end: &str) -> Result<(), ApiError> {
        self.batch.extra["end"] = json!(end);
        self.enter("finalizing", "finalizing_at").await?;
        for (failed, field, name) in [
            (false, "output_file_id", "output"),
            (true, "error_file_id", "error"),
        ] {
            let mut draft = Draft::new(&self.app);
            let (mut from, mut any) = (0, false);
            loop {
                let id = self.batch.id.clone();
                let some = self
                    .app
                    .store(move |store| store.lines(&id, failed, from, 100));
                let some = some.await?;
                let Some(last) = some.last() else { break };
                from = last.n + 1;
                any = true;
                for line in &some {
                    draft.write(format!("{}\n", line.body).as_bytes()).await?;
                }
            }
            if any {
                let name = format!("{}_{name}.jsonl", self.batch.id);
                let life = self.batch.extra["life"].as_u64();
                let owner = self.batch.owner.clone();
                let file = draft.finish(&owner, &name, "batch_output", life).await?;
                self.batch.body[field] = file["id"].clone();
            }
        }
        let at = match end {
            "expired" => "expired_at",
            "cancelled" => "cancelled_at",
            _ => "completed_at",
        };
        self.enter(end, at).await?;
        let id = self.batch.id.clone();
        self.app.store(move |store| store.drop_lines(&id)).await
    }
}

/// Reads a line.
pub(crate) fn read(n: u64, line: &[u8]) -> Result<Ask, ApiError> {
    let mut fields = super::fields::Fields::of_body(line)?;
    let custom_id: String = fields.need("custom_id")?;
    let (method, url): (String, String) = (fields.need("method")?, fields.need("url")?);
    if method != "POST" {
        return Err(ApiError::invalid("method", "`method` must be `POST`"));
    }
    if !ENDPOINTS.contains(&url.as_str()) {
        let message = format!("`url` must be one of {}", ENDPOINTS.join(", "));
        return Err(ApiError::invalid("url", message));
    }
    let body: Value = fields.need("body")?;
    fields.finish(&[])?;
    if !body.is_object() {
        return Err(ApiError::invalid("body", "`body` must be an object"));
    }
    Ok(Ask {
        n,
        custom_id,
        url,
        body: body.to_string().into_bytes(),
    })
}

/// Asks one line, again as long as there is no room.
async fn one(
    app: &Arc<App>,
    owner: &str,
    endpoint: &str,
    ask: Ask,
    stop: &AtomicBool,
    expires: u64,
) -> Result<Line, ApiError> {
    let answer = loop {
        let answer = answer(app, owner, endpoint, &ask.body).await;
        match answer.as_ref().err().and_then(ApiError::pause) {
            Some(pause) if !stop.load(Ordering::Relaxed) && ids::now() < expires => {
                tokio::time::sleep(pause).await;
            }
            _ => break answer,
        }
    };
    let (status, body) = match &answer {
        Ok(body) => (200, body.clone()),
        Err(error) => (error.status.as_u16(), error.to_json()),
    };
    let line = json!({
        "id": ids::random("batch_req_"),
        "custom_id": ask.custom_id,
        "response": {"status_code": status, "request_id": ids::random("req_"), "body": body},
        "error": null,
    });
    Ok(Line {
        n: ask.n,
        failed: answer.is_err(),
        tokens: body["usage"]["total_tokens"].as_u64().unwrap_or(0),
        body: line.to_string(),
    })
}

async fn answer(
    app: &Arc<App>,
    owner: &str,
    endpoint: &str,
    body: &[u8],
) -> Result<Value, ApiError> {
    let caller = app.door.absent(owner)?;
    let caller = &caller;
    match endpoint {
        "/v1/chat/completions" => chat::answer(app, caller, body).await,
        "/v1/completions" => {
            let request = CompletionRequest::parse(body)?;
            chat::no_stream(request.stream)?;
            completions::whole(app, caller, request).await
        }
        "/v1/embeddings" => embeddings::answer(app, caller, body).await,
        _ => responses::answer(app, caller, body).await,
    }
}
