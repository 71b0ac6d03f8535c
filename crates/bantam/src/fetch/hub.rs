//! Files of a repository on the Hugging Face hub, or on anything that speaks like it (`HF_ENDPOINT`).
//!
//! For each file: a `HEAD` tells the commit, the size and, for weights, the sha256 (`x-linked-etag`); then a `GET`
//! with a `Range` goes on where an earlier one stopped. What arrives is a `.part` file until its size and digest are
//! right. The first file's commit is used for all that follow, so that a model is never mixed from two.

use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, anyhow};
use ureq::http::{Response, StatusCode, Uri, header};
use ureq::{Agent, Body};

use super::Fetcher;
use crate::cache::{RefFile, check_digest, copy, hash_file, hex};
use crate::catalogue::Entry;
use crate::error::{HintExt as _, Interrupted, advise};
use crate::http;
use crate::settings::Network;

/// Attempts at one file before giving up; each goes on where the last one stopped.
const ATTEMPTS: u32 = 5;
/// The hub answers a download with one redirect; more than a few is a loop.
const REDIRECTS_MAX: usize = 8;

/// Fetches `files` of a repository as blobs.
pub(super) fn fetch(
    fetcher: &Fetcher<'_>,
    entry: &Entry,
    repo: &str,
    revision: &str,
    files: &[String],
) -> anyhow::Result<(Option<String>, Vec<RefFile>)> {
    let client = Client::new(fetcher.network);
    let mut revision = revision.to_owned();
    let mut commit = None;
    let mut records = Vec::with_capacity(files.len());
    for file in files {
        fetcher.go_on()?;
        let url = format!("{}/{repo}/resolve/{revision}/{file}", client.endpoint);
        let about = client
            .about(&url)
            .with_context(|| format!("`{file}` of `{repo}`"))?;
        if commit.is_none()
            && let Some(found) = &about.commit
        {
            revision.clone_from(found);
            commit = Some(found.clone());
        }
        let pin = entry.sha256.get(file).or(about.sha256.as_ref()).cloned();
        let sha256 = download(fetcher, &client, &url, file, &about, pin.as_deref())
            .with_context(|| format!("`{file}` of `{repo}`"))?;
        records.push(fetcher.cache.record(file, &sha256)?);
    }
    Ok((commit, records))
}

/// Downloads one file into a blob; returns its digest.
fn download(
    fetcher: &Fetcher<'_>,
    client: &Client,
    url: &str,
    file: &str,
    about: &About,
    pin: Option<&str>,
) -> anyhow::Result<String> {
    if let Some(pin) = pin
        && fetcher.cache.blob(pin).is_file()
        && hash_file(&fetcher.cache.blob(pin), &mut |_| fetcher.go_on())? == pin
    {
        return Ok(pin.to_owned());
    }
    // Another version of the file has another tag and so another partial file.
    let key = {
        use sha2::Digest as _;
        hex(&sha2::Sha256::digest(format!("{url} {}", about.tag)))
    };
    let part = fetcher.cache.partial(&key)?;
    let there = std::fs::metadata(&part).map_or(0, |m| m.len());
    if let Some(size) = about.size {
        fetcher.room_for(size.saturating_sub(there))?;
    }
    let bar = fetcher.bar(file, about.size);
    let mut attempt = 1;
    loop {
        let outcome = receive(fetcher, client, url, &part, about.size, &bar);
        let error = match outcome {
            Ok(()) => break,
            Err(Failure::Final(error)) => return Err(error),
            Err(Failure::Passing(error)) => error,
        };
        if attempt == ATTEMPTS {
            return Err(error).hint("run the same command again: it goes on where it stopped");
        }
        let wait = client.retry_delay * 2u32.pow(attempt - 1);
        fetcher
            .printer
            .note(format!("`{file}`: {error:#}; trying again"));
        std::thread::sleep(wait);
        fetcher.go_on()?;
        attempt += 1;
    }
    drop(bar);
    let digest = hash_file(&part, &mut |_| fetcher.go_on())?;
    if let Err(wrong) = check_digest(pin, &digest) {
        fs_err::remove_file(&part)?;
        return Err(wrong).hint(
            "the download was discarded; if it fails again, the hub holds another file than the catalogue expects",
        );
    }
    fs_err::File::open(&part)?.sync_all()?;
    fetcher.cache.adopt(&part, &digest)?;
    Ok(digest)
}

/// Why an attempt failed.
enum Failure {
    /// Worth another attempt.
    Passing(anyhow::Error),
    /// Would fail again.
    Final(anyhow::Error),
}

/// One attempt: appends to `part` what is missing of the file.
fn receive(
    fetcher: &Fetcher<'_>,
    client: &Client,
    url: &str,
    part: &Path,
    size: Option<u64>,
    bar: &crate::progress::Progress,
) -> Result<(), Failure> {
    let mut start = std::fs::metadata(part).map_or(0, |m| m.len());
    if size.is_some_and(|size| start > size) {
        start = 0;
    }
    if start > 0 && Some(start) == size {
        return Ok(());
    }
    let mut response = client.get(url, start)?;
    let status = response.status();
    if status == StatusCode::RANGE_NOT_SATISFIABLE {
        let _ = std::fs::remove_file(part);
        return Err(Failure::Passing(anyhow!(
            "the server cannot go on after {start} bytes, starting over"
        )));
    }
    if !status.is_success() {
        return Err(refusal(status, url));
    }
    // A server that ignores `Range` sends the whole file again.
    let resumed = status == StatusCode::PARTIAL_CONTENT;
    if resumed && range_start(&response) != Some(start) {
        return Err(Failure::Final(anyhow!(
            "the server sent another range than the one asked for"
        )));
    }
    if !resumed {
        start = 0;
    }
    bar.resume_at(start);
    let open = fs_err::OpenOptions::new()
        .create(true)
        .append(resumed)
        .write(true)
        .truncate(!resumed)
        .open(part);
    let mut file = open.map_err(|e| Failure::Final(e.into()))?;
    let cap = size.map_or(u64::MAX, |size| size - start);
    let mut disk = Ok(());
    let mut body = response.body_mut().with_config().limit(u64::MAX).reader();
    let received = copy(
        &mut body,
        cap,
        &mut |n| {
            bar.add(n);
            fetcher.go_on()
        },
        &mut |piece| {
            disk = file.write_all(piece);
            // Told apart below from a failing network.
            if disk.is_err() {
                Err(io::Error::other("disk"))
            } else {
                Ok(())
            }
        },
    );
    disk.map_err(|e| Failure::Final(e.into()))?;
    let received = received.map_err(|error| {
        if error.chain().any(|link| link.is::<Interrupted>()) {
            Failure::Final(error)
        } else {
            Failure::Passing(error.context("the connection broke"))
        }
    })?;
    match size {
        Some(size) if start + received < size => Err(Failure::Passing(anyhow!(
            "the connection ended after {} of {size} bytes",
            start + received
        ))),
        _ => Ok(()),
    }
}

/// What a `HEAD` tells of a file.
#[derive(Debug)]
struct About {
    /// The commit that the revision stands for.
    commit: Option<String>,
    /// The file's size.
    size: Option<u64>,
    /// The file's sha256, stated for files in large-file storage.
    sha256: Option<String>,
    /// Whatever tells versions of the file apart.
    tag: String,
}

/// Asks the hub.
struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
    retry_delay: Duration,
}

impl Client {
    fn new(network: &Network) -> Self {
        // Redirects are followed here: their headers matter.
        let config = http::config()
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .timeout_per_read(Some(Duration::from_secs(60)))
            .build();
        Self {
            agent: config.new_agent(),
            endpoint: network.hf_endpoint.trim_end_matches('/').to_owned(),
            token: network.hf_token.clone(),
            retry_delay: network.retry_delay,
        }
    }

    /// Size, digest and commit of the file at `url`.
    fn about(&self, url: &str) -> anyhow::Result<About> {
        let mut attempt = 1;
        loop {
            match self.try_about(url) {
                Ok(about) => return Ok(about),
                Err(Failure::Passing(_)) if attempt < ATTEMPTS => {
                    std::thread::sleep(self.retry_delay * 2u32.pow(attempt - 1));
                    attempt += 1;
                }
                Err(Failure::Final(error) | Failure::Passing(error)) => return Err(error),
            }
        }
    }

    fn try_about(&self, url: &str) -> Result<About, Failure> {
        let mut about = About {
            commit: None,
            size: None,
            sha256: None,
            tag: String::new(),
        };
        let last = self.follow(url, None, |response| {
            let text = |name: &str| {
                response
                    .headers()
                    .get(name)
                    .and_then(|v| v.to_str().ok())
                    .map(str::to_owned)
            };
            let unquoted = |v: String| v.trim_start_matches("W/").trim_matches('"').to_owned();
            about.commit = about
                .commit
                .take()
                .or_else(|| text("x-repo-commit"))
                .filter(|c| is_hex(c, 40));
            let linked = text("x-linked-etag").map(unquoted);
            let tag = linked.clone().or_else(|| text("etag").map(unquoted));
            if about.tag.is_empty() {
                about.tag = tag.unwrap_or_default();
            }
            about.sha256 = about.sha256.take().or(linked.filter(|t| is_hex(t, 64)));
            let size = text("x-linked-size");
            // The length of a redirect is that of its own little page.
            let size =
                size.or_else(|| text("content-length").filter(|_| response.status().is_success()));
            about.size = about.size.or_else(|| size.and_then(|s| s.parse().ok()));
        })?;
        if last.status().is_success() {
            Ok(about)
        } else {
            Err(refusal(last.status(), url))
        }
    }

    fn get(&self, url: &str, start: u64) -> Result<Response<Body>, Failure> {
        self.follow(url, Some(start), |_| {})
    }

    /// Sends a `HEAD`, or a `GET` from a byte on, and follows redirects; `each` sees every answer.
    fn follow(
        &self,
        url: &str,
        start: Option<u64>,
        mut each: impl FnMut(&Response<Body>),
    ) -> Result<Response<Body>, Failure> {
        let bad_address = |url: &str| Failure::Final(anyhow!("`{url}` is not a web address"));
        let first: Uri = url.parse().map_err(|_| bad_address(url))?;
        let mut here = first.clone();
        for _ in 0..REDIRECTS_MAX {
            let mut request = if start.is_some() {
                self.agent.get(&here)
            } else {
                self.agent.head(&here)
            };
            request = request.header(header::ACCEPT_ENCODING, "identity");
            if let Some(start) = start.filter(|s| *s > 0) {
                request = request.header(header::RANGE, format!("bytes={start}-"));
            }
            let same_origin =
                here.scheme() == first.scheme() && here.authority() == first.authority();
            if let Some(token) = self.token.as_ref().filter(|_| same_origin) {
                request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
            }
            let response = request.call().map_err(|error| self.unreachable(error))?;
            each(&response);
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let target = response
                .headers()
                .get(header::LOCATION)
                .and_then(|v| v.to_str().ok());
            let target =
                target.ok_or_else(|| Failure::Final(anyhow!("the server redirects to nowhere")))?;
            here = join(&here, target).ok_or_else(|| bad_address(target))?;
        }
        Err(Failure::Final(anyhow!("the server redirects in circles")))
    }

    fn unreachable(&self, error: ureq::Error) -> Failure {
        let refused = matches!(&error, ureq::Error::BadUri(_) | ureq::Error::Http(_));
        let error = advise(
            anyhow::Error::new(error).context(format!("could not reach `{}`", self.endpoint)),
            "check the network; HF_ENDPOINT names another hub, and a local model can be given by its path",
        );
        if refused {
            Failure::Final(error)
        } else {
            Failure::Passing(error)
        }
    }
}

/// The error for an answer that is neither the file nor a redirect.
fn refusal(status: StatusCode, url: &str) -> Failure {
    let code = status.as_u16();
    match code {
        401 | 403 => Failure::Final(advise(
            anyhow!(
                "the hub refuses access ({code}): the repository is private, gated or does not exist"
            ),
            "accept the model's terms on its page if it has any, and set HF_TOKEN to a token that may read it",
        )),
        404 => Failure::Final(advise(
            anyhow!("the hub has no such file (404): {url}"),
            "check the repository, the revision and the file name",
        )),
        429 | 500.. => Failure::Passing(anyhow!("the hub is busy ({code})")),
        _ => Failure::Final(anyhow!("the hub answered with {code}")),
    }
}

/// The first byte of a `206` answer.
fn range_start(response: &Response<Body>) -> Option<u64> {
    let text = response
        .headers()
        .get(header::CONTENT_RANGE)?
        .to_str()
        .ok()?;
    text.strip_prefix("bytes ")?.split_once('-')?.0.parse().ok()
}

/// Where a `Location` leads, seen from `here`.
fn join(here: &Uri, target: &str) -> Option<Uri> {
    if let Some(rest) = target.strip_prefix("//") {
        return format!("{}://{rest}", here.scheme_str()?).parse().ok();
    }
    if target.starts_with('/') {
        return format!("{}://{}{target}", here.scheme_str()?, here.authority()?)
            .parse()
            .ok();
    }
    target
        .parse::<Uri>()
        .ok()
        .filter(|uri| uri.scheme().is_some())
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit())
}

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
