//! One request: its prompt and settings, its events, and its cancellation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::decode::batch::BatchError;
use crate::decode::{FinishReason, GenerateError, Limits, Step};
use crate::help::{Fault, Help};
use crate::sample::{Constraint, ConstraintError, Settings, SettingsError};

/// Where a request's events go, in order. `false`: the receiver is gone, and the request ends.
pub type Sink = Box<dyn FnMut(Event) -> bool + Send>;

/// A prompt, and the settings of its continuation.
pub struct Request {
    /// Token ids of the model.
    pub prompt: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: Settings,
    /// The form that its text must have.
    pub constraint: Option<Box<dyn Constraint>>,
    /// When to end.
    pub limits: Limits,
    /// When it is of no use any more, whether it runs or waits.
    pub deadline: Option<Instant>,
    /// What it is given.
    pub events: Sink,
}

/// What a request is given.
#[derive(Debug)]
pub enum Event {
    /// A token was drawn, or text that was held back became certain.
    Piece {
        /// `None` for text that was held back to the end.
        token: Option<u32>,
        /// If log-probabilities were asked for.
        step: Option<Step>,
        /// Often one word; empty inside a character, inside what may be a stop string, and without a tokenizer.
        text: String,
    },
    /// The last event of a request that went well.
    Finished(Finished),
    /// The last event of one that did not.
    Failed(RequestError),
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// Tokens of its prompt.
    pub prompt: usize,
    /// Of these, tokens whose keys another request had computed.
    pub reused: usize,
    /// Tokens drawn, an end token included.
    pub generated: usize,
    /// From submission to the first chunk of its prompt.
    pub queued: Duration,
    /// From submission to its first token.
    pub ttft: Duration,
    /// From submission to its end.
    pub total: Duration,
}

/// Why a request failed; others go on.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Its sequence cannot be fed.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// Its tokens cannot be drawn or written.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// The form that its text must have cannot be followed.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// It cannot be drawn in such a way.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Its deadline passed.
    #[error("the request exceeded its time limit after {generated} tokens")]
    Deadline {
        /// Until then.
        generated: usize,
    },
    /// It was cancelled, or the receiver of its events is gone.
    #[error("the request was cancelled after {generated} tokens")]
    Cancelled {
        /// Until then.
        generated: usize,
    },
    /// The server stops.
    #[error("the server is stopping")]
    Stopping,
}

impl Help for RequestError {
    fn fault(&self) -> Fault {
        match self {
            RequestError::Batch(error) => error.fault(),
            RequestError::Generate(error) => error.fault(),
            RequestError::Constraint(error) => error.fault(),
            RequestError::Settings(error) => error.fault(),
            RequestError::Cancelled { .. } => Fault::Stopped,
            RequestError::Deadline { .. } | RequestError::Stopping => Fault::Machine,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            RequestError::Batch(error) => error.help(),
            RequestError::Generate(error) => error.help(),
            RequestError::Constraint(error) => error.help(),
            RequestError::Settings(error) => error.help(),
            RequestError::Deadline { .. } => Some("ask for fewer tokens, or allow more time".into()),
            RequestError::Cancelled { .. } | RequestError::Stopping => None,
        }
    }
}

/// A request that was taken. Dropping it cancels the request, if it is not done.
#[derive(Debug)]
pub struct Ticket(pub(super) Arc<AtomicBool>);

impl Ticket {
    /// Ends the request before its next token.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.cancel();
    }
}
