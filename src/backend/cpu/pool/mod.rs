//! Threads that run one closure together, with a barrier inside it.
//!
//! A decode step has about three hundred short phases. Submitting each to a general task pool would cost more than the phase, so
//! the pool wakes its threads once for a whole run of a program, and a spinning [`Team::barrier`] separates the phases.
//! Between runs the threads spin briefly (the next token comes soon), then sleep. Dropping the
//! pool ends its threads.
//!
//! The protocol is checked under [loom](https://docs.rs/loom) by the crate in `tests/loom`, which includes this file:
//! so it uses nothing else of the crate, and atomics, locks and threads only through [`sync`].
//!
//! 1. *Start*: the caller writes `unfinished` and the job under the lock and increments `run`; a worker that sees the
//!    change takes the job under the same lock.
//! 2. *Pieces*: threads take numbers from [`Pieces`] until none is left. The result does not depend on which thread
//!    takes which.
//! 3. *Barrier*: writes of any thread before it are visible to every thread after it.
//! 4. *Completion*: each worker decrements `unfinished` when it is done with the job; the caller returns when it is 0,
//!    and only then may the closure and its borrows be dropped.
//! 5. *Panic*: a thread that panics breaks the barrier, so that no thread waits for it; the caller still waits for all
//!    and then panics too.

mod sync;

use std::panic::{AssertUnwindSafe, catch_unwind};

use sync::{Arc, AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Condvar, JoinHandle, Mutex, Ordering};

/// Spins before a waiting thread gives up its core. About 20 µs.
const SPINS: u32 = if cfg!(loom) { 0 } else { 1 << 9 };
/// Spins between runs before a worker sleeps. About 200 µs.
const IDLE_SPINS: u32 = if cfg!(loom) { 1 } else { 1 << 12 };

/// A team of threads, the calling thread included.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// One run at a time.
    turn: Mutex<()>,
}

type Job = *const (dyn Fn(Team<'_>) + Sync);

struct Shared {
    threads: u32,
    /// The closure of the current run; valid while `unfinished` is not 0.
    job: Mutex<Option<JobPointer>>,
    /// Counts runs; workers wait for it to change.
    run: AtomicU64,
    wake: Condvar,
    stop: AtomicBool,
    unfinished: AtomicU32,
    barrier: Barrier,
}

#[derive(Clone, Copy)]
struct JobPointer(Job);
// SAFETY: the closure is `Sync`, so another thread may call it through this pointer, and `Pool::run` keeps it alive until
// every worker is done with it.
unsafe impl Send for JobPointer {}

struct Barrier {
    waiting: AtomicU32,
    generation: AtomicU32,
    /// A thread of this run panicked: no thread may wait for it.
    broken: AtomicBool,
}

/// One thread's place in a run.
#[derive(Clone, Copy)]
pub(crate) struct Team<'a> {
    shared: &'a Shared,
    /// Private, because it selects a thread's scratch memory.
    thread: usize,
}

impl Team<'_> {
    /// This thread's number, from 0 (the caller) to `threads() - 1`; each thread of a run has its own.
    pub fn thread(&self) -> usize {
        self.thread
    }

    /// Threads of the run.
    pub fn threads(&self) -> usize {
        self.shared.threads as usize
    }

    /// Waits until every thread of the run is here; their earlier writes are then visible to all.
    pub fn barrier(&self) {
        let barrier = &self.shared.barrier;
        if self.shared.threads == 1 {
            return;
        }
        let generation = barrier.generation.load(Ordering::Acquire);
        if barrier.waiting.fetch_add(1, Ordering::AcqRel) + 1 == self.shared.threads {
            barrier.waiting.store(0, Ordering::Relaxed);
            barrier.generation.store(generation.wrapping_add(1), Ordering::Release);
            return;
        }
        let mut spins = 0;
        while barrier.generation.load(Ordering::Acquire) == generation {
            assert!(
                !barrier.broken.load(Ordering::Relaxed),
                "another thread of the run panicked"
            );
            relax(&mut spins, SPINS);
        }
    }
}

fn relax(spins: &mut u32, limit: u32) {
    if *spins < limit {
        *spins += 1;
        sync::spin_loop();
    } else {
        sync::yield_now();
    }
}

impl Pool {
    /// A pool of `threads` threads, counting the one that calls [`Pool::run`]; at least 1.
    pub fn new(threads: usize) -> Pool {
        let threads = threads.clamp(1, 1024) as u32;
        let shared = Arc::new(Shared {
            threads,
            job: Mutex::new(None),
            run: AtomicU64::new(0),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            unfinished: AtomicU32::new(0),
            barrier: Barrier {
                waiting: AtomicU32::new(0),
                generation: AtomicU32::new(0),
                broken: AtomicBool::new(false),
            },
        });
        let workers = (1..threads as usize)
            .map(|thread| {
                let shared = shared.clone();
                sync::spawn(format!("lapidary-cpu-{thread}"), move || work(&shared, thread))
            })
            .collect();
        Pool {
            shared,
            workers,
            turn: Mutex::new(()),
        }
    }

    /// The pool of the process, with one thread per available core. Created on first use.
    #[cfg(not(loom))]
    pub fn global() -> Arc<Pool> {
        static GLOBAL: std::sync::OnceLock<Arc<Pool>> = std::sync::OnceLock::new();
        GLOBAL.get_or_init(|| Arc::new(Pool::new(available_threads()))).clone()
    }

    /// Number of threads, including the caller's.
    pub fn threads(&self) -> usize {
        self.shared.threads as usize
    }

    /// Runs `job` once on each thread and returns when all are done. A panic in any of them is propagated.
    pub(crate) fn run(&self, job: impl Fn(Team<'_>) + Sync) {
        let turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        let barrier = &shared.barrier;
        barrier.waiting.store(0, Ordering::Relaxed);
        barrier.broken.store(false, Ordering::Relaxed);
        if shared.threads > 1 {
            let borrowed: &(dyn Fn(Team<'_>) + Sync) = &job;
            // SAFETY: only the lifetime is erased. Workers use the pointer between the start of this run and their own step
            // down in `unfinished`, which is awaited below on every path, a panic of the caller's share included, before
            // `job` goes out of scope.
            let erased: Job = unsafe { std::mem::transmute::<&(dyn Fn(Team<'_>) + Sync), Job>(borrowed) };
            shared.unfinished.store(shared.threads - 1, Ordering::Relaxed);
            let mut slot = shared.job.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            *slot = Some(JobPointer(erased));
            shared.run.fetch_add(1, Ordering::Release);
            shared.wake.notify_all();
        }
        let result = catch_unwind(AssertUnwindSafe(|| job(Team { shared, thread: 0 })));
        if result.is_err() {
            barrier.broken.store(true, Ordering::Relaxed);
        }
        let mut spins = 0;
        while shared.unfinished.load(Ordering::Acquire) != 0 {
            relax(&mut spins, SPINS);
        }
        let broken = barrier.broken.load(Ordering::Relaxed);
        // The pool stays usable: a panic of the job does not poison it.
        drop(turn);
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
        assert!(!broken, "a thread of the CPU executor panicked");
    }
}

/// The pieces of one phase of work, numbered from 0, each taken by one thread.
#[derive(Default)]
pub(crate) struct Pieces {
    next: AtomicUsize,
}

impl Pieces {
    /// The next free piece of `total`.
    pub fn take(&self, total: usize) -> Option<usize> {
        // Relaxed: the number alone is shared. What pieces read and write is ordered by the start, barriers and end of a run.
        let piece = self.next.fetch_add(1, Ordering::Relaxed);
        (piece < total).then_some(piece)
    }

    /// Makes all pieces available again.
    pub fn reset(&mut self) {
        sync::set(&mut self.next, 0);
    }
}

/// Cores available to this process; 1 if unknown.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

fn work(shared: &Shared, thread: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.run.load(Ordering::Acquire) == seen && !shared.stop.load(Ordering::Acquire) && spins < IDLE_SPINS {
            spins += 1;
            sync::spin_loop();
        }
        let job = {
            let mut slot = shared.job.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            while shared.run.load(Ordering::Acquire) == seen && !shared.stop.load(Ordering::Acquire) {
                slot = shared.wake.wait(slot).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
            if shared.stop.load(Ordering::Acquire) {
                return;
            }
            seen = shared.run.load(Ordering::Acquire);
            slot.expect("a run has a job")
        };
        // SAFETY: `Pool::run` keeps the closure alive until `unfinished` is 0, and this worker has not lowered it yet.
        let job = unsafe { &*job.0 };
        if catch_unwind(AssertUnwindSafe(|| job(Team { shared, thread }))).is_err() {
            shared.barrier.broken.store(true, Ordering::Relaxed);
        }
        shared.unfinished.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        {
            let _slot = self.shared.job.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            self.shared.stop.store(true, Ordering::Release);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its jobs, so it ends normally.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({} threads)", self.threads())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_separates_phases() {
        let pool = Pool::new(3);
        let counters: Vec<AtomicUsize> = (0..200).map(|_| AtomicUsize::new(0)).collect();
        for round in 1..=3 {
            pool.run(|team| {
                for counter in &counters {
                    counter.fetch_add(1, Ordering::Relaxed);
                    team.barrier();
                    assert_eq!(counter.load(Ordering::Relaxed), 3 * round);
                    team.barrier();
                }
            });
        }
    }

    #[test]
    fn every_piece_is_taken_once_and_again_after_a_reset() {
        let pool = Pool::new(3);
        let mut pieces = Pieces::default();
        for _ in 0..2 {
            let taken: Vec<AtomicUsize> = (0..50).map(|_| AtomicUsize::new(0)).collect();
            pool.run(|_| {
                while let Some(piece) = pieces.take(taken.len()) {
                    taken[piece].fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(taken.into_iter().all(|times| times.into_inner() == 1));
            assert_eq!(pieces.take(50), None);
            pieces.reset();
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        for guilty in 0..2 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(|team| {
                    assert!(team.thread() != guilty, "guilty");
                    team.barrier();
                });
            }));
            assert!(result.is_err());
        }
        let sum = AtomicUsize::new(0);
        pool.run(|team| {
            sum.fetch_add(team.thread() + 1, Ordering::Relaxed);
            team.barrier();
        });
        assert_eq!(sum.into_inner(), 3);
    }
}
