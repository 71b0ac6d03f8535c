//! Evals, runs and graders that cannot be: each is refused by name, and nothing is kept.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use serde_json::{Value, json};
use support::evals::{content, done, exact, made, post_to, rows, schema};
use support::{get, send, start};

#[test]
fn what_is_wrong_is_named_and_nothing_is_kept() {
    let server = start();
    let with =
        |criteria: Value| json!({"data_source_config": schema(), "testing_criteria": criteria});
    let changed = |name: &str, value: Value| {
        let mut grader = exact();
        grader[name] = value;
        with(json!([grader]))
    };
    let message = |text: &str| json!([{"role": "user", "content": text}]);
    let evals = [
        (json!({"testing_criteria": [exact()]}), "data_source_config"),
        (
            json!({"data_source_config": {"type": "csv"}, "testing_criteria": [exact()]}),
            "`custom`, `logs`",
        ),
        (
            json!({"data_source_config": {"type": "custom", "item_schema": {"type": "objekt"}}, "testing_criteria": [exact()]}),
            "item_schema",
        ),
        (
            json!({"data_source_config": {"type": "custom"}, "testing_criteria": [exact()]}),
            "item_schema",
        ),
        (with(json!([])), "1 to 50"),
        (with(json!("x")), "array"),
        (
            with(json!([{"type": "magic", "name": "m"}])),
            "testing_criteria[0].type",
        ),
        (
            changed("operation", json!("is")),
            "testing_criteria[0].operation",
        ),
        (changed("reference", json!("{{ item.wnat }}")), "item.wnat"),
        (changed("reference", json!("{{ item.want")), "byte 0"),
        (
            changed("reference", json!("{{ row.want }}")),
            "begins with `item` or `sample`",
        ),
        (changed("colour", json!(1)), "colour"),
        (changed("name", json!("")), "testing_criteria[0].name"),
        (with(json!([exact(), exact()])), "there twice"),
        (
            with(
                json!([{"type": "text_similarity", "name": "t", "input": "", "reference": "", "evaluation_metric": "bleu"}]),
            ),
            "pass_threshold",
        ),
        (
            with(
                json!([{"type": "text_similarity", "name": "t", "input": "", "reference": "", "evaluation_metric": "vibes", "pass_threshold": 1}]),
            ),
            "evaluation_metric",
        ),
        (
            with(
                json!([{"type": "label_model", "name": "l", "model": "mock", "labels": ["a", "b"], "passing_labels": ["c"], "input": message("")}]),
            ),
            "`c` is not one",
        ),
        (
            with(
                json!([{"type": "label_model", "name": "l", "model": "mock", "labels": ["a", "a"], "passing_labels": ["a"], "input": message("")}]),
            ),
            "differ",
        ),
        (
            with(
                json!([{"type": "score_model", "name": "s", "model": "mock", "range": [1, 0], "input": message("")}]),
            ),
            "lesser first",
        ),
        (
            with(json!([{"type": "score_model", "name": "s", "model": "mock", "input": []}])),
            "array of messages",
        ),
        (
            with(
                json!([{"type": "score_model", "name": "s", "model": "mock", "input": [{"role": "user", "content": {"type": "input_image", "image_url": "x"}}]}]),
            ),
            "input_image",
        ),
        (
            with(json!([{"type": "python", "name": "p", "source": "x = 1"}])),
            "def",
        ),
        (
            with(
                json!([{"type": "multi", "name": "m", "graders": {"a": exact()}, "calculate_output": "a + c"}]),
            ),
            "`c` is not the name",
        ),
        (
            with(
                json!([{"type": "multi", "name": "m", "graders": {"a": exact()}, "calculate_output": "a +"}]),
            ),
            "ends where",
        ),
        (
            with(
                json!([{"type": "multi", "name": "m", "graders": {"a": {"type": "multi", "name": "n", "graders": {}, "calculate_output": "1"}}, "calculate_output": "a"}]),
            ),
            "does not stand in another",
        ),
    ];
    for (body, want) in &evals {
        let answer = post_to(&server, "/v1/evals", body);
        assert_eq!(answer.status, 400, "{body}: {answer:?}");
        let error = answer.json()["error"].clone();
        assert!(
            error["type"] == "invalid_request_error" && error["param"].is_string(),
            "{error}"
        );
        assert!(
            answer.body.contains(want) || error["message"].as_str().unwrap().contains(want),
            "{want}: {error}"
        );
    }
    assert_eq!(get(&server, "/v1/evals").json()["data"], json!([]));

    let program =
        json!({"type": "python", "name": "p", "source": "def grade(sample, item): return 1"});
    let eval = |criteria: Value| made(&post_to(&server, "/v1/evals", &with(criteria)));
    let plain = eval(json!([exact()]));
    let model = eval(
        json!([{"type": "score_model", "name": "s", "model": "gpt-99", "input": message("x")}]),
    );
    let program = eval(json!([program]));
    let source = |kind: &str, source: Value, more: Value| {
        let mut body = json!({"data_source": {"type": kind, "source": source}});
        for (name, value) in more.as_object().unwrap() {
            body["data_source"][name] = value.clone();
        }
        body
    };
    let given = json!({"type": "file_content", "content": rows(&[("a", "b")])});
    let template = json!({"type": "template", "template": message("{{ item.q }}")});
    let runs = [
        (&plain, json!({}), "data_source"),
        (
            &plain,
            source("csv", given.clone(), json!({})),
            "data_source.type",
        ),
        (
            &plain,
            source(
                "jsonl",
                json!({"type": "file_content", "content": []}),
                json!({}),
            ),
            "1 to",
        ),
        (
            &plain,
            source(
                "jsonl",
                json!({"type": "file_content", "content": [{"itme": {}}]}),
                json!({}),
            ),
            "content[0].item",
        ),
        (
            &plain,
            source(
                "jsonl",
                json!({"type": "file_content", "content": [{"item": {}, "smaple": {}}]}),
                json!({}),
            ),
            "smaple",
        ),
        (
            &plain,
            source(
                "jsonl",
                json!({"type": "file_content", "content": [{"item": {"q": "", "want": ""}}]}),
                json!({}),
            ),
            "content[0].sample",
        ),
        (
            &plain,
            source(
                "jsonl",
                json!({"type": "file_id", "id": "file-no"}),
                json!({}),
            ),
            "no file `file-no`",
        ),
        (
            &plain,
            source("jsonl", json!({"type": "stored_completions"}), json!({})),
            "`file_content`, `file_id`",
        ),
        (
            &plain,
            source("jsonl", given.clone(), json!({"model": "mock"})),
            "data_source.model",
        ),
        (
            &plain,
            source("completions", given.clone(), json!({"model": "mock"})),
            "input_messages",
        ),
        (
            &plain,
            source(
                "completions",
                given.clone(),
                json!({"input_messages": template}),
            ),
            "whom to ask",
        ),
        (
            &plain,
            source(
                "completions",
                given.clone(),
                json!({"model": "gpt-99", "input_messages": template}),
            ),
            "[providers]",
        ),
        (
            &plain,
            source(
                "completions",
                given.clone(),
                json!({"model": "mock", "input_messages": {"type": "template", "template": message("{{sample.output_text}}")}}),
            ),
            "no answer yet",
        ),
        (
            &plain,
            source(
                "completions",
                given.clone(),
                json!({"model": "mock", "input_messages": {"type": "item_reference", "item_reference": "sample"}}),
            ),
            "item_reference",
        ),
        (
            &plain,
            source(
                "completions",
                given.clone(),
                json!({"model": "mock", "input_messages": template, "sampling_params": {"temperature": 9}}),
            ),
            "sampling_params.temperature",
        ),
        (
            &plain,
            source(
                "completions",
                given.clone(),
                json!({"model": "mock", "input_messages": template, "sampling_params": {"heat": 9}}),
            ),
            "heat",
        ),
        (&model, source("jsonl", given.clone(), json!({})), "gpt-99"),
        (
            &program,
            source("jsonl", given.clone(), json!({})),
            "no place to run programs",
        ),
    ];
    for (eval, body, want) in &runs {
        let answer = post_to(&server, &format!("/v1/evals/{eval}/runs"), body);
        assert_eq!(answer.status, 400, "{body}: {answer:?}");
        let error = answer.json()["error"].clone();
        let told = format!("{} {}", error["message"], error["param"]);
        assert!(told.contains(want), "{want}: {error}");
        let kept = get(&server, &format!("/v1/evals/{eval}/runs")).json();
        assert_eq!(kept["data"], json!([]));
    }
    // A row that does not fit is found before anything is asked.
    let body = content(json!([{"item": {"q": 1, "want": "x"}, "sample": {"output_text": ""}}]));
    let run = made(&post_to(&server, &format!("/v1/evals/{plain}/runs"), &body));
    let run = done(&server, &plain, &run);
    assert_eq!(run["status"], "failed");
    assert!(
        run["error"]["message"].as_str().unwrap().contains("`/q`"),
        "{run}"
    );

    for (method, path) in [
        ("GET", "/v1/evals/eval_no".to_string()),
        ("DELETE", "/v1/evals/eval_no".to_string()),
        ("GET", "/v1/evals/eval_no/runs".to_string()),
        ("GET", format!("/v1/evals/{plain}/runs/evalrun_no")),
        (
            "GET",
            format!("/v1/evals/{model}/runs/{}", run["id"].as_str().unwrap()),
        ),
        (
            "GET",
            format!(
                "/v1/evals/{plain}/runs/{}/output_items/outputitem_x_0",
                run["id"].as_str().unwrap()
            ),
        ),
    ] {
        assert_eq!(send(&server, method, &path, None).status, 404, "{path}");
    }
    let path = "/v1/evals?order_by=name";
    assert_eq!(get(&server, path).status, 400);
    let graders = "/v1/fine_tuning/alpha/graders/run";
    for (body, want) in [
        (json!({"model_sample": "x"}), "grader"),
        (json!({"grader": exact()}), "model_sample"),
        (
            json!({"grader": {"type": "score_model", "name": "s", "model": "gpt-99", "input": message("x")}, "model_sample": ""}),
            "gpt-99",
        ),
        (
            json!({"grader": exact(), "model_sample": "x", "item": []}),
            "item",
        ),
    ] {
        let answer = post_to(&server, graders, &body);
        assert!(
            answer.status == 400 && answer.body.contains(want),
            "{answer:?}"
        );
    }
    server.stop().unwrap();
}
