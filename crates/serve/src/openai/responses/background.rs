//! Responses in the background: the caller gets a name at once and asks for the response when it likes.
//!
//! Each is a task of its own. Whoever takes a response's name out of [`Running`] writes its end, so one that is
//! cancelled as it completes ends once. What a stop of the server cut off is told so at the next start: unlike a
//! batch's line, a response may have been seen half done, and is not begun again behind the caller's back.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bantam_store::{Object, Store, StoreError};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use super::super::answers::Answers;
use super::request::KIND;
use super::{Work, spell};
use crate::error::ApiError;
use crate::server::App;

/// Responses that are being made.
#[derive(Default)]
pub(crate) struct Running {
    tasks: Mutex<HashMap<String, AbortHandle>>,
    ended: Notify,
}

impl Running {
    fn tasks(&self) -> std::sync::MutexGuard<'_, HashMap<String, AbortHandle>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a response out; whoever does that decides how it ends.
    fn take(&self, id: &str) -> Option<AbortHandle> {
        let task = self.tasks().remove(id);
        self.ended.notify_waiters();
        task
    }

    /// Notes something of a response unless its end was decided meanwhile.
    fn while_running(&self, id: &str, note: impl FnOnce()) {
        let tasks = self.tasks();
        if tasks.contains_key(id) {
            note();
        }
    }

    /// Waits until nothing runs.
    pub(crate) async fn idle(&self) {
        loop {
            let ended = self.ended.notified();
            if self.tasks().is_empty() {
                return;
            }
            ended.await;
        }
    }
}

/// Keeps the response as `queued` and goes on with it in a task of its own; how it stands now.
pub(super) fn start(app: &Arc<App>, answers: Answers, mut work: Work) -> Result<Value, ApiError> {
    work.builder.enter("queued");
    work.begin()?;
    let queued = work.builder.response();
    let (id, owner) = (work.id.clone(), work.caller.owner.clone());
    // Held until the task is known, which it might otherwise end before.
    let mut tasks = app.background.tasks();
    let task = tokio::spawn(run(Arc::clone(app), answers, work));
    tasks.insert(id.clone(), task.abort_handle());
    drop(tasks);
    let app = Arc::clone(app);
    tokio::spawn(async move {
        let panicked = task.await.is_err_and(|error| error.is_panic());
        if panicked && app.background.take(&id).is_some() {
            tracing::error!(id, "a response in the background panicked");
            let failed = fail(app.store_now(), &owner, &id);
            failed.unwrap_or_else(|error| tracing::error!(%error, "a failure was not kept"));
        }
    });
    Ok(queued)
}

fn fail(store: &Store, owner: &str, id: &str) -> Result<(), StoreError> {
    if let Some(mut object) = store.get(KIND.name, owner, id)? {
        spell(&mut object, "failed", cause("the request failed"));
        store.update(&object)?;
    }
    Ok(())
}

fn cause(message: &str) -> Value {
    json!({"code": "server_error", "message": message})
}

async fn run(app: Arc<App>, mut answers: Answers, mut work: Work) {
    let mut failed = false;
    let mut is_queued = true;
    while let Some(next) = answers.next().await {
        if std::mem::take(&mut is_queued) {
            work.builder.enter("in_progress");
            app.background.while_running(&work.id, || work.save());
        }
        match next {
            Ok((_, piece)) => work.builder.piece(piece),
            Err(error) => {
                work.builder.fail(&error);
                failed = true;
                break;
            }
        }
    }
    drop(answers);
    if app.background.take(&work.id).is_none() {
        return;
    }
    if failed {
        work.save();
    } else if let Err(error) = work.keep() {
        work.builder.fail(&error);
        work.save();
    }
}

/// Ends a response that is being made; how it stands then.
pub(super) fn cancel(app: &App, mut object: Object) -> Result<Object, ApiError> {
    if stop(app, &object.id) {
        spell(&mut object, "cancelled", Value::Null);
        let kept = app.store_now().update(&object);
        kept.map_err(ApiError::store)?;
    }
    Ok(object)
}

/// Ends the work on a response; whether there was any.
pub(super) fn stop(app: &App, id: &str) -> bool {
    let task = app.background.take(id);
    task.map(|task| task.abort()).is_some()
}

/// Says of every response that a stop of the server cut off that it failed.
pub(crate) async fn settle(app: &App) {
    let settled = app.store(|store| {
        let labels = ["queued", "in_progress"];
        for mut object in store.unfinished(KIND.name, &labels)? {
            let message = "the server stopped before this response was complete; ask again";
            spell(&mut object, "failed", cause(message));
            store.update(&object)?;
        }
        Ok(())
    });
    if let Err(error) = settled.await {
        tracing::error!(
            message = error.message,
            "responses that were cut off were not settled"
        );
    }
}
