//! The command line: one file per command, parsing and printing only.
//!
//! Exit status: 0 done; 2 wrong usage or unusable input, with one message on stderr that states the problem and advice;
//! 130 interrupted by Ctrl-C (a server stops cleanly, with 0); 1 anything else. `--json` prints one document on stdout
//! and nothing else there. Notes and warnings go to stderr, and progress if stderr is a terminal; `--quiet` turns them
//! off.

mod bench;
mod chat;
mod completions;
mod convert;
mod device;
mod doctor;
mod evaluate;
mod events;
mod failure;
mod generate;
mod info;
mod inspect;
mod interrupt;
mod output;
mod perplexity;
mod progress;
pub mod reference;
mod refit;
mod report;
mod sample;
mod sampler;
#[cfg(feature = "serve")]
mod serve;
mod strip;
mod table;
mod value_checks;
mod verify;
mod weights;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::units::bytes;
pub use failure::Failure;
use output::{JsonForm, note, print, print_json, warning};

/// Compile ONNX language models to TensorRT engines and run them
#[derive(Parser)]
#[command(name = "lapidary", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    /// Print no progress, notes or warnings
    #[arg(short, long, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Inspect an ONNX export: what it is, and whether it can be converted
    Inspect(inspect::Args),
    /// Convert an ONNX export to a package
    Convert(convert::Args),
    /// Show what a package contains
    Info(info::Args),
    /// Generate text
    Generate(generate::Args),
    /// Chat with a model in the terminal
    Chat(chat::Args),
    /// Serve packages over HTTP with the OpenAI API
    #[cfg(feature = "serve")]
    Serve(Box<serve::Args>),
    /// Apply a sampler chain to one distribution
    Sample(sample::Args),
    /// Compare a package with its export, run by another engine
    Verify(verify::Args),
    /// Replace a package's weights
    Refit(refit::Args),
    /// List, check or export the weights of a package
    Weights(weights::Args),
    /// Copy a package without its weights
    Strip(strip::Args),
    /// Measure speed, memory and answers of a package
    Bench(bench::Args),
    /// Measure perplexity on a text, and KL divergence from another package
    Perplexity(perplexity::Args),
    /// Score answers to the prompts of a task (ROUGE, exact match)
    Evaluate(evaluate::Args),
    /// Write a report with tables and plots from results
    Report(report::Args),
    /// Show what this machine can build and run, and how to fix what it cannot
    Doctor(doctor::Args),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
    /// Write manual pages
    Man(completions::ManArgs),
}

/// The whole program.
pub fn main() -> ExitCode {
    let started = std::time::Instant::now();
    // clap exits the process: with 0 after --help and --version, with 2 on wrong usage.
    let cli = Cli::parse();
    interrupt::install();
    if cli.quiet {
        output::be_quiet();
    }
    let result = match cli.command {
        Command::Inspect(args) => inspect::run(args),
        Command::Convert(args) => convert::run(args),
        Command::Info(args) => info::run(args),
        Command::Generate(args) => generate::run(args, started),
        Command::Chat(args) => chat::run(args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(*args),
        Command::Sample(args) => sample::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Refit(args) => refit::run(args),
        Command::Weights(args) => weights::run(args),
        Command::Strip(args) => strip::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Evaluate(args) => evaluate::run(args),
        Command::Report(args) => report::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Completions(args) => completions::completions(args),
        Command::Man(args) => completions::man(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// A `value_parser` for a type that serde parses from one of these words.
fn words<T>(words: &'static [&'static str]) -> impl clap::builder::TypedValueParser<Value = T>
where
    T: serde::de::DeserializeOwned + Clone + Send + Sync + 'static,
{
    use clap::builder::TypedValueParser;
    clap::builder::PossibleValuesParser::new(words).map(|word| {
        let value = serde_json::Value::String(word);
        serde_json::from_value(value).expect("the words are the type's own")
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn flags_do_not_clash() {
        super::Cli::command().debug_assert();
    }
}
