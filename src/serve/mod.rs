//! Many requests on one device: the queue, prefill, and the next token of each.
//!
//! A [`Scheduler`] takes [`Request`]s from any thread and owns a [`BatchDecoder`](crate::decode::batch::BatchDecoder) on a
//! thread of its own. It knows prompts as token ids, draws with a [`Chain`](crate::sample::Chain) a request, makes text with a
//! [`Transcript`](crate::decode::Transcript) a request, and reports [`Event`]s. [`Metrics`] count what it does,
//! [`prometheus()`] writes them for scrapers. It does not use the network: `http`, with the cargo feature `serve`, is an
//! OpenAI-compatible server in front of it, and `dynamo/` a worker of NVIDIA Dynamo. `grammar`, with the feature
//! `structured`, is the form that a text must have, and `gbnf` reads the forms of llama.cpp.

#[cfg(feature = "structured")]
pub mod gbnf;
#[cfg(feature = "structured")]
mod grammar;
#[cfg(feature = "serve")]
pub mod http;
mod metrics;
mod prometheus;
mod request;
mod scheduler;
mod turn;

#[cfg(feature = "structured")]
pub use grammar::{Form, FormError, Grammars, Limited};
pub use metrics::{Histogram, Metrics, Snapshot, metric_ends};
pub use prometheus::prometheus;
pub use request::{Event, Finished, Request, RequestError, Sink, Ticket};
pub use scheduler::{Facts, Scheduler, SchedulerOptions, SubmitError};
