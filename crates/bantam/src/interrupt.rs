//! Ctrl-C: the first asks for a clean stop, the second stops at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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

/// From now on the first Ctrl-C ends the process: what follows has nothing to save.
pub(crate) fn end_at_once(flag: &AtomicBool) {
    flag.store(true, Ordering::SeqCst);
}

/// Ctrl-C in a conversation: it stops an answer, and ends the process between answers.
pub(crate) struct Pause {
    /// Nothing is being answered: a signal ends the process.
    idle: Arc<AtomicBool>,
    /// A signal came.
    stop: Arc<AtomicBool>,
}

impl Pause {
    /// Listens from now on.
    pub(crate) fn watch() -> anyhow::Result<Self> {
        let pause = Self {
            idle: Arc::new(AtomicBool::new(true)),
            stop: Arc::new(AtomicBool::new(false)),
        };
        let signal = signal_hook::consts::SIGINT;
        signal_hook::flag::register_conditional_shutdown(
            signal,
            i32::from(EXIT_INTERRUPTED),
            pause.idle.clone(),
        )?;
        signal_hook::flag::register(signal, pause.stop.clone())?;
        Ok(pause)
    }

    /// An answer begins; it ends when the value is dropped.
    pub(crate) fn answering(&self) -> Answering {
        self.stop.store(false, Ordering::SeqCst);
        self.idle.store(false, Ordering::SeqCst);
        Answering {
            idle: self.idle.clone(),
            stop: self.stop.clone(),
        }
    }
}

/// An answer in the making.
pub(crate) struct Answering {
    idle: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
}

impl Answering {
    /// Whether the user wants it to stop.
    pub(crate) fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        self.idle.store(true, Ordering::SeqCst);
    }
}
