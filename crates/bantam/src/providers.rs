//! Other servers of the OpenAI API, for evals: asked with patience, each answer remembered by what was asked, and what
//! it cost written down.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bantam_judge::canonical;
use bantam_serve::{ProviderAnswer, Providers};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use ureq::Agent;

use crate::http;
use crate::settings::{Price, ProviderSettings};

/// The longest answer that is read.
const ANSWER_MAX: u64 = 16 << 20;
/// The longest that is waited between two tries.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// All providers of a configuration.
pub(crate) struct ProviderBook {
    providers: Vec<Provider>,
    /// Where answers and the ledger are kept.
    folder: Option<PathBuf>,
    ledger: Mutex<()>,
}

struct Provider {
    settings: ProviderSettings,
    key: Option<String>,
    agent: Agent,
    room: Room,
}

/// Lets in so many at a time.
struct Room {
    left: Mutex<usize>,
    freed: Condvar,
}

impl Room {
    fn with<T>(&self, work: impl FnOnce() -> T) -> T {
        let lock = || self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left = lock();
        while *left == 0 {
            left = self
                .freed
                .wait(left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *left -= 1;
        drop(left);
        let done = work();
        *lock() += 1;
        self.freed.notify_one();
        done
    }
}

impl ProviderBook {
    /// `key_of` reads a variable of the environment; one that is named and not set is an error.
    pub(crate) fn new(
        settings: &[ProviderSettings],
        folder: Option<PathBuf>,
        key_of: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Self> {
        let provider = |settings: &ProviderSettings| {
            let key = match &settings.key_env {
                None => None,
                Some(name) => Some(key_of(name).with_context(|| {
                    format!(
                        "provider `{}`: the variable {name} is not set\nhint: export it, or take `key_env` out of the configuration",
                        settings.name
                    )
                })?),
            };
            let agent = http::config()
                .timeout_global(Some(settings.timeout))
                .build()
                .new_agent();
            let room = Room {
                left: Mutex::new(settings.concurrency),
                freed: Condvar::new(),
            };
            Ok(Provider {
                settings: settings.clone(),
                key,
                agent,
                room,
            })
        };
        Ok(Self {
            providers: settings
                .iter()
                .map(provider)
                .collect::<anyhow::Result<_>>()?,
            folder,
            ledger: Mutex::new(()),
        })
    }

    /// The provider of a model, and what the provider calls it.
    fn of(&self, model: &str) -> Option<(&Provider, String)> {
        self.providers.iter().find_map(|provider| {
            let name = &provider.settings.name;
            // `NAME/MODEL` is any model of the provider's.
            let spelled = model
                .strip_prefix(name.as_str())
                .and_then(|rest| rest.strip_prefix('/'));
            if let Some(model) = spelled {
                return Some((provider, model.to_owned()));
            }
            let is_listed = provider.settings.models.iter().any(|known| known == model);
            is_listed.then(|| (provider, model.to_owned()))
        })
    }

    fn write_down(&self, entry: &Value) {
        let Some(folder) = &self.folder else { return };
        let _turn = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let written = fs_err::create_dir_all(folder)
            .and_then(|()| {
                fs_err::OpenOptions::new()
                    .create(true)
                    .append(true)
                    .open(folder.join("ledger.jsonl"))
            })
            .and_then(|mut file| file.write_all(format!("{entry}\n").as_bytes()));
        if let Err(error) = written {
            tracing::warn!(%error, "what an answer cost was not written down");
        }
    }
}

impl Providers for ProviderBook {
    fn knows(&self, model: &str) -> bool {
        self.of(model).is_some()
    }

    fn chat(&self, model: &str, body: &Value) -> Result<ProviderAnswer, String> {
        let (provider, name) = self
            .of(model)
            .ok_or_else(|| format!("`{model}` is not a provider's model"))?;
        let mut body = body.clone();
        body["model"] = json!(name);
        let place = self.folder.as_ref().map(|folder| {
            let asked = format!("{}\n{}", provider.settings.base_url, canonical(&body));
            let digest = Sha256::digest(asked.as_bytes());
            folder
                .join("answers")
                .join(format!("{}.json", crate::cache::hex(&digest)))
        });
        if let Some(kept) = place.as_deref().and_then(remembered) {
            return Ok(ProviderAnswer {
                latency_ms: kept["latency_ms"].as_f64().unwrap_or(0.0),
                body: kept["body"].clone(),
                cost_usd: Some(0.0),
                cached: true,
            });
        }
        let (answer, took) = provider.room.with(|| provider.ask(&body))?;
        let latency_ms = took.as_secs_f64() * 1000.0;
        let cost_usd = provider
            .settings
            .prices
            .get(&name)
            .map(|price| cost(price, &answer["usage"]));
        self.write_down(&json!({
            "at": http::now(), "provider": provider.settings.name, "model": name,
            "usage": answer["usage"], "cost_usd": cost_usd, "latency_ms": latency_ms,
        }));
        if let Some(place) = place {
            remember(&place, &json!({"body": answer, "latency_ms": latency_ms}));
        }
        Ok(ProviderAnswer {
            body: answer,
            cost_usd,
            latency_ms,
            cached: false,
        })
    }
}

/// Math: (uncached · input + cached · cached_input + completion · output) / 10^6
fn cost(price: &Price, usage: &Value) -> f64 {
    let tokens = |value: &Value| value.as_f64().unwrap_or(0.0);
    let prompt = tokens(&usage["prompt_tokens"]);
    let cached = tokens(&usage["prompt_tokens_details"]["cached_tokens"]).min(prompt);
    let cached_price = price.cached_input.unwrap_or(price.input);
    let dollars = (prompt - cached) * price.input
        + cached * cached_price
        + tokens(&usage["completion_tokens"]) * price.output;
    dollars / 1e6
}

fn remembered(place: &Path) -> Option<Value> {
    let text = std::fs::read_to_string(place).ok()?;
    serde_json::from_str(&text).ok()
}

fn remember(place: &Path, answer: &Value) {
    let folder = place.parent().unwrap_or(Path::new(""));
    let written = fs_err::create_dir_all(folder)
        .map_err(anyhow::Error::from)
        .and_then(|()| {
            Ok(bantam_formats::atomic::write(
                place,
                answer.to_string().as_bytes(),
            )?)
        });
    if let Err(error) = written {
        tracing::warn!(%error, "an answer was not remembered");
    }
}

/// How a try ended that did not succeed.
enum Failed {
    /// Another may help, after so long if that was said.
    Again(String, Option<Duration>),
    /// It would fail again.
    For(String),
}

impl Provider {
    /// Asks until there is an answer, or trying is no use.
    fn ask(&self, body: &Value) -> Result<(Value, Duration), String> {
        let name = &self.settings.name;
        let mut pause = Duration::from_millis(500);
        for attempt in 0.. {
            let began = Instant::now();
            match self.try_once(body) {
                Ok(answer) => return Ok((answer, began.elapsed())),
                Err(Failed::For(why)) => return Err(format!("provider `{name}`: {why}")),
                Err(Failed::Again(why, wanted)) => {
                    if attempt >= self.settings.retries {
                        let tries = attempt + 1;
                        return Err(format!("provider `{name}`: {why} (asked {tries} times)"));
                    }
                    std::thread::sleep(wanted.unwrap_or(pause).min(PAUSE_MAX));
                    pause *= 2;
                }
            }
        }
        Err(format!("provider `{name}` was not asked"))
    }

    fn try_once(&self, body: &Value) -> Result<Value, Failed> {
        let url = format!("{}/chat/completions", self.settings.base_url);
        let mut request = self
            .agent
            .post(&url)
            .header("content-type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let sent = request.send(body.to_string());
        let mut answer = sent.map_err(|error| Failed::Again(error.to_string(), None))?;
        let status = answer.status().as_u16();
        let wanted = {
            let header = |name: &str| -> Option<f64> {
                answer
                    .headers()
                    .get(name)?
                    .to_str()
                    .ok()?
                    .trim()
                    .parse()
                    .ok()
            };
            let ms = header("retry-after-ms").or_else(|| header("retry-after").map(|s| s * 1000.0));
            ms.filter(|ms| (0.0..1e9).contains(ms))
                .map(|ms| Duration::from_secs_f64(ms / 1000.0))
        };
        let read = answer
            .body_mut()
            .with_config()
            .limit(ANSWER_MAX)
            .read_to_string();
        let text = read.map_err(|error| Failed::Again(error.to_string(), None))?;
        if status == 200 {
            return serde_json::from_str(&text)
                .map_err(|error| Failed::Again(format!("its answer is not JSON: {error}"), None));
        }
        let told: Value = serde_json::from_str(&text).unwrap_or_default();
        let told = told["error"]["message"]
            .as_str()
            .unwrap_or(text.trim())
            .to_owned();
        let why = format!("status {status}: {told:.500}");
        // A key that is out of money does not get richer by waiting.
        let is_spent = told.contains("quota") || text.contains("insufficient_quota");
        match status {
            408 | 409 | 429 | 500..=599 if !is_spent => Err(Failed::Again(why, wanted)),
            _ => Err(Failed::For(why)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_by_the_million() {
        let price = Price {
            input: 1.0,
            cached_input: Some(0.5),
            output: 4.0,
        };
        let usage = json!({"prompt_tokens": 1000, "completion_tokens": 500, "prompt_tokens_details": {"cached_tokens": 400}});
        assert!((cost(&price, &usage) - (600.0 + 200.0 + 2000.0) / 1e6).abs() < 1e-12);
        assert_eq!(cost(&price, &Value::Null), 0.0);
    }
}
