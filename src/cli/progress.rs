//! Progress of long work, on stderr, and only when somebody is watching.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A line that says what is being done. Vanishes when dropped.
pub struct Progress(ProgressBar);

impl Progress {
    pub fn new() -> Self {
        let target = if std::io::stderr().is_terminal() {
            ProgressDrawTarget::stderr_with_hz(10)
        } else {
            ProgressDrawTarget::hidden()
        };
        Progress(ProgressBar::with_draw_target(None, target))
    }

    /// Work of unknown length.
    pub fn step(&self, message: impl Into<String>) {
        let style = ProgressStyle::with_template("{spinner} {msg}").expect("a fixed template");
        self.0.set_style(style);
        self.0.unset_length();
        self.0.set_message(message.into());
        self.0.enable_steady_tick(std::time::Duration::from_millis(100));
    }

    /// Work counted in bytes.
    pub fn bytes(&self, message: &'static str, done: u64, total: u64) {
        if self.0.length() != Some(total) || self.0.message() != message {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}");
            self.0.set_style(style.expect("a fixed template"));
            self.0.set_message(message);
            self.0.set_length(total);
        }
        self.0.set_position(done);
    }

    pub fn handle(&self) -> Handle {
        Handle(self.0.clone())
    }

    /// A line that stays, printed above the bar; lost when nobody watches.
    pub fn note(&self, line: impl AsRef<str>) {
        self.0.println(line);
    }
}

/// The same line for a closure that reports from another thread, without the right to end it.
#[derive(Clone)]
pub struct Handle(ProgressBar);

impl Handle {
    /// Says something else about the work.
    pub fn message(&self, message: &'static str) {
        self.0.set_message(message);
    }

    /// Work of which a share is done, 0 to 1.
    pub fn fraction(&self, message: &str, fraction: f32) {
        if self.0.length() != Some(1000) || self.0.message() != message {
            let style = ProgressStyle::with_template("{msg} {wide_bar} {percent}%");
            self.0.set_style(style.expect("a fixed template"));
            self.0.set_message(message.to_string());
            self.0.set_length(1000);
        }
        self.0.set_position((fraction * 1000.0) as u64);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
