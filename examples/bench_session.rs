//! One measurement of a package on the CPU, for `scripts/bench_cpu.py`: prefill and greedy decode, after a warm-up.
//!
//! `bench_session PACKAGE --prompt-ids 1,2,3 --max-new-tokens 48 --threads 2` prints one JSON line.

use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use lapidary::decode::Session;
use lapidary::decode::cpu::CpuDevice;
use lapidary::package::Package;

#[derive(Parser)]
struct Args {
    package: PathBuf,
    #[arg(long, value_delimiter = ',')]
    prompt_ids: Vec<u32>,
    #[arg(long)]
    max_new_tokens: usize,
    #[arg(long)]
    threads: Option<usize>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let start = Instant::now();
    let package = Package::open(&args.package)?;
    let vocabulary = package.vocabulary()?;
    let device = CpuDevice::new(package.graph()?, vocabulary, args.threads);
    let mut session = Session::new(Box::new(device), &package.manifest.capacities, vocabulary);
    let load = start.elapsed();

    // The warm-up brings the weights into the page cache and compiles both programs, as the other systems' does.
    let first = greedy(session.feed(&args.prompt_ids)?);
    session.feed(&[first])?;
    session.clear();

    let start = Instant::now();
    let mut tokens = vec![greedy(session.feed(&args.prompt_ids)?)];
    let prefill = start.elapsed();
    let start = Instant::now();
    while tokens.len() < args.max_new_tokens {
        let last = tokens[tokens.len() - 1];
        tokens.push(greedy(session.feed(&[last])?));
    }
    let decode = start.elapsed() / (args.max_new_tokens as u32 - 1).max(1);
    let ms = |d: std::time::Duration| d.as_secs_f64() * 1e3;
    let report = serde_json::json!({
        "tokens": tokens, "load_ms": ms(load), "prefill_ms": ms(prefill), "decode_ms": ms(decode),
    });
    println!("{report}");
    Ok(())
}

fn greedy(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.map_or(0, |(id, _)| id as u32)
}
