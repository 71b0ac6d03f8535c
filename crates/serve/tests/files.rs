//! Files, uploads in parts and batches, over a real socket.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use bantam_engine::EngineConfig;
use bantam_serve::{ServeConfig, Server};
use bantam_store::Store;
use serde_json::{Value, json};
use support::{ask, config, finish, get, open, post, send, start, start_with};

/// Uploads a file for a batch.
fn upload(server: &Server, purpose: &str, content: &str) -> support::Answer {
    let body = format!(
        "--b\r\nContent-Disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"in.jsonl\"\r\nContent-Type: application/octet-stream\r\n\r\n{content}\r\n--b--\r\n"
    );
    let kind = "Content-Type: multipart/form-data; boundary=b\r\n";
    finish(open(server.addr(), "POST", "/v1/files", kind, &body))
}

fn wait(server: &Server, id: &str) -> Value {
    for _ in 0..400 {
        let batch = get(server, &format!("/v1/batches/{id}")).json();
        if !["validating", "in_progress", "finalizing", "cancelling"]
            .contains(&batch["status"].as_str().unwrap())
        {
            return batch;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the batch does not end");
}

#[test]
fn files_come_back_as_they_were() {
    let server = start();
    let content = "x".repeat(3_000_000) + "\nend";
    let file = upload(&server, "user_data", &content).json();
    assert_eq!(
        (&file["bytes"], &file["filename"]),
        (&json!(content.len()), &json!("in.jsonl"))
    );
    let id = file["id"].as_str().unwrap();
    assert_eq!(
        get(&server, &format!("/v1/files/{id}/content")).body,
        content
    );
    assert_eq!(get(&server, &format!("/v1/files/{id}")).json(), file);
    assert_eq!(
        get(&server, "/v1/files?purpose=user_data").json()["data"][0]["id"],
        id
    );
    assert!(
        get(&server, "/v1/files?purpose=batch").json()["data"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        send(&server, "DELETE", &format!("/v1/files/{id}"), None).json()["deleted"],
        true
    );
    assert_eq!(get(&server, &format!("/v1/files/{id}/content")).status, 404);
    assert_eq!(
        upload(&server, "party", "x").json()["error"]["param"],
        "purpose"
    );
    let broken = finish(open(
        server.addr(),
        "POST",
        "/v1/files",
        "Content-Type: multipart/form-data; boundary=b\r\n",
        "--b\r\nnonsense",
    ));
    assert_eq!(broken.status, 400);
    server.stop().unwrap();
}

#[test]
fn batches_answer_every_line() {
    let server = start();
    let line = |id: &str, extra: Value| {
        json!({"custom_id": id, "method": "POST", "url": "/v1/chat/completions", "body": ask(extra)}).to_string()
    };
    let lines = [
        line("a", json!({"max_tokens": 3})),
        line("b", json!({"colour": 1})),
        line("c", json!({"max_tokens": 4})),
    ];
    let file = upload(&server, "batch", &lines.join("\n")).json();
    let body = json!({"input_file_id": file["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h", "metadata": {"k": "v"}});
    let batch = send(&server, "POST", "/v1/batches", Some(&body)).json();
    assert_eq!(
        (&batch["object"], &batch["metadata"]["k"]),
        (&json!("batch"), &json!("v"))
    );
    let done = wait(&server, batch["id"].as_str().unwrap());
    assert_eq!(done["status"], "completed", "{done}");
    assert_eq!(
        done["request_counts"],
        json!({"total": 3, "completed": 2, "failed": 1})
    );
    let read = |field: &str| -> Vec<Value> {
        let id = done[field].as_str().unwrap();
        let text = get(&server, &format!("/v1/files/{id}/content")).body;
        text.lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect()
    };
    let output = read("output_file_id");
    let ids: Vec<&Value> = output.iter().map(|l| &l["custom_id"]).collect();
    assert_eq!(ids, ["a", "c"]);
    let alone = post(&server, &ask(json!({"max_tokens": 3}))).json();
    assert_eq!(output[0]["response"]["body"]["choices"], alone["choices"]);
    let errors = read("error_file_id");
    assert_eq!(errors[0]["response"]["status_code"], 400);
    assert_eq!(errors[0]["response"]["body"]["error"]["param"], "colour");
    assert_eq!(
        get(&server, "/v1/batches").json()["data"][0]["id"],
        batch["id"]
    );
    let late = send(
        &server,
        "POST",
        &format!("/v1/batches/{}/cancel", batch["id"].as_str().unwrap()),
        None,
    );
    assert_eq!(late.status, 400);
    // A file may be a batch's and not this batch's.
    let body = json!({"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"});
    let batch = send(&server, "POST", "/v1/batches", Some(&body)).json();
    let failed = wait(&server, batch["id"].as_str().unwrap());
    assert_eq!(failed["status"], "failed");
    let lines: Vec<&Value> = failed["errors"]["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|e| &e["line"])
        .collect();
    assert_eq!(lines, [&json!(1), &json!(2), &json!(3)]);
    server.stop().unwrap();
}

/// Why a file was refused.
fn refusal(server: &Server, purpose: &str, content: &str) -> String {
    let answer = upload(server, purpose, content);
    assert_eq!(answer.status, 400, "{answer:?}");
    let error = answer.json()["error"].clone();
    assert_eq!(
        (&error["code"], &error["param"]),
        (&json!("invalid_file"), &json!("file"))
    );
    error["message"].as_str().unwrap().to_string()
}

#[test]
fn a_file_with_a_bad_line_is_refused_whole() {
    let judged = ServeConfig {
        training_rows: Some(Arc::new(|| {
            Box::new(|line: &str| match line {
                "good" => Ok(()),
                _ => Err("it is not good".to_string()),
            })
        })),
        ..config()
    };
    let server = start_with(judged, EngineConfig::default(), Duration::ZERO);
    let line = |id: &str, url: &str| {
        json!({"custom_id": id, "method": "POST", "url": url, "body": {}}).to_string()
    };
    let chat = "/v1/chat/completions";
    let lines = [
        line("a", chat),
        line("a", chat),
        "{".to_string(),
        line("b", "/v1/embeddings"),
        line("c", "/elsewhere"),
        line("d", chat),
    ];
    let told = refusal(&server, "batch", &lines.join("\n"));
    for part in [
        "line 2: `custom_id` \"a\" is there twice; line 3: the body is not JSON",
        "; line 4: `url` is not that of the first line",
        "; line 5: `url` must be one of",
    ] {
        assert!(told.contains(part), "{told}");
    }
    assert!(
        !told.contains("line 1:") && !told.contains("line 6:"),
        "{told}"
    );
    let told = refusal(
        &server,
        "fine-tune",
        &("good\n\n".to_string() + &"bad\n".repeat(30)),
    );
    assert!(
        told.contains("line 3: it is not good"),
        "blank lines count: {told}"
    );
    assert!(
        told.contains("line 22:") && !told.contains("line 23:"),
        "{told}"
    );
    assert!(told.ends_with("; and 10 more"), "{told}");
    let item = json!({"item": {"a": 1}}).to_string();
    let told = refusal(
        &server,
        "evals",
        &format!("{item}\n{{\"sample\": {{}}}}\n{{\"item\": 1}}"),
    );
    assert!(
        told.contains("line 2: `item` is missing; line 3: `item` must be an object"),
        "{told}"
    );
    assert!(refusal(&server, "evals", "\n \n").contains("no lines"));
    // Nothing of any of them is there, and what is good is taken.
    assert_eq!(get(&server, "/v1/files").json()["data"], json!([]));
    for (purpose, content) in [
        ("batch", lines[0].clone()),
        ("fine-tune", "good\r\ngood".to_string()),
        ("evals", item),
    ] {
        assert_eq!(upload(&server, purpose, &content).status, 200, "{purpose}");
    }
    server.stop().unwrap();
}

/// Adds a part to an upload.
fn add_part(server: &Server, upload: &str, data: &str) -> support::Answer {
    let body = format!(
        "--b\r\nContent-Disposition: form-data; name=\"data\"; filename=\"p\"\r\nContent-Type: application/octet-stream\r\n\r\n{data}\r\n--b--\r\n"
    );
    let kind = "Content-Type: multipart/form-data; boundary=b\r\n";
    let path = format!("/v1/uploads/{upload}/parts");
    finish(open(server.addr(), "POST", &path, kind, &body))
}

fn begin(server: &Server, bytes: usize, purpose: &str) -> Value {
    let body = json!({"bytes": bytes, "filename": "big.jsonl", "mime_type": "text/jsonl", "purpose": purpose});
    send(server, "POST", "/v1/uploads", Some(&body)).json()
}

fn complete(server: &Server, id: &Value, body: Value) -> support::Answer {
    let path = format!("/v1/uploads/{}/complete", id.as_str().unwrap());
    send(server, "POST", &path, Some(&body))
}

#[test]
fn parts_become_a_file_in_the_order_asked_for() {
    let server = start();
    let upload = begin(&server, 11, "user_data");
    assert_eq!(
        (&upload["object"], &upload["status"]),
        (&json!("upload"), &json!("pending"))
    );
    assert_eq!(
        upload["expires_at"].as_u64().unwrap() - upload["created_at"].as_u64().unwrap(),
        3600
    );
    let id = upload["id"].as_str().unwrap();
    let second = add_part(&server, id, " world").json();
    let first = add_part(&server, id, "hello").json();
    assert_eq!(
        (&first["object"], &first["upload_id"]),
        (&json!("upload.part"), &upload["id"])
    );
    assert_eq!(add_part(&server, id, "x").status, 400, "more than was said");
    let parts = json!([first["id"], second["id"]]);
    for (bad, param) in [
        (json!({"part_ids": [first["id"]]}), "part_ids"),
        (
            json!({"part_ids": [first["id"], first["id"]]}),
            "part_ids[1]",
        ),
        (json!({"part_ids": ["part_x"]}), "part_ids[0]"),
        (json!({"part_ids": parts, "md5": "00"}), "md5"),
    ] {
        let refused = complete(&server, &upload["id"], bad);
        assert_eq!(refused.json()["error"]["param"], param);
    }
    let md5 = "5eb63bbbe01eeed093cb22bb8f5acdc3";
    let done = complete(
        &server,
        &upload["id"],
        json!({"part_ids": parts, "md5": md5}),
    )
    .json();
    assert_eq!(done["status"], "completed", "{done}");
    assert_eq!(
        (&done["file"]["filename"], &done["file"]["bytes"]),
        (&json!("big.jsonl"), &json!(11))
    );
    let file = done["file"]["id"].as_str().unwrap();
    assert_eq!(
        get(&server, &format!("/v1/files/{file}/content")).body,
        "hello world"
    );
    // It is over.
    assert_eq!(
        add_part(&server, id, "x").json()["error"]["code"],
        "upload_ended"
    );
    let again = complete(&server, &upload["id"], json!({"part_ids": parts}));
    assert_eq!(again.json()["error"]["code"], "upload_ended");
    server.stop().unwrap();
}

#[test]
fn an_upload_is_judged_as_a_file_is_and_ends_in_time() {
    let store = Arc::new(Store::in_memory().unwrap());
    let kept = ServeConfig {
        store: Some(Arc::clone(&store)),
        ..config()
    };
    let server = start_with(kept, EngineConfig::default(), Duration::ZERO);
    let upload = begin(&server, 1, "batch");
    let id = upload["id"].as_str().unwrap();
    let part = add_part(&server, id, "{").json();
    let refused = complete(&server, &upload["id"], json!({"part_ids": [part["id"]]}));
    assert_eq!(refused.json()["error"]["code"], "invalid_file");
    assert_eq!(get(&server, "/v1/files").json()["data"], json!([]));
    let path = format!("/v1/uploads/{id}/cancel");
    assert_eq!(
        send(&server, "POST", &path, None).json()["status"],
        "cancelled"
    );
    let part = part["id"].as_str().unwrap();
    assert_eq!(store.chunk(part, 0).unwrap(), None, "its bytes are gone");

    let late = begin(&server, 1, "batch");
    let id = late["id"].as_str().unwrap();
    let noted = store.amend("upload", "", id, |upload| {
        upload.body["expires_at"] = json!(1);
        true
    });
    assert!(noted.unwrap());
    let refused = add_part(&server, id, "x").json();
    assert_eq!(refused["error"]["message"], "the upload is `expired`");
    for (body, param) in [
        (
            json!({"bytes": 0, "filename": "a", "mime_type": "m", "purpose": "batch"}),
            "bytes",
        ),
        (
            json!({"bytes": 1, "filename": "a", "mime_type": "m", "purpose": "party"}),
            "purpose",
        ),
        (
            json!({"bytes": 1, "filename": "a", "mime_type": "m", "purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": 1}}),
            "expires_after.seconds",
        ),
    ] {
        let refused = send(&server, "POST", "/v1/uploads", Some(&body)).json();
        assert_eq!(refused["error"]["param"], param);
    }
    server.stop().unwrap();
}
