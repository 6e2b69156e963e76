//! The command line: one file a command, parsing and printing only.
//!
//! Exit status: 0 done; 2 wrong usage or unusable input, with one message on stderr that says what is wrong and what to
//! do; 130 stopped by Ctrl-C (a server stops in order, with 0); 1 anything else. `--json` prints one document on stdout and nothing else there; progress and notes go to stderr,
//! and only when it is a terminal. Warnings go there always, each after `warning: `.

mod bench;
mod chat;
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
mod perplexity;
mod progress;
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

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::units::bytes;
pub use failure::Failure;

/// Cuts ONNX language models into TensorRT engines, layer by layer, and runs them.
#[derive(Parser)]
#[command(name = "lapidary", version, propagate_version = true, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Says what an ONNX export is, and whether it can be converted
    Inspect(inspect::Args),
    /// Makes a package from an ONNX export
    Convert(convert::Args),
    /// Tells what is in a package
    Info(info::Args),
    /// Generates text from a package
    Generate(generate::Args),
    /// Talks with a model, turn by turn
    Chat(chat::Args),
    /// Serves packages to many clients, by OpenAI's endpoints
    #[cfg(feature = "serve")]
    Serve(Box<serve::Args>),
    /// Tries a sampler chain on one distribution
    Sample(sample::Args),
    /// Compares a package with the export it was made from, run by another engine
    Verify(verify::Args),
    /// Puts other weights into a package
    Refit(refit::Args),
    /// Lists the weights of a package, checks whether others fit, writes them as a checkpoint
    Weights(weights::Args),
    /// Makes a copy of a package without its weights
    Strip(strip::Args),
    /// Measures a package: prefill, decode, end to end, what it answers
    Bench(bench::Args),
    /// Says how well a package predicts a text, and how far it is from another package
    Perplexity(perplexity::Args),
    /// Scores a package's answers to the prompts of a task
    Evaluate(evaluate::Args),
    /// Makes tables, plots and text of results
    Report(report::Args),
    /// Says what can be built and run on this machine
    Doctor(doctor::Args),
}

/// The whole program.
pub fn main() -> ExitCode {
    let started = std::time::Instant::now();
    // clap exits by itself: with 0 after --help and --version, with 2 on wrong usage.
    let cli = Cli::parse();
    interrupt::install();
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
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

/// Prints a document on stdout.
fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut stdout, value).map_err(std::io::Error::from)?;
    writeln!(stdout)?;
    stdout.flush()?;
    Ok(())
}

/// Prints text on stdout.
fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()?;
    Ok(())
}

/// A `value_parser` for a type that serde reads from one of these words.
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
