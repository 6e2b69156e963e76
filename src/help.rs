//! The fault and the remedy of an error.
//!
//! Every error that reaches a user implements [`Help`]. Its `Display` states the problem and names file, node or tensor.
//! [`Help::help`] gives the remedy, and [`Help::fault`] whether the input, the machine or Lapidary has to change. The command
//! line prints the first two and derives its exit status from the third.

/// The cause of a failure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The input or the flags: an *error*. Exit status 2.
    Input,
    /// The machine, with valid input. Exit status 1.
    Machine,
    /// Lapidary: a *bug*. Exit status 1.
    Bug,
    /// None: the user stopped it. Exit status 130.
    Stopped,
}

/// The help for a bug.
pub const REPORT_BUG: &str = "this is a bug in Lapidary; please report it with the export";

/// An error with a remedy.
pub trait Help: std::error::Error {
    /// The cause.
    fn fault(&self) -> Fault {
        Fault::Input
    }

    /// The remedy, printed after `help:`. `None` if there is nothing to add to the error.
    fn help(&self) -> Option<String> {
        (self.fault() == Fault::Bug).then(|| REPORT_BUG.to_string())
    }
}
