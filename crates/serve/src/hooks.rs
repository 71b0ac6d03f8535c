//! Webhooks: who runs the server is told, at addresses of their own, when a job, a batch or a run of an eval is over.
//!
//! A delivery is kept with the change that it tells of, in one transaction, so that none is lost with the process; its
//! name follows from what it tells, so that none is made twice. It is tried until it is taken, for two days and a half.
//!
//! Source: Standard Webhooks 1.0 (headers, signature, answers); the events' bodies are OpenAI's

use std::sync::Arc;
use std::time::Duration;

use bantam_store::Object;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac as _};
use serde_json::{Map, json};
use sha2::{Digest as _, Sha256};
use tokio::task::JoinSet;

use crate::apart::apart;
use crate::error::{ApiError, ServeError};
use crate::ids;
use crate::server::App;

/// The kind of kept object that a delivery is.
const KIND: &str = "webhook.delivery";
/// Seconds until a delivery is tried again, by how often it was tried.
const PAUSES: [u64; 9] = [1, 5, 30, 120, 600, 3600, 5 * 3600, 14 * 3600, 36 * 3600];
/// How long a delivery that is over is kept, in seconds.
const KEPT: u64 = 7 * 24 * 3600;
/// Deliveries at a time.
const AT_ONCE: usize = 4;

/// Carries deliveries. It blocks.
pub trait Courier: Send + Sync {
    /// Posts a body; the status of the answer, or why there is none. A redirect is an answer.
    fn post(&self, url: &str, headers: &[(&str, String)], body: &str) -> Result<u16, String>;
}

/// Where events are told, and by whose hand.
#[derive(Clone)]
pub struct Hooks {
    /// The addresses, each with its secret.
    pub targets: Vec<HookTarget>,
    /// Who carries.
    pub courier: Arc<dyn Courier>,
}

/// An address and what its deliveries are signed with.
#[derive(Clone)]
pub struct HookTarget {
    /// Where to post.
    pub url: String,
    secret: Vec<u8>,
}

impl HookTarget {
    /// `secret` is base64, with or without `whsec_` before it, of 16 bytes or more.
    pub fn new(url: impl Into<String>, secret: &str) -> Result<Self, ServeError> {
        let text = secret.trim();
        let bytes = STANDARD.decode(text.strip_prefix("whsec_").unwrap_or(text));
        match bytes {
            Ok(bytes) if bytes.len() >= 16 => Ok(Self {
                url: url.into(),
                secret: bytes,
            }),
            _ => Err(ServeError::WebhookSecret),
        }
    }

    /// `v1,` and the base64 of HMAC-SHA-256 over `id.timestamp.body`.
    fn sign(&self, id: &str, timestamp: u64, body: &str) -> String {
        // A key of any length will do.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.secret) else {
            return String::new();
        };
        mac.update(format!("{id}.{timestamp}.{body}").as_bytes());
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }
}

/// What is told of an object in this state, if anything is.
fn event_of(object: &Object) -> Option<String> {
    let told = match (object.kind.as_str(), object.label.as_str()) {
        ("fine_tuning.job", "succeeded" | "failed" | "cancelled")
        | ("batch", "completed" | "failed" | "expired" | "cancelled")
        | ("eval.run", "failed" | "canceled") => object.label.as_str(),
        ("eval.run", "completed") => "succeeded",
        _ => return None,
    };
    Some(format!("{}.{told}", object.kind))
}

/// The deliveries that an object's state asks for: the same each time it is asked.
pub(crate) fn deliveries(app: &App, object: &Object) -> Vec<Object> {
    let (Some(hooks), Some(event)) = (&app.config.hooks, event_of(object)) else {
        return Vec::new();
    };
    let name = |more: &str| -> String {
        let digest = Sha256::digest(format!("{} {event} {more}", object.id));
        digest[..12].iter().map(|b| format!("{b:02x}")).collect()
    };
    let created = ids::now();
    let body = json!({
        "id": format!("evt_{}", name("")), "object": "event", "created_at": created,
        "type": event, "data": {"id": object.id},
    });
    let one = |target: &HookTarget| Object {
        kind: KIND.to_string(),
        id: format!("whd_{}", name(&target.url)),
        owner: String::new(),
        parent: String::new(),
        created,
        label: "pending".to_string(),
        expires: None,
        metadata: Map::new(),
        body: body.clone(),
        extra: json!({"url": target.url, "tries": 0, "next": created}),
    };
    hooks.targets.iter().map(one).collect()
}

/// Carries deliveries for as long as the server runs.
pub(crate) async fn work(app: Arc<App>) {
    if app.config.hooks.is_none() {
        return;
    }
    loop {
        let waiting = app
            .store(|store| store.unfinished(KIND, &["pending"]))
            .await;
        let waiting = match waiting {
            Ok(waiting) => waiting,
            Err(error) => {
                tracing::error!(message = error.message, "webhooks are not read");
                Vec::new()
            }
        };
        let now = ids::now();
        let due = |one: &Object| one.extra["next"].as_u64().unwrap_or(0);
        let next = waiting.iter().map(due).filter(|at| *at > now).min();
        let mut carried = JoinSet::new();
        for one in waiting.into_iter().filter(|one| due(one) <= now) {
            if carried.len() >= AT_ONCE {
                carried.join_next().await;
            }
            let app = Arc::clone(&app);
            carried.spawn(async move {
                if let Err(error) = carry(&app, one).await {
                    tracing::error!(message = error.message, "a webhook was not carried");
                }
            });
        }
        let had_some = !carried.is_empty();
        while carried.join_next().await.is_some() {}
        if had_some {
            continue;
        }
        let pause = next.map_or(600, |at| at.saturating_sub(now).clamp(1, 600));
        let sleep = tokio::time::sleep(Duration::from_secs(pause));
        tokio::select! {
            () = sleep => {}
            () = app.told.notified() => {}
        }
    }
}

/// Tries a delivery once, and notes how that went.
async fn carry(app: &Arc<App>, mut one: Object) -> Result<(), ApiError> {
    let Some(hooks) = app.config.hooks.clone() else {
        return Ok(());
    };
    let url = one.extra["url"].as_str().unwrap_or_default().to_string();
    let Some(target) = hooks.targets.iter().find(|target| target.url == url) else {
        // It was taken out of the configuration.
        return finish(app, one, "dropped").await;
    };
    let id = one.body["id"].as_str().unwrap_or_default().to_string();
    let (now, body) = (ids::now(), one.body.to_string());
    let headers = [
        ("content-type", "application/json".to_string()),
        ("webhook-id", id.clone()),
        ("webhook-timestamp", now.to_string()),
        ("webhook-signature", target.sign(&id, now, &body)),
    ];
    let courier = Arc::clone(&hooks.courier);
    let receive = apart("webhook", move || courier.post(&url, &headers, &body))
        .map_err(|error| ApiError::internal(format!("a thread for a webhook: {error}")))?;
    let answer = receive
        .await
        .unwrap_or_else(|_| Err("the thread failed".to_string()));
    let tries = one.extra["tries"].as_u64().unwrap_or(0) + 1;
    one.extra["tries"] = json!(tries);
    let why = match answer {
        Ok(200..=299) => return finish(app, one, "delivered").await,
        // Nobody wants them any more.
        Ok(410) => return finish(app, one, "refused").await,
        Ok(status) => format!("status {status}"),
        Err(why) => why,
    };
    one.extra["error"] = json!(why);
    let pause = PAUSES.get(usize::try_from(tries - 1).unwrap_or(usize::MAX));
    let Some(pause) = pause else {
        tracing::warn!(id, why, "a webhook was given up");
        return finish(app, one, "failed").await;
    };
    // Spread by name, so that what failed together is not tried together.
    let spread = one.id.bytes().map(u64::from).sum::<u64>() % (pause / 5 + 1);
    one.extra["next"] = json!(now + pause + spread);
    tracing::info!(id, tries, why, "a webhook is tried again later");
    app.store(move |store| store.update(&one)).await.map(drop)
}

async fn finish(app: &Arc<App>, mut one: Object, how: &str) -> Result<(), ApiError> {
    one.label = how.to_string();
    one.expires = Some(ids::now() + KEPT);
    app.store(move |store| store.update(&one)).await.map(drop)
}

impl App {
    /// Keeps an object as it is by now, with whatever is to be told of it; `false` if it is gone.
    pub(crate) async fn keep(&self, object: &Object) -> Result<bool, ApiError> {
        let told = deliveries(self, object);
        let (object, any) = (object.clone(), !told.is_empty());
        let kept = self
            .store(move |store| store.update_with(&object, &told))
            .await?;
        if any {
            self.told.notify_one();
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_as_the_standard_has_them() {
        // By Python: base64(hmac(key, b"evt_1.1700000000.{}", sha256)).
        let secret = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3";
        let target = HookTarget::new("http://x", secret).unwrap();
        assert_eq!(
            target.sign("evt_1", 1_700_000_000, "{}"),
            "v1,NNE7l8yBGUIZix+ZWhuw1i0d7yHV58dTPlowMVgdMTA="
        );
        for bad in ["", "whsec_", "whsec_AAAA", "whsec_not base64 at all!!"] {
            assert!(HookTarget::new("http://x", bad).is_err(), "{bad}");
        }
    }
}
