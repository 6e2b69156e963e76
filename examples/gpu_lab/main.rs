//! Measurements on a GPU, run by `scripts/gpu/` on the remote machine.
//!
//! ```text
//! gpu_lab bench PKG --live 300 --prefill 128,512       # decode and prefill of a package, as JSON
//! gpu_lab logits PKG --cases cases.json --output F     # logits of given token sequences, to compare with another engine
//! gpu_lab batch PKG --cases cases.json --output F      # the same for several sequences in one batch
//! gpu_lab swap PKG --weights OTHER_PKG                 # other weights under loaded engines, and back
//! gpu_lab moves PKG                                    # a token after a move of the cache, and without one
//! gpu_lab forms                                        # forms of a matrix product of one row
//! gpu_lab kernels 8b                                   # decode steps of whole models with and without Lapidary's kernels
//! gpu_lab prefill --large                              # chunks of a prompt by their rows, on a few layers
//! gpu_lab choices --large --layers 4                   # one choice of the lowering at a time, on a few layers
//! ```

mod accuracy;
mod batch;
mod choices;
mod drive;
mod forms;
mod kernels;
mod moves;
mod prefill;
mod swap;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

type Outcome<T> = Result<T, Box<dyn Error>>;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Bench {
        package: PathBuf,
        #[arg(long, default_value_t = 300)]
        live: usize,
        #[arg(long, value_delimiter = ',')]
        prefill: Vec<usize>,
        #[arg(long, default_value_t = 64)]
        tokens: usize,
    },
    Logits {
        package: PathBuf,
        /// `[{"prompt": [ids], "forced": [ids]}]`
        #[arg(long)]
        cases: PathBuf,
        /// f32 rows: after the prompt, then after each forced token; all cases in order.
        #[arg(long)]
        output: PathBuf,
    },
    /// As `logits`, for several sequences at once: engines of that batch size are built here from the package's graph.
    Batch {
        package: PathBuf,
        /// `[{"prompt": [ids], "forced": [ids]}]`, one per sequence of the batch, prompts of any length, `forced` of
        /// equal length.
        #[arg(long)]
        cases: PathBuf,
        /// f32 rows: for each step the rows of all sequences.
        #[arg(long)]
        output: PathBuf,
        #[arg(long, default_value_t = 1024)]
        capacity: usize,
        #[arg(long, default_value_t = 128)]
        chunk: usize,
    },
    /// Runs with the weights of another package, then with its own again, and compares with fresh sessions.
    Swap {
        package: PathBuf,
        #[arg(long)]
        weights: PathBuf,
        #[arg(long, default_value_t = 5)]
        times: usize,
    },
    Moves {
        package: PathBuf,
        #[arg(long, default_value_t = 64)]
        steps: usize,
    },
    /// Single choices of the lowering on a few layers of a model of real dims, decode and prefill.
    Choices {
        #[arg(long)]
        large: bool,
        /// Layers of the model.
        #[arg(long, default_value_t = 8)]
        layers: usize,
        /// Only choices whose name contains this.
        #[arg(long, default_value = "")]
        only: String,
    },
    /// Decode steps of whole models of real dims, with and without Lapidary's kernels.
    Kernels {
        /// Only cases whose name contains this.
        #[arg(default_value = "")]
        only: String,
        /// Sequences of a step.
        #[arg(long, value_delimiter = ',', default_value = "1")]
        rows: Vec<usize>,
    },
    /// Times of chunks of a prompt by their rows.
    Prefill {
        #[arg(long)]
        large: bool,
    },
    /// Errors of single fp16 layers, in several forms.
    Accuracy,
    Forms {
        /// Only forms whose name contains this.
        #[arg(long, default_value = "")]
        only: String,
    },
}

fn main() -> ExitCode {
    // SAFETY: the first statement of the program, so there is no other thread.
    unsafe { lapidary::backend::tensorrt::compute_in_full_precision() };
    let done = match Arguments::parse().command {
        Command::Bench {
            package,
            live,
            prefill,
            tokens,
        } => drive::bench(&package, live, &prefill, tokens).map(|v| println!("{v:#}")),
        Command::Logits { package, cases, output } => {
            drive::logits(&package, &cases, &output).map(|v| println!("{v:#}"))
        }
        Command::Batch {
            package,
            cases,
            output,
            capacity,
            chunk,
        } => batch::logits(&package, &cases, &output, capacity, chunk).map(|v| println!("{v:#}")),
        Command::Swap {
            package,
            weights,
            times,
        } => swap::swap(&package, &weights, times).map(|v| println!("{v:#}")),
        Command::Moves { package, steps } => moves::moves(&package, steps).map(|v| println!("{v:#}")),
        Command::Forms { only } => forms::forms(&only),
        Command::Choices { large, layers, only } => choices::choices(large, layers, &only),
        Command::Kernels { only, rows } => kernels::kernels(&only, &rows),
        Command::Prefill { large } => prefill::prefill(large),
        Command::Accuracy => accuracy::accuracy(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
