//! The protocol of the CPU executor's thread pool, in every order in which its threads can run and see each other's
//! writes: start, pieces, barrier, completion, panics and shutdown (see the head of the pool's source).
//!
//! loom runs each model again and again, switching threads at every atomic, lock and yield, and giving loads every value
//! that the orderings allow. Memory that a job shares is a `loom::cell::UnsafeCell`, so that an access that is not ordered
//! after another's write is an error, and a thread that waits for ever is one too.

#![cfg(all(test, loom))]

#[path = "../../../src/backend/cpu/pool/mod.rs"]
#[allow(dead_code)]
mod pool;

use loom::cell::UnsafeCell;
use pool::{Pieces, Pool};

/// Explores every order with this many preemptions, of which two or three find nearly all faults (Musuvathi and Qadeer,
/// "Iterative context bounding for systematic testing of multithreaded programs", 2007).
fn explore(preemptions: usize, model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(model);
}

/// Memory of one element that jobs share without a lock, as kernels share the arena.
struct Shared(UnsafeCell<u32>);

// SAFETY: loom checks every access: two that are not ordered fail the model.
unsafe impl Sync for Shared {}

impl Shared {
    fn new() -> Self {
        Shared(UnsafeCell::new(0))
    }
    fn add(&self, n: u32) {
        // SAFETY: loom fails the model where another thread's access is not ordered before or after.
        self.0.with_mut(|value| unsafe { *value += n });
    }
    fn get(&self) -> u32 {
        // SAFETY: as in `add`.
        self.0.with(|value| unsafe { *value })
    }
}

/// What the caller wrote before a run is seen by the worker, and what the worker wrote by the caller afterwards; a second
/// run finds the pool as the first did. The pool is dropped with its worker asleep, or on its way there.
#[test]
fn runs_begin_and_end() {
    explore(3, || {
        let pool = Pool::new(2);
        let cells = [Shared::new(), Shared::new()];
        for round in 1..=2 {
            cells[1].add(1);
            pool.run(|team| {
                let own = &cells[team.thread()];
                own.add(1);
            });
            assert_eq!([cells[0].get(), cells[1].get()], [round, 2 * round]);
        }
    });
}

/// Every piece is taken once, by whichever thread, and after the barrier each thread reads what any has written.
#[test]
fn pieces_then_a_barrier() {
    explore(3, || {
        let pool = Pool::new(2);
        let mut pieces = Pieces::default();
        for round in 1..=2 {
            let cells = [Shared::new(), Shared::new()];
            pool.run(|team| {
                while let Some(piece) = pieces.take(cells.len()) {
                    cells[piece].add(round);
                }
                team.barrier();
                assert_eq!(cells.iter().map(Shared::get).sum::<u32>(), 2 * round);
            });
            pieces.reset();
        }
    });
}

/// Two barriers in a row: a thread that is quick must not pass the second before the other has left the first.
#[test]
fn barriers_follow_one_another() {
    explore(3, || {
        let pool = Pool::new(2);
        let cell = Shared::new();
        pool.run(|team| {
            if team.thread() == 1 {
                cell.add(1);
            }
            team.barrier();
            let seen = cell.get();
            team.barrier();
            if team.thread() == 0 {
                cell.add(seen);
            }
            team.barrier();
            assert_eq!(cell.get(), 2);
        });
    });
}

/// Two workers share the pieces with the caller, who sees what both wrote. Without a barrier: of two threads that spin, loom
/// may run one after the other for ever and the third never, which no scheduler does.
#[test]
fn two_workers() {
    explore(2, || {
        let pool = Pool::new(3);
        let pieces = Pieces::default();
        let cells = [Shared::new(), Shared::new()];
        pool.run(|_| {
            while let Some(piece) = pieces.take(cells.len()) {
                cells[piece].add(1);
            }
        });
        assert_eq!(cells.iter().map(Shared::get).sum::<u32>(), 2);
    });
}

/// A panic of either thread frees the other from the barrier and reaches the caller, after the job is done everywhere; the
/// pool then runs the next.
#[test]
fn a_panic_ends_the_run_for_all() {
    for guilty in 0..2 {
        explore(2, move || {
            let pool = Pool::new(2);
            let cell = Shared::new();
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                pool.run(|team| {
                    if team.thread() == guilty {
                        cell.add(1);
                        panic!("guilty");
                    }
                    team.barrier();
                });
            }));
            assert!(result.is_err());
            assert_eq!(cell.get(), 1);
            pool.run(|team| {
                if team.thread() == 1 {
                    cell.add(1);
                }
                team.barrier();
                assert_eq!(cell.get(), 2);
            });
        });
    }
}
