//! `bantam demo`: messy US addresses to JSON, end to end.

use crate::commands::Context;
use crate::settings::DemoSettings;

/// Runs the demo.
pub(crate) fn run(_context: &Context, _settings: &DemoSettings) -> anyhow::Result<()> {
    anyhow::bail!("the demo is not in this build yet")
}
