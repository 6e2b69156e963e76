//! A worker of [NVIDIA Dynamo](https://github.com/ai-dynamo/dynamo) that serves a Lapidary package.
//!
//! Dynamo's frontend speaks OpenAI's protocol, applies the chat template, tokenizes, chooses a worker, turns tokens into text,
//! looks for stop strings, and moves a request to another worker if one is lost. What reaches this worker are token ids with
//! how to go on; what leaves it are token ids. [`args`] are its flags, [`engine`] is Dynamo's trait in front of
//! [`lapidary::serve::Scheduler`], [`request`] reads what is asked and refuses by name what cannot be done, [`errors`] are
//! Dynamo's kinds of errors for ours. Batching, caches and sampling are Lapidary's own, as in `lapidary serve`.

#![deny(missing_docs)]

pub mod args;
pub mod engine;
pub mod errors;
pub mod request;
