//! `/v1/evals/{id}/runs`: starting, looking up, cancelling, and the items that came out.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, Request, State};
use bantam_judge::template::Root;
use bantam_store::{ListQuery, Object};
use serde_json::{Value, json};

use super::criteria::Criterion;
use super::prompt::Prompt;
use super::rows::Source;
use super::{asking, criteria, grade, report, work};
use crate::caller::Caller;
use crate::error::ApiError;
use crate::ids;
use crate::openai::fields::Fields;
use crate::openai::objects::Kind;
use crate::query::{self, Id, Ids};
use crate::server::App;

pub(crate) const KIND: Kind = Kind {
    name: "eval.run",
    noun: "eval run",
};

/// The states of a run that is not over.
const OPEN: [&str; 2] = ["queued", "in_progress"];

/// `POST /v1/evals/{id}/runs`
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    Id(eval): Id,
    http: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&http)?.owner;
    let body = app.read_json(http).await?;
    let eval = super::KIND.find(&app, &owner, &eval).await?;
    let mut fields = Fields::of_body(&body)?;
    let shown: Value = fields.need("data_source")?;
    let (source, prompt) = data_source(&app, &owner, &eval, shown.clone()).await?;
    let metadata = fields.metadata()?.unwrap_or_default();
    let name: Option<String> = fields.take("name")?;
    fields.finish(&[])?;
    let criteria = criteria::kept(&eval.body["testing_criteria"])?;
    ready(&app, &criteria, prompt.as_ref()).await?;
    if prompt.is_none() && !source.is_kept() {
        no_model_needed(&criteria, &source)?;
    }
    let created = ids::now();
    let id = ids::random("evalrun_");
    let model = prompt.as_ref().map_or(Value::Null, |p| json!(p.model));
    let body = json!({
        "id": id, "object": "eval.run", "eval_id": eval.id, "status": "queued", "model": model,
        "name": name.unwrap_or_default(), "created_at": created,
        "report_url": format!("/v1/evals/{}/runs/{id}", eval.id),
        "result_counts": {"total": 0, "passed": 0, "failed": 0, "errored": 0},
        "per_model_usage": [], "per_testing_criteria_results": [], "data_source": shown,
        "error": null, "metadata": metadata, "statistics": null,
    });
    let object = Object {
        kind: KIND.name.to_string(),
        id,
        owner,
        parent: eval.id.clone(),
        created,
        label: "queued".to_string(),
        expires: None,
        metadata,
        body: body.clone(),
        // A run is judged by what the eval was when it began.
        extra: json!({
            "testing_criteria": eval.body["testing_criteria"], "item_schema": eval.extra["item_schema"],
            "group_by": eval.extra["group_by"], "source": source.to_kept(),
        }),
    };
    let kept = object.clone();
    app.store(move |store| store.insert(&kept)).await?;
    work::start(&app, object);
    Ok(Json(body))
}

/// Reads where rows come from and what is asked about them.
async fn data_source(
    app: &App,
    owner: &str,
    eval: &Object,
    shown: Value,
) -> Result<(Source, Option<Prompt>), ApiError> {
    let mut fields = Fields::of("data_source", shown)?;
    let kind: String = fields.need("type")?;
    let kept = match kind.as_str() {
        "jsonl" => "",
        "completions" => "stored_completions",
        "responses" => "responses",
        _ => {
            let message = "`data_source.type` must be `jsonl`, `completions` or `responses`";
            return Err(ApiError::invalid("data_source.type", message));
        }
    };
    let mut place = fields
        .object("source")?
        .ok_or_else(|| ApiError::missing("data_source.source"))?;
    // An eval of kept answers says which; a run may say more.
    if let (Some(wanted), true) = (eval.extra["stored"].as_object(), !kept.is_empty()) {
        place.default_metadata(wanted);
    }
    let source = Source::read(app, owner, place, kept).await?;
    let prompt = if kind == "jsonl" {
        None
    } else {
        Prompt::read(&mut fields, &source)?
    };
    fields.finish(&[])?;
    if let Some(prompt) = &prompt {
        check_prompt(prompt, eval)?;
    }
    Ok((source, prompt))
}

/// Refuses messages that read what no row has.
fn check_prompt(prompt: &Prompt, eval: &Object) -> Result<(), ApiError> {
    let known = eval.extra["item_schema"]["properties"].as_object();
    for place in prompt.places() {
        let wrong = match (place.root, place.field(), known) {
            (Root::Sample, ..) => "there is no answer yet when the model is asked",
            (Root::Item, Some(field), Some(known))
                if !known.is_empty() && !known.contains_key(field) =>
            {
                "the eval's `item_schema` does not have it"
            }
            _ => continue,
        };
        let message = format!("`data_source.input_messages` reads `{place}`: {wrong}");
        return Err(ApiError::invalid("data_source.input_messages", message));
    }
    Ok(())
}

/// Refuses what would fail in every row: models that cannot be asked, programs that cannot be run.
pub(super) async fn ready(
    app: &App,
    criteria: &[Criterion],
    prompt: Option<&Prompt>,
) -> Result<(), ApiError> {
    if let Some(refused) =
        prompt.and_then(|prompt| asking::refusal(app, "data_source.model", &prompt.model))
    {
        return Err(refused);
    }
    for criterion in criteria {
        let param = format!("testing_criteria `{}`", criterion.name);
        for model in criterion.models() {
            if let Some(refused) = asking::refusal(app, &param, model) {
                return Err(refused);
            }
        }
        if criterion.runs_programs() {
            let refused = match &app.config.sandbox {
                Some(sandbox) => {
                    let sandbox = Arc::clone(sandbox);
                    let asked = tokio::task::spawn_blocking(move || sandbox.refusal()).await;
                    asked.unwrap_or_else(|_| Some("it was not tried".to_string()))
                }
                None => Some(grade::NO_SANDBOX.to_string()),
            };
            if let Some(why) = refused {
                let message = format!("`{}` is a program, and {why}", criterion.name);
                return Err(ApiError::unsupported(param, message));
            }
        }
        if let Some(Some(model)) = criterion.embedder()
            && !app.models.embedders().iter().any(|one| one.id == model)
            && !app.models.has(model)
        {
            let message = format!(
                "`{}` compares vectors of `{model:.80}`, which is not served here",
                criterion.name
            );
            return Err(ApiError::invalid(param, message));
        }
    }
    Ok(())
}

/// Rows without answers, and nobody to ask: every grader that reads an answer would fail on every row.
fn no_model_needed(criteria: &[Criterion], source: &Source) -> Result<(), ApiError> {
    let reads_answers = criteria.iter().find(|one| {
        let places = one.places();
        places.iter().any(|place| place.root == Root::Sample)
    });
    let (Some(criterion), Source::Content(rows)) = (reads_answers, source) else {
        return Ok(());
    };
    match rows.iter().position(|row| row["sample"].is_null()) {
        Some(at) => {
            let param = format!("data_source.source.content[{at}].sample");
            let message = format!(
                "`{param}` is absent and `{}` reads it; bring answers along, or ask a model with a data source of type `completions`",
                criterion.name
            );
            Err(ApiError::invalid(param, message))
        }
        None => Ok(()),
    }
}

/// A run of an eval's.
async fn find(app: &App, owner: &str, eval: &str, run: &str) -> Result<Object, ApiError> {
    let found = KIND.find(app, owner, run).await?;
    if found.parent == eval {
        Ok(found)
    } else {
        Err(ApiError::no_object(KIND.noun, run))
    }
}

/// `GET /v1/evals/{id}/runs`
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    Id(eval): Id,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    super::KIND.find(&app, &owner, &eval).await?;
    let mut query = query::list(raw.as_deref(), Some("status"), false, true)?;
    if let Some(status) = &query.label
        && !["queued", "in_progress", "completed", "canceled", "failed"].contains(&status.as_str())
    {
        let message =
            "`status` must be `queued`, `in_progress`, `completed`, `canceled` or `failed`";
        return Err(ApiError::invalid("status", message));
    }
    query.parent = Some(eval);
    KIND.list(&app, owner, query).await
}

/// `GET /v1/evals/{id}/runs/{run}`; `?compare_to=RUN` adds the difference to another run.
pub(crate) async fn retrieve(
    State(app): State<Arc<App>>,
    Ids([eval, run]): Ids<2>,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let mut other = None;
    for (name, value) in query::pairs(raw.as_deref()) {
        match name.as_str() {
            "compare_to" => other = Some(value),
            _ => return Err(ApiError::unknown(&name)),
        }
    }
    let run = find(&app, &owner, &eval, &run).await?;
    let mut body = run.body.clone();
    if let Some(other) = other {
        let other = find(&app, &owner, &eval, &other).await?;
        for one in [&run, &other] {
            if one.label != "completed" {
                let message = format!(
                    "`{}` is `{}`; only runs that are completed can be compared",
                    one.id, one.label
                );
                return Err(ApiError::conflict("wrong_state", message));
            }
        }
        body["comparison"] = report::between(&app, &run, &other).await?;
    }
    Ok(Json(body))
}

/// `POST /v1/evals/{id}/runs/{run}/cancel`, and without `/cancel`: rows that are done stay.
pub(crate) async fn cancel(
    State(app): State<Arc<App>>,
    Ids([eval, run]): Ids<2>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let run = find(&app, &owner, &eval, &run).await?;
    if !OPEN.contains(&run.label.as_str()) {
        let message = format!("the run is `{}` and cannot be canceled", run.label);
        return Err(ApiError::conflict("not_cancellable", message));
    }
    app.evals.cancel(&run.id);
    wait(&app, &owner, &run.id).await;
    Ok(Json(find(&app, &owner, &eval, &run.id).await?.body))
}

/// Waits until nobody works on a run, or a while.
async fn wait(app: &Arc<App>, owner: &str, run: &str) {
    for _ in 0..100 {
        match KIND.find(app, owner, run).await {
            Ok(run) if OPEN.contains(&run.label.as_str()) => {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
            _ => return,
        }
    }
}

/// `DELETE /v1/evals/{id}/runs/{run}`, with its items.
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    Ids([eval, run]): Ids<2>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let run = find(&app, &owner, &eval, &run).await?;
    if app.evals.cancel(&run.id) {
        wait(&app, &owner, &run.id).await;
    }
    let id = run.id.clone();
    KIND.delete(&app, owner, &run.id).await?;
    Ok(Json(
        json!({"run_id": id, "object": "eval.run.deleted", "deleted": true}),
    ))
}

/// Stops all runs of an eval that is to be deleted.
pub(super) async fn stop_all(app: &Arc<App>, owner: &str, eval: &str) -> Result<(), ApiError> {
    let query = ListQuery {
        limit: 10_000,
        parent: Some(eval.to_string()),
        ..ListQuery::default()
    };
    let asked = owner.to_string();
    let page = app
        .store(move |store| store.list(KIND.name, &asked, &query))
        .await?;
    for run in page.map(|page| page.objects).unwrap_or_default() {
        if OPEN.contains(&run.label.as_str()) && app.evals.cancel(&run.id) {
            wait(app, owner, &run.id).await;
        }
    }
    Ok(())
}

/// The number in an item's name.
fn number(run: &str, item: &str) -> Option<u64> {
    let prefix = format!("outputitem_{}_", run.trim_start_matches("evalrun_"));
    let digits = item.strip_prefix(&prefix)?;
    digits
        .parse()
        .ok()
        .filter(|n: &u64| n.to_string() == digits)
}

/// `GET /v1/evals/{id}/runs/{run}/output_items`; what could not be judged counts as `fail`.
pub(crate) async fn items(
    State(app): State<Arc<App>>,
    Ids([eval, run]): Ids<2>,
    RawQuery(raw): RawQuery,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let run = find(&app, &owner, &eval, &run).await?.id;
    let query = query::list(raw.as_deref(), Some("status"), false, true)?;
    let failed = match query.label.as_deref() {
        None => None,
        Some("pass") => Some(false),
        Some("fail") => Some(true),
        Some(_) => {
            return Err(ApiError::invalid(
                "status",
                "`status` must be `pass` or `fail`",
            ));
        }
    };
    let after = match &query.after {
        None => None,
        Some(after) => Some(
            number(&run, after)
                .ok_or_else(|| ApiError::invalid("after", "`after` names nothing of this list"))?,
        ),
    };
    let (limit, ascending) = (query.limit, query.ascending);
    let page = app.store(move |store| {
        store.page_of_lines(&run, after, ascending, failed, limit.saturating_add(1))
    });
    let page = page.await?;
    let has_more = page.len() > limit;
    let data = page.into_iter().take(limit).map(|line| shown(&line.body));
    Ok(Json(query::list_of(data.collect(), has_more)))
}

fn shown(body: &str) -> Value {
    serde_json::from_str(body).unwrap_or(Value::Null)
}

/// `GET /v1/evals/{id}/runs/{run}/output_items/{item}`
pub(crate) async fn item(
    State(app): State<Arc<App>>,
    Ids([eval, run, item]): Ids<3>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let owner = Caller::of(&request)?.owner;
    let run = find(&app, &owner, &eval, &run).await?.id;
    let missing = || ApiError::no_object("output item", &item);
    let n = number(&run, &item).ok_or_else(missing)?;
    let line = app.store(move |store| store.line(&run, n)).await?;
    line.map(|line| Json(shown(&line.body))).ok_or_else(missing)
}
