//! Threads that run one closure together, with a barrier inside it.
//!
//! A decode step is some three hundred short phases. Handing each to a general task pool costs more than the phase, so
//! the pool wakes its threads once for a whole [`Program::run`](super::Program::run) and the phases are separated by a
//! spinning [`Team::barrier`]. Between runs the threads spin for a moment (the next token comes soon), then sleep.
//! Dropping the pool ends its threads.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread::JoinHandle;

/// Spins before a waiting thread gives up its core. About 20 µs.
const SPINS: u32 = 1 << 9;
/// Spins between runs before a worker sleeps. About 200 µs.
const IDLE_SPINS: u32 = 1 << 12;

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
    /// Counts runs; workers wait for it to move.
    run: AtomicU64,
    wake: Condvar,
    stop: AtomicBool,
    unfinished: AtomicU32,
    barrier: Barrier,
}

#[derive(Clone, Copy)]
struct JobPointer(Job);
// SAFETY: the closure is Sync, and `Pool::run` keeps it alive until every worker is done with it.
unsafe impl Send for JobPointer {}

struct Barrier {
    waiting: AtomicU32,
    generation: AtomicU32,
    /// A thread of this run panicked: nobody may wait for it.
    broken: AtomicBool,
}

/// One thread's place in a run.
#[derive(Clone, Copy)]
pub struct Team<'a> {
    shared: &'a Shared,
    /// This thread's number, from 0 (the caller) to `threads() - 1`.
    pub thread: usize,
}

impl Team<'_> {
    pub fn threads(&self) -> usize {
        self.shared.threads as usize
    }

    /// Waits until every thread of the run is here; what they wrote before is then visible to all.
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
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
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
                std::thread::Builder::new()
                    .name(format!("lapidary-cpu-{thread}"))
                    .spawn(move || work(&shared, thread))
                    .expect("the system refuses another thread")
            })
            .collect();
        Pool {
            shared,
            workers,
            turn: Mutex::new(()),
        }
    }

    /// The pool of the process, with a thread for each core it may use. Made when first asked for.
    pub fn global() -> Arc<Pool> {
        static GLOBAL: OnceLock<Arc<Pool>> = OnceLock::new();
        GLOBAL.get_or_init(|| Arc::new(Pool::new(available_threads()))).clone()
    }

    pub fn threads(&self) -> usize {
        self.shared.threads as usize
    }

    /// Runs `job` once on each thread and returns when all are done. A panic in any of them is raised here.
    pub fn run(&self, job: impl Fn(Team<'_>) + Sync) {
        let _turn = self.turn.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        let barrier = &shared.barrier;
        barrier.waiting.store(0, Ordering::Relaxed);
        barrier.broken.store(false, Ordering::Relaxed);
        if shared.threads > 1 {
            let borrowed: &(dyn Fn(Team<'_>) + Sync) = &job;
            // SAFETY: only the lifetime is erased; below we wait for every worker before `job` goes out of scope.
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
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
        assert!(
            !barrier.broken.load(Ordering::Relaxed),
            "a thread of the CPU executor panicked"
        );
    }
}

/// Cores this process may use; 1 where the system does not say.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

fn work(shared: &Shared, thread: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.run.load(Ordering::Acquire) == seen && !shared.stop.load(Ordering::Acquire) && spins < IDLE_SPINS {
            spins += 1;
            std::hint::spin_loop();
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
        // SAFETY: `Pool::run` keeps the closure alive until `unfinished` is 0.
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

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
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(2);
        for guilty in 0..2 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(|team| {
                    assert!(team.thread != guilty, "guilty");
                    team.barrier();
                });
            }));
            assert!(result.is_err());
        }
        let sum = AtomicUsize::new(0);
        pool.run(|team| {
            sum.fetch_add(team.thread + 1, Ordering::Relaxed);
            team.barrier();
        });
        assert_eq!(sum.into_inner(), 3);
    }
}
