//! How this program asks other servers, and what time it tells them.

use std::time::{SystemTime, UNIX_EPOCH};

use ureq::Agent;
use ureq::config::ConfigBuilder;
use ureq::typestate::AgentScope;

/// An agent for whom every status is an answer, and who follows nobody elsewhere: a key must not leave its host.
pub(crate) fn config() -> ConfigBuilder<AgentScope> {
    Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .user_agent(concat!("bantam/", env!("CARGO_PKG_VERSION")))
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
