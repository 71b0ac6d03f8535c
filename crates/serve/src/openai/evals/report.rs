//! What a run comes to: counts as OpenAI has them, and what those counts are worth: intervals, and differences to other
//! runs over the same rows.

use std::collections::HashMap;
use std::sync::Arc;

use bantam_judge::canonical;
use bantam_judge::compare::{self, compare};
use bantam_judge::stats::percentile;
use bantam_store::{ListQuery, Object};
use serde_json::{Value, json};

use super::runs;
use crate::error::ApiError;
use crate::server::App;

/// Earlier runs that a run is compared with on its own.
const COMPARED: usize = 5;

/// A score and whether it passed; absent where the grader failed.
type Mark = Option<(f64, bool)>;

/// The rows of a run, as far as they are needed here.
struct Rows {
    /// Which row it is, whatever its place; the same row a second time is another.
    keys: Vec<String>,
    groups: Vec<Option<String>>,
    status: Vec<String>,
    /// By criterion.
    graded: Vec<(String, Vec<Mark>)>,
    latency_ms: Vec<f64>,
    cost_usd: Option<f64>,
    usage: Vec<Value>,
}

impl Rows {
    /// Reads the results of a run.
    async fn read(app: &App, run: &Object) -> Result<Rows, ApiError> {
        let names: Vec<String> = run.extra["testing_criteria"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|one| one["name"].as_str().unwrap_or_default().to_string())
            .collect();
        let group_by = run.extra["group_by"].as_str().map(str::to_string);
        let id = run.id.clone();
        let work = move |store: &bantam_store::Store| {
            let mut rows = Rows {
                keys: Vec::new(),
                groups: Vec::new(),
                status: Vec::new(),
                graded: names.into_iter().map(|name| (name, Vec::new())).collect(),
                latency_ms: Vec::new(),
                cost_usd: None,
                usage: Vec::new(),
            };
            let mut seen = HashMap::new();
            let mut after = None;
            loop {
                let page = store.page_of_lines(&id, after, true, None, 200)?;
                let Some(last) = page.last() else { break };
                after = Some(last.n);
                for line in &page {
                    if let Ok(item) = serde_json::from_str::<Value>(&line.body) {
                        rows.add(&item, group_by.as_deref(), &mut seen);
                    }
                }
            }
            Ok(rows)
        };
        app.store(work).await
    }

    fn add(&mut self, item: &Value, group_by: Option<&str>, seen: &mut HashMap<String, usize>) {
        let source = &item["datasource_item"];
        let key = canonical(source).to_string();
        let times = seen.entry(key.clone()).or_insert(0);
        *times += 1;
        self.keys.push(format!("{times} {key}"));
        let field = group_by.unwrap_or("group");
        let mut place = source;
        for key in field.trim_start_matches("item.").split('.') {
            place = &place[key];
        }
        self.groups.push(match place {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            other => Some(other.to_string()),
        });
        self.status
            .push(item["status"].as_str().unwrap_or_default().to_string());
        let results = item["results"].as_array();
        for (at, (_, graded)) in self.graded.iter_mut().enumerate() {
            let result = results.and_then(|all| all.get(at)).unwrap_or(&Value::Null);
            let score = result["score"].as_f64();
            graded.push(score.map(|score| (score, result["passed"] == true)));
        }
        self.latency_ms.extend(item["latency_ms"].as_f64());
        if let Some(cost) = item["cost_usd"].as_f64() {
            self.cost_usd = Some(self.cost_usd.unwrap_or(0.0) + cost);
        }
        let usage = item["usage_per_model"].as_array().into_iter().flatten();
        for one in usage {
            let known = self
                .usage
                .iter_mut()
                .find(|known| known["model_name"] == one["model_name"]);
            match known {
                None => self.usage.push(one.clone()),
                Some(known) => {
                    for name in [
                        "invocation_count",
                        "prompt_tokens",
                        "completion_tokens",
                        "cached_tokens",
                        "total_tokens",
                    ] {
                        let sum =
                            known[name].as_u64().unwrap_or(0) + one[name].as_u64().unwrap_or(0);
                        known[name] = json!(sum);
                    }
                }
            }
        }
    }

    /// The groups, if every row has one.
    fn grouped(&self) -> Option<Vec<String>> {
        self.groups.iter().cloned().collect()
    }

    /// 1 where a row passed all criteria, 0 where it did not or could not be judged.
    fn passes(&self) -> Vec<f64> {
        let pass = |status: &String| f64::from(u8::from(status == "pass"));
        self.status.iter().map(pass).collect()
    }
}

/// Writes what the rows come to into the run.
pub(crate) async fn conclude(app: &Arc<App>, run: &mut Object) -> Result<(), ApiError> {
    let rows = Rows::read(app, run).await?;
    let count = |status: &str| rows.status.iter().filter(|one| *one == status).count();
    run.body["result_counts"] = json!({
        "total": run.body["result_counts"]["total"], "passed": count("pass"),
        "failed": count("fail"), "errored": count("error"),
    });
    run.body["per_model_usage"] = json!(rows.usage);
    let groups = rows.grouped();
    let groups = groups.as_deref();
    let mut results = Vec::new();
    for (name, graded) in &rows.graded {
        let passed = graded
            .iter()
            .flatten()
            .filter(|(_, passed)| *passed)
            .count();
        let errored = graded.iter().filter(|one| one.is_none()).count();
        // A row that could not be judged is no pass, and has no score.
        let passes: Vec<f64> = graded
            .iter()
            .map(|one| f64::from(u8::from(one.is_some_and(|(_, passed)| passed))))
            .collect();
        let (scores, of): (Vec<f64>, Vec<String>) = graded
            .iter()
            .enumerate()
            .filter_map(|(i, one)| {
                let group = groups.map(|groups| groups[i].clone()).unwrap_or_default();
                one.map(|(score, _)| (score, group))
            })
            .unzip();
        results.push(json!({
            "testing_criteria": name, "passed": passed,
            "failed": graded.len() - passed - errored, "errored": errored,
            "pass_rate": compare::score(&passes, groups),
            "score": compare::score(&scores, groups.map(|_| of.as_slice())),
        }));
    }
    run.body["per_testing_criteria_results"] = json!(results);
    let at = |percent| percentile(&rows.latency_ms, percent);
    run.body["statistics"] = json!({
        "pass_rate": compare::score(&rows.passes(), groups),
        "latency_ms": {"p50": at(50.0), "p95": at(95.0)},
        "cost_usd": rows.cost_usd,
        "comparisons": earlier(app, run, &rows).await?,
    });
    Ok(())
}

/// The differences to the last runs of the same eval that are over.
async fn earlier(app: &Arc<App>, run: &Object, ours: &Rows) -> Result<Vec<Value>, ApiError> {
    let query = ListQuery {
        limit: COMPARED,
        label: Some("completed".to_string()),
        parent: Some(run.parent.clone()),
        ..ListQuery::default()
    };
    let owner = run.owner.clone();
    let page = app.store(move |store| store.list(runs::KIND.name, &owner, &query));
    let mut all = Vec::new();
    for other in page.await?.map(|page| page.objects).unwrap_or_default() {
        if other.id != run.id {
            let theirs = Rows::read(app, &other).await?;
            all.extend(difference(ours, &theirs, &other));
        }
    }
    Ok(all)
}

/// The difference of two runs of an eval, asked for by name.
pub(crate) async fn between(app: &App, run: &Object, other: &Object) -> Result<Value, ApiError> {
    let ours = Rows::read(app, run).await?;
    let theirs = Rows::read(app, other).await?;
    difference(&ours, &theirs, other).ok_or_else(|| {
        let message = format!("`{}` and `{}` share no row", run.id, other.id);
        ApiError::invalid("compare_to", message)
    })
}

/// Compares row by row what both runs have; `None` if that is nothing.
fn difference(ours: &Rows, theirs: &Rows, other: &Object) -> Option<Value> {
    let places: HashMap<&str, usize> = theirs
        .keys
        .iter()
        .enumerate()
        .map(|(i, key)| (key.as_str(), i))
        .collect();
    let pairs: Vec<(usize, usize)> = ours
        .keys
        .iter()
        .enumerate()
        .filter_map(|(i, key)| places.get(key.as_str()).map(|j| (i, *j)))
        .collect();
    if pairs.is_empty() {
        return None;
    }
    let all_groups = ours.grouped();
    let groups_of = |rows: &[usize]| {
        let groups = all_groups.as_ref()?;
        Some(rows.iter().map(|i| groups[*i].clone()).collect::<Vec<_>>())
    };
    let both = |a: &[f64], b: &[f64]| {
        let a: Vec<f64> = pairs.iter().map(|(i, _)| a[*i]).collect();
        let b: Vec<f64> = pairs.iter().map(|(_, j)| b[*j]).collect();
        let rows: Vec<usize> = pairs.iter().map(|(i, _)| *i).collect();
        compare(&a, &b, groups_of(&rows).as_deref())
    };
    let mut criteria = Vec::new();
    for (name, graded) in &ours.graded {
        let Some((_, other)) = theirs.graded.iter().find(|(known, _)| known == name) else {
            continue;
        };
        // Rows that a grader failed on, in either run, say nothing of its scores.
        let scored: Vec<(usize, f64, f64)> = pairs
            .iter()
            .filter_map(|(i, j)| Some((*i, graded[*i]?.0, other[*j]?.0)))
            .collect();
        let rows: Vec<usize> = scored.iter().map(|(i, ..)| *i).collect();
        let a: Vec<f64> = scored.iter().map(|(_, a, _)| *a).collect();
        let b: Vec<f64> = scored.iter().map(|(_, _, b)| *b).collect();
        let score = compare(&a, &b, groups_of(&rows).as_deref());
        criteria.push(json!({"testing_criteria": name, "score": score}));
    }
    Some(json!({
        "run_id": other.id, "name": other.body["name"], "model": other.body["model"],
        "rows_in_common": pairs.len(),
        "rows_only_here": ours.keys.len() - pairs.len(),
        "rows_only_there": theirs.keys.len() - pairs.len(),
        "pass_rate": both(&ours.passes(), &theirs.passes()),
        "criteria": criteria,
    }))
}
