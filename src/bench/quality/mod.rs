//! Quality of a model's answers: perplexity and divergence over a text, scores over a task.
//!
//! `perplexity` sums log-probabilities of tokens in sessions; `task` computes [`rouge`] scores and exact matches of
//! texts. `result` is the document that both commands write and `report` reads. `docs/guides/quantization.md` defines
//! the numbers.

pub mod perplexity;
pub mod result;
pub mod rouge;
pub mod task;
