//! One request: its prompt and settings, its events, and its cancellation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::decode::batch::BatchError;
use crate::decode::{FinishReason, GenerateError, Limits, Step};
use crate::help::{Fault, Help};
use crate::sample::{Constraint, ConstraintError, Settings, SettingsError};

/// Receives a request's events, in order. Returning `false` means that the receiver is gone, which ends the request.
pub type Sink = Box<dyn FnMut(Event) -> bool + Send>;

/// A prompt, and the settings of its continuation.
pub struct Request {
    /// Token ids of the model.
    pub prompt: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: Settings,
    /// The form of its text.
    pub constraint: Option<Box<dyn Constraint>>,
    /// When to end.
    pub limits: Limits,
    /// Its deadline, whether it runs or waits.
    pub deadline: Option<Instant>,
    /// Receiver of its events.
    pub events: Sink,
}

/// Events of a request.
#[derive(Debug)]
pub enum Event {
    /// A token was drawn, or held-back text became final.
    Piece {
        /// `None` for text that was held back to the end.
        token: Option<u32>,
        /// If log-probabilities were requested.
        step: Option<Step>,
        /// Often one word; empty inside a character, inside what may be a stop string, and without a tokenizer.
        text: String,
    },
    /// The last event of a successful request.
    Finished(Finished),
    /// The last event of a failed request.
    Failed(RequestError),
}

/// How a request ended.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// Tokens of its prompt.
    pub prompt: usize,
    /// Reused tokens among them, which another request had computed.
    pub reused: usize,
    /// Tokens drawn, including an end token.
    pub generated: usize,
    /// From submission to the first chunk of its prompt.
    pub queued: Duration,
    /// From submission to its first token.
    pub ttft: Duration,
    /// From submission to its end.
    pub total: Duration,
}

/// Why a request failed; others continue.
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
    /// Its sampler settings are invalid.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Its deadline passed.
    #[error("the request exceeded its time limit after {generated} tokens")]
    Deadline {
        /// Tokens until then.
        generated: usize,
    },
    /// It was cancelled, or the receiver of its events is gone.
    #[error("the request was cancelled after {generated} tokens")]
    Cancelled {
        /// Tokens until then.
        generated: usize,
    },
    /// The server is stopping.
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

/// An accepted request. Dropping it cancels the request if it is not done.
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
