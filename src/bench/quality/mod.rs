//! Quality of a model's answers: perplexity and divergence over a text, scores over a task.
//!
//! `perplexity` takes sessions and tokens and gives sums over their log-probabilities; `task` takes texts and gives the
//! scores of [`rouge`] and exact matches. `result` is what both commands write, and what `report` reads back. What the
//! numbers mean is in `docs/guides/quantization.md`.

pub mod perplexity;
pub mod result;
pub mod rouge;
pub mod task;
