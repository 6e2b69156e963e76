//! Results become a report: tables, plots and prose, every figure with the file it came from.
//!
//! Takes result files, packages and the kept facts of conversions ([`Input`]); gives Markdown and [`plots::Figure`]s.
//! `headlines`, `benchmarks`, `ablations`, `quality` and `steps` are the tables, `missing` what no file has, `write` puts them into
//! `text/report.md`, whose prose holds opinions and no figures. What results mean and whether they hold together is
//! `bench`'s; writing files is the command line's.

mod ablations;
mod benchmarks;
mod ceilings;
pub mod conversion;
mod footprint;
mod headlines;
mod input;
pub mod markdown;
mod missing;
pub mod plots;
mod quality;
mod steps;
mod write;

pub use input::Input;
pub use write::report;
