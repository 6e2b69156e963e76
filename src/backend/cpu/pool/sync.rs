//! The atomics, locks and threads of the pool: the standard library's, or loom's under `--cfg loom`, which explores
//! every order in which threads can see each other's writes.

#[cfg(loom)]
pub(super) use loom::{
    hint::spin_loop,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{JoinHandle, yield_now},
};
#[cfg(not(loom))]
pub(super) use std::{
    hint::spin_loop,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{JoinHandle, yield_now},
};

/// A thread with this name. Panics if the system refuses another.
pub(super) fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    #[cfg(loom)]
    use loom::thread::Builder;
    #[cfg(not(loom))]
    use std::thread::Builder;

    let spawned = Builder::new().name(name).spawn(work);
    spawned.expect("the system refuses another thread")
}

/// Sets a value that no other thread can see yet.
pub(super) fn set(atomic: &mut AtomicUsize, value: usize) {
    #[cfg(loom)]
    atomic.with_mut(|number| *number = value);
    #[cfg(not(loom))]
    {
        *atomic.get_mut() = value;
    }
}
