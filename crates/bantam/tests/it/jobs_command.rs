//! `bantam jobs`: what the API does, from the command line.

use serde_json::json;

use crate::jobs::{get, world};
use crate::support::{Server, report, said, succeeded};

#[test]
fn jobs_are_made_followed_and_listed() {
    let world = world();
    let server = Server::start(&world, &["--model", "./model", "--data", "data"]);
    let url = format!("http://{}/v1", server.address);
    let jobs = |arguments: &[&str]| world.run(&[&["jobs", "--url", &url], arguments].concat());

    let made = jobs(&[
        "create",
        "train.jsonl",
        "--model",
        "model",
        "--valid",
        "valid.jsonl",
        "--epochs",
        "1",
        "--suffix",
        "cli",
    ]);
    let id = succeeded(&made).trim().to_string();
    assert!(id.starts_with("ftjob-"), "{made:?}");
    let followed = jobs(&["follow", &id, "--json"]);
    let job = report(&followed);
    assert_eq!(job["status"], "succeeded");
    assert!(
        job["fine_tuned_model"].as_str().unwrap().contains(":cli:"),
        "{job}"
    );
    assert!(said(&followed).contains("created job"), "{followed:?}");
    assert_eq!(job, get(&server, &format!("/v1/fine_tuning/jobs/{id}")));

    // One that waits in the queue is paused, goes on, and is cancelled.
    let id = report(&jobs(&[
        "create",
        "train.jsonl",
        "--model",
        "model",
        "--epochs",
        "40",
        "--json",
    ]))["id"]
        .clone();
    let id = id.as_str().unwrap();
    for (command, status) in [
        ("pause", "paused"),
        ("resume", "queued"),
        ("cancel", "cancelled"),
    ] {
        let mut changed = jobs(&[command, id, "--json"]);
        // The files are checked first.
        while said(&changed).contains("validating_files") {
            changed = jobs(&[command, id, "--json"]);
        }
        assert_eq!(report(&changed)["status"], status, "{changed:?}");
    }
    let listed = report(&jobs(&["list", "--json"]));
    assert_eq!(listed["jobs"].as_array().unwrap().len(), 2);
    assert_eq!(
        (&listed["jobs"][0]["id"], &listed["has_more"]),
        (&json!(id), &json!(false))
    );
    let table = succeeded(&jobs(&["list"]));
    assert!(
        table.contains("cancelled") && table.contains("succeeded"),
        "{table}"
    );
    assert!(succeeded(&jobs(&["show", id])).contains("cancelled"));

    // A job that failed, and what cannot be asked.
    let failed = jobs(&["follow", id]);
    assert_eq!(failed.status.code(), Some(1));
    assert!(said(&failed).contains("cancelled"), "{failed:?}");
    std::fs::write(world.at("bad.jsonl"), "{\"messages\": 1}\n").unwrap();
    for (arguments, want) in [
        (vec!["show", "ftjob-none"], "ftjob-none"),
        (vec!["cancel", id], "cannot be cancelled"),
        (vec!["create", "bad.jsonl", "--model", "model"], "line 1"),
        (
            vec!["create", "none.jsonl", "--model", "model"],
            "none.jsonl",
        ),
        (vec!["create", "train.jsonl", "--model", "nobody"], "nobody"),
        (vec!["--url", "127.0.0.1", "list"], "not the address"),
        (
            vec!["--url", "http://127.0.0.1:9/v1", "list"],
            "bantam serve",
        ),
    ] {
        let output = if arguments[0] == "--url" {
            world.run(&[&["jobs"], &arguments[..]].concat())
        } else {
            jobs(&arguments)
        };
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        assert!(
            said(&output).contains(want),
            "{arguments:?}: {}",
            said(&output)
        );
    }
    server.stop();
}

#[test]
fn evals_of_promptfoo_and_openai_are_taken_over() {
    let world = world();
    let server = Server::start(&world, &["--model", "./model"]);
    let url = format!("http://{}/v1", server.address);
    let import =
        |arguments: &[&str]| world.run(&[&["evals", "--url", &url, "import"], arguments].concat());
    let config = "prompts: ['Name: {{ text }}']\nproviders: [openai:gpt-4o-mini]\ntests:\n\
        - {vars: {text: rain}, assert: [{type: not-contains, value: '{{text}}'}, {type: javascript, value: '1'}]}\n\
        - {vars: {text: cake}, assert: [{type: not-contains, value: cake}]}\n";
    std::fs::write(world.at("promptfooconfig.yaml"), config).unwrap();
    let refused = import(&["promptfooconfig.yaml"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        said(&refused).contains("tests[0].assert[1]: `javascript`"),
        "{}",
        said(&refused)
    );
    let flags = ["--model", "model", "--skip-unsupported", "--run", "--json"];
    let made = report(&import(&[&["promptfooconfig.yaml"], &flags[..]].concat()));
    let eval = &made["evals"][0];
    assert_eq!(
        (&eval["rows"], &eval["graders"]),
        (&json!(2), &json!(1)),
        "{made}"
    );
    let done = |eval: &str, run: &str| loop {
        let run = get(&server, &format!("/v1/evals/{eval}/runs/{run}"));
        if run["status"] == "completed" {
            return run;
        }
        assert_ne!(run["status"], "failed", "{run}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    let run = done(
        eval["id"].as_str().unwrap(),
        eval["runs"][0].as_str().unwrap(),
    );
    assert_eq!(run["result_counts"]["errored"], 0, "{run}");
    assert_eq!(run["result_counts"]["total"], 2);

    // What this server gives is what OpenAI's gave: an eval, its runs and items.
    let id = eval["id"].as_str().unwrap();
    let items = get(
        &server,
        &format!(
            "/v1/evals/{id}/runs/{}/output_items",
            run["id"].as_str().unwrap()
        ),
    );
    let whole =
        json!({"eval": get(&server, &format!("/v1/evals/{id}")), "runs": [run], "items": items});
    std::fs::write(world.at("export.json"), whole.to_string()).unwrap();
    let again = report(&import(&["export.json", "--run", "--json"]));
    let eval = &again["evals"][0];
    let judged = done(
        eval["id"].as_str().unwrap(),
        eval["runs"][0].as_str().unwrap(),
    );
    assert_eq!(
        judged["result_counts"], whole["runs"][0]["result_counts"],
        "{judged}"
    );
    server.stop();
}
