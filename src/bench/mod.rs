//! Measurements of a package, and results of any system, as data.
//!
//! `measure` runs a [`crate::decode::Session`] as users do and times it; `machine`, `model` and `workload` say on what, of
//! what and with what. All of it becomes one [`Document`], in the same form in which the baselines write theirs. [`read`]
//! takes such files back and refuses those that do not hold together. What the numbers mean is in `docs/reference/benchmarks.md`;
//! what is made of them is `report`'s.

mod check;
pub mod compare;
pub mod csv;
pub mod layers;
pub mod machine;
pub mod measure;
pub mod model;
pub mod quality;
pub mod result;
pub mod summary;
pub mod workload;

pub use check::{ResultError, parse, read};
pub use result::Document;
pub use summary::Summary;
