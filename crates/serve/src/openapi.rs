//! `/openapi.json` and `/docs`: the API described, from one table.
//!
//! `openapi.json` beside this crate is this document as last released; a test compares the two, and the table with the
//! routes, so that a change of the API shows in review.

mod operations;

use std::fmt::Write as _;

use axum::Json;
use axum::response::Html;
use serde_json::{Map, Value, json};

use operations::OPERATIONS;

/// Lists that are asked for by pages: by which parameter they are filtered, and whether by metadata.
const LISTS: &[(&str, Option<&str>, bool)] = &[
    ("/v1/chat/completions", Some("model"), true),
    ("/v1/chat/completions/{id}/messages", None, false),
    ("/v1/responses/{id}/input_items", None, false),
    ("/v1/files", Some("purpose"), false),
    ("/v1/batches", None, false),
    ("/v1/evals", None, true),
    ("/v1/evals/{id}/runs", Some("status"), false),
    (
        "/v1/evals/{id}/runs/{run}/output_items",
        Some("status"),
        false,
    ),
];

/// Fields about how tokens are chosen, of every request that generates.
fn sampling() -> Map<String, Value> {
    fields(json!({
        "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": 2},
        "top_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "top_k": {"type": ["integer", "null"], "minimum": -1},
        "min_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "repetition_penalty": {"type": ["number", "null"], "minimum": 0.01, "maximum": 100},
        "presence_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
        "frequency_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
        "logit_bias": {"type": ["object", "null"], "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
        "seed": {"type": ["integer", "null"]},
        "user": {"type": ["string", "null"]},
    }))
}

fn fields(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn request(required: &[&str], own: Value, with: Map<String, Value>) -> Value {
    let mut properties = fields(own);
    properties.extend(with);
    json!({
        "type": "object", "properties": properties, "required": required, "additionalProperties": false,
    })
}

fn schemas() -> Value {
    let stop = json!({"anyOf": [
        {"type": "null"}, {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
    ]});
    let metadata = json!({
        "type": ["object", "null"], "maxProperties": 16, "additionalProperties": {"type": "string", "maxLength": 512},
    });
    let stream_options = json!({
        "type": ["object", "null"], "additionalProperties": false,
        "properties": {"include_usage": {"type": ["boolean", "null"]}, "include_obfuscation": {"enum": [false, null]}},
    });
    let prompt = json!({"anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}, "minItems": 1},
    ]});
    let flag = json!({"type": ["boolean", "null"]});
    let object = json!({"type": ["object", "null"]});
    let text = json!({"type": ["string", "null"]});
    let tools = json!({"type": ["array", "null"], "items": {"type": "object"}, "maxItems": 128});
    let choice = json!({"anyOf": [{"type": "null"}, {"enum": ["none", "auto", "required"]}, {"type": "object"}]});
    let count = |min: u64| json!({"type": ["integer", "null"], "minimum": min});
    let guided = json!({
        "guided_regex": text, "guided_choice": {"type": ["array", "null"], "items": {"type": "string"}, "minItems": 1},
        "response_format": object,
    });
    let of_evals = schemas_of_evals(&metadata, &object, &text);
    let mut for_chat = sampling();
    for_chat.extend(fields(guided.clone()));
    let mut for_completions = sampling();
    for_completions.extend(fields(guided));
    let mut all = json!({
        "Error": {
            "type": "object", "required": ["error"],
            "properties": {"error": {
                "type": "object", "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text,
                },
            }},
        },
        "Any": {"type": "object"},
        "List": {
            "type": "object", "required": ["object", "data"],
            "properties": {"object": {"const": "list"}, "data": {"type": "array"}, "has_more": {"type": "boolean"}},
        },
        "Deleted": {
            "type": "object", "required": ["id", "deleted"],
            "properties": {"id": {"type": "string"}, "object": {"type": "string"}, "deleted": {"const": true}},
        },
        "Model": answer(&["id", "object", "created", "owned_by"], "model"),
        "ChatCompletion": answer(&["id", "object", "created", "model", "choices", "usage"], "chat.completion"),
        "Completion": answer(&["id", "object", "created", "model", "choices", "usage"], "text_completion"),
        "Response": answer(&["id", "object", "created_at", "model", "output", "status"], "response"),
        "File": answer(&["id", "object", "bytes", "created_at", "filename", "purpose", "status"], "file"),
        "Upload": answer(&["id", "object", "bytes", "created_at", "expires_at", "filename", "purpose", "status"], "upload"),
        "UploadPart": answer(&["id", "object", "created_at", "upload_id"], "upload.part"),
        "Batch": answer(&["id", "object", "endpoint", "input_file_id", "status", "created_at"], "batch"),
        "FineTuningJob": answer(&["id", "object", "model", "status", "training_file", "created_at"], "fine_tuning.job"),
        "FineTuningJobRequest": request(&["model", "training_file"], json!({
            "model": {"type": "string"}, "training_file": {"type": "string"}, "validation_file": text,
            "suffix": {"type": ["string", "null"], "minLength": 1, "maxLength": 64, "pattern": "^[A-Za-z0-9._-]+$"},
            "seed": {"type": ["integer", "null"]}, "metadata": metadata, "hyperparameters": object, "method": object,
            "integrations": {"type": ["array", "null"], "maxItems": 0},
        }), Map::new()),
        "ChatRequest": request(&["model", "messages"], json!({
            "model": {"type": "string"},
            "messages": {"type": "array", "minItems": 1, "items": {"type": "object", "required": ["role"]}},
            "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 128},
            "max_tokens": count(1), "max_completion_tokens": count(1), "stop": stop,
            "stream": flag, "stream_options": stream_options,
            "logprobs": flag, "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
            "tools": tools, "tool_choice": choice, "parallel_tool_calls": flag,
            "prediction": object, "store": flag, "metadata": metadata,
        }), for_chat),
        "CompletionRequest": request(&["model", "prompt"], json!({
            "model": {"type": "string"}, "prompt": prompt,
            "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 128},
            "best_of": {"type": ["integer", "null"], "minimum": 1, "maximum": 20},
            "echo": flag, "logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
            "max_tokens": count(0), "stop": stop, "stream": flag, "stream_options": stream_options,
        }), for_completions),
        "EmbeddingRequest": request(&["model", "input"], json!({
            "model": {"type": "string"}, "input": prompt, "dimensions": count(1),
            "encoding_format": {"enum": ["float", "base64", null]}, "user": text,
        }), Map::new()),
        "DecisionRequest": request(&["model", "input", "questions"], json!({
            "model": {"type": "string"},
            "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]},
            "questions": {"type": "array", "minItems": 1, "maxItems": 400, "items": {
                "type": "object", "required": ["type", "instructions"],
                "properties": {"type": {"enum": ["predicate", "choice", "score"]}, "instructions": {"type": "string"}},
            }},
        }), Map::new()),
        "RerankRequest": request(&["model", "query", "documents"], json!({
            "model": {"type": "string"}, "query": {"type": "string"},
            "documents": {"type": "array", "minItems": 1, "maxItems": 1000},
            "top_n": count(1), "return_documents": flag,
        }), Map::new()),
        "ResponseRequest": request(&["model", "input"], json!({
            "model": {"type": "string"},
            "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]},
            "instructions": text, "previous_response_id": text, "max_output_tokens": count(1),
            "max_tool_calls": count(1), "metadata": metadata, "store": flag, "stream": flag, "background": flag,
            "text": object, "tools": tools, "tool_choice": choice, "parallel_tool_calls": flag,
            "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
            "include": {"type": ["array", "null"], "items": {"const": "message.output_text.logprobs"}},
        }), sampling()),
        "MetadataRequest": request(&["metadata"], json!({"metadata": metadata}), Map::new()),
        "FileForm": request(&["file", "purpose"], json!({
            "file": {"type": "string", "format": "binary"},
            "purpose": {"enum": ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]},
        }), Map::new()),
        "UploadRequest": request(&["bytes", "filename", "mime_type", "purpose"], json!({
            "bytes": {"type": "integer", "minimum": 1}, "filename": {"type": "string", "minLength": 1, "maxLength": 512},
            "mime_type": {"type": "string"},
            "purpose": {"enum": ["assistants", "batch", "fine-tune", "vision", "user_data", "evals"]},
            "expires_after": object,
        }), Map::new()),
        "PartForm": request(&["data"], json!({"data": {"type": "string", "format": "binary"}}), Map::new()),
        "CompleteRequest": request(&["part_ids"], json!({
            "part_ids": {"type": "array", "items": {"type": "string"}}, "md5": text,
        }), Map::new()),
        "BatchRequest": request(&["input_file_id", "endpoint", "completion_window"], json!({
            "input_file_id": {"type": "string"}, "endpoint": {"enum": crate::openai::batch_run::ENDPOINTS},
            "completion_window": {"const": "24h"}, "metadata": metadata, "output_expires_after": object,
        }), Map::new()),
        "TokenizeRequest": request(&[], json!({
            "model": text, "prompt": text, "add_special_tokens": flag,
            "messages": {"type": ["array", "null"], "items": {"type": "object"}}, "tools": tools,
            "return_token_strs": flag,
        }), Map::new()),
        "DetokenizeRequest": request(&["tokens"], json!({
            "model": text, "tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        }), Map::new()),
    });
    for (name, schema) in of_evals {
        all[name] = schema;
    }
    all
}

fn schemas_of_evals(metadata: &Value, object: &Value, text: &Value) -> Map<String, Value> {
    fields(json!({
        "Eval": answer(&["id", "object", "name", "created_at", "data_source_config", "testing_criteria"], "eval"),
        "EvalRequest": request(&["data_source_config", "testing_criteria"], json!({
            "name": {"type": ["string", "null"], "maxLength": 256}, "metadata": metadata,
            "data_source_config": {"type": "object", "required": ["type"]},
            "testing_criteria": {"type": "array", "minItems": 1, "maxItems": 50, "items": {"type": "object", "required": ["type", "name"]}},
        }), Map::new()),
        "EvalUpdate": request(&[], json!({
            "name": {"type": ["string", "null"], "maxLength": 256}, "metadata": metadata,
        }), Map::new()),
        "EvalDeleted": {
            "type": "object", "required": ["object", "deleted"],
            "properties": {"object": {"type": "string"}, "deleted": {"const": true}},
        },
        "EvalRun": answer(&["id", "object", "eval_id", "status", "created_at", "result_counts", "data_source"], "eval.run"),
        "EvalRunRequest": request(&["data_source"], json!({
            "name": text, "metadata": metadata, "data_source": {"type": "object", "required": ["type", "source"]},
        }), Map::new()),
        "OutputItem": answer(&["id", "object", "run_id", "eval_id", "status", "datasource_item", "results"], "eval.run.output_item"),
        "GraderRequest": request(&["grader"], json!({"grader": {"type": "object", "required": ["type"]}}), Map::new()),
        "GraderRunRequest": request(&["grader", "model_sample"], json!({
            "grader": {"type": "object", "required": ["type"]}, "model_sample": {"type": "string"}, "item": object,
        }), Map::new()),
    }))
}

fn answer(required: &[&str], object: &str) -> Value {
    json!({
        "type": "object", "required": required, "properties": {"object": {"const": object}},
    })
}

/// What an operation takes beside its body.
fn parameters(method: &str, path: &str) -> Vec<Value> {
    let mut all = Vec::new();
    for part in path.split('/') {
        if let Some(name) = part
            .strip_prefix('{')
            .and_then(|part| part.strip_suffix('}'))
        {
            all.push(
                json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}),
            );
        }
    }
    if (method, path) == ("get", "/v1/evals/{id}/runs/{run}") {
        all.push(json!({"name": "compare_to", "in": "query", "required": false, "schema": {"type": "string"}}));
    }
    if (method, path) == ("get", "/v1/evals") {
        all.push(json!({"name": "order_by", "in": "query", "required": false, "schema": {"enum": ["created_at", "updated_at"]}}));
    }
    if path == "/tokenizer_info" {
        all.push(
            json!({"name": "model", "in": "query", "required": false, "schema": {"type": "string"}}),
        );
    }
    let Some((_, label, metadata)) = LISTS.iter().find(|(p, ..)| *p == path && method == "get")
    else {
        return all;
    };
    let mut query = |name: &str, schema: Value| {
        all.push(json!({"name": name, "in": "query", "required": false, "schema": schema}));
    };
    query("after", json!({"type": "string"}));
    query(
        "limit",
        json!({"type": "integer", "minimum": 1, "maximum": 10_000, "default": 20}),
    );
    query("order", json!({"enum": ["asc", "desc"]}));
    if let Some(label) = label {
        query(label, json!({"type": "string"}));
    }
    if *metadata {
        all.push(json!({
            "name": "metadata", "in": "query", "required": false, "style": "deepObject", "explode": true,
            "schema": {"type": "object", "maxProperties": 16, "additionalProperties": {"type": "string"}},
        }));
    }
    all
}

/// The document.
pub(crate) fn document() -> Value {
    let mut paths = Map::new();
    for (method, path, about, body, answer) in OPERATIONS {
        let content = match *answer {
            "Text" => json!({"text/plain": {"schema": {"type": "string"}}}),
            "Page" => json!({"text/html": {"schema": {"type": "string"}}}),
            "Bytes" => {
                json!({"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}})
            }
            name => {
                let schema = json!({"$ref": format!("#/components/schemas/{name}")});
                let mut content = json!({"application/json": {"schema": schema}});
                if matches!(
                    *body,
                    Some("ChatRequest" | "CompletionRequest" | "ResponseRequest")
                ) && !path.ends_with("input_tokens")
                {
                    content["text/event-stream"] = json!({"schema": {
                        "type": "string", "contentMediaType": "text/event-stream",
                        "description": "With `stream: true`: frames of `data: JSON`, of `event: NAME` before it in responses.",
                    }});
                }
                content
            }
        };
        let error = json!({
            "description": "An error, in OpenAI's shape.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
        });
        let mut operation = json!({
            "summary": about,
            "operationId": format!("{method}{}", path.replace(['/', '{', '}', '.'], "_")),
            "responses": {"200": {"description": "Done.", "content": content}, "4XX": error, "5XX": error},
        });
        if let Some(body) = body {
            let schema = json!({"$ref": format!("#/components/schemas/{body}")});
            let kind = if body.ends_with("Form") {
                "multipart/form-data"
            } else {
                "application/json"
            };
            operation["requestBody"] =
                json!({"required": true, "content": {kind: {"schema": schema}}});
        }
        if matches!(*path, "/health" | "/ready") {
            operation["responses"]["503"] = json!({
                "description": "An engine has stopped, or there is no room.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Any"}}},
            });
        }
        let parameters = parameters(method, path);
        if !parameters.is_empty() {
            operation["parameters"] = Value::Array(parameters);
        }
        let entry = paths.entry(path.to_string()).or_insert_with(|| json!({}));
        entry[*method] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Bantam",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The OpenAI API over small models on a CPU. A field is honoured, a hint, or a 400 that names it.",
        },
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas(),
        },
    })
}

/// `GET /openapi.json`
pub(crate) async fn json() -> Json<Value> {
    Json(document())
}

/// `GET /docs`
pub(crate) async fn page() -> Html<String> {
    let mut page = String::from(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Bantam's API</title>\
         <style>body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}td{padding:.2rem 1rem .2rem 0;vertical-align:top}</style>\
         <h1>Bantam's API</h1><p>The whole description: <a href=\"/openapi.json\">/openapi.json</a></p><table>",
    );
    for (method, path, about, ..) in OPERATIONS {
        let method = method.to_uppercase();
        let about = about.replace('&', "&amp;").replace('<', "&lt;");
        let _ = write!(page, "<tr><td><code>{method} {path}</code><td>{about}");
    }
    page.push_str("</table></html>");
    Html(page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::router::ROUTES;

    #[test]
    fn the_table_has_every_route() {
        let mut routes: Vec<String> = ROUTES.iter().map(|r| r.replace("{*id}", "{id}")).collect();
        routes.sort();
        let mut paths: Vec<String> = OPERATIONS.iter().map(|op| op.1.to_string()).collect();
        paths.sort();
        paths.dedup();
        assert_eq!(paths, routes);
    }

    #[test]
    fn the_released_document_is_this_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
        let now = serde_json::to_string_pretty(&document()).unwrap() + "\n";
        if std::env::var_os("BANTAM_UPDATE").is_some() {
            std::fs::write(path, &now).unwrap();
        }
        let released = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            released == now,
            "openapi.json is not what the server says; if that is meant, run this test with BANTAM_UPDATE=1"
        );
    }

    #[test]
    fn every_field_of_a_schema_is_known() {
        let schemas = schemas();
        for (name, parse) in [
            (
                "ChatRequest",
                (|body| crate::openai::chat_fields(body).err()) as fn(&[u8]) -> Option<_>,
            ),
            ("CompletionRequest", |body| {
                crate::openai::completion_fields(body).err()
            }),
        ] {
            for field in schemas[name]["properties"].as_object().unwrap().keys() {
                let mut body = json!({"model": "m", "prompt": "p"});
                if name == "ChatRequest" {
                    body = json!({"model": "m", "messages": [{"role": "user", "content": "x"}]});
                }
                if body.get(field).is_none() {
                    body[field] = Value::Null;
                }
                let error = parse(body.to_string().as_bytes());
                assert!(error.is_none(), "{name}.{field}: {error:?}");
            }
        }
    }
}
