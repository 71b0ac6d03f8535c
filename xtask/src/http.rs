//! HTTP as a client that measures it: connections that stay open, answers read as they come.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// A connection; one request at a time.
pub(crate) struct Connection(BufReader<TcpStream>);

/// The beginning of an answer, and how much of its body is still to come.
pub(crate) struct Head {
    /// The status.
    pub(crate) status: u16,
    left: Left,
}

enum Left {
    Bytes(usize),
    Chunks,
    Nothing,
}

impl Connection {
    /// Connects to a port of this machine; an answer that takes longer than `patience` is an error.
    pub(crate) fn open(port: u16, patience: Duration) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Sends a request; `body` is JSON, or whatever is to be sent as if it were.
    pub(crate) fn send(&mut self, method: &str, path: &str, body: &str) -> Result<Head> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.0.get_mut().write_all(request.as_bytes())?;
        let line = self.line()?;
        let status = line.split(' ').nth(1).and_then(|word| word.parse().ok());
        let status = status.with_context(|| format!("no HTTP answer but {line:?}"))?;
        let mut left = Left::Nothing;
        loop {
            let line = self.line()?;
            let Some((name, value)) = line.split_once(':') else {
                return Ok(Head { status, left });
            };
            match name.to_ascii_lowercase().as_str() {
                "content-length" => left = Left::Bytes(value.trim().parse()?),
                "transfer-encoding" => left = Left::Chunks,
                _ => {}
            }
        }
    }

    /// The next part of a body as it came; `None` after the last. An answer that breaks off is an error.
    pub(crate) fn part(&mut self, head: &mut Head) -> Result<Option<Vec<u8>>> {
        let n = match head.left {
            Left::Nothing => return Ok(None),
            Left::Bytes(n) => {
                head.left = Left::Nothing;
                n
            }
            Left::Chunks => usize::from_str_radix(&self.line()?, 16)?,
        };
        let mut bytes = vec![0; n];
        self.0.read_exact(&mut bytes)?;
        if matches!(head.left, Left::Chunks) {
            ensure!(self.line()?.is_empty(), "a chunk has no end");
            if n == 0 {
                head.left = Left::Nothing;
            }
        }
        Ok((n > 0).then_some(bytes))
    }

    /// The rest of a body as JSON.
    pub(crate) fn json(&mut self, mut head: Head) -> Result<Value> {
        let mut all = Vec::new();
        while let Some(part) = self.part(&mut head)? {
            all.extend(part);
        }
        serde_json::from_slice(&all).context("the answer is not JSON")
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            bail!("the connection was closed");
        }
        Ok(line.trim_end().to_owned())
    }
}
