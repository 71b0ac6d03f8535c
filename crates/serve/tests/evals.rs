//! Evals: graders, rows, runs, what runs come to, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bantam_engine::EngineConfig;
use bantam_serve::{
    ProviderAnswer, Providers, Sandbox, SandboxError, ServeConfig, ServedEmbedder, Server,
};
use bantam_store::Store;
use serde_json::{Value, json};
use support::evals::{close, content, done, exact, made, post_to, rows, schema};
use support::{ask, config, get, model, models, post, send, start};

/// Another server's models: `echo` repeats the last message, `judge` gives the marks it finds there.
#[derive(Default)]
struct Elsewhere {
    asked: AtomicUsize,
    delay: Duration,
}

impl Providers for Elsewhere {
    fn knows(&self, model: &str) -> bool {
        ["echo", "judge", "broken"].contains(&model)
    }

    fn chat(&self, model: &str, body: &Value) -> Result<ProviderAnswer, String> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(self.delay);
        let messages = body["messages"].as_array().unwrap();
        let last = messages.last().unwrap()["content"].as_str().unwrap();
        let text = match model {
            "echo" => last.to_string(),
            "judge" if last.contains("\"label\"") => {
                let label = if last.contains("good") {
                    "fine"
                } else {
                    "poor"
                };
                json!({"label": label}).to_string()
            }
            "judge" if last.contains("nonsense") => "I would rather not".to_string(),
            "judge" => json!({"score": if last.contains("good") { 0.9 } else { 0.2 }}).to_string(),
            _ => return Err("the provider is down".to_string()),
        };
        Ok(ProviderAnswer {
            body: json!({
                "model": model,
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": 5, "completion_tokens": 2},
            }),
            cost_usd: Some(0.25),
            latency_ms: 12.0,
            cached: false,
        })
    }
}

/// A place to run programs in that knows two of them.
struct Box;

impl Sandbox for Box {
    fn refusal(&self) -> Option<String> {
        None
    }

    fn grade(&self, source: &str, sample: &Value, item: &Value) -> Result<f64, SandboxError> {
        if source.contains("raise") {
            return Err(SandboxError::Program("ValueError: no".to_string()));
        }
        let same = sample["output_text"] == item["want"];
        Ok(f64::from(u8::from(same)))
    }
}

fn with_elsewhere(elsewhere: &Arc<Elsewhere>, store: Option<Arc<Store>>) -> Server {
    let config = ServeConfig {
        providers: Some(Arc::clone(elsewhere) as Arc<dyn Providers>),
        sandbox: Some(Arc::new(Box)),
        store,
        ..config()
    };
    let shelf = models(vec![model("mock", EngineConfig::default(), Duration::ZERO)]);
    Server::start(config, shelf).unwrap()
}

#[test]
fn answers_that_are_brought_along_are_judged_and_compared() {
    let server = start();
    let eval = made(&post_to(
        &server,
        "/v1/evals",
        &json!({"name": "e", "data_source_config": schema(), "testing_criteria": [exact(), close()], "metadata": {"a": "b"}}),
    ));
    let runs = format!("/v1/evals/{eval}/runs");
    let four = rows(&[
        ("rome", "rome"),
        ("oslo", "oslo!"),
        ("bern", "xxxx"),
        ("kyiv", "kyiv"),
    ]);
    let first = made(&post_to(&server, &runs, &content(four)));
    let run = done(&server, &eval, &first);
    assert_eq!(run["status"], "completed", "{run}");
    assert_eq!(
        run["result_counts"],
        json!({"total": 4, "passed": 2, "failed": 2, "errored": 0})
    );
    let results = &run["per_testing_criteria_results"];
    assert_eq!(
        (&results[0]["passed"], &results[0]["failed"]),
        (&json!(2), &json!(2))
    );
    assert_eq!(
        (&results[1]["passed"], &results[1]["failed"]),
        (&json!(3), &json!(1))
    );
    let rate = &run["statistics"]["pass_rate"];
    assert_eq!((&rate["mean"], &rate["n"]), (&json!(0.5), &json!(4)));
    assert!(rate["interval"]["lo"].as_f64().unwrap() < 0.2);
    assert_eq!(rate["interval"]["method"], "wilson");

    // Items: in order, a page at a time, by status, by name.
    let items = format!("{runs}/{first}/output_items");
    let all = get(&server, &items).json();
    assert_eq!(all["data"].as_array().unwrap().len(), 4);
    let second = all["data"][1].clone();
    assert_eq!(second["status"], "fail");
    assert_eq!(
        second["results"][0],
        json!({"name": "exact", "type": "string_check", "passed": false, "score": 0.0, "sample": null})
    );
    assert!(second["results"][1]["score"].as_f64().unwrap() > 0.8);
    let id = |item: &Value| item["id"].as_str().unwrap().to_string();
    let page = get(
        &server,
        &format!("{items}?limit=2&after={}", id(&all["data"][0])),
    )
    .json();
    assert_eq!(
        (&page["data"][0], &page["has_more"]),
        (&second, &json!(true))
    );
    let failed = get(&server, &format!("{items}?status=fail&order=desc")).json();
    assert_eq!(failed["data"].as_array().unwrap().len(), 2);
    assert_eq!(failed["data"][1], second);
    assert_eq!(
        get(&server, &format!("{items}/{}", id(&second))).json(),
        second
    );

    // A second run over the same rows, in another order, and one more.
    let five = rows(&[
        ("rome", "rome"),
        ("oslo", "oslo"),
        ("bern", "bern"),
        ("kyiv", "kyiv"),
        ("nuuk", "nuuk"),
    ]);
    let second = made(&post_to(&server, &runs, &content(five)));
    let run = done(&server, &eval, &second);
    let seen = &run["statistics"]["comparisons"][0];
    assert_eq!(
        (&seen["run_id"], &seen["rows_in_common"]),
        (&json!(first), &json!(4))
    );
    assert_eq!(seen["rows_only_here"], 1);
    assert_eq!(seen["pass_rate"]["difference"], 0.5);
    assert_eq!(seen["pass_rate"]["verdict"], "undecided");
    assert_eq!(seen["pass_rate"]["mcnemar"]["only_ours"], 2);
    assert!(seen["pass_rate"]["more_rows"].as_u64().unwrap() >= 1);
    let other_way = get(&server, &format!("{runs}/{first}?compare_to={second}")).json();
    assert_eq!(other_way["comparison"]["pass_rate"]["difference"], -0.5);

    // Lists, names, the end.
    let listed = get(&server, &format!("{runs}?status=completed&order=desc")).json();
    assert_eq!(listed["data"][0]["id"], json!(second));
    let eval_path = format!("/v1/evals/{eval}");
    let renamed = post_to(
        &server,
        &eval_path,
        &json!({"name": "f", "metadata": {"c": "d"}}),
    )
    .json();
    assert_eq!(
        (&renamed["name"], &renamed["metadata"]),
        (&json!("f"), &json!({"c": "d"}))
    );
    let by_update = get(&server, "/v1/evals?order_by=updated_at&limit=1").json();
    assert_eq!(by_update["data"][0]["name"], "f");
    assert_eq!(
        post_to(&server, &format!("{runs}/{first}"), &json!({})).status,
        400
    );
    let gone = send(&server, "DELETE", &format!("{runs}/{first}"), None).json();
    assert_eq!(
        gone,
        json!({"run_id": first, "object": "eval.run.deleted", "deleted": true})
    );
    assert_eq!(get(&server, &items).status, 404);
    let gone = send(&server, "DELETE", &eval_path, None).json();
    assert_eq!(
        (&gone["eval_id"], &gone["deleted"]),
        (&json!(eval), &json!(true))
    );
    assert_eq!(get(&server, &format!("{runs}/{second}")).status, 404);
    server.stop().unwrap();
}

#[test]
fn models_are_asked_and_judge() {
    let elsewhere = Arc::new(Elsewhere::default());
    let server = with_elsewhere(&elsewhere, None);
    let criteria = json!([
        exact(),
        {"type": "label_model", "name": "tone", "model": "judge", "labels": ["fine", "poor"], "passing_labels": ["fine"],
         "input": [{"role": "user", "content": [{"type": "input_text", "text": "{{item.q}} {{sample.output_text}}"}]}]},
        {"type": "score_model", "name": "mark", "model": "judge", "pass_threshold": 0.5,
         "input": [{"role": "developer", "content": "mark it"}, {"role": "user", "content": "{{item.q}}"}]},
        {"type": "python", "name": "program", "source": "def grade(sample, item): return 1.0"},
    ]);
    let eval = made(&post_to(
        &server,
        "/v1/evals",
        &json!({"data_source_config": schema(), "testing_criteria": criteria}),
    ));
    let runs = format!("/v1/evals/{eval}/runs");
    let source = json!({"type": "file_content", "content": [
        {"item": {"q": "good", "want": "say good"}},
        {"item": {"q": "bad", "want": "say bad"}},
        {"item": {"q": "nonsense", "want": "say nonsense"}},
    ]});
    let template =
        json!({"type": "template", "template": [{"role": "user", "content": "say {{item.q}}"}]});
    let body = json!({"name": "r", "data_source": {
        "type": "completions", "model": "echo", "source": source, "input_messages": template,
        "sampling_params": {"temperature": 0.5, "max_completion_tokens": 9},
    }});
    let run = made(&post_to(&server, &runs, &body));
    let run = done(&server, &eval, &run);
    assert_eq!(
        run["result_counts"],
        json!({"total": 3, "passed": 1, "failed": 1, "errored": 1}),
        "{run}"
    );
    assert_eq!(run["model"], "echo");
    let usage = run["per_model_usage"].as_array().unwrap();
    assert_eq!(usage.len(), 2);
    assert_eq!(
        usage[0],
        json!({"model_name": "echo", "invocation_count": 3, "prompt_tokens": 15,
        "completion_tokens": 6, "cached_tokens": 0, "total_tokens": 21})
    );
    assert_eq!(usage[1]["invocation_count"], 6);
    assert_eq!(run["statistics"]["cost_usd"], 9.0 * 0.25);
    assert_eq!(run["statistics"]["latency_ms"]["p50"], 12.0);
    let id = run["id"].as_str().unwrap();
    let items = get(&server, &format!("{runs}/{id}/output_items")).json();
    let first = &items["data"][0];
    assert_eq!(
        first["sample"]["input"],
        json!([{"role": "user", "content": "say good"}])
    );
    assert_eq!(first["sample"]["output"][0]["content"], "say good");
    assert_eq!(first["sample"]["temperature"], 0.5);
    assert_eq!(first["results"][2]["score"], 0.9);
    assert_eq!(first["results"][1]["sample"]["model"], "judge");
    // A judge that does not answer as it was asked is an error, not a zero.
    let third = &items["data"][2];
    assert_eq!(third["status"], "error");
    assert_eq!(third["results"][2]["score"], Value::Null);
    assert!(
        third["results"][2]["error"]["message"]
            .as_str()
            .unwrap()
            .contains("is not JSON")
    );

    // The mock answers here, under a schema, from a message in the row.
    let body = json!({"data_source": {
        "type": "responses", "model": "mock",
        "source": {"type": "file_content", "content": [{"item": {"q": "x", "want": "y"}}]},
        "input_messages": {"type": "item_reference", "item_reference": "item.q"},
        "sampling_params": {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "boolean"}}}},
    }});
    let run = made(&post_to(&server, &runs, &body));
    let run = done(&server, &eval, &run);
    let id = run["id"].as_str().unwrap();
    let items = get(&server, &format!("{runs}/{id}/output_items")).json();
    let text = items["data"][0]["sample"]["output"][0]["content"].clone();
    assert!(text == "true" || text == "false", "{items}");

    // A provider that is down fails rows, not the run.
    let mut body = body;
    body["data_source"]["model"] = json!("broken");
    let run = made(&post_to(&server, &runs, &body));
    let run = done(&server, &eval, &run);
    assert_eq!(
        (&run["status"], &run["result_counts"]["errored"]),
        (&json!("completed"), &json!(1))
    );
    server.stop().unwrap();
}

#[test]
fn answers_that_were_kept_are_rows() {
    let server = start();
    for i in 0..3 {
        let asked =
            ask(json!({"store": true, "metadata": {"use": if i == 0 { "a" } else { "b" }}}));
        assert_eq!(post(&server, &asked).status, 200);
    }
    let long = json!({"type": "string_check", "name": "any", "operation": "like", "input": "{{sample.output_text}}", "reference": ""});
    let eval = made(&post_to(
        &server,
        "/v1/evals",
        &json!({"data_source_config": {"type": "stored_completions", "metadata": {"use": "b"}}, "testing_criteria": [long]}),
    ));
    let runs = format!("/v1/evals/{eval}/runs");
    let kept = json!({"data_source": {"type": "completions", "source": {"type": "stored_completions", "model": "mock"}}});
    let run = made(&post_to(&server, &runs, &kept));
    let run = done(&server, &eval, &run);
    assert_eq!(run["result_counts"]["passed"], 2, "{run}");
    // The same conversations, asked again.
    let again = json!({"data_source": {"type": "completions", "source": {"type": "stored_completions"}, "model": "mock",
        "sampling_params": {"max_completion_tokens": 3}}});
    let run = made(&post_to(&server, &runs, &again));
    let run = done(&server, &eval, &run);
    assert_eq!(run["result_counts"]["passed"], 2, "{run}");
    assert_eq!(run["statistics"]["comparisons"][0]["rows_in_common"], 2);
    let none = json!({"data_source": {"type": "completions", "source": {"type": "stored_completions", "metadata": {"use": "c"}}}});
    assert!(post_to(&server, &runs, &none).body.contains("store: true"));
    server.stop().unwrap();
}

#[test]
fn a_run_goes_on_with_the_next_server() {
    let folder = std::env::temp_dir().join(format!("bantam-evals-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let open = || Some(Arc::new(Store::open(&folder.join("db")).unwrap()));
    let elsewhere = Arc::new(Elsewhere {
        delay: Duration::from_millis(30),
        ..Elsewhere::default()
    });
    let server = with_elsewhere(&elsewhere, open());
    let eval = made(&post_to(
        &server,
        "/v1/evals",
        &json!({"data_source_config": schema(), "testing_criteria": [exact()]}),
    ));
    let rows: Vec<Value> = (0..60)
        .map(|i| json!({"item": {"q": format!("{i}"), "want": format!("{i}"), "group": format!("{}", i / 4)}}))
        .collect();
    let body = json!({"data_source": {
        "type": "completions", "model": "echo", "source": {"type": "file_content", "content": rows},
        "input_messages": {"type": "item_reference", "item_reference": "item.q"},
    }});
    let runs = format!("/v1/evals/{eval}/runs");
    let run = made(&post_to(&server, &runs, &body));
    while elsewhere.asked.load(Ordering::Relaxed) < 20 {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(server);
    let server = with_elsewhere(&elsewhere, open());
    let ended = done(&server, &eval, &run);
    assert_eq!(
        ended["result_counts"],
        json!({"total": 60, "passed": 60, "failed": 0, "errored": 0})
    );
    let asked = elsewhere.asked.load(Ordering::Relaxed);
    assert!(
        (60..80).contains(&asked),
        "only what was under way is asked again: {asked}"
    );
    assert_eq!(ended["statistics"]["pass_rate"]["n_groups"], 15);

    // And one that is cancelled keeps what it has.
    let run = made(&post_to(&server, &runs, &body));
    std::thread::sleep(Duration::from_millis(100));
    let ended = post_to(&server, &format!("{runs}/{run}/cancel"), &json!({})).json();
    assert_eq!(ended["status"], "canceled");
    let n = ended["result_counts"]["passed"].as_u64().unwrap();
    assert!(n < 60, "{ended}");
    server.stop().unwrap();
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_cosine_is_that_of_the_embedding_model() {
    let shelf = models(vec![model("mock", EngineConfig::default(), Duration::ZERO)]);
    let counter = ServedEmbedder::new("counter", Arc::new(support::Counter));
    shelf.add_embedder(counter).unwrap();
    let server = Server::start(config(), shelf).unwrap();
    let run = |reference: &str, model: Option<&str>| {
        let mut grader = json!({"type": "text_similarity", "name": "near", "evaluation_metric": "cosine",
            "input": "{{sample.output_text}}", "reference": reference});
        if let Some(model) = model {
            grader["model"] = model.into();
        }
        let body = json!({"grader": grader, "model_sample": "abc", "item": {}});
        post_to(&server, "/v1/fine_tuning/alpha/graders/run", &body)
    };
    // One token of each kind against the same, and against three of one kind: 3 / (sqrt 3 sqrt 9).
    for (reference, want) in [("bca", 1.0), ("aad", 1.0 / 3.0f64.sqrt()), ("", 0.0)] {
        let answer = run(reference, None);
        assert_eq!(answer.status, 200, "{answer:?}");
        let reward = answer.json()["reward"].as_f64().unwrap();
        assert!((reward - want).abs() < 1e-6, "{reference}: {reward}");
    }
    let elsewhere = run("bca", Some("not-there"));
    assert_eq!(elsewhere.status, 400, "{elsewhere:?}");
    assert!(elsewhere.body.contains("`not-there`"), "{elsewhere:?}");
    server.stop().unwrap();
}

#[test]
fn graders_are_tried_alone() {
    let elsewhere = Arc::new(Elsewhere::default());
    let server = with_elsewhere(&elsewhere, None);
    let run = |grader: Value, sample: &str| {
        let body = json!({"grader": grader, "model_sample": sample, "item": {"q": "good", "want": "Rome"}});
        let answer = post_to(&server, "/v1/fine_tuning/alpha/graders/run", &body);
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()
    };
    let multi = json!({
        "type": "multi", "name": "both", "calculate_output": "0.5 * a + 0.5 * b",
        "graders": {"a": exact(), "b": {"type": "string_check", "name": "b", "operation": "ilike",
            "input": "{{sample.output_json.city}}", "reference": "rome"}},
    });
    let graded = run(multi.clone(), r#"{"city": "ROME"}"#);
    assert_eq!(graded["reward"], 0.5);
    assert_eq!(graded["sub_rewards"], json!({"a": 0.0, "b": 1.0}));
    let graded = run(multi, "no json");
    assert_eq!(graded["metadata"]["errors"]["invalid_variable_error"], true);
    assert_eq!(graded["reward"], 0.0);
    let mark = json!({"type": "score_model", "name": "m", "model": "judge", "range": [0, 1],
        "input": [{"role": "user", "content": "{{item.q}}"}]});
    let graded = run(mark, "x");
    assert_eq!(
        (&graded["reward"], &graded["metadata"]["token_usage"]),
        (&json!(0.9), &json!(7))
    );
    assert_eq!(
        graded["model_grader_token_usage_per_model"],
        json!({"judge": 7})
    );
    let program = |source: &str| json!({"type": "python", "name": "p", "source": source});
    assert_eq!(
        run(program("def grade(sample, item): return 1"), "Rome")["reward"],
        1.0
    );
    let graded = run(
        program("def grade(sample, item): raise ValueError('no')"),
        "Rome",
    );
    let errors = &graded["metadata"]["errors"];
    assert_eq!(errors["python_grader_runtime_error"], true);
    assert!(
        errors["python_grader_runtime_error_details"]
            .as_str()
            .unwrap()
            .contains("ValueError")
    );
    let path = "/v1/fine_tuning/alpha/graders/validate";
    let valid = post_to(&server, path, &json!({"grader": exact()}));
    assert_eq!(valid.json(), json!({"grader": exact()}));
    server.stop().unwrap();
}
