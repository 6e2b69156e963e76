//! Many requests on one device: who waits, who is fed, who gets the next token.
//!
//! A [`Scheduler`] takes [`Request`]s from any thread and owns a [`BatchDecoder`](crate::decode::batch::BatchDecoder) on a
//! thread of its own. It knows prompts as token ids, draws with a [`Chain`](crate::sample::Chain) a request, makes text with a
//! [`Transcript`](crate::decode::Transcript) a request, and reports [`Event`]s. [`Metrics`] count what it does. It knows
//! nothing of networks and JSON: `http`, with the cargo feature `serve`, is an OpenAI-compatible server in front of it.

#[cfg(feature = "serve")]
pub mod http;
mod metrics;
mod request;
mod scheduler;
mod turn;

pub use metrics::{Histogram, Metrics, Snapshot, metric_ends};
pub use request::{Event, Finished, Request, RequestError, Sink, Ticket};
pub use scheduler::{Facts, Scheduler, SchedulerOptions, SubmitError};
