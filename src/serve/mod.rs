//! Many requests on one device: who waits, who is fed, who gets the next token.
//!
//! A [`Scheduler`] takes [`Request`]s from any thread and owns a [`BatchDecoder`](crate::decode::batch::BatchDecoder) on a
//! thread of its own. It knows prompts as token ids, draws with a [`Chain`](crate::sample::Chain) a request, makes text with a
//! [`Transcript`](crate::decode::Transcript) a request, and reports [`Event`]s. [`Metrics`] count what it does. Networks,
//! names of fields and JSON are not known here.

mod metrics;
mod request;
mod scheduler;
mod turn;

pub use metrics::{Histogram, Metrics, Snapshot};
pub use request::{Event, Finished, Request, RequestError, Sink, Ticket};
pub use scheduler::{Facts, Scheduler, SchedulerOptions, SubmitError};
