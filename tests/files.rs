//! Text forms, and behavior described by them.
//!
//! `tests/files/*/*.txt` are cases: a graph, an action, and the resulting graph, network or refusal. The folder selects
//! the action: `passes` rewrites, `lower` lowers, `infer` types and verifies, `parse` reads. A case looks like
//!
//! ```text
//! # What it shows.
//! pass: cleanup
//! --- input
//! graph small
//! ...
//! --- output
//! 1 rewrite
//! graph small
//! ...
//! ```
//!
//! Lines above the input are comments (`#`) or options; `runner` lists the options. `UPDATE_FILES=1 cargo nextest run
//! --features tract --test files` writes the actual output of each input, and the generated pages of docs/ (cli.md,
//! models.md, operators.md, chat-templates.md, glossary.md); read the difference before you commit it.

#[cfg(feature = "serve")]
#[path = "files/cli_page.rs"]
mod cli_page;
#[path = "files/links.rs"]
mod links;
#[path = "files/models_page.rs"]
mod models_page;
#[path = "files/operators_page.rs"]
mod operators_page;
#[path = "files/round_trips.rs"]
mod round_trips;
#[path = "files/runner.rs"]
mod runner;
#[path = "files/templates_page.rs"]
mod templates_page;
