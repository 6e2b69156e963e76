//! Ctrl-C: ends the program, except while somebody listens for it.

use std::sync::atomic::{AtomicBool, Ordering};

static LISTENING: AtomicBool = AtomicBool::new(false);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Installs the handler; once, by `main`.
pub fn install() {
    let handler = ctrlc::set_handler(|| {
        if LISTENING.load(Ordering::SeqCst) && !INTERRUPTED.swap(true, Ordering::SeqCst) {
            return;
        }
        // An unfinished package is removed; what else is going on just ends. Also at the second Ctrl-C, if whoever
        // listens is too busy to hear the first.
        crate::package::abandon();
        std::process::exit(130);
    });
    debug_assert!(handler.is_ok(), "set once");
}

/// While this lives, Ctrl-C is only noted.
pub struct Listener(());

impl Listener {
    pub fn new() -> Self {
        INTERRUPTED.store(false, Ordering::SeqCst);
        LISTENING.store(true, Ordering::SeqCst);
        Listener(())
    }

    pub fn interrupted(&self) -> bool {
        INTERRUPTED.load(Ordering::SeqCst)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        LISTENING.store(false, Ordering::SeqCst);
    }
}
