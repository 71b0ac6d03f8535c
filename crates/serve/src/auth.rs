//! API keys: only their SHA-256 is kept, and compared in constant time.

use axum::http::HeaderMap;
use axum::http::header::HOST;
use sha2::{Digest, Sha256};

use crate::error::ApiError;

/// The digest of a key that opens the API.
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey([u8; 32]);

impl ApiKey {
    /// Digests `key`; the key itself is not kept.
    pub fn new(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    /// Looks at every byte, whatever the first ones say.
    fn matches(&self, other: &ApiKey) -> bool {
        let differs = self
            .0
            .iter()
            .zip(&other.0)
            .fold(0u8, |acc, (a, b)| acc | (a ^ b));
        std::hint::black_box(differs) == 0
    }

    /// Is `given` one of `keys`? No early return: the time taken does not tell which it was nearly.
    pub(crate) fn any_matches(keys: &[ApiKey], given: &ApiKey) -> bool {
        keys.iter()
            .fold(false, |found, key| found | key.matches(given))
    }
}

impl std::fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// Without keys, only pages of this machine may call: a foreign page that has its name resolve
/// to 127.0.0.1 still sends that name as `Host`.
pub(crate) fn check_host(is_locked: bool, headers: &HeaderMap) -> Result<(), ApiError> {
    if is_locked {
        return Ok(());
    }
    let Some(host) = headers.get(HOST) else {
        return Ok(());
    };
    let host = host.to_str().unwrap_or("?");
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let is_loopback = name.eq_ignore_ascii_case("localhost")
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|ip| ip.is_loopback());
    if is_loopback {
        Ok(())
    } else {
        Err(ApiError::foreign_host())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: axum::http::HeaderName, value: &str) -> HeaderMap {
        HeaderMap::from_iter([(name, value.parse().unwrap())])
    }

    #[test]
    fn any_of_the_keys_opens_and_no_other() {
        let keys = [ApiKey::new("alpha"), ApiKey::new("beta")];
        for (given, opens) in [
            ("alpha", true),
            ("beta", true),
            ("gamma", false),
            ("alph", false),
        ] {
            assert_eq!(ApiKey::any_matches(&keys, &ApiKey::new(given)), opens);
        }
        assert!(!ApiKey::any_matches(&[], &ApiKey::new("alpha")));
        assert_eq!(format!("{:?}", keys[0]), "ApiKey(..)");
    }

    #[test]
    fn a_foreign_host_needs_a_key() {
        for ok in [
            "localhost:8080",
            "127.0.0.1",
            "127.0.0.1:1",
            "[::1]:8080",
            "LOCALHOST",
        ] {
            assert!(check_host(false, &headers(HOST, ok)).is_ok(), "{ok}");
        }
        for bad in [
            "evil.example",
            "evil.example:8080",
            "127.0.0.1.evil.example",
            "192.168.0.2",
        ] {
            assert!(check_host(false, &headers(HOST, bad)).is_err(), "{bad}");
            assert!(check_host(true, &headers(HOST, bad)).is_ok(), "{bad}");
        }
    }
}
