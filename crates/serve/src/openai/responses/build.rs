//! A response that is being put together, and the events that tell of it.

use bantam_engine::Usage;
use bantam_text::CallKind;
use serde_json::{Map, Value, json};

use super::super::answers::Piece;
use super::super::response::TokenLogprob;
use crate::error::ApiError;
use crate::ids;

/// Puts a response together from the parts of one answer.
pub(super) struct Builder {
    head: Map<String, Value>,
    output: Vec<Value>,
    open: Option<Open>,
    status: &'static str,
    incomplete: bool,
    error: Value,
    usage: Option<Usage>,
    sequence: u64,
    /// Frames of events; nothing is collected unless streamed.
    events: Option<String>,
}

/// The item that is being written, the last of the output.
enum Open {
    Message {
        id: String,
        text: String,
        logprobs: Vec<Value>,
    },
    Call {
        id: String,
        kind: CallKind,
        input: String,
    },
}

impl Builder {
    /// An empty response; `head` are its fields that do not change.
    pub(super) fn new(head: Map<String, Value>, streamed: bool) -> Self {
        Self {
            head,
            output: Vec::new(),
            open: None,
            status: "in_progress",
            incomplete: false,
            error: Value::Null,
            usage: None,
            sequence: 0,
            events: streamed.then(String::new),
        }
    }

    /// The events since the last call.
    pub(super) fn events(&mut self) -> String {
        self.events.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The finished items.
    pub(super) fn output(&self) -> &[Value] {
        &self.output
    }

    /// The response as it stands.
    pub(super) fn response(&self) -> Value {
        let mut body = self.head.clone();
        body.insert("status".into(), json!(self.status));
        body.insert("error".into(), self.error.clone());
        let details = self
            .incomplete
            .then(|| json!({"reason": "max_output_tokens"}));
        body.insert("incomplete_details".into(), json!(details));
        body.insert("output".into(), json!(self.output));
        let usage = self.usage.map(|usage| {
            json!({
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            })
        });
        body.insert("usage".into(), json!(usage));
        Value::Object(body)
    }

    /// Changes the status of one that has not ended.
    pub(super) fn enter(&mut self, status: &'static str) {
        self.status = status;
    }

    /// The first events.
    pub(super) fn begin(&mut self) {
        self.tell_response("response.created");
        self.tell_response("response.in_progress");
    }

    /// Takes a part.
    pub(super) fn piece(&mut self, piece: Piece) {
        match piece {
            Piece::Text { text, logprobs } => self.text(&text, &logprobs),
            Piece::Begin { id, kind, name, .. } => self.call(id, kind, &name),
            Piece::Input { text, .. } => self.input(&text),
            Piece::End => self.close("completed"),
            Piece::Done { reason, usage } => {
                if self.output.is_empty() {
                    self.message();
                }
                self.incomplete = reason == "length";
                self.close(if self.incomplete {
                    "incomplete"
                } else {
                    "completed"
                });
                self.usage = Some(usage);
                self.status = if self.incomplete {
                    "incomplete"
                } else {
                    "completed"
                };
                self.tell_response(if self.incomplete {
                    "response.incomplete"
                } else {
                    "response.completed"
                });
            }
        }
    }

    /// Ends in failure.
    pub(super) fn fail(&mut self, error: &ApiError) {
        self.close("incomplete");
        self.status = "failed";
        self.error = json!({"code": "server_error", "message": error.message});
        self.tell_response("response.failed");
    }

    fn at(&self) -> usize {
        self.output.len().saturating_sub(1)
    }

    fn text(&mut self, text: &str, new: &[TokenLogprob]) {
        if !matches!(self.open, Some(Open::Message { .. })) {
            self.message();
        }
        let at = self.at();
        let new: Vec<Value> = new.iter().map(|one| json!(one)).collect();
        if let Some(Open::Message {
            id,
            text: all,
            logprobs,
        }) = &mut self.open
        {
            all.push_str(text);
            logprobs.extend(new.iter().cloned());
            let fields = json!({
                "item_id": id, "output_index": at, "content_index": 0, "delta": text, "logprobs": new,
            });
            self.tell("response.output_text.delta", fields);
        }
    }

    /// Begins a message.
    fn message(&mut self) {
        self.close("completed");
        let id = ids::random("msg_");
        let item = json!({
            "id": id, "type": "message", "status": "in_progress", "role": "assistant", "content": [],
        });
        self.output.push(item.clone());
        let at = self.at();
        self.tell(
            "response.output_item.added",
            json!({"output_index": at, "item": item}),
        );
        let part = json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []});
        self.tell(
            "response.content_part.added",
            json!({"item_id": id, "output_index": at, "content_index": 0, "part": part}),
        );
        self.open = Some(Open::Message {
            id,
            text: String::new(),
            logprobs: Vec::new(),
        });
    }

    fn call(&mut self, call_id: String, kind: CallKind, name: &str) {
        self.close("completed");
        let (id, item) = match kind {
            CallKind::Function => {
                let id = ids::random("fc_");
                let item = json!({
                    "id": id, "type": "function_call", "status": "in_progress", "call_id": call_id,
                    "name": name, "arguments": "",
                });
                (id, item)
            }
            CallKind::Custom => {
                let id = ids::random("ctc_");
                let item = json!({
                    "id": id, "type": "custom_tool_call", "status": "in_progress", "call_id": call_id,
                    "name": name, "input": "",
                });
                (id, item)
            }
        };
        self.output.push(item.clone());
        let at = self.at();
        self.tell(
            "response.output_item.added",
            json!({"output_index": at, "item": item}),
        );
        self.open = Some(Open::Call {
            id,
            kind,
            input: String::new(),
        });
    }

    fn input(&mut self, text: &str) {
        let at = self.at();
        if let Some(Open::Call { id, kind, input }) = &mut self.open {
            input.push_str(text);
            let name = match kind {
                CallKind::Function => "response.function_call_arguments.delta",
                CallKind::Custom => "response.custom_tool_call_input.delta",
            };
            let fields = json!({"item_id": id, "output_index": at, "delta": text});
            self.tell(name, fields);
        }
    }

    /// Ends the item that is being written.
    fn close(&mut self, status: &str) {
        let at = self.at();
        match self.open.take() {
            None => return,
            Some(Open::Message { id, text, logprobs }) => {
                self.tell(
                    "response.output_text.done",
                    json!({"item_id": id, "output_index": at, "content_index": 0, "text": text, "logprobs": logprobs}),
                );
                let part = json!({
                    "type": "output_text", "text": text, "annotations": [], "logprobs": logprobs,
                });
                self.output[at]["content"] = json!([part]);
                self.tell(
                    "response.content_part.done",
                    json!({"item_id": id, "output_index": at, "content_index": 0, "part": part}),
                );
            }
            Some(Open::Call { id, kind, input }) => {
                let (event, field) = match kind {
                    CallKind::Function => ("response.function_call_arguments.done", "arguments"),
                    CallKind::Custom => ("response.custom_tool_call_input.done", "input"),
                };
                let name = self.output[at]["name"].clone();
                let mut fields = json!({"item_id": id, "output_index": at, "name": name});
                fields[field] = json!(input);
                self.output[at][field] = json!(input);
                self.tell(event, fields);
            }
        }
        self.output[at]["status"] = json!(status);
        let item = self.output[at].clone();
        self.tell(
            "response.output_item.done",
            json!({"output_index": at, "item": item}),
        );
    }

    fn tell_response(&mut self, name: &str) {
        let response = self.response();
        self.tell(name, json!({"response": response}));
    }

    fn tell(&mut self, name: &str, mut fields: Value) {
        let Some(events) = &mut self.events else {
            return;
        };
        fields["type"] = json!(name);
        fields["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        events.push_str(&format!("event: {name}\ndata: {fields}\n\n"));
    }
}
