//! Completions, tokens, responses, stored completions, over a real socket.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::sync::Arc;
use std::time::Duration;

use bantam_engine::EngineConfig;
use bantam_serve::{ServedEmbedder, Server};
use serde_json::{Value, json};
use support::{Counter, ask, config, get, post, send, start, start_wide};

const COMPLETIONS: &str = "/v1/completions";

fn complete(server: &Server, extra: Value) -> Value {
    let mut body =
        json!({"model": "mock", "prompt": "where is", "max_tokens": 8, "temperature": 0});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    send(server, "POST", COMPLETIONS, Some(&body)).json()
}

#[test]
fn completions_go_on_and_echo() {
    let server = start();
    let plain = complete(&server, json!({}));
    assert_eq!(plain["object"], "text_completion");
    let text = plain["choices"][0]["text"].as_str().unwrap();
    let echoed = complete(&server, json!({"echo": true}));
    assert_eq!(echoed["choices"][0]["text"], format!("where is{text}"));
    let ids = send(
        &server,
        "POST",
        "/tokenize",
        Some(&json!({"model": "mock", "prompt": "where is"})),
    )
    .json();
    let ids = &ids["tokens"];
    assert_eq!(
        complete(&server, json!({"prompt": ids}))["choices"][0]["text"],
        text
    );
    let back = send(
        &server,
        "POST",
        "/detokenize",
        Some(&json!({"model": "mock", "tokens": ids})),
    )
    .json();
    assert_eq!(back["prompt"], "where is");
    let many = complete(&server, json!({"prompt": ["where is", "a"], "n": 2}));
    assert_eq!(many["choices"].as_array().unwrap().len(), 4);
    assert_eq!(many["choices"][1]["text"], text);
    assert_eq!(many["choices"][3]["index"], 3);
    let best = complete(&server, json!({"best_of": 4, "temperature": 1, "seed": 2}));
    assert_eq!(best["choices"].as_array().unwrap().len(), 1);
    assert_eq!(best["choices"][0]["logprobs"], Value::Null);
    let body = json!({"model": "mock", "prompt": "where is", "max_tokens": 8, "temperature": 0, "stream": true});
    let chunks = send(&server, "POST", COMPLETIONS, Some(&body)).chunks();
    let streamed: String = chunks
        .iter()
        .map(|c| c["choices"][0]["text"].as_str().unwrap())
        .collect();
    assert_eq!(streamed, text);
    server.stop().unwrap();
}

#[test]
fn a_client_that_counts_tokens_itself_is_told_how() {
    let server = start();
    let info = get(&server, "/tokenizer_info").json();
    assert_eq!(
        (&info["model"], &info["max_model_len"]),
        (&json!("mock"), &json!(400))
    );
    assert!(info["vocab_size"].as_u64().unwrap() > 0);
    assert!(info["chat_template"].as_str().unwrap().contains("messages"));
    // Where there is one model, it need not be named.
    let cut =
        |body: Value| send(&server, "POST", "/tokenize", Some(&body)).json()["tokens"].clone();
    let tokens = cut(json!({"prompt": "a card", "add_special_tokens": false}));
    assert_eq!(tokens, cut(json!({"prompt": "a card", "model": "mock"})));
    let body = json!({"tokens": tokens});
    let text = send(&server, "POST", "/detokenize", Some(&body)).json();
    assert_eq!(text["prompt"], "a card");
    for (path, status) in [
        ("?model=mock", 200),
        ("?model=none", 404),
        ("?colour=1", 400),
    ] {
        assert_eq!(
            get(&server, &format!("/tokenizer_info{path}")).status,
            status
        );
    }
    server.stop().unwrap();
}

#[test]
fn the_prompts_own_likelihood_is_that_of_saying_it() {
    let server = start();
    // What the model says, and how likely it found that ...
    let said = complete(&server, json!({"logprobs": 2, "max_tokens": 6}));
    let text = said["choices"][0]["text"].as_str().unwrap();
    let said = &said["choices"][0]["logprobs"];
    // ... is what it finds of the same text as a prompt.
    let ids = |text: &str| {
        let body = json!({"model": "mock", "prompt": text});
        send(&server, "POST", "/tokenize", Some(&body)).json()["tokens"].clone()
    };
    let (before, after) = (ids("where is"), said["tokens"].as_array().unwrap().len());
    let mut prompt = before.as_array().unwrap().clone();
    // The mock's answers are single bytes: byte `b` is token `b + 3`.
    prompt.extend(text.bytes().map(|b| json!(u32::from(b) + 3)));
    let scored = complete(
        &server,
        json!({"prompt": prompt, "echo": true, "logprobs": 2, "max_tokens": 0}),
    );
    let choice = &scored["choices"][0];
    assert_eq!(choice["text"], format!("where is{text}"));
    let list = &choice["logprobs"];
    assert_eq!(list["token_logprobs"][0], Value::Null);
    assert_eq!(list["tokens"].as_array().unwrap().len(), prompt.len());
    let tail = |name: &str| list[name].as_array().unwrap()[prompt.len() - after..].to_vec();
    assert_eq!(tail("tokens"), *said["tokens"].as_array().unwrap());
    assert_eq!(
        tail("token_logprobs"),
        *said["token_logprobs"].as_array().unwrap()
    );
    assert_eq!(
        tail("top_logprobs"),
        *said["top_logprobs"].as_array().unwrap()
    );
    assert_eq!(
        list["text_offset"][1],
        list["tokens"][0].as_str().unwrap().len()
    );
    // With a token to go on with, as harnesses ask.
    let more = complete(
        &server,
        json!({"prompt": prompt, "echo": true, "logprobs": 1, "max_tokens": 1}),
    );
    let list = &more["choices"][0]["logprobs"]["tokens"];
    assert_eq!(list.as_array().unwrap().len(), prompt.len() + 1);
    server.stop().unwrap();
}

#[test]
fn completions_refuse_what_they_cannot_do() {
    let server = start();
    for (extra, param) in [
        (json!({"suffix": "x"}), "suffix"),
        (json!({"prompt": []}), "prompt"),
        (json!({"prompt": [[]]}), "prompt"),
        (json!({"prompt": [99999]}), "prompt"),
        (json!({"prompt": 7}), "prompt"),
        (json!({"best_of": 1, "n": 2}), "best_of"),
        (json!({"max_tokens": 0}), "max_tokens"),
        (json!({"logprobs": 21}), "logprobs"),
        (json!({"stream": true, "best_of": 2}), "stream"),
        (json!({"colour": 1}), "colour"),
    ] {
        assert_eq!(
            complete(&server, extra.clone())["error"]["param"],
            param,
            "{extra}"
        );
    }
    server.stop().unwrap();
}

#[test]
fn stored_completions_are_listed_changed_and_forgotten() {
    let server = start();
    let keep = |tag: &str| {
        let body = ask(json!({"store": true, "metadata": {"tag": tag}, "max_tokens": 4}));
        post(&server, &body).json()
    };
    let first = keep("a");
    let second = keep("b");
    let mut streamed = ask(json!({"store": true, "metadata": {"tag": "a"}, "max_tokens": 4}));
    streamed["stream"] = json!(true);
    let third = post(&server, &streamed).chunks()[0]["id"].clone();
    post(&server, &ask(json!({"max_tokens": 2})));
    let ids = |query: &str| -> Vec<Value> {
        let page = get(&server, &format!("/v1/chat/completions{query}")).json();
        let data = page["data"].as_array().unwrap();
        data.iter().map(|c| c["id"].clone()).collect()
    };
    let all = [first["id"].clone(), second["id"].clone(), third.clone()];
    assert_eq!(ids(""), all);
    assert_eq!(ids("?metadata%5Btag%5D=a"), [all[0].clone(), third.clone()]);
    assert_eq!(ids("?order=desc&limit=1"), std::slice::from_ref(&third));
    let after = first["id"].as_str().unwrap();
    assert_eq!(ids(&format!("?after={after}&limit=1")), [all[1].clone()]);
    assert!(ids("?model=other").is_empty());
    let path = format!("/v1/chat/completions/{after}");
    let kept = get(&server, &path).json();
    assert_eq!(kept["choices"], first["choices"]);
    let third_kept = get(
        &server,
        &format!("/v1/chat/completions/{}", third.as_str().unwrap()),
    )
    .json();
    assert_eq!(third_kept["choices"], first["choices"]);
    let changed = send(
        &server,
        "POST",
        &path,
        Some(&json!({"metadata": {"tag": "z"}})),
    )
    .json();
    assert_eq!(changed["metadata"], json!({"tag": "z"}));
    assert_eq!(ids("?metadata%5Btag%5D=z"), [all[0].clone()]);
    let messages = get(&server, &format!("{path}/messages")).json();
    assert_eq!(messages["data"][0]["content"], "where is the card?");
    assert_eq!(send(&server, "DELETE", &path, None).json()["deleted"], true);
    assert_eq!(get(&server, &path).status, 404);
    assert_eq!(
        get(&server, "/v1/chat/completions?after=nobody").status,
        400
    );
    server.stop().unwrap();
}

fn respond(server: &Server, extra: Value) -> support::Answer {
    let mut body = json!({"model": "mock", "input": "where is the card?", "max_output_tokens": 10, "temperature": 0});
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    send(server, "POST", "/v1/responses", Some(&body))
}

#[test]
fn responses_go_on_from_one_another() {
    let server = start_wide();
    let first = respond(&server, json!({"metadata": {"k": "v"}})).json();
    assert_eq!(
        (&first["object"], &first["metadata"]["k"]),
        (&json!("response"), &json!("v"))
    );
    let item = &first["output"][0];
    let text = item["content"][0]["text"].as_str().unwrap();
    // The same conversation, told and gone on from, has the same answer.
    let id = first["id"].clone();
    let next = respond(
        &server,
        json!({"previous_response_id": id, "input": "and now?"}),
    )
    .json();
    let told = json!([
        {"role": "user", "content": "where is the card?"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text, "annotations": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "and now?"}]},
    ]);
    let whole = respond(&server, json!({"input": told})).json();
    assert_eq!(next["output"][0]["content"], whole["output"][0]["content"]);
    assert_eq!(
        next["usage"]["input_tokens"],
        whole["usage"]["input_tokens"]
    );
    let referred =
        json!([{"type": "item_reference", "id": item["id"]}, {"role": "user", "content": "x"}]);
    assert_eq!(respond(&server, json!({"input": referred})).status, 200);
    let path = format!("/v1/responses/{}", id.as_str().unwrap());
    assert_eq!(get(&server, &path).json(), first);
    let items = get(&server, &format!("{path}/input_items")).json();
    assert_eq!(items["data"][0]["content"], "where is the card?");
    let counted = json!({"model": "mock", "input": "where is the card?"});
    let counted = send(
        &server,
        "POST",
        "/v1/responses/input_tokens",
        Some(&counted),
    )
    .json();
    assert_eq!(counted["input_tokens"], first["usage"]["input_tokens"]);
    assert_eq!(send(&server, "DELETE", &path, None).json()["deleted"], true);
    assert_eq!(get(&server, &path).status, 404);
    let lost = respond(&server, json!({"previous_response_id": id})).json();
    assert_eq!(lost["error"]["param"], "previous_response_id");
    let private = respond(&server, json!({"store": false})).json();
    let path = format!("/v1/responses/{}", private["id"].as_str().unwrap());
    assert_eq!(get(&server, &path).status, 404);
    server.stop().unwrap();
}

#[test]
fn a_streamed_response_is_the_whole_one_in_order() {
    let server = start_wide();
    let tool = json!({"type": "function", "name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": false}, "strict": true});
    for extra in [
        json!({}),
        json!({"max_output_tokens": 300, "tools": [tool], "tool_choice": "required", "parallel_tool_calls": false}),
        json!({"text": {"format": {"type": "json_schema", "name": "t", "schema": {"enum": [1, 2]}}}}),
    ] {
        let whole = respond(&server, extra.clone()).json();
        let mut body = extra;
        body["stream"] = json!(true);
        let answer = respond(&server, body);
        let mut events = Vec::new();
        for event in answer.body.split("\n\n").filter(|e| !e.is_empty()) {
            let (name, data) = event.split_once('\n').unwrap();
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(name, format!("event: {}", data["type"].as_str().unwrap()));
            assert_eq!(data["sequence_number"], events.len());
            events.push(data);
        }
        assert_eq!(events[0]["type"], "response.created");
        assert_eq!(events[1]["type"], "response.in_progress");
        assert_eq!(events[2]["type"], "response.output_item.added");
        let last = events.last().unwrap();
        let status = whole["status"].as_str().unwrap();
        assert_eq!(last["type"], format!("response.{status}"));
        let strip = |output: &Value| -> Vec<Value> {
            let mut items = output.as_array().unwrap().clone();
            for item in &mut items {
                item["id"] = json!(0);
                item["call_id"] = json!(0);
            }
            items
        };
        assert_eq!(strip(&last["response"]["output"]), strip(&whole["output"]));
        let deltas = events
            .iter()
            .filter_map(|e| e["delta"].as_str())
            .collect::<String>();
        let item = &whole["output"][0];
        let said = item["content"][0]["text"]
            .as_str()
            .or(item["arguments"].as_str());
        assert_eq!(deltas, said.unwrap());
        let id = last["response"]["id"].as_str().unwrap();
        assert_eq!(
            get(&server, &format!("/v1/responses/{id}")).json(),
            last["response"]
        );
    }
    server.stop().unwrap();
}

#[test]
fn responses_take_tools_results_and_refuse_the_rest() {
    let server = start_wide();
    let tool = json!({"type": "function", "name": "now"});
    let body = json!({"tools": [tool], "tool_choice": {"type": "function", "name": "now"}, "max_output_tokens": 100});
    let first = respond(&server, body).json();
    let call = first["output"][0].clone();
    assert_eq!(
        (&call["type"], &call["name"]),
        (&json!("function_call"), &json!("now"))
    );
    let result =
        json!([{"type": "function_call_output", "call_id": call["call_id"], "output": "noon"}]);
    let next = respond(
        &server,
        json!({"previous_response_id": first["id"], "input": result}),
    );
    assert_eq!(next.status, 200, "{next:?}");
    for (extra, param) in [
        (json!({"truncation": "auto"}), "truncation"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (
            json!({"include": ["reasoning.encrypted_content"]}),
            "include[0]",
        ),
        (json!({"input": 7}), "input"),
        (
            json!({"input": [{"type": "computer_call"}]}),
            "input[0].type",
        ),
        (json!({"colour": 1}), "colour"),
        (
            json!({"text": {"format": {"type": "xml"}}}),
            "text.format.type",
        ),
    ] {
        let refused = respond(&server, extra.clone());
        assert_eq!(
            (refused.status, refused.json()["error"]["param"].clone()),
            (400, json!(param)),
            "{extra}"
        );
    }
    server.stop().unwrap();
}

#[test]
fn decisions_are_exact_likelihoods() {
    let server = start();
    let ask = json!({
        "model": "mock", "input": "where is the card?",
        "questions": [
            {"type": "predicate", "name": "p", "instructions": "Is it about money?"},
            {"type": "choice", "instructions": "Topic?", "choices": [{"value": "money"}, {"value": "food", "description": "d"}, {"value": true}]},
            {"type": "score", "instructions": "How sure?", "levels": [{"label": "low"}, {"label": "high"}]},
        ],
    });
    let answer = send(&server, "POST", "/v1/decisions", Some(&ask)).json();
    let answers = answer["answers"].as_array().unwrap();
    assert_eq!((answers.len(), &answers[0]["name"]), (3, &json!("p")));
    let p = answers[0]["probability"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&p));
    for answer in &answers[1..] {
        let all = answer["probabilities"].as_array().unwrap();
        let sum: f64 = all
            .iter()
            .map(|one| one["probability"].as_f64().unwrap())
            .sum();
        assert!((sum - 1.0).abs() < 1e-9);
        let best = all
            .iter()
            .map(|one| one["probability"].as_f64().unwrap())
            .fold(0.0, f64::max);
        assert_eq!(answer["confidence"], best);
    }
    assert!((1.0..=2.0).contains(&answers[2]["score"].as_f64().unwrap()));
    assert_eq!(
        send(&server, "POST", "/v1/decisions", Some(&ask)).json(),
        answer
    );
    for (extra, param) in [
        (json!({"questions": []}), "questions"),
        (
            json!({"questions": [{"type": "guess", "instructions": "x"}]}),
            "questions[0].type",
        ),
        (
            json!({"questions": [{"type": "choice", "instructions": "x", "choices": [{"value": "a"}]}]}),
            "questions[0].choices",
        ),
        (
            json!({"questions": [{"type": "choice", "instructions": "x", "choices": [{"value": "a"}, {"value": "a"}]}]}),
            "questions[0].choices[1].value",
        ),
        (json!({"colour": 1}), "colour"),
    ] {
        let mut body = ask.clone();
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        assert_eq!(
            send(&server, "POST", "/v1/decisions", Some(&body)).json()["error"]["param"],
            param
        );
    }
    assert_eq!(answer["calibrated"], false);
    // A temperature that was fitted for the model makes it as much less sure, and changes no choice.
    let mut sober = support::model("sober", EngineConfig::default(), Duration::ZERO);
    sober.calibration = Some(4.0);
    let other = Server::start(config(), support::models(vec![sober])).unwrap();
    let mut body = ask.clone();
    body["model"] = json!("sober");
    let calibrated = send(&other, "POST", "/v1/decisions", Some(&body)).json();
    assert_eq!(calibrated["calibrated"], true);
    for (one, other) in answer["answers"]
        .as_array()
        .unwrap()
        .iter()
        .zip(calibrated["answers"].as_array().unwrap())
    {
        let odds = |a: &Value| {
            let p = a["probability"].as_f64();
            p.map(|p| (p / (1.0 - p)).ln())
        };
        if let (Some(plain), Some(cooled)) = (odds(one), odds(other)) {
            assert!((plain / 4.0 - cooled).abs() < 1e-6, "{plain} {cooled}");
        }
        assert_eq!(one["choice"], other["choice"]);
    }
    other.stop().unwrap();
    let rerank = json!({"model": "mock", "query": "card", "documents": ["a", {"text": "b"}, "c"], "top_n": 2, "return_documents": true});
    let ranked = send(&server, "POST", "/v1/rerank", Some(&rerank)).json();
    let results = ranked["results"].as_array().unwrap();
    assert_eq!(results.len(), 2);
    assert!(results[0]["relevance_score"].as_f64() >= results[1]["relevance_score"].as_f64());
    assert!(results[0]["document"]["text"].is_string());
    server.stop().unwrap();
}

#[test]
fn embeddings_in_both_spellings() {
    let models = support::models(vec![support::model(
        "mock",
        EngineConfig::default(),
        Duration::ZERO,
    )]);
    let mut counter = ServedEmbedder::new("counter", Arc::new(Counter));
    counter.aliases = vec!["text-embedding-3-small".into()];
    models.add_embedder(counter).unwrap();
    let server = Server::start(config(), models).unwrap();
    let embed = |extra: Value| {
        let mut body = json!({"model": "text-embedding-3-small", "input": ["abc", "aad"]});
        for (name, value) in extra.as_object().unwrap() {
            body[name] = value.clone();
        }
        send(&server, "POST", "/v1/embeddings", Some(&body)).json()
    };
    let plain = embed(json!({}));
    assert_eq!(plain["model"], "counter");
    assert_eq!(plain["usage"]["prompt_tokens"], 6);
    assert_eq!(
        plain["data"][0]["embedding"],
        json!([1.0, 1.0, 1.0]),
        "as the model has them"
    );
    assert_eq!(plain["data"][1]["index"], 1);
    // 1.0 as four bytes, three times.
    let coded = embed(json!({"encoding_format": "base64"}));
    assert_eq!(coded["data"][0]["embedding"], "AACAPwAAgD8AAIA/");
    let tokens = embed(json!({"input": [97, 98, 99]}));
    assert_eq!(
        tokens["data"][0]["embedding"],
        plain["data"][0]["embedding"]
    );
    let short = embed(json!({"dimensions": 1}));
    assert_eq!(short["data"][0]["embedding"], json!([1.0]));
    for (extra, param) in [
        (json!({"dimensions": 4}), "dimensions"),
        (json!({"input": ["", "x"]}), "input[0]"),
        (json!({"input": "x".repeat(101)}), "input[0]"),
        (json!({"input": [301]}), "input"),
        (json!({"encoding_format": "hex"}), "encoding_format"),
        (json!({"model": "mock"}), "model"),
        (json!({"colour": 1}), "colour"),
    ] {
        assert_eq!(embed(extra.clone())["error"]["param"], param, "{extra}");
    }
    assert_eq!(get(&server, "/v1/models/counter").json()["id"], "counter");
    server.stop().unwrap();
}
