//! The fault and the remedy of an error.
//!
//! Every error that reaches a user implements [`Help`]. Its `Display` states the problem and names file, node or tensor.
//! [`Help::help`] gives the remedy, and [`Help::fault`] whether the input, the machine or Lapidary has to change. The command
//! line prints the first two and derives its exit status from the third.

/// Where the cause of a failure lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// In the input or in how it was asked for: an *error*. Exit status 2.
    Input,
    /// In the machine, while it worked on good input. Exit status 1.
    Machine,
    /// In Lapidary: a *bug*. Exit status 1.
    Bug,
    /// Nowhere: the user stopped it. Exit status 130.
    Stopped,
}

/// What to do about a bug.
pub const REPORT_BUG: &str = "this is a bug in Lapidary; please report it with the export";

/// An error that knows what to do about it.
pub trait Help: std::error::Error {
    /// Where the cause lies.
    fn fault(&self) -> Fault {
        Fault::Input
    }

    /// What to do about it, as printed after `help:`. `None` if nothing can be said that the error does not say.
    fn help(&self) -> Option<String> {
        (self.fault() == Fault::Bug).then(|| REPORT_BUG.to_string())
    }
}
