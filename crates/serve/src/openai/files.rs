//! `/v1/files`: what batches read and write, in pieces that are never all in memory.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::multipart::Field;
use axum::extract::{FromRequest, Multipart, RawQuery, Request, State};
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use bantam_store::{Object, Store, StoreError};
use serde_json::{Map, Value, json};
use tokio_stream::wrappers::ReceiverStream;

use super::fields::Fields;
use super::file_check;
use super::objects::Kind;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::query::{self, Id};
use crate::server::App;

pub(crate) const KIND: Kind = Kind {
    name: "file",
    noun: "file",
};

/// The length of a piece.
const PIECE: usize = 1 << 20;

const PURPOSES: [&str; 6] = [
    "assistants",
    "batch",
    "fine-tune",
    "vision",
    "user_data",
    "evals",
];

/// The default life of what is uploaded for a batch, in seconds.
const BATCH_LIFE: u64 = 30 * 24 * 60 * 60;

/// A file that is being written. What is not finished is forgotten.
pub(crate) struct Draft {
    app: Arc<App>,
    pub(crate) id: String,
    n: u64,
    bytes: u64,
    bytes_max: u64,
    piece: Vec<u8>,
    finished: bool,
}

impl Draft {
    pub(crate) fn new(app: &Arc<App>) -> Self {
        Self::named(app, ids::random("file-"))
    }

    /// One whose bytes are kept under a name of another kind.
    pub(crate) fn named(app: &Arc<App>, id: String) -> Self {
        Self {
            app: Arc::clone(app),
            id,
            n: 0,
            bytes: 0,
            bytes_max: app.config.file_bytes_max,
            piece: Vec::new(),
            finished: false,
        }
    }

    /// The same with room for fewer bytes.
    pub(crate) fn at_most(mut self, bytes: u64) -> Self {
        self.bytes_max = self.bytes_max.min(bytes);
        self
    }

    /// Bytes so far.
    pub(crate) fn len(&self) -> u64 {
        self.bytes
    }

    /// Adds bytes.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> Result<(), ApiError> {
        self.bytes += bytes.len() as u64;
        let limit = self.bytes_max;
        if self.bytes > limit {
            return Err(ApiError::body_too_large(
                usize::try_from(limit).unwrap_or(usize::MAX),
            ));
        }
        self.piece.extend_from_slice(bytes);
        while self.piece.len() >= PIECE {
            let rest = self.piece.split_off(PIECE);
            let piece = std::mem::replace(&mut self.piece, rest);
            self.keep(piece).await?;
        }
        Ok(())
    }

    async fn keep(&mut self, piece: Vec<u8>) -> Result<(), ApiError> {
        let (id, n) = (self.id.clone(), self.n);
        self.n += 1;
        self.app
            .store(move |store| store.append_chunk(&id, n, &piece))
            .await
    }

    /// Makes it something other than a file: `work` notes it in the database and says whether to keep the bytes.
    pub(crate) async fn keep_as(
        mut self,
        work: impl FnOnce(&Store) -> Result<bool, StoreError> + Send + 'static,
    ) -> Result<bool, ApiError> {
        self.flush().await?;
        self.finished = self.app.store(work).await?;
        Ok(self.finished)
    }

    async fn flush(&mut self) -> Result<(), ApiError> {
        let piece = std::mem::take(&mut self.piece);
        if piece.is_empty() {
            return Ok(());
        }
        self.keep(piece).await
    }

    /// Makes it a file of the API's, if its lines are what the purpose asks for; how long it lives in seconds, if
    /// not for ever.
    pub(crate) async fn finish(
        mut self,
        owner: &str,
        name: &str,
        purpose: &str,
        life: Option<u64>,
    ) -> Result<Value, ApiError> {
        self.flush().await?;
        self.check(purpose).await?;
        let created = ids::now();
        let expires = life.map(|life| created.saturating_add(life));
        let body = json!({
            "id": self.id, "object": "file", "bytes": self.bytes, "created_at": created,
            "expires_at": expires, "filename": name, "purpose": purpose, "status": "processed",
            "status_details": null,
        });
        let object = Object {
            kind: KIND.name.to_string(),
            parent: String::new(),
            id: self.id.clone(),
            owner: owner.to_string(),
            created,
            label: purpose.to_string(),
            expires,
            metadata: Map::new(),
            body: body.clone(),
            extra: Value::Null,
        };
        self.app.store(move |store| store.insert(&object)).await?;
        self.finished = true;
        Ok(body)
    }

    async fn check(&self, purpose: &str) -> Result<(), ApiError> {
        let (app, id) = (Arc::clone(&self.app), self.id.clone());
        let purpose = purpose.to_string();
        let checking = tokio::task::spawn_blocking(move || {
            let rows = app.config.training_rows.as_ref();
            file_check::check(app.store_now(), &id, &purpose, rows)
        });
        checking
            .await
            .map_err(|_| ApiError::internal("the file was not checked"))?
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.finished && self.n > 0 {
            let (app, id) = (Arc::clone(&self.app), self.id.clone());
            // Where there is no runtime left, the next start sweeps.
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn_blocking(move || drop(app.store_now().drop_chunks(&id)));
            }
        }
    }
}

/// `POST /v1/files`
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&http)?.owner;
    let multipart = Multipart::from_request(http, &()).await;
    let mut multipart = multipart.map_err(|_| ApiError::not_multipart())?;
    let patience = app.config.body_timeout;
    let mut draft = None;
    let (mut name, mut purpose) = (String::new(), None);
    let (mut anchor, mut seconds): (Option<String>, Option<String>) = (None, None);
    while let Some(field) = part(multipart.next_field(), patience).await? {
        match field.name().unwrap_or_default() {
            "file" => {
                if draft.is_some() {
                    let message = "`file` is there twice";
                    return Err(ApiError::invalid("file", message));
                }
                name = field
                    .file_name()
                    .unwrap_or("upload")
                    .chars()
                    .take(512)
                    .collect();
                draft = Some(receive(Draft::new(&app), field, patience).await?);
            }
            "purpose" => purpose = Some(text("purpose", field, patience).await?),
            "expires_after[anchor]" => {
                anchor = Some(text("expires_after.anchor", field, patience).await?);
            }
            "expires_after[seconds]" => {
                seconds = Some(text("expires_after.seconds", field, patience).await?);
            }
            other => {
                return Err(ApiError::unknown(
                    &other.chars().take(80).collect::<String>(),
                ));
            }
        }
    }
    let draft = draft.ok_or_else(|| ApiError::missing("file"))?;
    let purpose = purpose.ok_or_else(|| ApiError::missing("purpose"))?;
    check_purpose(&purpose)?;
    let life = match (anchor.as_deref(), seconds) {
        (None, None) => (purpose == "batch").then_some(BATCH_LIFE),
        (anchor, seconds) => Some(expires_after(anchor, seconds.as_deref())?),
    };
    Ok(Json(draft.finish(&owner, &name, &purpose, life).await?))
}

/// `expires_after`: from an hour to 30 days after the making.
pub(crate) fn expires_after(anchor: Option<&str>, seconds: Option<&str>) -> Result<u64, ApiError> {
    if anchor != Some("created_at") {
        let message = "`expires_after.anchor` must be `created_at`";
        return Err(ApiError::invalid("expires_after.anchor", message));
    }
    let seconds = seconds.and_then(|s| s.parse::<u64>().ok());
    let seconds = seconds.filter(|s| (3600..=BATCH_LIFE).contains(s));
    let message = "`expires_after.seconds` must be between 3600 and 2592000";
    seconds.ok_or_else(|| ApiError::invalid("expires_after.seconds", message))
}

/// Refuses a purpose that there is none of.
pub(crate) fn check_purpose(purpose: &str) -> Result<(), ApiError> {
    if PURPOSES.contains(&purpose) {
        return Ok(());
    }
    let message = format!("`purpose` must be one of {}", PURPOSES.join(", "));
    Err(ApiError::invalid("purpose", message))
}

/// Reads `expires_after` of a JSON body: the seconds that a file for `purpose` lives, if not for ever.
pub(crate) fn life_of(after: Option<Fields>, purpose: &str) -> Result<Option<u64>, ApiError> {
    let Some(mut after) = after else {
        return Ok((purpose == "batch").then_some(BATCH_LIFE));
    };
    let anchor: Option<String> = after.take("anchor")?;
    let seconds: Option<u64> = after.take("seconds")?;
    after.finish(&[])?;
    let seconds = seconds.map(|s| s.to_string());
    expires_after(anchor.as_deref(), seconds.as_deref()).map(Some)
}

/// Waits for a part of the body, but not for ever.
pub(crate) async fn part<T>(
    next: impl Future<Output = Result<T, axum::extract::multipart::MultipartError>>,
    patience: Duration,
) -> Result<T, ApiError> {
    match tokio::time::timeout(patience, next).await {
        Err(_) => Err(ApiError::body_slow()),
        Ok(Ok(part)) => Ok(part),
        Ok(Err(_)) => Err(ApiError::not_multipart()),
    }
}

/// Writes a part of a body into a file.
pub(crate) async fn receive(
    mut draft: Draft,
    mut field: Field<'_>,
    patience: Duration,
) -> Result<Draft, ApiError> {
    while let Some(bytes) = part(field.chunk(), patience).await? {
        draft.write(&bytes).await?;
    }
    Ok(draft)
}

/// A field of a few words.
async fn text(param: &str, mut field: Field<'_>, patience: Duration) -> Result<String, ApiError> {
    let mut all = Vec::new();
    while let Some(bytes) = part(field.chunk(), patience).await? {
        all.extend_from_slice(&bytes);
        if all.len() > 1000 {
            return Err(ApiError::invalid(param, format!("`{param}` is too long")));
        }
    }
    String::from_utf8(all).map_err(|_| ApiError::invalid(param, format!("`{param}` is no text")))
}

/// `GET /v1/files`
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let query = query::list(raw.as_deref(), Some("purpose"), false, false)?;
    KIND.list(&app, owner, query).await
}

/// `GET /v1/files/{id}`
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    Ok(Json(KIND.find(&app, &owner, &id).await?.body))
}

/// `DELETE /v1/files/{id}`
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    KIND.delete(&app, owner, &id).await?;
    Ok(Json(json!({"id": id, "object": "file", "deleted": true})))
}

/// `GET /v1/files/{id}/content`
pub(crate) async fn content(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Response, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let file = KIND.find(&app, &owner, &id).await?;
    let bytes = file.body["bytes"].to_string();
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(2);
    tokio::spawn(async move {
        for n in 0.. {
            let id = file.id.clone();
            let piece = match app.store(move |store| store.chunk(&id, n)).await {
                Ok(Some(piece)) => Ok(Bytes::from(piece)),
                Ok(None) => return,
                Err(error) => Err(std::io::Error::other(error.message)),
            };
            let broken = piece.is_err();
            if sender.send(piece).await.is_err() || broken {
                return;
            }
        }
    });
    let headers = [
        (CONTENT_TYPE, "application/octet-stream".to_string()),
        (CONTENT_LENGTH, bytes),
        (CONTENT_DISPOSITION, "attachment".to_string()),
    ];
    Ok((headers, Body::from_stream(ReceiverStream::new(receiver))).into_response())
}

/// The longest line that is read.
const LINE_MAX: usize = 8 << 20;

/// Cuts pieces into lines.
#[derive(Default)]
pub(crate) struct LineBuffer {
    bytes: Vec<u8>,
    at: usize,
    ended: bool,
}

impl LineBuffer {
    /// Adds the next piece; `None` after the last.
    pub(crate) fn feed(&mut self, piece: Option<Vec<u8>>) {
        self.bytes.drain(..self.at);
        self.at = 0;
        match piece {
            Some(piece) => self.bytes.extend_from_slice(&piece),
            None => self.ended = true,
        }
    }

    /// The next line, without its end, if all of it is there.
    pub(crate) fn take(&mut self) -> Result<Option<Vec<u8>>, ApiError> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|b| *b == b'\n');
        let (mut line, n) = match end {
            Some(end) => (rest[..end].to_vec(), end + 1),
            None if self.ended && !rest.is_empty() => (rest.to_vec(), rest.len()),
            None if rest.len() > LINE_MAX => {
                let message = format!("a line of the file is longer than {LINE_MAX} bytes");
                return Err(ApiError::bad_file(message));
            }
            None => return Ok(None),
        };
        self.at += n;
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Ok(Some(line))
    }

    /// Has the last piece been added?
    pub(crate) fn is_over(&self) -> bool {
        self.ended
    }
}

/// Reads a file line by line.
pub(crate) struct Lines {
    app: Arc<App>,
    id: String,
    n: u64,
    buffer: LineBuffer,
}

impl Lines {
    pub(crate) fn new(app: &Arc<App>, id: &str) -> Self {
        Self {
            app: Arc::clone(app),
            id: id.to_string(),
            n: 0,
            buffer: LineBuffer::default(),
        }
    }

    /// The next line, without its end; `None` after the last.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<u8>>, ApiError> {
        loop {
            if let Some(line) = self.buffer.take()? {
                return Ok(Some(line));
            }
            if self.buffer.is_over() {
                return Ok(None);
            }
            let (id, n) = (self.id.clone(), self.n);
            let piece = self.app.store(move |store| store.chunk(&id, n)).await?;
            self.buffer.feed(piece);
            self.n += 1;
        }
    }
}
