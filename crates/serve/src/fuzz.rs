//! Entry points for fuzzers and hostile-input tests: bytes in, nothing out, no panic, bounded time.

use std::sync::OnceLock;

use bantam_store::Store;
use serde_json::{Value, json};

use crate::openai;

/// Reads bytes as the body of every endpoint that takes JSON.
pub fn request_body(data: &[u8]) {
    static STORE: OnceLock<Store> = OnceLock::new();
    let store = STORE.get_or_init(|| Store::in_memory().expect("memory is there"));
    openai::read_any(data, store);
}

/// Reads bytes as a query string.
pub fn query(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let _ = crate::query::list(Some(&text), Some("model"), true, true);
}

/// Streams bytes as the text of an answer, and reads the frame as a client does: it is one event, and the text is
/// whole.
pub fn sse(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let frame = openai::sse::frame(&json!({"text": text}));
    let mut events = events_of(&frame).into_iter();
    let event = events.next().expect("a frame is an event");
    let read: Value = serde_json::from_str(&event).expect("an event is JSON");
    assert_eq!(read["text"].as_str(), Some(&*text));
    assert!(events.next().is_none(), "a frame is one event: {frame:?}");
}

/// The data of the events of a stream, by the rules of the HTML standard (section 9.2.6, "Interpreting an event
/// stream"): lines end at CR, LF or both, an event ends at an empty line.
fn events_of(stream: &str) -> Vec<String> {
    let lines = stream.replace("\r\n", "\n").replace('\r', "\n");
    let mut lines: Vec<&str> = lines.split('\n').collect();
    // What follows the last end of a line is no line yet.
    lines.pop();
    let (mut events, mut data) = (Vec::new(), Vec::new());
    for line in lines {
        if line.is_empty() {
            if !data.is_empty() {
                events.push(data.join("\n"));
                data.clear();
            }
            continue;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        if field == "data" {
            data.push(value.strip_prefix(' ').unwrap_or(value));
        }
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Requests that use every field.
    fn seeds() -> Vec<Value> {
        vec![
            json!({"model": "m", "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "x"}]},
                {"role": "assistant", "content": null, "tool_calls": [
                    {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                    {"id": "d", "type": "custom", "custom": {"name": "g", "input": "x"}}]},
                {"role": "tool", "tool_call_id": "c", "content": "r"}],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": true}},
                    {"type": "custom", "custom": {"name": "g", "format": {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: \"a\""}}}}],
                "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}},
                "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
                "logit_bias": {"1": -1}, "stop": ["a"], "n": 2, "seed": -1, "metadata": {"a": "b"}, "store": true,
                "prediction": {"type": "content", "content": "x"}, "stream": true, "stream_options": {"include_usage": true}}),
            json!({"model": "m", "prompt": [[1, 2], "x"], "echo": true, "logprobs": 2, "best_of": 3}),
            json!({"model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "x"}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]}],
                "text": {"format": {"type": "json_object"}}, "tools": [{"type": "function", "name": "f"}], "include": [],
                "previous_response_id": "r", "instructions": "i"}),
        ]
    }

    /// Replaces one value somewhere inside.
    fn mutate(value: &mut Value, at: &mut usize, by: &Value) {
        if *at == 0 {
            *value = by.clone();
        }
        *at = at.wrapping_sub(1);
        match value {
            Value::Array(items) => items.iter_mut().for_each(|item| mutate(item, at, by)),
            Value::Object(fields) => fields.values_mut().for_each(|field| mutate(field, at, by)),
            _ => {}
        }
    }

    #[test]
    fn no_text_breaks_out_of_its_event() {
        for text in [
            "",
            "a\n\ndata: [DONE]\n\n",
            "\r\r\nevent: x\r",
            "\u{2028}\u{2029}\u{0}\u{85}\"\\",
        ] {
            sse(text.as_bytes());
        }
        sse(b"\xff\xfe\n\n\xf0\x9f");
        assert_eq!(events_of("data: a\n\ndata: b\r\rdata: c\n"), ["a", "b"]);
    }

    #[test]
    fn hostile_bodies_do_no_harm() {
        let odd = [
            json!(null),
            json!(-1),
            json!(1e300),
            json!(u64::MAX),
            json!(""),
            json!("\u{0}é"),
            json!([]),
            json!([[[]]]),
            json!({}),
            json!({"type": "x"}),
        ];
        for seed in seeds() {
            request_body(seed.to_string().as_bytes());
            for at in 0..70 {
                for by in &odd {
                    let mut body = seed.clone();
                    let mut at = at;
                    mutate(&mut body, &mut at, by);
                    request_body(body.to_string().as_bytes());
                }
            }
        }
        let deep = "[".repeat(100_000);
        for bytes in [&b"\xff\xfe"[..], b"", b"{", b"null", deep.as_bytes()] {
            request_body(bytes);
            query(bytes);
        }
        for text in ["limit=%", "metadata[%5b]=%c3%28&after=%00", "&&=&%ff=%ff"] {
            query(text.as_bytes());
        }
    }
}
