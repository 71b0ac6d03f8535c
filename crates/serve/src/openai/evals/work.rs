//! The work of a run: a task reads the rows, asks the model that is judged, has every grader look at the answer, and
//! keeps what came of it. What is kept is not asked again when the server starts anew.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bantam_store::{Line, Object};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::asking::{Asked, Asker};
use super::criteria::{self, Criterion};
use super::grade::{Graded, grade};
use super::prompt::{self, Prompt};
use super::rows::{ROWS_MAX, Row, Rows, Source, of_message};
use super::{report, runs};
use crate::error::ApiError;
use crate::ids;
use crate::server::App;

/// Rows that are worked on at the same time.
const AT_ONCE: usize = 8;
/// How often a run's counts are kept while it runs.
const COUNTED_EVERY: Duration = Duration::from_millis(500);
/// Graders' programs that run at the same time.
pub(crate) const PROGRAMS: usize = 2;

/// Takes up all runs that were not finished when the server stopped.
pub(crate) async fn resume(app: &Arc<App>) {
    let left = app.store(|store| store.unfinished(runs::KIND.name, &["queued", "in_progress"]));
    match left.await {
        Ok(all) => all.into_iter().for_each(|run| start(app, run)),
        Err(error) => tracing::error!(message = error.message, "eval runs were not taken up"),
    }
}

/// Starts the task.
pub(crate) fn start(app: &Arc<App>, run: Object) {
    let id = run.id.clone();
    let stop = app.evals.begin(&id, false);
    let app = Arc::clone(app);
    tokio::spawn(async move {
        let mut work = Work {
            app: Arc::clone(&app),
            run,
            stop,
            told: Instant::now(),
        };
        if let Err(error) = work.run().await {
            tracing::warn!(id, message = error.message, "an eval run failed");
            let _ = work.fail(&error).await;
        }
        app.evals.end(&id);
    });
}

struct Work {
    app: Arc<App>,
    run: Object,
    stop: Arc<AtomicBool>,
    /// When the counts were last kept.
    told: Instant,
}

/// What rows are worked on with.
struct Plan {
    asker: Asker,
    criteria: Vec<Criterion>,
    prompt: Option<Prompt>,
    run: String,
    eval: String,
}

impl Work {
    async fn run(&mut self) -> Result<(), ApiError> {
        let criteria = criteria::kept(&self.run.extra["testing_criteria"])?;
        let source = Source::of_kept(&self.run.extra["source"], &self.run.body["data_source"]);
        let prompt = match self.run.body["data_source"]["type"].as_str() {
            Some("jsonl") => None,
            _ => prompt::of_kept(&self.run.body["data_source"], &source)?,
        };
        if self.run.label == "queued" {
            let total = self.validate(source.clone()).await?;
            self.run.body["result_counts"]["total"] = json!(total);
            self.enter("in_progress").await?;
        }
        let plan = Arc::new(Plan {
            asker: Asker {
                app: Arc::clone(&self.app),
                owner: self.run.owner.clone(),
                stop: Arc::clone(&self.stop),
            },
            criteria,
            prompt,
            run: self.run.id.clone(),
            eval: self.run.parent.clone(),
        });
        self.work_through(source, &plan).await?;
        let end = if self.stop.load(Ordering::Relaxed) {
            "canceled"
        } else {
            "completed"
        };
        report::conclude(&self.app, &mut self.run).await?;
        self.enter(end).await
    }

    async fn enter(&mut self, status: &str) -> Result<(), ApiError> {
        self.run.label = status.to_string();
        self.run.body["status"] = json!(status);
        self.keep().await
    }

    async fn keep(&self) -> Result<(), ApiError> {
        self.app.keep(&self.run).await.map(drop)
    }

    async fn fail(&mut self, error: &ApiError) -> Result<(), ApiError> {
        let code = error.code.unwrap_or("failed");
        self.run.body["error"] = json!({"code": code, "message": error.message});
        self.enter("failed").await
    }

    /// Reads all rows before anything is asked: how many there are, or which is not what the eval says.
    async fn validate(&self, source: Source) -> Result<usize, ApiError> {
        let schema = &self.run.extra["item_schema"];
        let validator = match schema {
            Value::Object(_) => Some(prompt::validator(schema).map_err(ApiError::bad_file)?),
            _ => None,
        };
        let mut rows = Rows::new(&self.app, &self.run.owner, source);
        let mut n = 0;
        while let Some(row) = rows.next().await? {
            n += 1;
            if n > ROWS_MAX {
                let message = format!("a run has at most {ROWS_MAX} rows");
                return Err(ApiError::bad_file(message));
            }
            if let Some(error) = validator
                .as_ref()
                .and_then(|v| v.iter_errors(&row.item).next())
            {
                let at = error.instance_path.to_string();
                let error = error.to_string();
                let message = format!(
                    "{}: the item does not fit the eval's schema at `{at:.100}`: {error:.300}",
                    rows.place()
                );
                return Err(ApiError::bad_file(message));
            }
        }
        if n == 0 {
            return Err(ApiError::bad_file("there are no rows"));
        }
        Ok(n)
    }

    /// Works on what has no result yet.
    async fn work_through(&mut self, source: Source, plan: &Arc<Plan>) -> Result<(), ApiError> {
        let id = self.run.id.clone();
        let answered = self.app.store(move |store| store.answered(&id)).await?;
        let answered: HashSet<u64> = answered.into_iter().map(|(n, _)| n).collect();
        let mut rows = Rows::new(&self.app, &self.run.owner, source);
        let (mut n, mut is_over) = (0, false);
        let mut tasks: JoinSet<(u64, Value)> = JoinSet::new();
        loop {
            is_over |= self.stop.load(Ordering::Relaxed);
            if !is_over && tasks.len() < AT_ONCE {
                let Some(row) = rows.next().await? else {
                    is_over = true;
                    continue;
                };
                n += 1;
                if !answered.contains(&(n - 1)) {
                    let (plan, at) = (Arc::clone(plan), n - 1);
                    tasks.spawn(async move { (at, one(&plan, at, row).await) });
                }
                continue;
            }
            let Some(done) = tasks.join_next().await else {
                return Ok(());
            };
            let (at, item) = done.map_err(|_| ApiError::internal("a row's task failed"))?;
            // What is stopped in the middle of a row has no result.
            if self.stop.load(Ordering::Relaxed) && item["status"] == "error" {
                continue;
            }
            self.note(at, item).await?;
        }
    }

    /// Keeps a row's result.
    async fn note(&mut self, at: u64, item: Value) -> Result<(), ApiError> {
        let status = item["status"].as_str().unwrap_or_default();
        let count = match status {
            "pass" => "passed",
            "fail" => "failed",
            _ => "errored",
        };
        let counts = &mut self.run.body["result_counts"];
        counts[count] = json!(counts[count].as_u64().unwrap_or(0) + 1);
        let line = Line {
            n: at,
            failed: status != "pass",
            tokens: item["sample"]["usage"]["total_tokens"]
                .as_u64()
                .unwrap_or(0),
            body: item.to_string(),
        };
        let id = self.run.id.clone();
        self.app
            .store(move |store| store.put_line(&id, &line))
            .await?;
        // The rows may stand in the run itself, which makes it long. At the end it is counted anew.
        if self.told.elapsed() < COUNTED_EVERY {
            return Ok(());
        }
        self.told = Instant::now();
        self.keep().await
    }
}

/// Works on a row; the output item.
async fn one(plan: &Plan, at: u64, row: Row) -> Value {
    let item = Arc::new(row.item);
    let mut shown = json!({
        "id": format!("outputitem_{}_{at}", plan.run.trim_start_matches("evalrun_")),
        "object": "eval.run.output_item", "created_at": ids::now(), "run_id": plan.run, "eval_id": plan.eval,
        "status": "error", "datasource_item_id": at, "datasource_item": *item, "results": [],
        "sample": null, "latency_ms": null, "remembered": false, "cost_usd": null,
    });
    let mut spent = Spent::default();
    let sample = match &plan.prompt {
        None => {
            let sample = row.sample.unwrap_or(Value::Null);
            shown["sample"] = given_sample(&item, &sample);
            sample
        }
        Some(prompt) => match ask(plan, prompt, &item).await {
            Ok((asked, told)) => {
                let sample = of_message(&asked.message, &asked.finish_reason, &json!(asked.model));
                shown["sample"] = told;
                shown["latency_ms"] = json!(asked.latency_ms);
                shown["remembered"] = json!(asked.remembered);
                spent.add(&asked);
                sample
            }
            Err((why, told)) => {
                shown["sample"] = told;
                shown["sample"]["error"] = json!({"code": "sampling_failed", "message": why});
                shown["cost_usd"] = spent.cost();
                return shown;
            }
        },
    };
    let sample = Arc::new(sample);
    let (mut passed, mut errored, mut results) = (true, false, Vec::new());
    for criterion in &plan.criteria {
        let graded = grade(&plan.asker, criterion, &item, &sample).await;
        graded.asked.iter().for_each(|asked| spent.add(asked));
        passed &= graded.passed;
        errored |= graded.error.is_some();
        results.push(result(criterion, graded));
    }
    shown["status"] = json!(match (errored, passed) {
        (true, _) => "error",
        (false, true) => "pass",
        (false, false) => "fail",
    });
    shown["results"] = Value::Array(results);
    shown["cost_usd"] = spent.cost();
    shown["usage_per_model"] = spent.usage();
    shown
}

async fn ask(
    plan: &Plan,
    prompt: &Prompt,
    item: &Value,
) -> Result<(Asked, Value), (String, Value)> {
    let mut told = json!({
        "input": [], "output": [], "finish_reason": null, "model": prompt.model, "usage": null, "error": null,
    });
    for name in ["temperature", "top_p", "seed", "max_completion_tokens"] {
        told[name] = prompt.sampled(name);
    }
    let body = match prompt.body(item) {
        Ok(body) => body,
        Err(why) => return Err((why, told)),
    };
    told["input"] = body["messages"].clone();
    match plan.asker.ask(&prompt.model, body).await {
        Ok(asked) => {
            told["output"] = json!([asked.message]);
            told["finish_reason"] = json!(asked.finish_reason);
            told["model"] = json!(asked.model);
            told["usage"] = asked.usage();
            Ok((asked, told))
        }
        Err(error) => Err((error.message, told)),
    }
}

/// An answer that the row brought along, as output items show answers.
fn given_sample(item: &Value, sample: &Value) -> Value {
    if sample.is_null() {
        return Value::Null;
    }
    let input = match &item["input"] {
        Value::Array(messages) => json!(messages),
        _ => json!([]),
    };
    json!({
        "input": input,
        "output": [{"role": "assistant", "content": sample["output_text"]}],
        "finish_reason": sample["finish_reason"], "model": sample["model"], "usage": null, "error": null,
        "temperature": null, "top_p": null, "seed": null, "max_completion_tokens": null,
    })
}

fn result(criterion: &Criterion, graded: Graded) -> Value {
    let mut result = json!({
        "name": criterion.name, "type": criterion.kind, "passed": graded.passed,
        "score": graded.score, "sample": graded.sample,
    });
    if !graded.inner.is_empty() {
        result["sub_scores"] = Value::Object(graded.inner);
    }
    if let Some(error) = graded.error {
        result["error"] = json!({"message": error.message()});
    }
    result
}

/// What a row took.
#[derive(Default)]
struct Spent {
    models: Vec<(String, [u64; 4])>,
    cost: Option<f64>,
}

impl Spent {
    fn add(&mut self, asked: &Asked) {
        if let Some(cost) = asked.cost_usd {
            self.cost = Some(self.cost.unwrap_or(0.0) + cost);
        }
        let tokens = [
            1,
            asked.prompt_tokens,
            asked.completion_tokens,
            asked.cached_tokens,
        ];
        let known = self
            .models
            .iter_mut()
            .find(|(name, _)| *name == asked.model);
        match known {
            Some((_, sums)) => sums.iter_mut().zip(tokens).for_each(|(sum, n)| *sum += n),
            None => self.models.push((asked.model.clone(), tokens)),
        }
    }

    fn cost(&self) -> Value {
        json!(self.cost)
    }

    fn usage(&self) -> Value {
        let of = |(name, n): &(String, [u64; 4])| {
            json!({
                "model_name": name, "invocation_count": n[0], "prompt_tokens": n[1],
                "completion_tokens": n[2], "cached_tokens": n[3], "total_tokens": n[1] + n[2],
            })
        };
        self.models.iter().map(of).collect()
    }
}
