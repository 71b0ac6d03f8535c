//! What tests of evals share.

use std::time::Duration;

use bantam_serve::Server;
use serde_json::{Value, json};

use super::{Answer, get, send};

pub fn post_to(server: &Server, path: &str, body: &Value) -> Answer {
    send(server, "POST", path, Some(body))
}

pub fn made(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["id"].as_str().unwrap().to_string()
}

pub fn schema() -> Value {
    json!({
        "type": "custom", "include_sample_schema": true,
        "item_schema": {
            "type": "object", "required": ["q", "want"],
            "properties": {"q": {"type": "string"}, "want": {"type": "string"}, "group": {"type": "string"}},
        },
    })
}

pub fn exact() -> Value {
    json!({
        "type": "string_check", "name": "exact", "operation": "eq",
        "input": "{{ sample.output_text }}", "reference": "{{ item.want }}",
    })
}

pub fn close() -> Value {
    json!({
        "type": "text_similarity", "name": "close", "evaluation_metric": "fuzzy_match", "pass_threshold": 0.5,
        "input": "{{ sample.output_text }}", "reference": "{{item.want}}",
    })
}

pub fn rows(answers: &[(&str, &str)]) -> Value {
    let rows = answers.iter().enumerate().map(|(i, (want, answer))| {
        json!({"item": {"q": format!("q{i}"), "want": want}, "sample": {"output_text": answer}})
    });
    rows.collect()
}

pub fn content(rows: Value) -> Value {
    json!({"data_source": {"type": "jsonl", "source": {"type": "file_content", "content": rows}}})
}

/// Waits for the end of a run.
pub fn done(server: &Server, eval: &str, run: &str) -> Value {
    for _ in 0..1000 {
        let run = get(server, &format!("/v1/evals/{eval}/runs/{run}")).json();
        if !["queued", "in_progress"].contains(&run["status"].as_str().unwrap()) {
            return run;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the run does not end");
}
