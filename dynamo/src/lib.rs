//! A worker of [NVIDIA Dynamo](https://github.com/ai-dynamo/dynamo) that serves a Lapidary package.
//!
//! Dynamo's frontend speaks OpenAI's protocol, applies the chat template, tokenizes, chooses a worker, turns tokens
//! into text, looks for stop strings, and moves a request to another worker if one is lost. This worker receives token
//! ids with sampling options, and returns token ids. [`args`] are its flags, [`engine`] implements Dynamo's trait with
//! [`lapidary::serve::Scheduler`], [`request`] reads requests and refuses unsupported fields by name, [`errors`] maps
//! Lapidary's errors to Dynamo's. Batching, caches and sampling are Lapidary's own, as in `lapidary serve`.

#![deny(missing_docs)]

pub mod args;
pub mod engine;
pub mod errors;
pub mod request;
