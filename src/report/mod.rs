//! Turns results into a report: tables, plots and prose, every figure with its source file.
//!
//! Input: result files, packages and records of conversions ([`Input`]). Output: Markdown and [`plots::Figure`]s.
//! Tables share `measure` and `matrix`: a time compared with Lapidary's, and a column per model. `headlines` is the
//! first page; `peers`, `benchmarks`, `footprint`, `serving`, `quality`, `ablations` and `steps` are the chapters'
//! tables; `missing` lists what no file has. `write` inserts them into `text/report.md`, whose prose has no figures.
//! The meaning and consistency of results belong to `bench`; the command line writes the files.

mod ablations;
mod benchmarks;
mod ceilings;
pub mod conversion;
mod footprint;
mod headlines;
mod input;
pub mod markdown;
mod matrix;
mod measure;
mod missing;
mod peers;
pub mod plots;
mod quality;
mod serving;
mod steps;
mod write;

pub use input::Input;
pub use write::report;
