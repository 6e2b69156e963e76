//! Results become a report: tables, plots and prose, every figure with the file that it comes from.
//!
//! Takes result files, packages and the records of conversions ([`Input`]); gives Markdown and [`plots::Figure`]s. `measure` and
//! `matrix` are what tables share: a time beside Lapidary's, and a column for each model. `headlines` is the first page; `peers`,
//! `benchmarks`, `footprint`, `serving`, `quality`, `ablations` and `steps` are the chapters' tables; `missing` lists what no file
//! has. `write` puts them into `text/report.md`, whose prose holds no figures. What results mean and whether they are consistent
//! belongs to `bench`; the command line writes the files.

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
