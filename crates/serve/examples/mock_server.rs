//! Serves the mock model until interrupted, for trying clients without weights:
//! `cargo run -p bantam-serve --example mock_server -- 8080`.
#![allow(clippy::unwrap_used, reason = "a tool for tests")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::Duration;

use bantam_engine::EngineConfig;
use bantam_serve::ServeConfig;

fn main() {
    let port = std::env::args()
        .nth(1)
        .map_or(0, |port| port.parse().unwrap());
    let config = ServeConfig {
        port,
        ..ServeConfig::default()
    };
    let model = support::model("mock", EngineConfig::default(), Duration::ZERO);
    let models = support::models(vec![model]);
    let mut on_ready = |addr| println!("http://{addr}/v1");
    bantam_serve::run(config, models, &mut on_ready, &mut || {}).unwrap();
}
