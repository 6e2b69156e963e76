//! Lowers a Llama with synthetic weights and builds its bound engine, with the times of both.
//!
//! ```text
//! cargo run --release --example llama_shape -- 8b                  # decode, capacity 1024
//! cargo run --release --example llama_shape -- 8b --tokens 128 --capacity 4096
//! cargo run --release --no-default-features --example llama_shape -- smollm2 --lower-only
//! ```
//!
//! The weights are bound, so only their shapes are needed: no bytes, no GPU. The target is an 8B engine in under 30 s.

use std::process::ExitCode;
use std::time::Instant;

use clap::{Parser, ValueEnum};
use lapidary::backend::tensorrt::{self, BuildOptions, Library};
use lapidary::lower::synthetic::Decoder;
use lapidary::lower::{AttentionForm, LinearForm, LowerOptions, lower};
use lapidary::network::{Profile, WeightMode};

#[derive(Clone, Copy, ValueEnum)]
enum Model {
    #[value(name = "8b")]
    Llama8b,
    #[value(name = "1b")]
    Llama1b,
    Smollm2,
    Tiny,
}

#[derive(Parser)]
struct Arguments {
    model: Model,
    #[arg(long, default_value_t = 1)]
    tokens: usize,
    #[arg(long, default_value_t = 1024)]
    capacity: usize,
    /// One product per linear layer and one attention layer per layer, instead of the defaults.
    #[arg(long)]
    plain: bool,
    /// Query heads of a KV group stay separate heads.
    #[arg(long)]
    no_fold: bool,
    /// Weights get three axes, instead of activations being flattened to two.
    #[arg(long)]
    raise_weights: bool,
    /// One product for q, k and v, and for gate and up.
    #[arg(long)]
    fuse: bool,
    /// Attention from single layers.
    #[arg(long)]
    decomposed: bool,
    /// Build no engine.
    #[arg(long)]
    lower_only: bool,
    /// Where to write the plan.
    #[arg(long)]
    output: Option<std::path::PathBuf>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Box<dyn std::error::Error>> {
    let config = match arguments.model {
        Model::Llama8b => Decoder::llama_8b(),
        Model::Llama1b => Decoder::llama_1b(),
        Model::Smollm2 => Decoder::smollm2_135m(),
        Model::Tiny => Decoder::tiny(),
    };
    let packaged = LowerOptions::for_engines();
    let options = LowerOptions {
        weight_mode: WeightMode::Bind,
        fold_groups: !arguments.no_fold,
        linear: match (arguments.raise_weights, arguments.plain) {
            (true, _) => LinearForm::RaiseWeight,
            (false, true) => LinearForm::FlattenActivation,
            (false, false) => packaged.linear,
        },
        fuse_linear: arguments.fuse || !arguments.plain,
        attention: match (arguments.decomposed, arguments.plain) {
            (true, _) => AttentionForm::Decomposed,
            (false, true) => AttentionForm::Layer,
            (false, false) => packaged.attention,
        },
        ..packaged
    };
    let profile = Profile::prefill(arguments.tokens, arguments.capacity);
    let graph = config.graph();
    let mut network = lower(&graph, &profile, &options)?;
    // The best of a few: the first includes cold memory.
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = Instant::now();
        network = lower(&graph, &profile, &options)?;
        best = best.min(start.elapsed().as_secs_f64() * 1e3);
    }
    let nodes = graph.node_ids().count();
    println!(
        "lowered {nodes} nodes to {} layers for {profile} in {best:.2} ms",
        network.layers.len()
    );
    if arguments.lower_only {
        return Ok(());
    }
    let library = Library::load(None)?;
    let plans = tensorrt::build_all(&library, &network, &BuildOptions::default())?;
    let bytes: usize = plans.iter().map(|plan| plan.bytes().len()).sum();
    let seconds: f64 = plans.iter().map(|plan| plan.elapsed().as_secs_f64()).sum();
    println!(
        "built {:.1} MB in {seconds:.1} s, peak memory {} MB",
        bytes as f64 / 1e6,
        peak_memory_mb()
    );
    if let Some(path) = &arguments.output {
        let plans: Vec<&[u8]> = plans.iter().map(|plan| plan.bytes()).collect();
        std::fs::write(path, plans.concat())?;
    }
    Ok(())
}

/// Peak memory of this process; 0 if unknown.
fn peak_memory_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.unwrap_or(0) / 1024
}
