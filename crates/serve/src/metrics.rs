//! What `/metrics` tells, in Prometheus's text format.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bantam_engine::Usage;

/// Upper bounds of the buckets of durations, in seconds.
const BOUNDS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0,
];

/// Everything that is counted. The registry is a value of the server's.
#[derive(Default)]
pub(crate) struct Metrics {
    inner: Mutex<Inner>,
    /// Connections that were dropped because nothing of an answer was read.
    pub(crate) slow_clients: Arc<AtomicU64>,
}

#[derive(Default)]
struct Inner {
    requests: BTreeMap<(&'static str, u16), u64>,
    request_seconds: BTreeMap<&'static str, Histogram>,
    first_token: BTreeMap<(String, &'static str), Histogram>,
    inter_token: BTreeMap<String, Histogram>,
    tokens: BTreeMap<String, Tokens>,
}

#[derive(Default)]
struct Tokens {
    prompt: u64,
    cached: u64,
    completion: u64,
}

#[derive(Default)]
struct Histogram {
    counts: [u64; BOUNDS.len()],
    total: u64,
    sum: f64,
}

/// What a model's engine is doing.
pub(crate) struct Gauge {
    pub(crate) model: String,
    pub(crate) running: usize,
    pub(crate) waiting: usize,
    pub(crate) capacity: usize,
}

impl Metrics {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request was answered.
    pub(crate) fn request(&self, route: &'static str, status: u16, took: Duration) {
        let mut inner = self.inner();
        *inner.requests.entry((route, status)).or_default() += 1;
        inner.request_seconds.entry(route).or_default().add(took);
    }

    /// The first token of an answer came.
    pub(crate) fn first_token(&self, model: &str, route: &'static str, took: Duration) {
        let key = (model.to_string(), route);
        self.inner().first_token.entry(key).or_default().add(took);
    }

    /// A further token came.
    pub(crate) fn inter_token(&self, model: &str, took: Duration) {
        let mut inner = self.inner();
        match inner.inter_token.get_mut(model) {
            Some(histogram) => histogram.add(took),
            None => (inner.inter_token.entry(model.to_string()))
                .or_default()
                .add(took),
        }
    }

    /// An answer ended.
    pub(crate) fn tokens(&self, model: &str, usage: &Usage) {
        let mut inner = self.inner();
        let tokens = inner.tokens.entry(model.to_string()).or_default();
        tokens.prompt += usage.prompt_tokens as u64;
        tokens.cached += usage.cached_tokens as u64;
        tokens.completion += usage.completion_tokens as u64;
    }

    /// The page; of adapters it says how many are in memory, and their bytes.
    pub(crate) fn page(&self, gauges: &[Gauge], adapters: (usize, usize)) -> String {
        let inner = self.inner();
        let mut page = Page(String::new());
        page.head("bantam_requests_total", "counter", "Answered requests.");
        for ((route, status), n) in &inner.requests {
            let labels = [("route", *route), ("status", &status.to_string())];
            page.line("bantam_requests_total", &labels, *n as f64);
        }
        page.head(
            "bantam_errors_total",
            "counter",
            "Requests answered with an error.",
        );
        for ((route, status), n) in inner.requests.iter().filter(|((_, s), _)| *s >= 400) {
            let labels = [("route", *route), ("status", &status.to_string())];
            page.line("bantam_errors_total", &labels, *n as f64);
        }
        page.head(
            "bantam_slow_clients_total",
            "counter",
            "Connections dropped because their client did not read its answer.",
        );
        let n = self.slow_clients.load(Ordering::Relaxed);
        page.line("bantam_slow_clients_total", &[], n as f64);
        page.head(
            "bantam_request_seconds",
            "histogram",
            "From a request's arrival to the head of its answer.",
        );
        for (route, histogram) in &inner.request_seconds {
            page.histogram("bantam_request_seconds", &[("route", route)], histogram);
        }
        page.head(
            "bantam_time_to_first_token_seconds",
            "histogram",
            "From a request's arrival to its first token.",
        );
        for ((model, route), histogram) in &inner.first_token {
            let labels = [("model", model.as_str()), ("route", *route)];
            page.histogram("bantam_time_to_first_token_seconds", &labels, histogram);
        }
        page.head(
            "bantam_inter_token_seconds",
            "histogram",
            "Between two tokens of one answer.",
        );
        for (model, histogram) in &inner.inter_token {
            page.histogram("bantam_inter_token_seconds", &[("model", model)], histogram);
        }
        page.head(
            "bantam_tokens_total",
            "counter",
            "Tokens read, found in the cache, and written.",
        );
        for (model, tokens) in &inner.tokens {
            for (kind, n) in [
                ("prompt", tokens.prompt),
                ("cached", tokens.cached),
                ("completion", tokens.completion),
            ] {
                let labels = [("model", model.as_str()), ("kind", kind)];
                page.line("bantam_tokens_total", &labels, n as f64);
            }
        }
        page.head(
            "bantam_cache_hit_ratio",
            "gauge",
            "The share of prompt tokens that were found in the cache.",
        );
        for (model, tokens) in &inner.tokens {
            let ratio = tokens.cached as f64 / (tokens.prompt.max(1)) as f64;
            page.line("bantam_cache_hit_ratio", &[("model", model)], ratio);
        }
        for (name, about, value) in [
            (
                "bantam_batch_size",
                "Answers that are being generated.",
                (|g: &Gauge| g.running) as fn(&Gauge) -> usize,
            ),
            (
                "bantam_queue_depth",
                "Requests that wait for a slot.",
                |g| g.waiting,
            ),
            (
                "bantam_queue_capacity",
                "Requests that may run or wait.",
                |g| g.capacity,
            ),
        ] {
            page.head(name, "gauge", about);
            for gauge in gauges {
                page.line(name, &[("model", &gauge.model)], value(gauge) as f64);
            }
        }
        for (name, about, value) in [
            ("bantam_adapters", "Adapters in memory.", adapters.0),
            (
                "bantam_adapter_bytes",
                "The memory of adapters, those in use included.",
                adapters.1,
            ),
        ] {
            page.head(name, "gauge", about);
            page.line(name, &[], value as f64);
        }
        page.0
    }
}

impl Histogram {
    fn add(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        if let Some(bucket) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            self.counts[bucket] += 1;
        }
        self.total += 1;
        self.sum += seconds;
    }
}

struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, about: &str) {
        let _ = writeln!(self.0, "# HELP {name} {about}\n# TYPE {name} {kind}");
    }

    fn line(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.0.push_str(name);
        for (i, (label, value)) in labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"");
            let value = value.replace('\n', "\\n");
            let _ = write!(
                self.0,
                "{}{label}=\"{value}\"",
                if i == 0 { '{' } else { ',' }
            );
        }
        let _ = writeln!(
            self.0,
            "{} {value}",
            if labels.is_empty() { "" } else { "}" }
        );
    }

    fn histogram(&mut self, name: &str, labels: &[(&str, &str)], histogram: &Histogram) {
        let bucket = format!("{name}_bucket");
        let mut sum = 0;
        for (bound, n) in BOUNDS.iter().zip(histogram.counts) {
            sum += n;
            let bound = bound.to_string();
            let labels = [labels, &[("le", bound.as_str())]].concat();
            self.line(&bucket, &labels, sum as f64);
        }
        let labels_inf = [labels, &[("le", "+Inf")]].concat();
        self.line(&bucket, &labels_inf, histogram.total as f64);
        self.line(&format!("{name}_sum"), labels, histogram.sum);
        self.line(&format!("{name}_count"), labels, histogram.total as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_adds_up() {
        let metrics = Metrics::default();
        metrics.request("/v1/models", 200, Duration::from_millis(3));
        metrics.request("/v1/models", 404, Duration::from_secs(100));
        metrics.inter_token("a\"b", Duration::from_millis(20));
        metrics.tokens(
            "m",
            &Usage {
                prompt_tokens: 8,
                cached_tokens: 2,
                completion_tokens: 3,
                ..Usage::default()
            },
        );
        let gauge = Gauge {
            model: "m".into(),
            running: 1,
            waiting: 2,
            capacity: 3,
        };
        let page = metrics.page(&[gauge], (2, 4096));
        for line in [
            "bantam_requests_total{route=\"/v1/models\",status=\"200\"} 1",
            "bantam_errors_total{route=\"/v1/models\",status=\"404\"} 1",
            "bantam_request_seconds_bucket{route=\"/v1/models\",le=\"0.005\"} 1",
            "bantam_request_seconds_bucket{route=\"/v1/models\",le=\"60\"} 1",
            "bantam_request_seconds_bucket{route=\"/v1/models\",le=\"+Inf\"} 2",
            "bantam_inter_token_seconds_count{model=\"a\\\"b\"} 1",
            "bantam_cache_hit_ratio{model=\"m\"} 0.25",
            "bantam_queue_depth{model=\"m\"} 2",
            "bantam_adapter_bytes 4096",
        ] {
            assert!(page.lines().any(|l| l == line), "{line}\n{page}");
        }
    }
}
