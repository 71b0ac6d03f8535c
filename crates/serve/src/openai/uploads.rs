//! `/v1/uploads`: a file in parts, which becomes an ordinary file when it is complete.
//!
//! A part's bytes are kept as those of a file are, under the part's name. What is not complete within an hour
//! expires: its parts are forgotten at once, the upload itself a day later, so that a late caller is told why.

use std::collections::HashSet;
use std::sync::Arc;

use axum::Json;
use axum::extract::{FromRequest, Multipart, Request, State};
use bantam_store::Object;
use md5::{Digest, Md5};
use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::files::{self, Draft, check_purpose, part};
use super::objects::Kind;
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::query::Id;
use crate::server::App;

const KIND: Kind = Kind {
    name: "upload",
    noun: "upload",
};
const PART: Kind = Kind {
    name: "upload.part",
    noun: "part",
};

/// How long the parts of an upload may take to come, in seconds.
const LIFE: u64 = 60 * 60;
/// How much longer an upload that has expired is remembered.
const REMEMBERED: u64 = 24 * 60 * 60;
/// The longest part.
const PART_MAX: u64 = 64 << 20;
/// The most parts of an upload.
const PARTS_MAX: usize = 10_000;

/// `POST /v1/uploads`
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&http)?.owner;
    let body = app.read_json(http).await?;
    let mut fields = Fields::of_body(&body)?;
    let limit = app.config.file_bytes_max;
    let bytes = fields.whole("bytes", 1, limit)?;
    let bytes = bytes.ok_or_else(|| ApiError::missing("bytes"))?;
    let filename: String = fields.need("filename")?;
    let mime: String = fields.need("mime_type")?;
    let purpose: String = fields.need("purpose")?;
    check_purpose(&purpose)?;
    if filename.is_empty() || filename.chars().count() > 512 {
        let message = "`filename` must be 1 to 512 characters";
        return Err(ApiError::invalid("filename", message));
    }
    let life = files::life_of(fields.object("expires_after")?, &purpose)?;
    fields.finish(&[])?;
    let created = ids::now();
    let body = json!({
        "id": ids::random("upload_"), "object": "upload", "bytes": bytes, "created_at": created,
        "expires_at": created + LIFE, "filename": filename, "purpose": purpose, "status": "pending",
        "file": null,
    });
    let object = Object {
        kind: KIND.name.to_string(),
        parent: String::new(),
        id: body["id"].as_str().unwrap_or_default().to_string(),
        owner,
        created,
        label: "pending".to_string(),
        expires: Some(created + LIFE + REMEMBERED),
        metadata: Map::new(),
        body: body.clone(),
        extra: json!({"life": life, "mime_type": mime, "parts": {}}),
    };
    app.store(move |store| store.insert(&object)).await?;
    Ok(Json(body))
}

/// `POST /v1/uploads/{id}/parts`
pub(crate) async fn add_part(
    State(app): State<Arc<App>>,
    Id(id): Id,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&http)?.owner;
    let upload = pending(&app, &owner, &id).await?;
    if parts(&upload).len() >= PARTS_MAX {
        let message = format!("an upload has at most {PARTS_MAX} parts");
        return Err(ApiError::conflict("too_many_parts", message));
    }
    let multipart = Multipart::from_request(http, &()).await;
    let mut multipart = multipart.map_err(|_| ApiError::not_multipart())?;
    let patience = app.config.body_timeout;
    let room = PART_MAX.min(upload.body["bytes"].as_u64().unwrap_or(0));
    let mut draft = None;
    while let Some(field) = part(multipart.next_field(), patience).await? {
        match field.name().unwrap_or_default() {
            "data" if draft.is_none() => {
                let empty = Draft::named(&app, ids::random("part_")).at_most(room);
                draft = Some(files::receive(empty, field, patience).await?);
            }
            "data" => return Err(ApiError::invalid("data", "`data` is there twice")),
            other => {
                let name: String = other.chars().take(80).collect();
                return Err(ApiError::unknown(&name));
            }
        }
    }
    let draft = draft.ok_or_else(|| ApiError::missing("data"))?;
    let body = json!({
        "id": draft.id, "object": "upload.part", "created_at": ids::now(), "upload_id": id,
    });
    let object = Object {
        kind: PART.name.to_string(),
        parent: String::new(),
        id: draft.id.clone(),
        owner: owner.clone(),
        created: ids::now(),
        label: id.clone(),
        expires: upload.body["expires_at"].as_u64(),
        metadata: Map::new(),
        body: body.clone(),
        extra: Value::Null,
    };
    let n = draft.len();
    // Parts may come side by side: each adds itself to the upload as it is by then.
    let added = draft.keep_as(move |store| {
        let noted = store.amend(KIND.name, &owner, &id, |upload| {
            let so_far: u64 = parts(upload).values().filter_map(Value::as_u64).sum();
            let fits = upload.label == "pending"
                && so_far + n <= upload.body["bytes"].as_u64().unwrap_or(0);
            if fits {
                upload.extra["parts"][&object.id] = json!(n);
            }
            fits
        })?;
        if noted {
            store.insert(&object)?;
        }
        Ok(noted)
    });
    if !added.await? {
        let message = "the parts of the upload would be longer than its `bytes`, or it has ended";
        return Err(ApiError::invalid("data", message));
    }
    Ok(Json(body))
}

/// `POST /v1/uploads/{id}/complete`: puts the parts together, in the order asked for.
pub(crate) async fn complete(
    State(app): State<Arc<App>>,
    Id(id): Id,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&http)?.owner;
    let body = app.read_json(http).await?;
    let mut fields = Fields::of_body(&body)?;
    let wanted: Vec<String> = fields.need("part_ids")?;
    let md5: Option<String> = fields.take("md5")?;
    fields.finish(&[])?;
    let mut upload = pending(&app, &owner, &id).await?;
    let known = parts(&upload);
    let mut seen = HashSet::new();
    for (i, part) in wanted.iter().enumerate() {
        let param = format!("part_ids[{i}]");
        if !known.contains_key(part) {
            let message = format!("`{param}`: `{part:.80}` is no part of this upload");
            return Err(ApiError::invalid(param, message));
        }
        if !seen.insert(part) {
            let message = format!("`{param}`: `{part:.80}` is there twice");
            return Err(ApiError::invalid(param, message));
        }
    }
    let (draft, digest) = assemble(&app, &wanted).await?;
    let bytes = upload.body["bytes"].as_u64().unwrap_or(0);
    if draft.len() != bytes {
        let n = draft.len();
        let message = format!("the parts are {n} bytes, and the upload was to be {bytes}");
        return Err(ApiError::invalid("part_ids", message));
    }
    if let Some(md5) = md5.filter(|md5| !md5.eq_ignore_ascii_case(&digest)) {
        let message = format!("`md5` is `{md5:.80}`, and that of the parts is `{digest}`");
        return Err(ApiError::invalid("md5", message));
    }
    let text = |name: &str| upload.body[name].as_str().unwrap_or_default().to_string();
    let life = upload.extra["life"].as_u64();
    let (name, purpose) = (text("filename"), text("purpose"));
    let file = draft.finish(&owner, &name, &purpose, life).await?;
    upload.body["file"] = file;
    end(&app, upload, "completed").await.map(Json)
}

/// `POST /v1/uploads/{id}/cancel`
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    Id(id): Id,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let upload = pending(&app, &owner, &id).await?;
    end(&app, upload, "cancelled").await.map(Json)
}

/// The parts' names, and how long each is.
fn parts(upload: &Object) -> Map<String, Value> {
    upload.extra["parts"]
        .as_object()
        .cloned()
        .unwrap_or_default()
}

/// An upload that may still be added to; one whose time is over ends here.
async fn pending(app: &Arc<App>, owner: &str, id: &str) -> Result<Object, ApiError> {
    let upload = KIND.find(app, owner, id).await?;
    let is_late = upload.body["expires_at"]
        .as_u64()
        .is_some_and(|at| at <= ids::now());
    let mut status = upload.label.clone();
    if status == "pending" && is_late {
        status = "expired".to_string();
        end(app, upload, "expired").await?;
    } else if status == "pending" {
        return Ok(upload);
    }
    let message = format!("the upload is `{status}`");
    Err(ApiError::conflict("upload_ended", message))
}

/// Ends an upload and forgets its parts; how it is shown.
async fn end(app: &Arc<App>, mut upload: Object, status: &str) -> Result<Value, ApiError> {
    upload.label = status.to_string();
    upload.body["status"] = json!(status);
    let names = parts(&upload);
    upload.extra["parts"] = json!({});
    let shown = upload.body.clone();
    app.store(move |store| {
        store.update(&upload)?;
        for name in names.keys() {
            store.delete(PART.name, &upload.owner, name)?;
        }
        Ok(())
    })
    .await?;
    Ok(shown)
}

/// Copies parts into a new file, and tells the MD5 of it.
async fn assemble(app: &Arc<App>, parts: &[String]) -> Result<(Draft, String), ApiError> {
    let mut draft = Draft::new(app);
    let mut digest = Md5::new();
    for part in parts {
        for n in 0.. {
            let id = part.clone();
            let Some(bytes) = app.store(move |store| store.chunk(&id, n)).await? else {
                break;
            };
            digest.update(&bytes);
            draft.write(&bytes).await?;
        }
    }
    let digest = digest.finalize();
    Ok((draft, digest.iter().map(|b| format!("{b:02x}")).collect()))
}
