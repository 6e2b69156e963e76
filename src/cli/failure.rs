//! Command errors: exit status, message, help.
//!
//! Errors of the library state the problem and advice ([`Help`]). This module derives the exit status (2: the input or
//! the usage, 1: anything else) and prints them.

use std::fmt;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use super::interrupt;
use crate::help::{Fault, Help};

#[derive(Debug)]
pub struct Failure {
    pub status: u8,
    pub message: String,
    pub help: Option<String>,
}

impl Failure {
    /// Wrong usage or unusable input.
    pub fn input(message: impl fmt::Display) -> Self {
        Failure {
            status: 2,
            message: message.to_string(),
            help: None,
        }
    }

    /// Anything else.
    pub fn other(message: impl fmt::Display) -> Self {
        Failure {
            status: 1,
            ..Failure::input(message)
        }
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// The same with the flag, for errors that do not contain it.
    pub fn of(self, flag: &str) -> Self {
        Failure {
            message: format!("{flag}: {}", self.message),
            ..self
        }
    }

    /// The same with the file's `path`, for errors that do not contain it.
    pub fn at(self, path: &Path) -> Self {
        Failure {
            message: format!("{}: {}", path.display(), self.message),
            ..self
        }
    }

    /// The user stopped it, and the unfinished output was removed; [`interrupt::say`] prints the message.
    pub fn interrupted() -> Self {
        Failure {
            status: interrupt::STATUS,
            ..Failure::input("")
        }
    }

    /// Prints to stderr. A closed output pipe causes no message.
    pub fn report(&self) -> ExitCode {
        if self.status == interrupt::STATUS {
            // A requested stop is not an error.
            interrupt::say("");
        } else if !self.message.is_empty() {
            let mut stderr = io::stderr().lock();
            let _ = writeln!(stderr, "error: {}", self.message);
            if let Some(help) = &self.help {
                let _ = writeln!(stderr, "help: {help}");
            }
        }
        ExitCode::from(self.status)
    }
}

/// The output could not be written.
impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match is_closed_pipe(&error) {
            true => Failure::other(""),
            false => Failure::other(format!("cannot write the output: {error}")),
        }
    }
}

/// The reader of the output has closed the pipe.
fn is_closed_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut chain = std::iter::successors(Some(error), |error| error.source());
    chain.any(|error| {
        let io = error.downcast_ref::<io::Error>();
        io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    })
}

impl<E: Help + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        if is_closed_pipe(&error) {
            return Failure::other("");
        }
        let status = match error.fault() {
            Fault::Input => 2,
            Fault::Machine | Fault::Bug => 1,
            Fault::Stopped => return Failure::interrupted(),
        };
        Failure {
            status,
            message: error.to_string(),
            help: error.help(),
        }
    }
}
