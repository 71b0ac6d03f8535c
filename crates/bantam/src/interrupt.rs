//! Ctrl-C: the first asks for a clean stop, the second stops at once.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::error::EXIT_INTERRUPTED;

/// From now on Ctrl-C (and `SIGTERM`) sets the returned flag; once it is set, another one ends the process.
///
/// Only commands that look at the flag call this; for others Ctrl-C ends the process as usual.
pub(crate) fn watch() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // In this order: the first signal finds the flag unset and only sets it.
        signal_hook::flag::register_conditional_shutdown(
            signal,
            i32::from(EXIT_INTERRUPTED),
            flag.clone(),
        )?;
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(flag)
}
