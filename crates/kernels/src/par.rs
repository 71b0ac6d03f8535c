//! A pool of threads for regions of a few microseconds.
//!
//! A token passes some two hundred parallel regions, so a region must cost about a
//! microsecond: workers spin for a while after a region before they sleep, and a worker that
//! arrives late finds the region closed and holds nobody up.

use std::any::Any;
use std::cell::Cell;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Turns of the spin loop before a worker sleeps: about 100 microseconds.
const SPINS: u32 = 20_000;
/// The count of workers inside a region sits in seven bits of the state word.
const MAX_THREADS: usize = 64;

const OPEN: usize = 1;
const INSIDE: usize = 2;
const INSIDE_MASK: usize = 0xfe;
const EPOCH: usize = 0x100;

/// Threads that run the tasks of one region at a time; cheap to clone.
#[derive(Clone)]
pub struct Pool {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Region number, how many workers are inside it, and whether it is open.
    state: AtomicUsize,
    next_task: AtomicUsize,
    job: Mutex<Job>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    /// Held by the thread that runs a region; others wait their turn.
    region: Mutex<()>,
}

#[derive(Clone, Copy)]
struct Job {
    task: *const (dyn Fn(usize) + Sync),
    n_tasks: usize,
}
// SAFETY: the pointee is `Sync`, and `run` keeps it alive until no worker is inside.
unsafe impl Send for Job {}

thread_local! {
    /// Set while this thread runs tasks: a region inside a region runs inline.
    static INSIDE_REGION: Cell<bool> = const { Cell::new(false) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A poisoned lock only says that a task panicked; the data behind is a plain value.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool in which `threads` threads take part, the calling one included.
    pub fn new(threads: usize) -> Self {
        let threads = threads.clamp(1, MAX_THREADS);
        let nothing: &'static (dyn Fn(usize) + Sync) = &|_| {};
        let shared = Arc::new(Shared {
            state: AtomicUsize::new(0),
            next_task: AtomicUsize::new(0),
            job: Mutex::new(Job {
                task: nothing,
                n_tasks: 0,
            }),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            region: Mutex::new(()),
        });
        let workers = (1..threads)
            .map(|i| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("bantam-compute-{i}"))
                    .spawn(move || work(&shared))
                    .expect("the system can start a thread")
            })
            .collect();
        Self {
            inner: Arc::new(Inner { shared, workers }),
        }
    }

    /// How many threads take part, the calling one included.
    pub fn threads(&self) -> usize {
        self.inner.workers.len() + 1
    }

    /// Runs `task(0)`, ..., `task(n_tasks - 1)`, each once, in any order, on any thread.
    ///
    /// A panic in a task is passed on after the region has ended.
    pub fn run(&self, n_tasks: usize, task: impl Fn(usize) + Sync) {
        if n_tasks <= 1 || self.inner.workers.is_empty() || INSIDE_REGION.get() {
            (0..n_tasks).for_each(task);
            return;
        }
        let shared = &*self.inner.shared;
        let turn = lock(&shared.region);
        let task: &(dyn Fn(usize) + Sync) = &task;
        // SAFETY: only the lifetime changes. Workers use the pointer only while they count as
        // inside an open region, and this function returns only when it is closed and empty.
        let task = unsafe {
            std::mem::transmute::<&(dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(task)
        };
        *lock(&shared.job) = Job { task, n_tasks };
        shared.next_task.store(0, Ordering::Relaxed);
        let closed = shared.state.load(Ordering::Relaxed);
        shared
            .state
            .store(closed.wrapping_add(EPOCH) | OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleep));
            shared.wake.notify_all();
        }
        shared.drain(Job { task, n_tasks });
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while shared.state.load(Ordering::Acquire) & INSIDE_MASK != 0 {
            spins += 1;
            if spins > SPINS {
                std::thread::yield_now()
            } else {
                std::hint::spin_loop()
            }
        }
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Runs `task(i, chunk)` on each chunk of `chunk_len` elements (the last may be shorter).
    pub fn chunks_mut<T: Send>(
        &self,
        data: &mut [T],
        chunk_len: usize,
        task: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let parts = Parts::new(data);
        self.run(parts.n_chunks(chunk_len), |i| {
            // SAFETY: the chunks of different `i` do not overlap, and each `i` runs once.
            task(i, unsafe { parts.slice(parts.chunk(i, chunk_len)) });
        });
    }

    /// As [`Pool::chunks_mut`] over two slices cut side by side into the same count of chunks.
    ///
    /// Panics if the counts differ.
    pub fn chunks_mut2<T: Send, U: Send>(
        &self,
        (a, a_len): (&mut [T], usize),
        (b, b_len): (&mut [U], usize),
        task: impl Fn(usize, &mut [T], &mut [U]) + Sync,
    ) {
        let (a, b) = (Parts::new(a), Parts::new(b));
        let n = a.n_chunks(a_len);
        assert_eq!(
            n,
            b.n_chunks(b_len),
            "both slices have the same count of chunks"
        );
        self.run(n, |i| {
            // SAFETY: as in `chunks_mut`, for each of the two slices.
            unsafe { task(i, a.slice(a.chunk(i, a_len)), b.slice(b.chunk(i, b_len))) }
        });
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("threads", &self.threads())
            .finish()
    }
}

impl Shared {
    fn drain(&self, job: Job) {
        INSIDE_REGION.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let i = self.next_task.fetch_add(1, Ordering::Relaxed);
                if i >= job.n_tasks {
                    break;
                }
                // SAFETY: this thread is inside the region, so `run` has not returned.
                unsafe { (*job.task)(i) };
            }
        }));
        INSIDE_REGION.set(false);
        if let Err(panic) = result {
            self.next_task.store(job.n_tasks, Ordering::Relaxed);
            lock(&self.panic).get_or_insert(panic);
        }
    }
}

fn work(shared: &Shared) {
    let mut last_epoch = 0;
    let mut spins = 0;
    loop {
        let state = shared.state.load(Ordering::Acquire);
        let epoch = state & !(INSIDE_MASK | OPEN);
        if state & OPEN != 0 && epoch != last_epoch {
            let entered = shared.state.compare_exchange_weak(
                state,
                state + INSIDE,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            if entered.is_ok() {
                let job = *lock(&shared.job);
                shared.drain(job);
                shared.state.fetch_sub(INSIDE, Ordering::AcqRel);
                last_epoch = epoch;
                spins = 0;
            }
            continue;
        }
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        spins += 1;
        if spins < SPINS {
            std::hint::spin_loop();
            continue;
        }
        let mut guard = lock(&shared.sleep);
        shared.sleepers.fetch_add(1, Ordering::SeqCst);
        // Looked at after announcing the sleep: a region opened since is seen here, one
        // opened later sees the sleeper and takes the lock to wake it.
        while shared.state.load(Ordering::SeqCst) == state && !shared.stop.load(Ordering::SeqCst) {
            guard = shared
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        shared.sleepers.fetch_sub(1, Ordering::SeqCst);
        drop(guard);
        spins = 0;
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.sleep));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker only panics outside `drain`, which is a bug that has been printed.
            let _ = worker.join();
        }
    }
}

/// A mutable slice that tasks take disjoint parts of.
pub(crate) struct Parts<T> {
    start: *mut T,
    len: usize,
}
// SAFETY: hands out disjoint `&mut [T]` to different threads, which `T: Send` allows.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    pub(crate) fn new(data: &mut [T]) -> Self {
        Self {
            start: data.as_mut_ptr(),
            len: data.len(),
        }
    }

    fn n_chunks(&self, chunk_len: usize) -> usize {
        if self.len == 0 {
            0
        } else {
            self.len.div_ceil(chunk_len)
        }
    }

    fn chunk(&self, i: usize, chunk_len: usize) -> Range<usize> {
        i * chunk_len..((i + 1) * chunk_len).min(self.len)
    }

    /// # Safety
    /// No two live slices from one `Parts` overlap, and the data outlives them.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion, disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }

    /// The address of element `i`, for blocks whose rows interleave with those of others.
    pub(crate) fn at(&self, i: usize) -> *mut T {
        assert!(i < self.len);
        self.start.wrapping_add(i)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_at_any_thread_count() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads);
            for n in [0, 1, 2, 7, 1000] {
                let mut seen = vec![0u32; n];
                pool.chunks_mut(&mut seen, 1, |_, x| x[0] += 1);
                assert!(seen.iter().all(|&x| x == 1), "threads {threads}, tasks {n}");
            }
        }
    }

    #[test]
    fn regions_survive_sleep_nesting_and_many_callers() {
        let pool = Pool::new(2);
        std::thread::sleep(std::time::Duration::from_millis(20));
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        pool.run(3, |_| {
                            pool.run(2, |_| {
                                total.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 500 * 6);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(64, |i| assert!(i != 40, "task forty"));
        }));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(64, |_| {
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.into_inner(), 64);
    }
}
