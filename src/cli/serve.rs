//! `lapidary serve`: an OpenAI-compatible server for some packages.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::device::Place;
use super::sampler::SamplerArgs;
use super::{Failure, interrupt};
use crate::decode::batch::{BatchDecoder, BatchOptions};
use crate::package::Package;
use crate::serve::http::{Keys, Limits, Model, Server};
use crate::serve::{Scheduler, SchedulerOptions};

#[derive(clap::Args)]
pub struct Args {
    /// Packages; requests name one by its folder's name
    #[arg(value_name = "PKG", required = true)]
    packages: Vec<PathBuf>,
    /// The address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// The port to listen on; 0: any that is free
    #[arg(long, value_name = "N", default_value_t = 8080)]
    port: u16,
    /// Serve only clients that give one of the keys in this file, one a line
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    #[command(flatten)]
    place: Place,

    /// Sequences of each package at a time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = count(1, 1024))]
    max_sequences: usize,
    /// Requests for each package that may wait for a place; one more is refused with status 429
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = count(0, 1 << 20))]
    queue: usize,
    /// Tokens of a prompt that are computed between two tokens of other requests
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = count(1, 512))]
    prefill_chunk: usize,
    /// Caches of finished requests that are kept for prompts that begin alike [default: as many as sequences]
    #[arg(long, value_name = "N", value_parser = count(0, 4096))]
    kept_prefixes: Option<usize>,
    /// Memory for the caches of each package, such as 4G; kept ones go first [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = byte_count)]
    cache_memory: Option<usize>,

    /// Bytes of a request's body at most
    #[arg(long, value_name = "BYTES", default_value = "4M", value_parser = byte_count)]
    max_body: usize,
    /// Tokens of a prompt at most [default: the largest capacity]
    #[arg(long, value_name = "N", value_parser = count(1, usize::MAX >> 1))]
    max_prompt: Option<usize>,
    /// Seconds that a request may take, waiting included [default: no limit]
    #[arg(long, value_name = "SECONDS", value_parser = count(1, 1 << 30))]
    timeout: Option<usize>,
    /// Seconds for requests to finish after Ctrl-C or SIGTERM; a second signal ends at once
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = count(0, 1 << 30))]
    grace: usize,
    /// Write a line of JSON to standard error for each request; no texts are in it
    #[arg(long)]
    log_requests: bool,

    #[command(flatten)]
    sampler: SamplerArgs,
}

/// A number in a range.
fn count(least: usize, most: usize) -> impl Fn(&str) -> Result<usize, String> + Clone {
    move |text| match text.parse() {
        Ok(n) if (least..=most).contains(&n) => Ok(n),
        _ => Err(format!("not a whole number from {least} to {most}")),
    }
}

/// `1048576`, `1M`, `4G`: powers of 1024.
fn byte_count(text: &str) -> Result<usize, String> {
    let (digits, unit) = match text.find(|c: char| !c.is_ascii_digit()) {
        Some(at) => text.split_at(at),
        None => (text, ""),
    };
    let shift = match unit {
        "" => 0,
        "k" | "K" => 10,
        "M" => 20,
        "G" => 30,
        _ => return Err("not a number of bytes, such as 1048576, 64M or 4G".into()),
    };
    let bytes = digits.parse::<usize>().ok().and_then(|n| n.checked_mul(1 << shift));
    bytes
        .filter(|n| *n > 0)
        .ok_or_else(|| "not a number of bytes above 0".to_string())
}

pub fn run(args: Args) -> Result<(), Failure> {
    let keys = match &args.api_key_file {
        Some(path) => read_keys(path)?,
        None => Keys::default(),
    };
    let names = names(&args.packages)?;
    let mut models = Vec::new();
    for (name, path) in names.iter().zip(&args.packages) {
        models.push(open(&args, name, path)?);
    }
    let limits = Limits {
        body: args.max_body,
        prompt: args.max_prompt,
        timeout: args.timeout.map(|seconds| Duration::from_secs(seconds as u64)),
        ..Limits::default()
    };
    if !args.host.is_loopback() && keys.is_empty() {
        eprintln!(
            "warning: everybody who reaches {} is served; --api-key-file limits that",
            args.host
        );
    }
    let server = Server::new(models, limits, keys, args.log_requests);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::other(format!("cannot start the server's threads: {error}")))?;
    let listener = interrupt::Listener::new();
    let stop = async move {
        while !listener.interrupted() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let address = SocketAddr::new(args.host, args.port);
    let done = runtime.block_on(async {
        let failed = |error: std::io::Error| {
            Failure::other(format!("cannot listen on {address}: {error}")).help("choose another --host or --port")
        };
        let listener = tokio::net::TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "listening on http://{address}, serving {}", names.join(", "))?;
        stdout.flush()?;
        drop(stdout);
        let grace = Duration::from_secs(args.grace as u64);
        server.run(listener, stop, grace).await;
        Ok(())
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    done
}

/// What requests call each package: the name of its folder.
fn names(packages: &[PathBuf]) -> Result<Vec<String>, Failure> {
    let mut seen = BTreeSet::new();
    let mut names = Vec::new();
    for path in packages {
        // Of `.` and of what ends in `..`, too.
        let whole = path.canonicalize().unwrap_or_else(|_| path.clone());
        let name = whole
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        if !seen.insert(name.clone()) {
            return Err(Failure::input(format!(
                "{}: requests name a package by its folder, and another one is called {name:?}, too",
                path.display()
            ))
            .help("rename one of the folders"));
        }
        names.push(name);
    }
    Ok(names)
}

fn read_keys(path: &Path) -> Result<Keys, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| Failure::input(format!("{}: {error}", path.display())))?;
    let keys = Keys::of_lines(&text);
    match keys.is_empty() {
        false => Ok(keys),
        true => Err(Failure::input(format!("{}: there is no key in it", path.display()))
            .help("write one key a line; lines that begin with # are no keys")),
    }
}

fn open(args: &Args, name: &str, path: &Path) -> Result<Model, Failure> {
    let package = Package::open(path)?;
    let tokenizer = package.tokenizer()?.map(Arc::new);
    let defaults = args
        .sampler
        .settings(path, tokenizer.as_deref(), package.vocabulary()?)?;
    let eos_ids = package.manifest.eos_token_ids.clone();
    let batch = BatchOptions {
        sequences: args.max_sequences,
        chunk: args.prefill_chunk,
        kept: args.kept_prefixes.unwrap_or(args.max_sequences),
        cache_bytes: args.cache_memory,
    };
    let options = SchedulerOptions {
        queue: args.queue,
        ..SchedulerOptions::default()
    };
    let place = args.place.clone();
    let open = move || BatchDecoder::open(&package, &place.options(1, 1), batch);
    let scheduler = Scheduler::start(open, tokenizer.clone(), options)?;
    let seed = args.sampler.seed;
    Ok(Model::new(
        name.to_string(),
        scheduler,
        tokenizer,
        defaults,
        seed,
        eos_ids,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_units() {
        assert_eq!(byte_count("17"), Ok(17));
        assert_eq!(byte_count("4M"), Ok(4 << 20));
        assert_eq!(byte_count("2G"), Ok(2 << 30));
        for wrong in ["", "0", "M", "-1", "4MB", "1.5G", "99999999999999999999G"] {
            assert!(byte_count(wrong).is_err(), "{wrong}");
        }
    }
}
