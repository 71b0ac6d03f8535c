//! A pool of threads for regions of a few microseconds.
//!
//! A token passes some hundred and fifty parallel regions, so a region must cost well under a
//! microsecond: it is opened by one store for each thread, tasks are taken by one addition
//! each, and no lock is touched. Workers spin for a while after a region before they sleep, and
//! a worker that arrives late finds no task left and holds nobody up.
//!
//! Each thread begins with a run of neighbouring tasks and helps with the others' when it is
//! done: neighbours are mostly neighbours in memory too, and a long stretch is read twice as
//! fast as every other piece of it.

use std::any::Any;
use std::cell::Cell;
use std::fmt;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker spins before it sleeps: longer than what passes between two tokens.
const SPIN: Duration = Duration::from_micros(500);
/// Turns of the spin loop between two looks at the clock.
const SPINS_PER_LOOK: u32 = 1_000;
const MAX_THREADS: usize = 64;

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
    job: Job,
    /// One for each thread, the calling one's first.
    tickets: Box<[Ticket]>,
    done: Done,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    /// Held by the thread that runs a region; others wait their turn.
    region: Mutex<()>,
}

/// The caller's closure and what calls it; stable while a taken task is not done.
#[repr(align(128))]
struct Job {
    closure: AtomicPtr<()>,
    call: AtomicPtr<()>,
}

/// A run of tasks: its end in the upper half, the next one to take in the lower. Taking one adds
/// 1; with all taken the lower half is at least the upper.
#[repr(align(128))]
struct Ticket(AtomicU64);

impl Ticket {
    fn take(&self) -> Option<usize> {
        let ticket = self.0.fetch_add(1, Ordering::AcqRel);
        let (end, next) = (ticket >> 32, ticket & 0xffff_ffff);
        (next < end).then_some(next as usize)
    }

    fn is_open(&self, order: Ordering) -> bool {
        let ticket = self.0.load(order);
        ticket & 0xffff_ffff < ticket >> 32
    }
}

/// Tasks that workers have finished in the open region.
#[repr(align(128))]
struct Done(AtomicUsize);

type Call = unsafe fn(*const (), usize);

/// # Safety
/// `closure` points to a live `F`.
unsafe fn call<F: Fn(usize)>(closure: *const (), i: usize) {
    // SAFETY: as the caller vouches.
    unsafe { (*closure.cast::<F>())(i) }
}

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
        let shared = Arc::new(Shared {
            job: Job {
                closure: AtomicPtr::default(),
                call: AtomicPtr::default(),
            },
            tickets: (0..threads).map(|_| Ticket(AtomicU64::new(0))).collect(),
            done: Done(AtomicUsize::new(0)),
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
                    .spawn(move || work(&shared, i))
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
    /// A panic in a task is passed on after the region has ended; the other tasks still run.
    pub fn run<F: Fn(usize) + Sync>(&self, n_tasks: usize, task: F) {
        if n_tasks <= 1 || self.inner.workers.is_empty() || INSIDE_REGION.get() {
            (0..n_tasks).for_each(task);
            return;
        }
        let n = u32::try_from(n_tasks).expect("a region has fewer tasks than 2^32");
        let shared = &*self.inner.shared;
        // Only ever contended where several threads share one pool.
        let turn = lock(&shared.region);
        shared.done.0.store(0, Ordering::Relaxed);
        let closure = (&raw const task).cast_mut().cast();
        shared.job.closure.store(closure, Ordering::Relaxed);
        let call = call::<F> as Call as *mut ();
        shared.job.call.store(call, Ordering::Relaxed);
        // Publishes the stores above. A worker that still adds to a ticket of the region before
        // either does so now, to no effect, or takes a task of this one.
        let threads = shared.tickets.len() as u64;
        for (i, ticket) in (0..).zip(&shared.tickets) {
            let (start, end) = (u64::from(n) * i / threads, u64::from(n) * (i + 1) / threads);
            ticket.0.store(end << 32 | start, Ordering::SeqCst);
        }
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.sleep));
            shared.wake.notify_all();
        }
        let others = n_tasks - shared.drain(0);
        let mut spins = 0u32;
        while shared.done.0.load(Ordering::Acquire) != others {
            spins += 1;
            if spins > 20 * SPINS_PER_LOOK {
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
    /// Takes and runs tasks, its own and then those of the others, until none is left; returns
    /// how many this thread ran.
    fn drain(&self, thread: usize) -> usize {
        let (mut taken, mut offset) = (0, 0);
        INSIDE_REGION.set(true);
        // A panic ends the inner loop; the outer one goes on with the tasks that are left.
        while let Err(panic) = catch_unwind(AssertUnwindSafe(|| {
            while offset < self.tickets.len() {
                let ticket = &self.tickets[(thread + offset) % self.tickets.len()];
                // Others' tickets are only looked at before they are written to.
                let open = offset == 0 || ticket.is_open(Ordering::Relaxed);
                let Some(i) = open.then(|| ticket.take()).flatten() else {
                    offset += 1;
                    continue;
                };
                taken += 1;
                let closure = self.job.closure.load(Ordering::Relaxed);
                let call = self.job.call.load(Ordering::Relaxed);
                // SAFETY: `run` stored a `Call` and its closure before it opened the region
                // whose task this thread has taken, and returns only when that task is done.
                unsafe { std::mem::transmute::<*mut (), Call>(call)(closure, i) };
            }
        })) {
            lock(&self.panic).get_or_insert(panic);
        }
        INSIDE_REGION.set(false);
        taken
    }
}

fn work(shared: &Shared, thread: usize) {
    let own = &shared.tickets[thread];
    let (mut spins, mut idle_since) = (0, None::<Instant>);
    loop {
        if own.is_open(Ordering::Relaxed) {
            let taken = shared.drain(thread);
            // The region cannot end before this, so the count is of one region.
            shared.done.0.fetch_add(taken, Ordering::Release);
            (spins, idle_since) = (0, None);
            continue;
        }
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        std::hint::spin_loop();
        spins += 1;
        if spins < SPINS_PER_LOOK {
            continue;
        }
        spins = 0;
        if idle_since.get_or_insert_with(Instant::now).elapsed() < SPIN {
            continue;
        }
        let mut guard = lock(&shared.sleep);
        shared.sleepers.fetch_add(1, Ordering::SeqCst);
        // Looked at after announcing the sleep: a region opened since is seen here, one
        // opened later sees the sleeper and takes the lock to wake it.
        while !own.is_open(Ordering::SeqCst) && !shared.stop.load(Ordering::SeqCst) {
            guard = shared
                .wake
                .wait(guard)
                .unwrap_or_else(PoisonError::into_inner);
        }
        shared.sleepers.fetch_sub(1, Ordering::SeqCst);
        drop(guard);
        idle_since = None;
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
        std::thread::sleep(Duration::from_millis(20));
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
