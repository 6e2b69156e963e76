//! Output of commands: documents and text on stdout; notes and warnings on stderr, which `--quiet` turns off.

use std::fmt::Display;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use super::Failure;

/// Set once, before a command runs.
static QUIET: AtomicBool = AtomicBool::new(false);

/// Turns off progress, notes and warnings for the rest of the process (`--quiet`).
pub fn be_quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Whether `--quiet` was given.
pub fn is_quiet() -> bool {
    QUIET.load(Ordering::Relaxed)
}

/// A line after `warning: `: the result may not be what the user expects.
pub fn warning(text: impl Display) {
    if !is_quiet() {
        eprintln!("warning: {text}");
    }
}

/// A line after `note: `: a choice made for the user.
pub fn note(text: impl Display) {
    if !is_quiet() {
        eprintln!("note: {text}");
    }
}

/// The form of a `--json` document.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum JsonForm {
    /// Indented
    Pretty,
    /// On one line
    Compact,
}

/// Prints a document on stdout.
pub fn print_json(value: &impl serde::Serialize, form: JsonForm) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    let written = match form {
        JsonForm::Pretty => serde_json::to_writer_pretty(&mut stdout, value),
        JsonForm::Compact => serde_json::to_writer(&mut stdout, value),
    };
    written.map_err(std::io::Error::from)?;
    writeln!(stdout)?;
    stdout.flush()?;
    Ok(())
}

/// Prints text on stdout.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}
