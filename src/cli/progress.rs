//! Progress of long work, on stderr, if it is a terminal and `--quiet` was not given.

use std::io::IsTerminal;
use std::ops::Deref;
use std::sync::Arc;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::interrupt::Listener;
use crate::convert;

/// A line that shows the current work. Disappears when dropped.
pub struct Progress(Handle);

impl Progress {
    pub fn new() -> Self {
        let target = if std::io::stderr().is_terminal() && !super::output::is_quiet() {
            ProgressDrawTarget::stderr_with_hz(10)
        } else {
            ProgressDrawTarget::hidden()
        };
        Progress(Handle(ProgressBar::with_draw_target(None, target)))
    }

    pub fn handle(&self) -> Handle {
        self.0.clone()
    }
}

impl Deref for Progress {
    type Target = Handle;

    fn deref(&self) -> &Handle {
        &self.0
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.0.finish_and_clear();
    }
}

/// The same line for a closure that reports from another thread and cannot end it.
#[derive(Clone)]
pub struct Handle(ProgressBar);

impl Handle {
    /// Work of unknown length.
    pub fn step(&self, message: impl Into<String>) {
        let style = ProgressStyle::with_template("{spinner} {msg}").expect("a fixed template");
        self.0.set_style(style);
        self.0.unset_length();
        self.0.set_message(message.into());
        self.0.enable_steady_tick(std::time::Duration::from_millis(100));
    }

    /// Work measured in bytes.
    pub fn bytes(&self, message: &'static str, done: u64, total: u64) {
        if self.0.length() != Some(total) || self.0.message() != message {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes} of {total_bytes}, {eta} left");
            self.0.set_style(style.expect("a fixed template"));
            self.0.set_message(message);
            self.0.set_length(total);
        }
        self.0.set_position(done);
    }

    /// Work measured as a share, 0 to 1.
    pub fn fraction(&self, message: &str, fraction: f32) {
        if self.0.length() != Some(1000) || self.0.message() != message {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {percent}%, {eta} left");
            self.0.set_style(style.expect("a fixed template"));
            self.0.set_message(message.to_string());
            self.0.set_length(1000);
        }
        self.0.set_position((fraction * 1000.0) as u64);
    }
}

impl convert::Progress for Handle {
    fn step(&self, what: &str) {
        Handle::step(self, what);
    }

    fn bytes(&self, what: &'static str, done: u64, total: u64) {
        Handle::bytes(self, what, done, total);
    }

    fn share(&self, what: &str, share: f32) {
        Handle::fraction(self, what, share);
    }

    /// A permanent line, printed above the bar; dropped if stderr is not a terminal.
    fn note(&self, line: &str) {
        self.0.println(line);
    }

    /// The first Ctrl-C stops the builds, and with them the command.
    fn stop_signal(&self) -> Arc<dyn Fn() -> bool + Send + Sync> {
        let (listener, bar) = (Listener::new(), self.0.clone());
        Arc::new(move || {
            let stop = listener.interrupted();
            if stop {
                bar.set_message("stopping; press Ctrl-C again to end at once");
            }
            stop
        })
    }
}
