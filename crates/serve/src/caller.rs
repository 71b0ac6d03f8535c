//! Who calls: the keys that open the API, what each may do, and how much of it.
//!
//! A key of the store is looked up by its public part on every request, so that one that is revoked is refused
//! from then on. Requests and tokens a minute are buckets that fill steadily; a request is let in while there are
//! tokens left and what it takes is known only later, so a bucket may go below nothing and has to fill up again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use axum::extract::Request;
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use bantam_store::{Key, KeyLimits, Scope, Store, hash_secret};

use crate::auth::ApiKey;
use crate::error::ApiError;
use crate::ids;

/// The headers that tell a key what it may use a minute, and what is left of it: of requests, then of tokens.
pub(crate) const LEFT: [&str; 4] = [
    "x-ratelimit-limit-requests",
    "x-ratelimit-remaining-requests",
    "x-ratelimit-limit-tokens",
    "x-ratelimit-remaining-tokens",
];

/// Everyone who may come in.
pub(crate) struct Door {
    /// Keys given at the start, which may do everything.
    fixed: Vec<ApiKey>,
    store: Option<Arc<Store>>,
    meters: Mutex<HashMap<String, Arc<Meter>>>,
}

/// Whoever sent a request.
#[derive(Clone)]
pub(crate) struct Caller {
    /// What is kept for them is kept under this name: their key's, or nothing where there are no keys.
    pub(crate) owner: String,
    scopes: Vec<Scope>,
    meter: Option<Arc<Meter>>,
}

impl Door {
    pub(crate) fn new(fixed: Vec<ApiKey>, store: Option<Arc<Store>>) -> Self {
        Self {
            fixed,
            store,
            meters: Mutex::default(),
        }
    }

    /// Is a key needed?
    pub(crate) fn is_locked(&self) -> bool {
        !self.fixed.is_empty() || self.store.is_some()
    }

    /// Who sent a request with these headers.
    pub(crate) fn enter(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        if !self.is_locked() {
            return Ok(Caller::anyone());
        }
        let header = headers
            .get(AUTHORIZATION)
            .and_then(|value| value.to_str().ok());
        let (scheme, token) = header.and_then(|h| h.split_once(' ')).unwrap_or(("", ""));
        let token = token.trim();
        if !scheme.eq_ignore_ascii_case("bearer") || token.is_empty() {
            return Err(ApiError::missing_key());
        }
        if let Some(store) = &self.store
            && let Some((id, secret)) = split(token)
        {
            let found = store.key(id).map_err(ApiError::store)?;
            if found.is_none() {
                // As much work for a name that does not exist.
                std::hint::black_box(hash_secret(secret));
            }
            if let Some(key) = found.filter(|key| key.opens(secret)) {
                return Ok(self.caller(key, store));
            }
        }
        let given = ApiKey::new(token);
        if ApiKey::any_matches(&self.fixed, &given) {
            return Ok(Caller::anyone());
        }
        Err(ApiError::wrong_key())
    }

    /// Whoever owns something, while they do not wait for it: under the same limits, as long as their key is good.
    pub(crate) fn absent(&self, owner: &str) -> Result<Caller, ApiError> {
        let Some(store) = self.store.as_ref().filter(|_| !owner.is_empty()) else {
            return Ok(Caller {
                owner: owner.to_string(),
                ..Caller::anyone()
            });
        };
        let found = store.key(owner).map_err(ApiError::store)?;
        match found.filter(|key| key.revoked.is_none()) {
            Some(key) => Ok(self.caller(key, store)),
            None => Err(ApiError::wrong_key()),
        }
    }

    fn caller(&self, key: Key, store: &Arc<Store>) -> Caller {
        let mut meters = self.meters.lock().unwrap_or_else(PoisonError::into_inner);
        let meter = meters
            .entry(key.id.clone())
            .or_insert_with(|| Arc::new(Meter::new(&key, Arc::clone(store))));
        if meter.limits != key.limits {
            *meter = Arc::new(Meter::new(&key, Arc::clone(store)));
        }
        meter.touch();
        Caller {
            owner: key.id,
            scopes: key.scopes,
            meter: Some(Arc::clone(meter)),
        }
    }
}

/// `bt-PUBLIC-SECRET`.
fn split(token: &str) -> Option<(&str, &str)> {
    token.strip_prefix("bt-")?.split_once('-')
}

impl Caller {
    /// Someone who needs no key.
    pub(crate) fn anyone() -> Self {
        Self {
            owner: String::new(),
            scopes: Scope::ALL.to_vec(),
            meter: None,
        }
    }

    /// The caller that the door let in with this request, who may ask models.
    pub(crate) fn of(request: &Request) -> Result<Self, ApiError> {
        Self::with(request, Scope::Inference)
    }

    /// The same, who may do this.
    pub(crate) fn with(request: &Request, scope: Scope) -> Result<Self, ApiError> {
        let caller = request.extensions().get::<Caller>().cloned();
        let caller = caller.ok_or_else(ApiError::missing_key)?;
        if caller.scopes.contains(&scope) || caller.scopes.contains(&Scope::Admin) {
            Ok(caller)
        } else {
            Err(ApiError::out_of_scope(scope.name()))
        }
    }

    /// A number that tells callers apart, for the engine to let them take turns.
    pub(crate) fn client(&self) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        std::hash::Hash::hash(&self.owner, &mut hasher);
        std::hash::Hasher::finish(&hasher)
    }

    /// Takes one request out of the budget, or says when there will be one.
    pub(crate) fn admit(&self) -> Result<(), ApiError> {
        self.meter.as_ref().map_or(Ok(()), |meter| meter.admit())
    }

    /// Takes tokens out of the budget.
    pub(crate) fn spend(&self, tokens: u64) {
        if let Some(meter) = &self.meter {
            meter.spend(tokens);
        }
    }

    /// What is left, as the headers that OpenAI's clients know.
    pub(crate) fn left(&self) -> Vec<(&'static str, u64)> {
        self.meter
            .as_ref()
            .map_or_else(Vec::new, |meter| meter.left())
    }
}

/// What a key has left.
struct Meter {
    id: String,
    limits: KeyLimits,
    store: Arc<Store>,
    state: Mutex<State>,
}

struct State {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
    /// The day, and the tokens used on it.
    day: u64,
    used: u64,
    /// The minute of the last use that was noted.
    touched: u64,
}

impl Meter {
    fn new(key: &Key, store: Arc<Store>) -> Self {
        let bucket = |per_minute: Option<u32>| per_minute.map(Bucket::full);
        Self {
            id: key.id.clone(),
            limits: key.limits,
            store,
            state: Mutex::new(State {
                requests: bucket(key.limits.requests_per_minute),
                tokens: bucket(key.limits.tokens_per_minute),
                day: u64::MAX,
                used: 0,
                touched: key.last_used.unwrap_or(0) / 60,
            }),
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes the use, to the minute.
    fn touch(&self) {
        let now = ids::now();
        let mut state = self.state();
        if state.touched != now / 60 {
            state.touched = now / 60;
            if let Err(error) = self.store.touch_key(&self.id, now) {
                tracing::warn!(%error, "the use of a key was not noted");
            }
        }
    }

    fn admit(&self) -> Result<(), ApiError> {
        let now = Instant::now();
        let mut state = self.state();
        if let Some(budget) = self.limits.tokens_per_day {
            let seconds = ids::now();
            let day = seconds / 86_400;
            if state.day != day {
                state.used = self
                    .store
                    .spend(&self.id, day, 0)
                    .map_err(ApiError::store)?;
                state.day = day;
            }
            if state.used >= budget {
                return Err(ApiError::over_budget((day + 1) * 86_400 - seconds));
            }
        }
        let wait = |bucket: &mut Option<Bucket>| bucket.as_mut().and_then(|b| b.wait_ms(now));
        if let Some(ms) = wait(&mut state.tokens) {
            return Err(ApiError::limited("tokens", ms));
        }
        if let Some(ms) = wait(&mut state.requests) {
            return Err(ApiError::limited("requests", ms));
        }
        if let Some(requests) = &mut state.requests {
            requests.level -= 1.0;
        }
        Ok(())
    }

    fn spend(&self, tokens: u64) {
        let mut state = self.state();
        if let Some(bucket) = &mut state.tokens {
            bucket.fill(Instant::now());
            bucket.level -= tokens as f64;
        }
        if self.limits.tokens_per_day.is_some() {
            let day = ids::now() / 86_400;
            match self.store.spend(&self.id, day, tokens) {
                Ok(used) => (state.day, state.used) = (day, used),
                Err(error) => tracing::warn!(%error, "tokens that a key used were not noted"),
            }
        }
    }

    fn left(&self) -> Vec<(&'static str, u64)> {
        let now = Instant::now();
        let mut state = self.state();
        let mut left = Vec::new();
        let mut tell = |bucket: &mut Option<Bucket>, limit, remaining| {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                left.push((limit, bucket.per_minute as u64));
                left.push((remaining, bucket.level.max(0.0) as u64));
            }
        };
        let [limit_requests, requests, limit_tokens, tokens] = LEFT;
        tell(&mut state.requests, limit_requests, requests);
        tell(&mut state.tokens, limit_tokens, tokens);
        left
    }
}

/// Fills up in a minute.
struct Bucket {
    per_minute: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn full(per_minute: u32) -> Self {
        Self {
            per_minute: f64::from(per_minute),
            level: f64::from(per_minute),
            at: Instant::now(),
        }
    }

    fn fill(&mut self, now: Instant) {
        let minutes = now.saturating_duration_since(self.at).as_secs_f64() / 60.0;
        self.level = (self.level + minutes * self.per_minute).min(self.per_minute);
        self.at = now;
    }

    /// How long until there is one; `None` if there is.
    fn wait_ms(&mut self, now: Instant) -> Option<u64> {
        self.fill(now);
        let lacks = 1.0 - self.level;
        if lacks <= 0.0 {
            return None;
        }
        let ms = lacks / self.per_minute.max(1e-3) * 60_000.0;
        Some((ms.ceil() as u64).max(1))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bantam_store::NewKey;

    use super::*;

    fn door(limits: KeyLimits) -> Door {
        let store = Arc::new(Store::in_memory().unwrap());
        let key = NewKey {
            id: "pub".into(),
            name: "n".into(),
            hash: hash_secret("secret"),
            scopes: vec![Scope::Inference],
            limits,
            created: 0,
        };
        store.create_key(&key).unwrap();
        Door::new(vec![ApiKey::new("fixed")], Some(store))
    }

    fn enter(door: &Door, key: &str) -> Result<Caller, ApiError> {
        let value = format!("Bearer {key}").parse().unwrap();
        door.enter(&HeaderMap::from_iter([(AUTHORIZATION, value)]))
    }

    #[test]
    fn keys_open_and_near_misses_do_not() {
        let door = door(KeyLimits::default());
        assert_eq!(enter(&door, "bt-pub-secret").unwrap().owner, "pub");
        assert!(enter(&door, "fixed").is_ok());
        for bad in [
            "bt-pub-secreT",
            "bt-pub-",
            "bt-pub",
            "bt-bup-secret",
            "fixe",
            "bt--",
        ] {
            assert!(enter(&door, bad).is_err(), "{bad}");
        }
        assert!(door.enter(&HeaderMap::new()).is_err());
        door.store.as_ref().unwrap().revoke_key("pub", 1).unwrap();
        assert!(enter(&door, "bt-pub-secret").is_err());
        assert!(Door::new(Vec::new(), None).enter(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn budgets_run_out_and_fill_up() {
        let door = door(KeyLimits {
            requests_per_minute: Some(2),
            tokens_per_minute: Some(100),
            tokens_per_day: Some(1000),
        });
        let caller = enter(&door, "bt-pub-secret").unwrap();
        caller.admit().unwrap();
        caller.admit().unwrap();
        let refused = caller.admit().unwrap_err();
        assert_eq!(refused.status.as_u16(), 429);
        assert!(
            refused
                .retry_ms
                .is_some_and(|ms| (29_000..=30_000).contains(&ms))
        );
        let meter = caller.meter.as_ref().unwrap();
        let mut state = meter.state();
        let bucket = state.requests.as_mut().unwrap();
        let later = bucket.at + Duration::from_secs(31);
        assert_eq!(bucket.wait_ms(later), None);
        bucket.level = 100.0;
        drop(state);
        caller.spend(160);
        assert!(caller.admit().unwrap_err().message.contains("tokens"));
        assert_eq!(caller.left()[3].1, 0);
        caller.spend(900);
        let spent = caller.admit().unwrap_err();
        assert_eq!(spent.code, Some("insufficient_quota"));
        assert!(!spent.should_retry);
    }
}
