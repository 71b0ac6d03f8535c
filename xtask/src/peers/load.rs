//! A server under everything at once: streams, long prompts, clients that leave, bodies that are wrong, clients that
//! hardly read, and a thousand connections that are only there.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use serde_json::{Value, json};

use super::report::{Bound, Report};
use super::{Desk, MODEL, serving};
use crate::http::Connection;
use crate::server::Server;

const CHAT: &str = "/v1/chat/completions";
/// Clients that ask, and connections that do not.
const CLIENTS: usize = 64;
const IDLE: usize = 1000;
/// How long an answer may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(120);
/// An idle connection says something so often; the server closes those that are silent for a minute.
const IDLE_EVERY: Duration = Duration::from_secs(20);

/// What a client does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Whole,
    Stream,
    Long,
    Leave,
    Wrong,
    Slow,
}

impl Act {
    const ALL: [Act; 6] = [
        Act::Whole,
        Act::Stream,
        Act::Long,
        Act::Leave,
        Act::Wrong,
        Act::Slow,
    ];

    fn drawn(draw: u64) -> Act {
        match draw % 100 {
            0..20 => Act::Whole,
            20..60 => Act::Stream,
            60..70 => Act::Long,
            70..80 => Act::Leave,
            80..90 => Act::Wrong,
            _ => Act::Slow,
        }
    }
}

/// What all clients saw.
#[derive(Default)]
struct Seen {
    done: [usize; Act::ALL.len()],
    refused: usize,
    lost: Vec<String>,
    /// Seconds between two deliveries of one stream.
    gaps: Vec<f64>,
    firsts: Vec<f64>,
    tokens: u64,
}

/// Runs it for so many seconds.
pub(super) fn load(desk: &Desk, seconds: u64) -> Result<Report> {
    let server = serving::bantam(desk, MODEL)?;
    let mut idle = (0..IDLE)
        .map(|_| Connection::open(server.port(), PATIENCE))
        .collect::<Result<Vec<_>>>()?;
    let seen = Mutex::new(Seen::default());
    let (began, end) = (
        Instant::now(),
        Instant::now() + Duration::from_secs(seconds),
    );
    let mut memory = Vec::new();
    let mut n_idle = 0;
    thread::scope(|scope| -> Result<()> {
        for client in 0..CLIENTS {
            let (server, seen) = (&server, &seen);
            scope.spawn(move || {
                let mut rng = Rng(client as u64 + 1);
                while Instant::now() < end {
                    act(server, &mut rng, seen);
                }
            });
        }
        let mut next_idle = Instant::now();
        while Instant::now() < end {
            if Instant::now() >= next_idle {
                n_idle = alive(&mut idle);
                next_idle = Instant::now() + IDLE_EVERY;
            }
            memory.push((began.elapsed().as_secs_f64(), server.rss_mb()?));
            thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    })?;
    let health = server.get("/health")?;
    let seen = seen
        .into_inner()
        .map_err(|_| anyhow!("a client panicked"))?;
    report(&server, seen, &memory, n_idle, &health, began.elapsed())
}

fn report(
    server: &Server,
    mut seen: Seen,
    memory: &[(f64, f64)],
    n_idle: usize,
    health: &Value,
    took: Duration,
) -> Result<Report> {
    let mut report = Report::new("load");
    let n: usize = seen.done.iter().sum();
    report.tell("answers, a second", n as f64 / took.as_secs_f64());
    report.tell(
        "tokens streamed, a second",
        seen.tokens as f64 / took.as_secs_f64(),
    );
    report.tell("refused for want of room", seen.refused as f64);
    report.must("lost answers", seen.lost.len() as f64, Bound::Max(0.0));
    for lost in seen.lost.iter().take(5) {
        eprintln!("lost: {lost}");
    }
    let idle = n_idle as f64 / IDLE as f64;
    report.must("idle connections that still answer", idle, Bound::Min(1.0));
    let left = &health["models"][0];
    let left = left["running"].as_f64().unwrap_or(f64::NAN)
        + left["queue_depth"].as_f64().unwrap_or(f64::NAN);
    report.must("left running after the last client", left, Bound::Max(0.0));
    // Caches fill until their budget is reached; what counts is whether it goes on.
    let half = memory.len() / 2;
    let mean =
        |part: &[(f64, f64)]| part.iter().map(|m| m.1).sum::<f64>() / part.len().max(1) as f64;
    let quarter = (memory.len() / 4).max(1);
    let (early, late) = (
        mean(&memory[half..(half + quarter).min(memory.len())]),
        mean(&memory[memory.len() - quarter..]),
    );
    report.tell("memory in the third quarter, MiB", early);
    report.tell("memory in the last quarter, MiB", late);
    report.must(
        "memory, last quarter over third",
        late / early,
        Bound::Max(1.02),
    );
    report.tell("peak memory, MiB", server.peak_rss_mb()?);
    seen.gaps.sort_by(f64::total_cmp);
    seen.firsts.sort_by(f64::total_cmp);
    let at = |all: &[f64], q: f64| all.get((all.len() as f64 * q) as usize).copied();
    let ms = |all: &[f64], q: f64| at(all, q).unwrap_or(f64::NAN) * 1000.0;
    report.tell("time to first token, p50, ms", ms(&seen.firsts, 0.5));
    report.tell("time to first token, p99, ms", ms(&seen.firsts, 0.99));
    let (p50, p99) = (ms(&seen.gaps, 0.5), ms(&seen.gaps, 0.99));
    report.tell("inter-token latency, p50, ms", p50);
    report.tell("inter-token latency, p99, ms", p99);
    report.must(
        "inter-token latency, p99 over p50",
        p99 / p50,
        Bound::Max(3.0),
    );
    let acts: Vec<Value> = Act::ALL
        .iter()
        .zip(seen.done)
        .map(|(act, n)| json!([format!("{act:?}"), n]))
        .collect();
    report.detail("acts", json!(acts));
    report.detail(
        "memory_mb",
        json!(memory.iter().map(|m| m.1.round()).collect::<Vec<_>>()),
    );
    Ok(report)
}

/// How many of the idle connections still answer.
fn alive(idle: &mut [Connection]) -> usize {
    let is_alive = |connection: &mut Connection| -> Result<()> {
        let head = connection.send("GET", "/v1/models", "")?;
        ensure!(head.status == 200, "status {}", head.status);
        connection.json(head).map(|_| ())
    };
    idle.iter_mut().filter_map(|one| is_alive(one).ok()).count()
}

/// Does one thing, and notes how it went.
fn act(server: &Server, rng: &mut Rng, seen: &Mutex<Seen>) {
    let act = Act::drawn(rng.next());
    let done = request(server, rng, act);
    let mut seen = seen
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    match done {
        Ok(Outcome::Refused) => {
            seen.refused += 1;
            drop(seen);
            thread::sleep(Duration::from_millis(500));
        }
        Ok(Outcome::Done {
            gaps,
            first,
            tokens,
        }) => {
            let kind = Act::ALL.iter().position(|one| *one == act).unwrap_or(0);
            seen.done[kind] += 1;
            seen.gaps.extend(gaps);
            seen.firsts.extend(first);
            seen.tokens += tokens;
        }
        Err(error) => seen.lost.push(format!("{act:?}: {error:#}")),
    }
}

enum Outcome {
    Done {
        gaps: Vec<f64>,
        first: Option<f64>,
        tokens: u64,
    },
    /// The queue was full, and the server said so.
    Refused,
}

const NOTHING: Outcome = Outcome::Done {
    gaps: Vec::new(),
    first: None,
    tokens: 0,
};

fn request(server: &Server, rng: &mut Rng, act: Act) -> Result<Outcome> {
    let mut connection = Connection::open(server.port(), PATIENCE)?;
    if act == Act::Wrong {
        return wrong(&mut connection, rng);
    }
    let streams = matches!(act, Act::Stream | Act::Leave | Act::Slow);
    let (words, max_tokens) = if act == Act::Long {
        (900, 16)
    } else {
        (20, 48)
    };
    let body = json!({
        "model": "m", "max_tokens": max_tokens, "stream": streams, "temperature": 1, "seed": rng.next() >> 12,
        "messages": [{"role": "user", "content": rng.text(words)}],
    });
    let began = Instant::now();
    let mut head = connection.send("POST", CHAT, &body.to_string())?;
    if head.status == 429 {
        return Ok(Outcome::Refused);
    }
    ensure!(head.status == 200, "status {}", head.status);
    if !streams {
        let answer = connection.json(head)?;
        ensure!(
            answer["choices"][0]["finish_reason"].is_string(),
            "{answer}"
        );
        return Ok(NOTHING);
    }
    let (mut gaps, mut first, mut last) = (Vec::new(), None, began);
    let (mut all, mut n) = (String::new(), 0);
    while let Some(part) = connection.part(&mut head)? {
        let text = String::from_utf8(part)?;
        // The frame that says who speaks has an empty content.
        let tokens = (text.matches("\"content\":").count())
            .saturating_sub(text.matches("\"role\":").count());
        all.push_str(&text);
        if tokens > 0 && act != Act::Slow {
            let now = Instant::now();
            match first {
                None => first = Some((now - began).as_secs_f64()),
                Some(_) => gaps.push((now - last).as_secs_f64()),
            }
            last = now;
        }
        n += tokens as u64;
        if act == Act::Leave && n >= 5 {
            return Ok(NOTHING);
        }
        if act == Act::Slow {
            thread::sleep(Duration::from_millis(50));
        }
    }
    ensure!(
        all.ends_with("data: [DONE]\n\n"),
        "a stream ended early: {all:?}"
    );
    Ok(Outcome::Done {
        gaps,
        first,
        tokens: n,
    })
}

/// A request that must be refused with a reason.
fn wrong(connection: &mut Connection, rng: &mut Rng) -> Result<Outcome> {
    let bodies = [
        "{",
        "[]",
        r#"{"model": "m"}"#,
        r#"{"model": "none", "messages": [{"role": "user", "content": "a"}]}"#,
        r#"{"model": "m", "messages": [{"role": "user", "content": "a"}], "temperature": 9}"#,
        r#"{"model": "m", "messages": [{"role": "user", "content": "a"}], "colour": 1}"#,
        r#"{"model": "m", "messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "nothing"}}}}"#,
    ];
    let body = bodies[rng.next() as usize % bodies.len()];
    let head = connection.send("POST", CHAT, body)?;
    let status = head.status;
    let answer = connection.json(head)?;
    ensure!(
        matches!(status, 400 | 404) && answer["error"]["message"].is_string(),
        "{status}: {answer}"
    );
    Ok(NOTHING)
}

/// A small generator (splitmix64): the same requests in every run.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Words in no order.
    fn text(&mut self, words: usize) -> String {
        const WORDS: [&str; 16] = [
            "card", "the", "where", "bank", "is", "river", "my", "money", "a", "lost", "blue",
            "why", "transfer", "of", "was", "never",
        ];
        let draw = |_| WORDS[self.next() as usize % WORDS.len()];
        (0..words).map(draw).collect::<Vec<_>>().join(" ")
    }
}
