//! A server over the mock model, and an HTTP client of a page.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "test support, used in part by each test"
)]

#[path = "../../../engine/tests/mock/mod.rs"]
pub mod mock;

pub mod evals;

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use bantam_engine::{Embedder, Engine, EngineConfig, shorten};
use bantam_serve::{Models, ServeConfig, ServedModel, Server};
use bantam_text::{Chat, ChatTemplate, ConstraintEngine, TemplateTokens};
use mock::Mock;
use serde_json::{Value, json};

pub fn model(id: &str, config: EngineConfig, delay: Duration) -> ServedModel {
    model_with(id, config, delay, mock::MAX_CONTEXT)
}

/// A model that reads more: tools take many of its tiny tokenizer's tokens to describe.
pub fn model_with(
    id: &str,
    config: EngineConfig,
    delay: Duration,
    max_context: usize,
) -> ServedModel {
    let tokenizer = mock::tokenizer();
    let template = bantam_testkit::tiny::CHAT_TEMPLATE;
    let template = ChatTemplate::new(template, TemplateTokens::default(), None).unwrap();
    let chat = Chat::new(Arc::clone(&tokenizer), template, &[]).unwrap();
    let constraints = ConstraintEngine::new(&tokenizer, chat.end_tokens()).unwrap();
    let mut model = ServedModel::new(id, Arc::new(chat), constraints, move || {
        let mut mock = Mock::new();
        mock.delay = delay;
        mock.max_context = max_context;
        Ok::<_, String>(Engine::new(mock, tokenizer, config))
    });
    model.created = 1_700_000_000;
    model
}

/// Vectors that count a text's tokens by what is left of them when divided by three.
pub struct Counter;

impl Embedder for Counter {
    fn dims(&self) -> usize {
        3
    }

    fn max_tokens(&self) -> usize {
        100
    }

    fn vocab(&self) -> usize {
        300
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        text.bytes().map(u32::from).collect()
    }

    fn vectors(&self, inputs: &[&[u32]]) -> Vec<Vec<f32>> {
        let one = |input: &&[u32]| {
            let mut vector = vec![0.0; 3];
            for token in *input {
                vector[*token as usize % 3] += 1.0;
            }
            shorten(&mut vector, 3);
            vector
        };
        inputs.iter().map(one).collect()
    }
}

pub fn config() -> ServeConfig {
    ServeConfig {
        port: 0,
        ..ServeConfig::default()
    }
}

pub fn start() -> Server {
    start_with(config(), EngineConfig::default(), Duration::ZERO)
}

pub fn start_with(serve: ServeConfig, engine: EngineConfig, delay: Duration) -> Server {
    Server::start(serve, models(vec![model("mock", engine, delay)])).unwrap()
}

/// A server with room for tools.
pub fn start_wide() -> Server {
    let model = model_with("mock", EngineConfig::default(), Duration::ZERO, 4000);
    Server::start(config(), models(vec![model])).unwrap()
}

/// A shelf with these models.
pub fn models(all: Vec<ServedModel>) -> Arc<Models> {
    let models = Models::default();
    all.into_iter().for_each(|one| models.add(one).unwrap());
    Arc::new(models)
}

/// Sends a request with a JSON body, or none.
pub fn send(server: &Server, method: &str, path: &str, body: Option<&Value>) -> Answer {
    send_with(server, method, path, "", body)
}

pub fn send_with(
    server: &Server,
    method: &str,
    path: &str,
    headers: &str,
    body: Option<&Value>,
) -> Answer {
    let (kind, text) = body.map_or(("", String::new()), |body| (JSON, body.to_string()));
    let headers = format!("{kind}{headers}");
    finish(open(server.addr(), method, path, &headers, &text))
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HashMap<String, String>,
    pub body: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The data of each server-sent event.
    pub fn events(&self) -> Vec<&str> {
        let events = self.body.split("\n\n").filter(|e| !e.is_empty());
        events
            .map(|e| e.strip_prefix("data: ").unwrap_or_else(|| panic!("{e}")))
            .collect()
    }

    pub fn chunks(&self) -> Vec<Value> {
        let events = self.events();
        assert_eq!(events.last(), Some(&"[DONE]"));
        events[..events.len() - 1]
            .iter()
            .map(|e| serde_json::from_str(e).unwrap())
            .collect()
    }
}

/// Sends a request and leaves the answer unread.
pub fn open(addr: SocketAddr, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
    let mut stream = TcpStream::connect(addr).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    // A refusal may come, and the connection go, before all of a body is written.
    let _ = stream.write_all(body.as_bytes());
    stream
}

pub fn finish(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => bytes.extend_from_slice(&buffer[..n]),
        }
    }
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("{text:?}"));
    let mut lines = head.split("\r\n");
    let status = lines
        .next()
        .unwrap()
        .split(' ')
        .nth(1)
        .unwrap()
        .parse()
        .unwrap();
    let headers: HashMap<String, String> = lines
        .map(|line| line.split_once(": ").unwrap())
        .map(|(name, value)| (name.to_ascii_lowercase(), value.to_string()))
        .collect();
    let is_chunked = headers
        .get("transfer-encoding")
        .is_some_and(|e| e == "chunked");
    let body = if is_chunked {
        unchunk(body)
    } else {
        body.to_string()
    };
    Answer {
        status,
        headers,
        body,
    }
}

fn unchunk(mut body: &str) -> String {
    let mut whole = String::new();
    loop {
        let (size, rest) = body.split_once("\r\n").unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            return whole;
        }
        whole.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
}

pub fn get(server: &Server, path: &str) -> Answer {
    finish(open(server.addr(), "GET", path, "", ""))
}

pub const JSON: &str = "Content-Type: application/json\r\n";
pub const CHAT: &str = "/v1/chat/completions";

pub fn post(server: &Server, body: &Value) -> Answer {
    finish(post_open(server, body))
}

pub fn post_open(server: &Server, body: &Value) -> TcpStream {
    open(server.addr(), "POST", CHAT, JSON, &body.to_string())
}

/// A request to the mock model with more fields.
pub fn ask(extra: Value) -> Value {
    let mut body = json!({
        "model": "mock",
        "messages": [{"role": "user", "content": "where is the card?"}],
        "max_tokens": 12,
        "temperature": 0,
    });
    for (name, value) in extra.as_object().unwrap() {
        if value.is_null() {
            body.as_object_mut().unwrap().remove(name);
        } else {
            body[name] = value.clone();
        }
    }
    body
}

/// Waits until `/health` says what is wanted.
pub fn wait_for(server: &Server, what: &str, is_so: impl Fn(&Value) -> bool) {
    for _ in 0..500 {
        if is_so(&get(server, "/health").json()["models"][0]) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("{what}: {:?}", get(server, "/health"));
}
