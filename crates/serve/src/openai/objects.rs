//! What the endpoints of kept objects do alike: find one of a caller's, list them, forget one.

use axum::Json;
use bantam_store::{ListQuery, Object};
use serde_json::Value;

use crate::error::ApiError;
use crate::ids;
use crate::query;
use crate::server::App;

/// A kind of object: its name in the database, and what errors call it.
#[derive(Clone, Copy)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    pub(crate) noun: &'static str,
}

impl Kind {
    /// The object of this name, if it is the owner's.
    pub(crate) async fn find(self, app: &App, owner: &str, id: &str) -> Result<Object, ApiError> {
        let (owner, wanted) = (owner.to_string(), id.to_string());
        let found = app.store(move |store| store.get(self.name, &owner, &wanted));
        // What has expired is gone, even before it is cleared away.
        let now = ids::now();
        found
            .await?
            .filter(|object| object.expires.is_none_or(|at| at > now))
            .ok_or_else(|| ApiError::no_object(self.noun, id))
    }

    /// A page of the owner's objects, as they are shown.
    pub(crate) async fn list(
        self,
        app: &App,
        owner: String,
        query: ListQuery,
    ) -> Result<Json<Value>, ApiError> {
        let page = app.store(move |store| store.list(self.name, &owner, &query));
        query::page(page.await?, |object| object.body).map(Json)
    }

    /// Forgets an object of the owner's.
    pub(crate) async fn delete(self, app: &App, owner: String, id: &str) -> Result<(), ApiError> {
        let wanted = id.to_string();
        let gone = app.store(move |store| store.delete(self.name, &owner, &wanted));
        if gone.await? {
            Ok(())
        } else {
            Err(ApiError::no_object(self.noun, id))
        }
    }
}
