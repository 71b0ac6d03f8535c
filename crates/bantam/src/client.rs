//! A running server, asked over its API by the commands that work through one.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use serde_json::Value;
use ureq::Agent;

use crate::error::advise;
use crate::http;

/// A server of the API.
pub(crate) struct Api {
    url: String,
    key: Option<String>,
    agent: Agent,
}

impl Api {
    /// `url` ends in `/v1`.
    pub(crate) fn new(url: &str, key: Option<String>) -> anyhow::Result<Self> {
        if !(url.starts_with("http://") || url.starts_with("https://")) {
            return Err(advise(
                anyhow!("`{url}` is not the address of a server"),
                "such as http://127.0.0.1:8080/v1",
            ));
        }
        let agent = http::config()
            .timeout_connect(Some(Duration::from_secs(10)))
            .timeout_recv_response(Some(Duration::from_secs(120)))
            .build()
            .new_agent();
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            key,
            agent,
        })
    }

    fn unreachable(&self, error: ureq::Error) -> anyhow::Error {
        let error = anyhow!(error).context(format!("there is no answer at {}", self.url));
        advise(
            error,
            "`bantam serve --data DIR` starts a server; --url says where one is",
        )
    }

    /// An answer's body, or what the server says is wrong.
    fn read(
        &self,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> anyhow::Result<Value> {
        let mut answer = answer.map_err(|error| self.unreachable(error))?;
        let status = answer.status().as_u16();
        let text = answer
            .body_mut()
            .read_to_string()
            .with_context(|| format!("the answer of {} broke off", self.url))?;
        let body: Value = serde_json::from_str(&text).unwrap_or_default();
        if status == 200 && !body.is_null() {
            return Ok(body);
        }
        match body["error"]["message"].as_str() {
            Some(message) if status == 401 => Err(advise(
                anyhow!("{message}"),
                "--api-key, or the variable BANTAM_API_KEY",
            )),
            Some(message) => Err(anyhow!("{message}")),
            None => Err(advise(
                anyhow!(
                    "{} answers with status {status}, and not as the API does",
                    self.url
                ),
                "does the address end in /v1?",
            )),
        }
    }

    fn auth<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.key {
            Some(key) => request.header("authorization", format!("Bearer {key}")),
            None => request,
        }
    }

    pub(crate) fn get(&self, path: &str) -> anyhow::Result<Value> {
        let request = self.agent.get(format!("{}{path}", self.url));
        self.read(self.auth(request).call())
    }

    fn post(&self, path: &str, kind: &str, body: &[u8]) -> anyhow::Result<Value> {
        let request = self.agent.post(format!("{}{path}", self.url));
        self.read(self.auth(request).header("content-type", kind).send(body))
    }

    pub(crate) fn post_json(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.post(path, "application/json", body.to_string().as_bytes())
    }

    /// Uploads a file; the API's name for it.
    pub(crate) fn upload_file(&self, purpose: &str, path: &Path) -> anyhow::Result<String> {
        let rows = fs_err::read(path)?;
        let name = path.file_name().map(|name| name.to_string_lossy());
        let name = name.unwrap_or_else(|| "rows.jsonl".into());
        self.upload(purpose, &name, &rows)
            .with_context(|| format!("{} was not taken", path.display()))
    }

    /// Uploads rows; the API's name for them.
    pub(crate) fn upload(&self, purpose: &str, name: &str, rows: &[u8]) -> anyhow::Result<String> {
        let name = name.replace(['"', '\r', '\n'], "_");
        // No line of JSON begins with two hyphens.
        let line = "bantam-rows";
        let mut body = format!(
            "--{line}\r\ncontent-disposition: form-data; name=\"purpose\"\r\n\r\n{purpose}\r\n\
             --{line}\r\ncontent-disposition: form-data; name=\"file\"; filename=\"{name}\"\r\n\r\n"
        )
        .into_bytes();
        body.extend_from_slice(rows);
        body.extend_from_slice(format!("\r\n--{line}--\r\n").as_bytes());
        let kind = format!("multipart/form-data; boundary={line}");
        Ok(text(&self.post("/files", &kind, &body)?["id"]))
    }
}

/// A text, or none.
pub(crate) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
