//! Adapters in memory: read when they are first asked for, shared by the requests that run with them, dropped when
//! others need the room, least recently used first.
//!
//! A [`Resident`] is held by the shelf and by every request that runs with it. Only one that no request holds is
//! dropped for another. One that was taken off the shelf lives on until its last request has ended; then the engine
//! forgets it, and what was kept of its prompts.

use std::any::Any;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bantam_engine::Embedder;

use crate::error::ApiError;
use crate::served::LoadAdapter;
use crate::worker::Worker;

/// Where an adapter comes from.
pub(crate) struct Source {
    id: u64,
    /// The model's name, for the log.
    name: String,
    worker: Arc<Worker>,
    load: LoadAdapter,
    /// Its size, once it has been read.
    bytes: AtomicUsize,
    /// Held while it is being read.
    reading: Mutex<()>,
}

impl Source {
    pub(crate) fn new(name: &str, worker: Arc<Worker>, load: LoadAdapter) -> Self {
        Self {
            id: next_id(),
            name: name.to_string(),
            worker,
            load,
            bytes: AtomicUsize::new(0),
            reading: Mutex::default(),
        }
    }
}

/// An adapter in memory.
pub(crate) struct Resident {
    /// Unique: one that is read again is another.
    pub(crate) id: u64,
    source: u64,
    pub(crate) adapter: Arc<dyn Any + Send + Sync>,
    pub(crate) embedder: Option<Arc<dyn Embedder>>,
    bytes: usize,
    live: Arc<AtomicUsize>,
    worker: Arc<Worker>,
}

impl Drop for Resident {
    fn drop(&mut self) {
        self.live.fetch_sub(self.bytes, Ordering::Relaxed);
        self.worker.forget(self.id);
    }
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// All adapters in memory.
pub(crate) struct Residents {
    bytes_max: usize,
    /// The least recently used first.
    shelf: Mutex<Vec<Arc<Resident>>>,
    /// Bytes of all that live, on the shelf or in use.
    live: Arc<AtomicUsize>,
}

impl Residents {
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            shelf: Mutex::default(),
            live: Arc::default(),
        }
    }

    /// The adapter, if it is in memory.
    pub(crate) fn find(&self, source: &Source) -> Option<Arc<Resident>> {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        let at = shelf.iter().position(|r| r.source == source.id)?;
        // To the end: the most recently used.
        shelf[at..].rotate_left(1);
        shelf.last().cloned()
    }

    /// The adapter, read if need be. For a thread that may block.
    pub(crate) fn get(&self, source: &Source) -> Result<Arc<Resident>, ApiError> {
        let _one_reads = source
            .reading
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(resident) = self.find(source) {
            return Ok(resident);
        }
        // With its size known, it is not read in vain.
        self.make_room(source.bytes.load(Ordering::Relaxed))?;
        let failed = |reason: &str| {
            tracing::error!(
                model = source.name,
                reason,
                "an adapter could not be loaded"
            );
            ApiError::not_loaded(&source.name)
        };
        let loaded = (source.load)().map_err(|reason| failed(&reason))?;
        if !source.worker.takes(&*loaded.adapter) {
            return Err(failed("it is of another kind of model than its base"));
        }
        source.bytes.store(loaded.bytes, Ordering::Relaxed);
        self.make_room(loaded.bytes)?;
        self.live.fetch_add(loaded.bytes, Ordering::Relaxed);
        let resident = Arc::new(Resident {
            id: next_id(),
            source: source.id,
            adapter: loaded.adapter,
            embedder: loaded.embedder,
            bytes: loaded.bytes,
            live: Arc::clone(&self.live),
            worker: Arc::clone(&source.worker),
        });
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        shelf.push(Arc::clone(&resident));
        Ok(resident)
    }

    /// Drops what is not in use until so many bytes fit. Where nothing is left to drop and running requests fill the
    /// memory, there is no room for now; a single adapter always fits.
    fn make_room(&self, bytes: usize) -> Result<(), ApiError> {
        let mut dropped = Vec::new();
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        let mut going = 0;
        let live = self.live.load(Ordering::Relaxed);
        let is_full = |going: usize| live - going > 0 && live - going + bytes > self.bytes_max;
        while is_full(going) {
            // In use is what someone besides the shelf holds; under the lock nobody takes it anew.
            let Some(at) = shelf.iter().position(|r| Arc::strong_count(r) == 1) else {
                return Err(ApiError::busy());
            };
            let resident = shelf.remove(at);
            going += resident.bytes;
            dropped.push(resident);
        }
        drop(shelf);
        Ok(())
    }

    /// Takes an adapter off the shelf.
    pub(crate) fn forget(&self, source: &Source) {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        let at = shelf.iter().position(|r| r.source == source.id);
        let gone = at.map(|at| shelf.remove(at));
        drop(shelf);
        drop(gone);
    }

    /// Takes all of them off.
    pub(crate) fn clear(&self) {
        let mut shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        let all = std::mem::take(&mut *shelf);
        drop(shelf);
        drop(all);
    }

    pub(crate) fn has(&self, source: &Source) -> bool {
        let shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        shelf.iter().any(|r| r.source == source.id)
    }

    /// How many are in memory, and the bytes of all that live.
    pub(crate) fn size(&self) -> (usize, usize) {
        let shelf = self.shelf.lock().unwrap_or_else(PoisonError::into_inner);
        (shelf.len(), self.live.load(Ordering::Relaxed))
    }
}
