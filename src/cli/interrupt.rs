//! Ctrl-C: ends the program, except while a [`Listener`] exists.
//!
//! A command that can stop cleanly has a listener and ends with [`Failure::interrupted`](super::Failure); its
//! unfinished output is dropped and thereby removed. Otherwise, and at the second Ctrl-C, the program ends immediately;
//! an unfinished package is also removed. The exit status is 130 in both cases, as in shells.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// `128 + SIGINT`.
pub const STATUS: u8 = 130;

/// The message if a package was being written.
const NOTHING_LEFT: &str = "interrupted: the unfinished package is removed";

static LISTENING: AtomicBool = AtomicBool::new(false);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Whether [`NOTHING_LEFT`] was printed. Two threads may try: the one that stops cleanly, and the one of the second
/// Ctrl-C.
static SAID: Mutex<bool> = Mutex::new(false);

/// Installs the handler; once, by `main`.
pub fn install() {
    let handler = ctrlc::set_handler(|| {
        if LISTENING.load(Ordering::SeqCst) && !INTERRUPTED.swap(true, Ordering::SeqCst) {
            return;
        }
        // Also at the second Ctrl-C, if the listener's thread is too busy to see the first.
        if crate::package::remove_unfinished() {
            // A progress bar may be on the line.
            say(if std::io::stderr().is_terminal() { "\n" } else { "" });
        }
        end();
    });
    debug_assert!(handler.is_ok(), "set once");
}

/// Prints the message once. An unfinished line is completed before the process ends.
pub fn say(before: &str) {
    let mut said = SAID.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if !std::mem::replace(&mut *said, true) {
        let _ = writeln!(std::io::stderr(), "{before}{NOTHING_LEFT}");
    }
}

/// Skips the destructors of C++ libraries, which may be in use in other threads.
fn end() -> ! {
    #[cfg(unix)]
    // SAFETY: ends the process; nothing runs after it.
    unsafe {
        libc::_exit(i32::from(STATUS))
    }
    #[cfg(not(unix))]
    std::process::exit(i32::from(STATUS))
}

/// While this exists, Ctrl-C is only recorded.
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
