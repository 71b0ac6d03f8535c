//! What OpenAI's Evals API gave, kept as JSON: evals, runs, and output items with the answers of that time.

use anyhow::bail;
use serde_json::{Map, Value, json};

use super::{Found, Imported, RowSet};

/// Reads objects of the API, however they are nested: an eval, lists of them, a line each.
pub(super) fn read(value: &Value) -> anyhow::Result<Found> {
    let mut kept = Kept::default();
    kept.collect(value, 0);
    if kept.evals.is_empty() {
        bail!(
            "no eval is in it\nhint: an export is what `client.evals.retrieve`, `runs.list` and `output_items.list` gave, as JSON or a line each"
        );
    }
    let mut found = Found::default();
    for eval in &kept.evals {
        found.evals.push(imported(eval, &kept, &mut found.notes));
    }
    Ok(found)
}

/// The objects that were found.
#[derive(Default)]
struct Kept {
    evals: Vec<Value>,
    runs: Vec<Value>,
    items: Vec<Value>,
}

impl Kept {
    fn collect(&mut self, value: &Value, depth: usize) {
        if depth > 20 {
            return;
        }
        match value["object"].as_str() {
            Some("eval") => self.evals.push(value.clone()),
            Some("eval.run") => self.runs.push(value.clone()),
            Some("eval.run.output_item") => {
                self.items.push(value.clone());
                return;
            }
            _ => {}
        }
        match value {
            Value::Array(values) => values
                .iter()
                .for_each(|value| self.collect(value, depth + 1)),
            Value::Object(map) => map
                .values()
                .for_each(|value| self.collect(value, depth + 1)),
            _ => {}
        }
    }
}

fn imported(eval: &Value, kept: &Kept, notes: &mut Vec<String>) -> Imported {
    let config = &eval["data_source_config"];
    let wanted = match config["type"].as_str() {
        Some(kind @ ("logs" | "stored_completions")) => {
            json!({"type": kind, "metadata": config["metadata"]})
        }
        _ => {
            let properties = &config["schema"]["properties"];
            let schema = match &properties["item"] {
                Value::Null => json!({"type": "object"}),
                schema => schema.clone(),
            };
            json!({
                "type": "custom", "item_schema": schema,
                "include_sample_schema": properties["sample"].is_object(),
            })
        }
    };
    let criteria = eval["testing_criteria"].as_array().into_iter().flatten();
    let mut body = json!({
        "name": eval["name"], "data_source_config": wanted,
        "testing_criteria": criteria.map(grader).collect::<Vec<Value>>(),
    });
    if eval["metadata"].is_object() {
        body["metadata"] = eval["metadata"].clone();
    }
    let mut sets: Vec<RowSet> = Vec::new();
    let id = &eval["id"];
    for item in kept.items.iter().filter(|item| &item["eval_id"] == id) {
        let run = &item["run_id"];
        let known = kept.runs.iter().find(|known| &known["id"] == run);
        let name = known
            .and_then(|run| run["name"].as_str())
            .filter(|name| !name.is_empty())
            .or(run.as_str())
            .unwrap_or_default();
        if !sets.iter().any(|set| set.name == name) {
            sets.push(RowSet {
                name: name.to_owned(),
                rows: Vec::new(),
                // The answers of that time are judged again.
                runs: vec![(name.to_owned(), json!({"type": "jsonl"}))],
            });
        }
        if let Some(set) = sets.iter_mut().find(|set| set.name == name) {
            set.rows.push(row(item));
        }
    }
    if sets.is_empty() {
        let name = eval["name"].as_str().unwrap_or_default();
        notes.push(format!(
            "eval `{name}`: no output items are in the file, so it has no rows"
        ));
    }
    Imported { eval: body, sets }
}

/// A grader without what the API adds to it.
fn grader(shown: &Value) -> Value {
    let fields = shown.as_object().into_iter().flatten();
    let kept = fields.filter(|(name, value)| *name != "id" && !value.is_null());
    Value::Object(
        kept.map(|(name, value)| (name.clone(), value.clone()))
            .collect(),
    )
}

fn row(item: &Value) -> Value {
    let source = match &item["datasource_item"] {
        Value::Object(map) => map.clone(),
        _ => Map::new(),
    };
    let sample = &item["sample"];
    let output = sample["output"].as_array().and_then(|all| all.last());
    let text = match output.map(|message| &message["content"]) {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Array(parts)) => Some(
            parts
                .iter()
                .filter_map(|part| part["text"].as_str())
                .collect(),
        ),
        _ => None,
    };
    let mut row = json!({"item": source});
    if let Some(text) = text {
        row["sample"] = json!({
            "output_text": text, "model": sample["model"], "finish_reason": sample["finish_reason"],
        });
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_export_keeps_its_graders_and_its_answers() {
        let export = json!({
            "eval": {
                "object": "eval", "id": "eval_1", "name": "tickets", "metadata": {"a": "b"},
                "data_source_config": {"type": "custom", "schema": {"properties": {
                    "item": {"type": "object", "properties": {"q": {"type": "string"}}}, "sample": {"type": "object"}}}},
                "testing_criteria": [{"id": "x", "type": "string_check", "name": "n", "input": "{{sample.output_text}}",
                    "reference": "{{item.q}}", "operation": "eq"}],
            },
            "runs": {"object": "list", "data": [{"object": "eval.run", "id": "r1", "eval_id": "eval_1", "name": "gpt-4o"}]},
            "items": [
                {"object": "eval.run.output_item", "eval_id": "eval_1", "run_id": "r1", "datasource_item": {"q": "a"},
                 "sample": {"model": "gpt-4o", "output": [{"role": "assistant", "content": "b"}]}},
                {"object": "eval.run.output_item", "eval_id": "eval_1", "run_id": "r1", "datasource_item": {"q": "c"},
                 "sample": {"output": [{"role": "assistant", "content": [{"type": "output_text", "text": "d"}]}]}},
            ],
        });
        let found = read(&export).unwrap();
        let one = &found.evals[0];
        assert_eq!(
            one.eval["data_source_config"]["include_sample_schema"],
            true
        );
        assert_eq!(one.eval["testing_criteria"][0].get("id"), None);
        assert_eq!((one.sets.len(), one.sets[0].name.as_str()), (1, "gpt-4o"));
        assert_eq!(one.sets[0].rows[1]["sample"]["output_text"], "d");
        assert_eq!(one.sets[0].rows[0]["item"], json!({"q": "a"}));
        assert!(read(&json!({"object": "list", "data": []})).is_err());
    }
}
