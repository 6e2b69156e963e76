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
use crate::weights::lora::Adapter;

#[derive(clap::Args)]
pub struct Args {
    /// Packages; the folder's name is the model's name in requests
    #[arg(value_name = "PKG", required = true)]
    packages: Vec<PathBuf>,
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port to listen on; 0: any free port
    #[arg(long, value_name = "N", default_value_t = 8080)]
    port: u16,
    /// Name of the package in requests, in place of its folder's; with several packages one for each, in their order
    #[arg(long, visible_alias = "alias", value_name = "NAME", value_delimiter = ',')]
    served_model_name: Vec<String>,
    /// Accept only requests with one of the API keys in this file (one per line)
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Accept requests with this API key, too; repeatable. Other users of the machine can read it in the list of
    /// processes, unlike those of --api-key-file
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,
    #[command(flatten)]
    place: Place,
    /// Also serve a package with a LoRA adapter (a PEFT folder), under the model name NAME; repeatable. With several
    /// packages PACKAGE:NAME=DIR
    #[arg(long, visible_alias = "lora-modules", value_name = "NAME=DIR", value_parser = adapter)]
    adapter: Vec<NamedAdapter>,

    /// Concurrent sequences of each package
    #[arg(long, visible_aliases = ["max-num-seqs", "parallel"], value_name = "N", default_value_t = 8, value_parser = count(1, 1024))]
    max_sequences: usize,
    /// Queue length of each package, 0 for none; further requests are refused with status 429
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = count(0, 1 << 20))]
    queue: usize,
    /// Prompt tokens that are computed between two decode steps of other requests
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = count(1, 512))]
    prefill_chunk: usize,
    /// Caches of finished requests to keep for prompts with a common prefix [default: --max-sequences]
    #[arg(long, value_name = "N", value_parser = count(0, 4096))]
    kept_prefixes: Option<usize>,
    /// Memory limit for the caches of each package, such as 4G; kept caches are evicted first [default: no limit]
    #[arg(long, value_name = "BYTES", value_parser = byte_count)]
    cache_memory: Option<usize>,

    /// Maximum size of a request body
    #[arg(long, value_name = "BYTES", default_value = "4M", value_parser = byte_count)]
    max_body: usize,
    /// Maximum length of a prompt, in tokens [default: the largest capacity]
    #[arg(long, value_name = "N", value_parser = count(1, usize::MAX >> 1))]
    max_prompt: Option<usize>,
    /// Time limit of a request, queueing included, in seconds [default: no limit]
    #[arg(long, value_name = "SECONDS", value_parser = count(1, 1 << 30))]
    timeout: Option<usize>,
    /// Seconds that running requests get after Ctrl-C or SIGTERM; a second signal ends at once
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = count(0, 1 << 30))]
    grace: usize,
    /// Log each request as a line of JSON on stderr, without its text
    #[arg(long)]
    log_requests: bool,

    #[command(flatten)]
    sampler: SamplerArgs,
}

/// The value of `--adapter`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct NamedAdapter {
    /// The package; required if there are several.
    package: Option<String>,
    name: String,
    folder: PathBuf,
}

impl NamedAdapter {
    /// The flag, for errors.
    fn flag(&self) -> String {
        format!("--adapter {}={}", self.name, self.folder.display())
    }
}

/// `NAME=DIR` or `PACKAGE:NAME=DIR`.
fn adapter(text: &str) -> Result<NamedAdapter, String> {
    let refusal = || "not NAME=DIR or PACKAGE:NAME=DIR".to_string();
    let (name, folder) = text.split_once('=').ok_or_else(refusal)?;
    let (package, name) = match name.split_once(':') {
        Some((package, name)) => (Some(package.to_string()), name),
        None => (None, name),
    };
    if name.is_empty() || folder.is_empty() || package.as_deref() == Some("") {
        return Err(refusal());
    }
    Ok(NamedAdapter {
        package,
        name: name.to_string(),
        folder: folder.into(),
    })
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
    let mut keys = match &args.api_key_file {
        Some(path) => read_keys(path)?,
        None => Keys::default(),
    };
    for key in &args.api_key {
        if key.trim().is_empty() {
            return Err(Failure::input("--api-key: the key is empty").help("write a key, or leave the flag out"));
        }
        keys.add(key.trim());
    }
    let mut names = names(&args.packages, &args.served_model_name)?;
    let parents = parents(&args.adapter, &names)?;
    let mut models = Vec::new();
    for (name, path) in names.iter().zip(&args.packages) {
        models.push(open(&args, name, path, None)?);
    }
    for (own, parent) in args.adapter.iter().zip(parents) {
        let opened = open(&args, &own.name, &args.packages[parent], Some(&own.folder));
        models.push(opened.map_err(|failure| failure.of(&own.flag()))?.of(&names[parent]));
        names.push(own.name.clone());
    }
    let limits = Limits {
        body: args.max_body,
        prompt: args.max_prompt,
        timeout: args.timeout.map(|seconds| Duration::from_secs(seconds as u64)),
        ..Limits::default()
    };
    if !args.host.is_loopback() && keys.is_empty() {
        super::warning(format_args!(
            "anyone who can reach {} can use this server; --api-key-file restricts access",
            args.host
        ));
    }
    let server = Server::new(models, limits, keys, args.log_requests);
    allow_connections();
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

/// Raises the limit of open files to the system's maximum: each connection is an open file.
fn allow_connections() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Otherwise the previous limit stays.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// The model name of each package in requests: the given name, or that of its folder.
fn names(packages: &[PathBuf], given: &[String]) -> Result<Vec<String>, Failure> {
    if !given.is_empty() {
        let flag = format!("--served-model-name {}", given.join(","));
        if given.len() != packages.len() {
            let message = format!("{flag}: names: {}, packages: {}", given.len(), packages.len());
            return Err(Failure::input(message).help("give one name for each package, in their order"));
        }
        let different: BTreeSet<&String> = given.iter().collect();
        if different.len() < given.len() || given.iter().any(|name| name.trim().is_empty()) {
            return Err(Failure::input(format!("{flag}: two names are equal, or one is empty"))
                .help("give each package another name"));
        }
        return Ok(given.to_vec());
    }
    let mut seen = BTreeSet::new();
    let mut names = Vec::new();
    for path in packages {
        // Also for `.` and for paths that end in `..`.
        let whole = path.canonicalize().unwrap_or_else(|_| path.clone());
        let name = whole
            .file_name()
            .map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        if !seen.insert(name.clone()) {
            return Err(Failure::input(format!(
                "{}: two packages are named {name:?}; the folder's name identifies a package in requests",
                path.display()
            ))
            .help("rename one of the folders, or give names with --served-model-name"));
        }
        names.push(name);
    }
    Ok(names)
}

/// For each adapter, its package. Names must differ from those of packages and of each other.
fn parents(adapters: &[NamedAdapter], packages: &[String]) -> Result<Vec<usize>, Failure> {
    let mut parents = Vec::new();
    for (i, adapter) in adapters.iter().enumerate() {
        let flag = adapter.flag();
        let mut others = packages.iter().chain(adapters[..i].iter().map(|other| &other.name));
        if others.any(|other| *other == adapter.name) {
            return Err(Failure::input(format!(
                "{flag}: requests name models, and another one is called {:?}, too",
                adapter.name
            ))
            .help("choose another name"));
        }
        parents.push(match (&adapter.package, packages) {
            (None, [_]) => 0,
            (None, _) => {
                return Err(Failure::input(format!("{flag}: there are several packages"))
                    .help(format!("say which: --adapter {}:{}=DIR", packages[0], adapter.name)));
            }
            (Some(package), _) => packages.iter().position(|name| name == package).ok_or_else(|| {
                Failure::input(format!(
                    "{flag}: there is no package {package:?}; there are {}",
                    packages.join(", ")
                ))
            })?,
        });
    }
    Ok(parents)
}

fn read_keys(path: &Path) -> Result<Keys, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| Failure::input(format!("{}: {error}", path.display())))?;
    let keys = Keys::of_lines(&text);
    match keys.is_empty() {
        false => Ok(keys),
        true => Err(Failure::input(format!("{}: the file contains no key", path.display()))
            .help("write one key per line; lines that begin with # are comments")),
    }
}

/// A package as a model of this name, possibly with an adapter.
fn open(args: &Args, name: &str, path: &Path, adapter: Option<&Path>) -> Result<Model, Failure> {
    let package = Package::open(path)?;
    let adapter = adapter.map(Adapter::open).transpose()?;
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
    let open = move || match &adapter {
        None => BatchDecoder::open(&package, &place.options(1, 1), batch),
        Some(adapter) => BatchDecoder::open_adapted(&package, adapter, &place.options(1, 1), batch),
    };
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
    fn adapters_have_a_name_and_a_folder() {
        let named = |package: Option<&str>, name: &str, folder: &str| NamedAdapter {
            package: package.map(String::from),
            name: name.into(),
            folder: folder.into(),
        };
        assert_eq!(adapter("a=b/c"), Ok(named(None, "a", "b/c")));
        assert_eq!(adapter("p:a=x=y:z"), Ok(named(Some("p"), "a", "x=y:z")));
        for wrong in ["", "a", "=b", "a=", ":a=b", "p:=b"] {
            assert!(adapter(wrong).is_err(), "{wrong}");
        }
    }

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
