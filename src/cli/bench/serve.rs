//! `lapidary bench --serve`: throughput and latencies of a scheduler against the number of clients.
//!
//! Every client requests one text after another and waits for it. Prompts are random token ids, different for each request, so
//! no prefix is shared. Tokens are greedy, and each text has exactly the requested number. Times are from submission to the
//! moment at which a server would send a token. HTTP is not involved.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::{Args, writable};
use crate::bench::machine;
use crate::bench::serving::{Level, SCHEMA, Serving};
use crate::bench::summary::Summary;
use crate::cli::progress::Progress;
use crate::cli::table::Table;
use crate::cli::{Failure, print, print_json};
use crate::decode::Limits;
use crate::decode::batch::{BatchDecoder, BatchOptions};
use crate::package::Package;
use crate::sample::Settings;
use crate::serve::{Event, Request, Scheduler, SchedulerOptions};

/// Times of one request.
struct Times {
    ttft: Duration,
    between: Vec<Duration>,
    total: Duration,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let package = Package::open(&args.package)?;
    if let Some(file) = &args.output {
        writable(file)?;
    }
    let (prompt, new) = args.serve_shape;
    let largest = *package.manifest.capacities.last().expect("a package has one");
    if prompt == 0 || new == 0 || prompt + new > largest {
        return Err(Failure::input(format!(
            "--serve-shape {prompt}:{new}: a prompt and its text have at least one token each, and {largest} together at most"
        )));
    }
    let most = *args.serve.iter().max().expect("the flag was given");
    let batch = BatchOptions {
        sequences: most,
        kept: 0,
        ..BatchOptions::default()
    };
    let options = SchedulerOptions {
        queue: most,
        ..SchedulerOptions::default()
    };
    let (of_thread, place) = (package.clone(), args.place.clone());
    let open = move || BatchDecoder::open(&of_thread, &place.options(1, 1), batch);
    let scheduler = Scheduler::start(open, None, options)?;

    let progress = Progress::new();
    let mut levels = Vec::new();
    let mut seed = args.sampler.seed.unwrap_or(0);
    for clients in &args.serve {
        progress.step(format!("{clients} clients"));
        // Warm-up: programs are compiled and pages are read.
        measure(&scheduler, *clients, *clients, [prompt, new], &mut seed)?;
        let requests = args.serve_requests.unwrap_or(4 * clients).max(*clients);
        levels.push(measure(&scheduler, *clients, requests, [prompt, new], &mut seed)?);
    }
    drop(progress);
    let facts = scheduler.facts();
    let document = Serving {
        schema: SCHEMA.to_string(),
        date: chrono::Local::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, false),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        commit: machine::commit(),
        package: package.name(),
        device: facts.device.clone(),
        engine: facts.engine.clone(),
        cores: machine::cores(),
        prompt_tokens: prompt,
        new_tokens: new,
        prefill_chunk: BatchOptions::default().chunk,
        levels,
    };
    if let Some(path) = &args.output {
        let text = serde_json::to_string_pretty(&document).expect("plain data") + "\n";
        std::fs::write(path, text).map_err(|e| Failure::other(format!("{}: {e}", path.display())))?;
    }
    match args.json {
        Some(form) => print_json(&document, form),
        None => print(&table(&document)),
    }
}

fn table(document: &Serving) -> String {
    let header = [
        "clients", "tokens/s", "× one", "a step", "TTFT p50", "p99", "ITL p50", "p99",
    ];
    let mut table = Table::new(header);
    let first = document.levels[0].tokens_per_s / document.levels[0].clients as f64;
    for level in &document.levels {
        let ms = |ms: f64| format!("{ms:.1}");
        let between = |of: fn(&Summary) -> f64| level.itl_ms.as_ref().map_or(String::new(), |itl| ms(of(itl)));
        table.row([
            level.clients.to_string(),
            format!("{:.1}", level.tokens_per_s),
            format!("{:.2}", level.tokens_per_s / first),
            format!("{:.1}", level.tokens_per_step),
            ms(level.ttft_ms.p50),
            ms(level.ttft_ms.p99),
            between(|itl| itl.p50),
            between(|itl| itl.p99),
        ]);
    }
    format!(
        "{}: {}, prompts of {} tokens, {} new ones; times in ms\n{}",
        document.package,
        document.engine,
        document.prompt_tokens,
        document.new_tokens,
        table.render()
    )
}

/// Measures this many clients, which send this many requests in total.
fn measure(
    scheduler: &Scheduler,
    clients: usize,
    requests: usize,
    [prompt, new]: [usize; 2],
    seed: &mut u64,
) -> Result<Level, Failure> {
    let vocabulary = scheduler.facts().vocabulary as u64;
    let first_seed = *seed;
    *seed += requests as u64;
    let taken = AtomicUsize::new(0);
    let before = scheduler.metrics().snapshot();
    let start = Instant::now();
    let work = || -> Result<Vec<Times>, Failure> {
        let mut times = Vec::new();
        loop {
            let number = taken.fetch_add(1, Ordering::Relaxed);
            if number >= requests {
                return Ok(times);
            }
            let ids = random_ids(first_seed + number as u64, prompt, vocabulary);
            times.push(ask(scheduler, ids, new)?);
        }
    };
    let all: Vec<Result<Vec<Times>, Failure>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..clients).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a client panicked"))
            .collect()
    });
    let seconds = start.elapsed().as_secs_f64();
    let after = scheduler.metrics().snapshot();
    let mut times = Vec::new();
    for of_client in all {
        times.extend(of_client?);
    }
    let ms = |durations: Vec<Duration>| -> Vec<f64> { durations.iter().map(|d| d.as_secs_f64() * 1e3).collect() };
    let of = |of: fn(&Times) -> Duration| Summary::of(&ms(times.iter().map(of).collect()));
    let between = times.iter().flat_map(|times| times.between.iter().copied()).collect();
    let steps = (after.steps - before.steps).max(1);
    Ok(Level {
        clients,
        requests,
        seconds,
        tokens_per_s: (requests * new) as f64 / seconds,
        requests_per_s: requests as f64 / seconds,
        // The first token of a text comes with its prompt.
        tokens_per_step: (requests * (new - 1)) as f64 / steps as f64,
        ttft_ms: of(|times| times.ttft).expect("there are requests"),
        itl_ms: Summary::of(&ms(between)),
        e2e_ms: of(|times| times.total).expect("there are requests"),
    })
}

/// Runs one request to its end.
fn ask(scheduler: &Scheduler, prompt: Vec<u32>, new: usize) -> Result<Times, Failure> {
    let (sender, events) = mpsc::channel();
    let request = Request {
        prompt,
        sampling: Settings::greedy(),
        constraint: None,
        limits: Limits {
            max_new_tokens: new,
            ..Limits::default()
        },
        deadline: None,
        events: Box::new(move |event| sender.send((Instant::now(), event)).is_ok()),
    };
    let start = Instant::now();
    let _ticket = scheduler.submit(request)?;
    let mut tokens: Vec<Instant> = Vec::with_capacity(new);
    for (when, event) in events {
        match event {
            Event::Piece { token: Some(_), .. } => tokens.push(when),
            Event::Piece { .. } => {}
            Event::Failed(error) => return Err(error.into()),
            Event::Finished(_) => {
                return Ok(Times {
                    ttft: tokens[0] - start,
                    between: tokens.windows(2).map(|pair| pair[1] - pair[0]).collect(),
                    total: when - start,
                });
            }
        }
    }
    Err(Failure::other("the device failed"))
}

fn random_ids(seed: u64, count: usize, vocabulary: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % vocabulary) as u32
    };
    (0..count).map(|_| next()).collect()
}
