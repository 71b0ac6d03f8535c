//! The hub client against a server of our own on the loopback, which can be told to misbehave.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use sha2::Digest as _;

use super::*;
use crate::cache::Cache;
use crate::catalogue::Source;
use crate::error::{Style, render};
use crate::fetch::Pulled;
use crate::printer::Printer;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server does with downloads.
#[derive(Default)]
struct Plan {
    /// Cut the body of the next downloads after so many bytes.
    cuts: Vec<usize>,
    /// Answer the next requests with these codes.
    refuse: Vec<u16>,
    /// Ignore `Range`.
    no_range: bool,
    /// State this digest instead of the right one.
    wrong_digest: bool,
    /// Only answer requests with this token.
    token: Option<&'static str>,
}

struct Hub {
    address: String,
    plan: Arc<Mutex<Plan>>,
    seen: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(files: &[(&str, &[u8])], plan: Plan) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let files: BTreeMap<String, Vec<u8>> = files
            .iter()
            .map(|(n, b)| ((*n).to_owned(), b.to_vec()))
            .collect();
        let (plan, seen) = (Arc::new(Mutex::new(plan)), Arc::new(Mutex::new(Vec::new())));
        let hub = Self {
            address,
            plan: plan.clone(),
            seen: seen.clone(),
        };
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = answer(&stream.unwrap(), &files, &plan, &seen);
            }
        });
        hub
    }

    fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().clone()
    }
}

/// Answers one request and closes: weights by a redirect to `/cdn/`, as the hub does, the rest directly.
fn answer(
    stream: &TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    plan: &Mutex<Plan>,
    seen: &Mutex<Vec<String>>,
) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let (method, path) = line.split_once(' ').unwrap();
    let path = path.split(' ').next().unwrap().to_owned();
    let (mut start, mut token) = (0, None);
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let header = header.trim().to_ascii_lowercase();
        if header.is_empty() {
            break;
        }
        if let Some(range) = header.strip_prefix("range: bytes=") {
            start = range.trim_end_matches('-').parse::<usize>().unwrap();
        }
        token = token.or(header
            .strip_prefix("authorization: bearer ")
            .map(str::to_owned));
    }
    seen.lock().unwrap().push(format!(
        "{method} {path} from {start}{}",
        token.as_ref().map_or("", |_| " with token")
    ));
    let mut plan = plan.lock().unwrap();
    let mut out = stream;
    if let Some(code) = (!plan.refuse.is_empty()).then(|| plan.refuse.remove(0)) {
        return write!(
            out,
            "HTTP/1.1 {code} X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
    }
    if plan
        .token
        .is_some_and(|wanted| token.as_deref() != Some(wanted))
    {
        return write!(
            out,
            "HTTP/1.1 401 X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
    }
    let name = path.rsplit('/').next().unwrap();
    let Some(bytes) = files.get(name) else {
        return write!(
            out,
            "HTTP/1.1 404 X\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        );
    };
    let mut digest = hex(&sha2::Sha256::digest(bytes));
    if plan.wrong_digest {
        digest = "0".repeat(64);
    }
    if name.ends_with(".safetensors") && !path.starts_with("/cdn/") {
        return write!(
            out,
            "HTTP/1.1 302 X\r\nlocation: /cdn/{name}\r\nx-repo-commit: {COMMIT}\r\nx-linked-etag: \"{digest}\"\r\n\
             x-linked-size: {}\r\ncontent-length: 3\r\nconnection: close\r\n\r\n{}",
            bytes.len(),
            if method == "HEAD" { "" } else { "see" }
        );
    }
    let start = if plan.no_range { 0 } else { start };
    let status = if start > 0 { "206 X" } else { "200 OK" };
    write!(
        out,
        "HTTP/1.1 {status}\r\nx-repo-commit: {COMMIT}\r\netag: \"v1\"\r\nconnection: close\r\n"
    )?;
    if start > 0 {
        write!(
            out,
            "content-range: bytes {start}-{}/{}\r\n",
            bytes.len() - 1,
            bytes.len()
        )?;
    }
    write!(out, "content-length: {}\r\n\r\n", bytes.len() - start)?;
    if method == "HEAD" {
        return Ok(());
    }
    let cut = (!plan.cuts.is_empty()).then(|| plan.cuts.remove(0));
    let end = cut.map_or(bytes.len(), |n| (start + n).min(bytes.len()));
    out.write_all(&bytes[start..end])
}

struct Client {
    cache: Cache,
    network: Network,
    _dir: tempfile::TempDir,
}

impl Client {
    fn new(hub: &Hub) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            cache: Cache::new(dir.path()),
            network: Network {
                hf_endpoint: hub.address.clone(),
                hf_token: None,
                python: None,
                retry_delay: Duration::from_millis(1),
            },
            _dir: dir,
        }
    }

    fn entry(pins: &[(&str, &str)]) -> Entry {
        Entry {
            name: "m".into(),
            source: Source::parse("hf:org/m@main#config.json,model.safetensors").unwrap(),
            sha256: pins
                .iter()
                .map(|(f, d)| ((*f).to_owned(), (*d).to_owned()))
                .collect(),
            licence: "MIT".into(),
            parameters: 1,
            context: 1,
            about: String::new(),
        }
    }

    fn pull_pinned(&self, pins: &[(&str, &str)], cancel: &AtomicBool) -> anyhow::Result<Pulled> {
        let printer = Printer::new(true, false);
        let fetcher = Fetcher {
            cache: &self.cache,
            network: &self.network,
            printer: &printer,
            cancel,
        };
        fetcher.model(&Self::entry(pins), false)
    }

    fn pull(&self) -> anyhow::Result<Pulled> {
        self.pull_pinned(&[], &AtomicBool::new(false))
    }

    fn error(&self, hub: &Hub) -> String {
        let text = render(&self.pull().unwrap_err(), Style { color: false });
        text.replace(&hub.address, "http://hub")
    }
}

fn weights() -> Vec<u8> {
    (0..100_000u32).flat_map(u32::to_le_bytes).collect()
}

fn hub(plan: Plan) -> Hub {
    Hub::start(
        &[("config.json", b"{}"), ("model.safetensors", &weights())],
        plan,
    )
}

#[test]
fn a_folder_of_verified_files_at_one_commit() {
    let hub = hub(Plan::default());
    let client = Client::new(&hub);
    let pulled = client.pull().unwrap();
    assert!(pulled.fetched);
    assert_eq!(pulled.files.commit.as_deref(), Some(COMMIT));
    assert_eq!(
        fs_err::read(pulled.path.join("model.safetensors")).unwrap(),
        weights()
    );
    assert_eq!(
        hub.seen(),
        [
            "HEAD /org/m/resolve/main/config.json from 0".to_owned(),
            "GET /org/m/resolve/main/config.json from 0".to_owned(),
            format!("HEAD /org/m/resolve/{COMMIT}/model.safetensors from 0"),
            "HEAD /cdn/model.safetensors from 0".to_owned(),
            format!("GET /org/m/resolve/{COMMIT}/model.safetensors from 0"),
            "GET /cdn/model.safetensors from 0".to_owned(),
        ]
    );
    assert!(
        !client.pull().unwrap().fetched,
        "the second time it is there"
    );
    assert_eq!(hub.seen().len(), 6, "and nobody is asked");
}

#[test]
fn cut_connections_go_on_where_they_ended() {
    let hub = hub(Plan {
        cuts: vec![2, 1000, 150_000],
        ..Plan::default()
    });
    let client = Client::new(&hub);
    let pulled = client.pull().unwrap();
    assert_eq!(
        fs_err::read(pulled.path.join("model.safetensors")).unwrap(),
        weights()
    );
    let ranges: Vec<String> = hub
        .seen()
        .into_iter()
        .filter(|l| l.starts_with("GET /cdn"))
        .collect();
    assert_eq!(
        ranges,
        [
            "GET /cdn/model.safetensors from 0",
            "GET /cdn/model.safetensors from 1000",
            "GET /cdn/model.safetensors from 151000"
        ]
    );
}

#[test]
fn a_later_run_goes_on_too() {
    let hub = hub(Plan {
        cuts: vec![2, 5000, 0, 0, 0, 0],
        ..Plan::default()
    });
    let client = Client::new(&hub);
    insta::assert_snapshot!(client.error(&hub), @r#"
    error: could not fetch `m`
      cause: `model.safetensors` of `org/m`
      cause: the connection broke
      cause: Peer disconnected
    hint: run the same command again: it goes on where it stopped
    "#);
    let pulled = client.pull().unwrap();
    assert_eq!(
        fs_err::read(pulled.path.join("model.safetensors")).unwrap(),
        weights()
    );
    assert!(hub.seen().last().unwrap().ends_with("from 5000"));
}

#[test]
fn a_server_without_ranges_starts_over() {
    let hub = hub(Plan {
        cuts: vec![2, 5000],
        no_range: true,
        ..Plan::default()
    });
    let client = Client::new(&hub);
    let pulled = client.pull().unwrap();
    assert_eq!(
        fs_err::read(pulled.path.join("model.safetensors")).unwrap(),
        weights()
    );
}

#[test]
fn a_busy_hub_is_asked_again() {
    let hub = hub(Plan {
        refuse: vec![503, 429, 500],
        ..Plan::default()
    });
    assert!(Client::new(&hub).pull().is_ok());
}

#[test]
fn wrong_bytes_are_discarded() {
    let wrong = hub(Plan {
        wrong_digest: true,
        ..Plan::default()
    });
    let client = Client::new(&wrong);
    insta::assert_snapshot!(client.error(&wrong), @r#"
    error: could not fetch `m`
      cause: `model.safetensors` of `org/m`
      cause: the sha256 is 20ff50e632cc575386b15d7fcd9c3842ef435388ed29ae8c30617158ee907dc5, not 0000000000000000000000000000000000000000000000000000000000000000: these are not the expected bytes
    hint: the download was discarded; if it fails again, the hub holds another file than the catalogue expects
    "#);
    assert_eq!(
        fs_err::read_dir(client.cache.root().join("partial"))
            .unwrap()
            .count(),
        0
    );

    let right = hub(Plan::default());
    let client = Client::new(&right);
    let pin = "1".repeat(64);
    let error = client
        .pull_pinned(&[("config.json", &pin)], &AtomicBool::new(false))
        .unwrap_err();
    assert!(
        format!("{error:#}").contains(&pin),
        "a pin of the catalogue wins: {error:#}"
    );
}

#[test]
fn the_token_is_sent_and_its_absence_explained() {
    let hub = hub(Plan {
        token: Some("secret"),
        ..Plan::default()
    });
    let mut client = Client::new(&hub);
    insta::assert_snapshot!(client.error(&hub), @r#"
    error: could not fetch `m`
      cause: `config.json` of `org/m`
      cause: the hub refuses access (401): the repository is private, gated or does not exist
    hint: accept the model's terms on its page if it has any, and set HF_TOKEN to a token that may read it
    "#);
    client.network.hf_token = Some("secret".into());
    assert!(client.pull().is_ok());
    assert!(hub.seen().iter().any(|l| l.ends_with("with token")));
}

#[test]
fn a_missing_file_and_a_missing_hub_are_explained() {
    let hub = Hub::start(&[("config.json", b"{}")], Plan::default());
    let client = Client::new(&hub);
    let text = client.error(&hub);
    insta::assert_snapshot!(text.replace(COMMIT, "COMMIT"), @r#"
    error: could not fetch `m`
      cause: `model.safetensors` of `org/m`
      cause: the hub has no such file (404): http://hub/org/m/resolve/COMMIT/model.safetensors
    hint: check the repository, the revision and the file name
    "#);
    let mut client = Client::new(&hub);
    let closed = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    client.network.hf_endpoint = format!("http://{closed}");
    let text = render(&client.pull().unwrap_err(), Style { color: false });
    assert!(
        text.contains("could not reach") && text.contains("HF_ENDPOINT"),
        "{text}"
    );
}

#[test]
fn ctrl_c_stops_and_says_how_to_go_on() {
    let hub = hub(Plan::default());
    let cancel = AtomicBool::new(false);
    cancel.store(true, Ordering::Relaxed);
    let error = Client::new(&hub).pull_pinned(&[], &cancel).unwrap_err();
    assert_eq!(crate::error::exit_code(&error), 130);
    insta::assert_snapshot!(render(&error, Style { color: false }), @r#"
    error: could not fetch `m`
      cause: interrupted
    hint: run the same command again to go on where it stopped
    "#);
    let plan = hub.plan.lock().unwrap();
    assert!(plan.cuts.is_empty());
}
