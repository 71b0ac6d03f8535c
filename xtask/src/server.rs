//! A server of the OpenAI API as a child process, and just enough HTTP to talk to it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::http::Connection;
use crate::sh;

/// A port that nobody listens on just now.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// A running server; killed when dropped.
pub(crate) struct Server {
    child: Child,
    port: u16,
}

impl Server {
    /// Starts `command`, which is to listen on `port`, and waits until it says that it is healthy.
    pub(crate) fn start(command: &mut Command, port: u16) -> Result<Server> {
        eprintln!("$ {}", sh::show(command));
        let child = command.spawn().context("cannot start the server")?;
        let mut server = Server { child, port };
        server.wait_until_healthy(Duration::from_secs(60))?;
        Ok(server)
    }

    /// The base address for OpenAI clients.
    pub(crate) fn base_url(&self) -> String {
        format!("http://127.0.0.1:{}/v1", self.port)
    }

    /// The port that it listens on.
    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Gets an address that answers with JSON.
    pub(crate) fn get(&self, path: &str) -> Result<Value> {
        let mut connection = Connection::open(self.port, Duration::from_secs(60))?;
        let head = connection.send("GET", path, "")?;
        connection.json(head)
    }

    /// Posts JSON and returns the JSON that comes back.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let body = body.to_string();
        let answer = self.exchange(&format!(
            "POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
             Connection: close\r\n\r\n{body}",
            body.len()
        ))?;
        let (head, rest) = answer
            .split_once("\r\n\r\n")
            .context("no HTTP answer came back")?;
        let json = rest.find('{').zip(rest.rfind('}'));
        match json {
            Some((first, last)) if head.starts_with("HTTP/1.1 200") => {
                Ok(serde_json::from_str(&rest[first..=last])?)
            }
            _ => bail!(
                "{path}: {}\n{rest}",
                head.lines().next().unwrap_or_default()
            ),
        }
    }

    /// The most memory that the process has held, in MiB. Linux tells.
    pub(crate) fn peak_rss_mb(&self) -> Result<f64> {
        self.memory("VmHWM:")
    }

    /// The memory that it holds now, in MiB.
    pub(crate) fn rss_mb(&self) -> Result<f64> {
        self.memory("VmRSS:")
    }

    fn memory(&self, field: &str) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix(field))
            .and_then(|rest| rest.split_whitespace().next())
            .with_context(|| format!("no {field} in /proc"))?;
        Ok(kib.parse::<f64>()? / 1024.0)
    }

    fn wait_until_healthy(&mut self, patience: Duration) -> Result<()> {
        let began = Instant::now();
        while began.elapsed() < patience {
            if let Some(status) = self.child.try_wait()? {
                bail!("the server stopped before it answered: {status}");
            }
            if self.is_healthy() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        bail!("no answer from /health within {} s", patience.as_secs())
    }

    fn is_healthy(&self) -> bool {
        let request = "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n";
        self.exchange(request)
            .is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }

    /// Sends a request that asks for the connection to be closed, and reads until it is.
    fn exchange(&self, request: &str) -> Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(600)))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nothing to do about a server that is already gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
