//! What is worked on in tasks of its own, by name, and whether each is to stop.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Batches, or runs of evals.
#[derive(Default)]
pub(crate) struct Running(Mutex<HashMap<String, Arc<AtomicBool>>>);

impl Running {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Arc<AtomicBool>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One is begun, or taken up after it was told to stop.
    pub(crate) fn begin(&self, id: &str, is_stopped: bool) -> Arc<AtomicBool> {
        let stop = Arc::new(AtomicBool::new(is_stopped));
        self.all().insert(id.to_string(), Arc::clone(&stop));
        stop
    }

    /// One is over.
    pub(crate) fn end(&self, id: &str) {
        self.all().remove(id);
    }

    /// Asks one to stop; `false` if it is not worked on.
    pub(crate) fn cancel(&self, id: &str) -> bool {
        let told = self
            .all()
            .get(id)
            .map(|stop| stop.store(true, Ordering::Relaxed));
        told.is_some()
    }
}
