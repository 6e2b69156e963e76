//! Quality of a model's answers: perplexity and divergence over a text, scores over a task.
//!
//! `perplexity` takes sessions and tokens and gives sums over their log-probabilities; `task` takes texts and gives the
//! scores of [`rouge`] and exact matches. `result` is the document that both commands write and `report` reads.
//! `docs/guides/quantization.md` defines the numbers.

pub mod perplexity;
pub mod result;
pub mod rouge;
pub mod task;
