//! Measurements of a package, and results of any system, as data.
//!
//! `measure` runs a [`crate::decode::Session`] as users do and times it; `machine`, `model` and `workload` describe the
//! machine, the model and the prompts. All of it becomes one [`Document`], in the form that the baselines write too. [`read`]
//! reads such files and refuses inconsistent ones. `docs/reference/benchmarks.md` defines the numbers; `report` presents
//! them.

mod check;
pub mod compare;
pub mod csv;
pub mod layers;
pub mod machine;
pub mod measure;
pub mod model;
pub mod quality;
pub mod result;
pub mod serving;
pub mod side_by_side;
pub mod summary;
pub mod workload;

pub use check::{ResultError, parse, read};
pub use result::Document;
pub use summary::Summary;
