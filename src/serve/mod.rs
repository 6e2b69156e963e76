//! Many requests on one device: queue, prefill and decode.
//!
//! A [`Scheduler`] takes [`Request`]s from any thread and owns a [`BatchDecoder`](crate::decode::batch::BatchDecoder)
//! on its own thread. Prompts are token ids; each request has a [`Chain`](crate::sample::Chain) for sampling and a
//! [`Transcript`](crate::decode::Transcript) for its text, and gets [`Event`]s. [`Metrics`] count requests and tokens,
//! [`prometheus()`] writes them for scrapers. It does not use the network: `http`, with the cargo feature `serve`, is
//! an OpenAI-compatible server in front of it, and `dynamo/` a worker of NVIDIA Dynamo. `grammar`, with the feature
//! `structured`, constrains texts to a form, and `gbnf` reads llama.cpp's grammars.

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
