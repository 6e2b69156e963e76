//! `lapidary bench`: measures a package and writes one result document.

mod serve;
mod summary;
mod system;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;
use tempfile::TempDir;

use super::device::Place;
use super::progress::Progress;
use super::sampler::SamplerArgs;
use super::{Failure, JsonForm, print, print_json};
use crate::bench::compare::{OTHER_PROMPTS, compare};
use crate::bench::measure::{self, Plan};
use crate::bench::result::{Document, Load, Machine, Peak, SCHEMA};
use crate::bench::workload::Workload;
use crate::bench::{self, csv, machine, model, result};
use crate::decode::{Session, SessionOptions};
use crate::package::Package;

/// A warning is printed if other processes use more than this share of the cores.
const BUSY_SHARE: f64 = 0.2;

#[derive(clap::Args)]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// Prompt lengths to measure, in tokens [default: 37,128,512, those that fit, if no measurement is selected]
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    prefill: Vec<usize>,
    /// Context lengths to measure decode at [default: 64,300,1024, those that fit, if no measurement is selected]
    #[arg(long, visible_alias = "live", value_name = "N,N", value_delimiter = ',')]
    decode: Vec<usize>,
    /// End to end: prompt length and tokens to generate (repeatable)
    #[arg(long, value_name = "PROMPT:NEW", value_parser = pair)]
    end_to_end: Vec<(usize, usize)>,
    /// Warm-up runs of each measurement
    #[arg(long, value_name = "N", default_value_t = 3)]
    warmup: usize,
    /// Samples for each prompt length
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least_one)]
    repetitions: usize,
    /// Minimum number of samples for each context length
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = at_least_one)]
    decode_samples: usize,
    /// Runs of each end-to-end measurement
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    runs: usize,
    /// Greedy tokens to record for each prompt, with logits, for comparison; 0: none
    #[arg(long, value_name = "N", default_value_t = 32)]
    outputs: usize,
    /// Prompts: `{"seed": S, "timed": [ids], "prompts": [[ids], …]}` [default: generated from --seed]
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Compare outputs with this result
    #[arg(long, value_name = "FILE")]
    reference: Option<PathBuf>,
    /// Measure time by layer too (GPU)
    #[arg(long)]
    profile: bool,
    /// Measure a cold load too, with an empty kernel cache (GPU)
    #[arg(long)]
    first_load: bool,

    /// Measure the server's scheduler instead, with these numbers of concurrent clients
    #[arg(long, value_name = "N,N", value_delimiter = ',', value_parser = at_least_one,
        conflicts_with_all = ["prefill", "decode", "end_to_end", "csv", "reference", "prompts", "profile", "first_load"])]
    serve: Vec<usize>,
    /// With --serve: prompt length and tokens to generate of each request
    #[arg(long, value_name = "PROMPT:NEW", value_parser = pair, default_value = "128:64", requires = "serve")]
    serve_shape: (usize, usize),
    /// With --serve: total number of requests [default: 4 per client]
    #[arg(long, value_name = "N", value_parser = at_least_one, requires = "serve")]
    serve_requests: Option<usize>,

    #[command(flatten)]
    place: Place,
    /// Launch engines without CUDA graphs
    #[arg(long)]
    no_cuda_graphs: bool,

    /// Label of this run in tables [default: from the variant]
    #[arg(long, value_name = "TEXT")]
    label: Option<String>,
    /// Name of the model in tables [default: the package's folder]
    #[arg(long, value_name = "TEXT")]
    model_name: Option<String>,
    /// A setting to record; dots nest, as in ablation.group=shapes (repeatable)
    #[arg(long, value_name = "KEY=VALUE", value_parser = setting)]
    setting: Vec<(String, Value)>,
    /// Copy bandwidth that MBU refers to, in bytes per second [default: measured]
    #[arg(long, value_name = "N", value_parser = positive, allow_hyphen_values = true)]
    copy_bandwidth: Option<f64>,
    /// Peak that MFU refers to, in floating-point operations per second [default: the data sheet of known GPUs]
    #[arg(long, value_name = "N", value_parser = positive, allow_hyphen_values = true)]
    peak_flops: Option<f64>,
    /// Source of the peak: `stated: …` or `measured: …`
    #[arg(
        long,
        value_name = "TEXT",
        requires = "peak_flops",
        default_value = "stated: --peak-flops"
    )]
    peak_flops_source: String,

    /// Write the result document to a file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Write the summaries as CSV
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Print the result document instead of a table
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
    #[command(flatten)]
    sampler: SamplerArgs,
}

fn pair(text: &str) -> Result<(usize, usize), String> {
    let wanted = || format!("{text:?} is not PROMPT:NEW, two numbers of tokens such as 128:512");
    let (prompt, new) = text.split_once(':').ok_or_else(wanted)?;
    Ok((
        prompt.parse().map_err(|_| wanted())?,
        new.parse().map_err(|_| wanted())?,
    ))
}

fn at_least_one(text: &str) -> Result<usize, String> {
    let n = text.parse().ok().filter(|n| *n >= 1);
    n.ok_or_else(|| format!("{text:?} is not a number of 1 or more"))
}

fn positive(text: &str) -> Result<f64, String> {
    let n: Option<f64> = text.parse().ok().filter(|n: &f64| n.is_finite() && *n > 0.0);
    n.ok_or_else(|| format!("{text:?} is not a number above 0"))
}

fn setting(text: &str) -> Result<(String, Value), String> {
    match text.split_once('=') {
        Some((key, value)) if key.split('.').all(|part| !part.is_empty()) => {
            let value = serde_json::from_str(value).unwrap_or_else(|_| Value::String(value.to_string()));
            Ok((key.to_string(), value))
        }
        _ => Err(format!("{text:?} is not KEY=VALUE, such as ablation.group=shapes")),
    }
}

pub fn run(args: Args) -> Result<(), Failure> {
    if !args.serve.is_empty() {
        return serve::run(&args);
    }
    let date = chrono::Local::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, false);
    let package = Package::open(&args.package)?;
    let settings = args.sampler.measuring(&package)?;
    let workload = workload(&args, &package)?;
    let largest = *package.manifest.capacities.last().expect("a package has one");
    let plan = plan(&args, largest);
    let reference = args
        .reference
        .as_deref()
        .map(|path| reference(path, &workload))
        .transpose()?;
    plan.check(&workload, largest)?;
    for file in args.output.iter().chain(&args.csv) {
        writable(file)?;
    }

    let progress = Progress::new();
    if let Some(busy) = machine::busy_cores().filter(|busy| *busy > machine::cores() as f64 * BUSY_SHARE) {
        super::warning(format_args!(
            "other processes use {busy:.1} of {} cores: times will be longer and may be unstable",
            machine::cores()
        ));
    }
    progress.step("loading");
    let (kernels, mut session, load) = open(&args, &plan, &workload)?;
    let on_gpu = session.instruments().is_some();
    let bar = progress.handle();
    let mut measured = measure::measure(&mut session, &plan, &workload, &settings, |what, share| {
        bar.fraction(what, share);
    })?;
    progress.step("measuring copy bandwidth");
    let threads = args.place.threads().unwrap_or_else(machine::cores);
    let (machine, versions) = surroundings(&mut session, &args, &package, threads)?;
    drop(session);
    // Until now the session wrote to it.
    drop(kernels);
    progress.step("hashing the weights");
    let name = args.model_name.clone().unwrap_or_else(|| package.name());
    let model = model::model(&package, &name)?;
    measured.relate(&model, machine.copy_bandwidth_bytes_per_s, machine.peak_flops.as_ref());
    drop(progress);

    let mut document = Document {
        schema: SCHEMA.to_string(),
        system: system::system(&args, &package, &settings, on_gpu, threads),
        date,
        command: std::env::args().collect::<Vec<_>>().join(" "),
        commit: machine::commit(),
        error: None,
        machine,
        versions,
        model,
        workload: result::Workload {
            batch: 1,
            seed: workload.seed,
            prompts: workload.hashes(),
        },
        prefill: measured.prefill,
        decode: measured.decode,
        end_to_end: measured.end_to_end,
        load: Some(load),
        build: model::build(&package),
        sizes: Some(model::sizes(&package)),
        memory: Some(measured.memory),
        outputs: measured.outputs,
        profile: (!measured.profile.is_empty()).then(|| measured.profile.into_iter().collect()),
    };
    if let (Some(reference), Some(_)) = (&reference, &document.outputs) {
        let found = compare(&document, reference)?;
        document.outputs.as_mut().expect("there are outputs").reference = Some(found);
    }
    let cannot = |path: &Path, error: std::io::Error| Failure::other(format!("{}: {error}", path.display()));
    if let Some(path) = &args.output {
        let text = serde_json::to_string_pretty(&document).expect("plain data") + "\n";
        std::fs::write(path, text).map_err(|e| cannot(path, e))?;
    }
    if let Some(path) = &args.csv {
        csv::write(path, &document).map_err(|e| cannot(path, e))?;
    }
    match args.json {
        Some(form) => print_json(&document, form),
        None => print(&summary::summary(&document)),
    }
}

/// Refuses, before minutes of measuring, a file that could not be written after them.
fn writable(path: &Path) -> Result<(), Failure> {
    let refuse = |why: &str| Err(Failure::input(format!("{}: {why}", path.display())));
    match path.parent().filter(|p| !p.as_os_str().is_empty()) {
        Some(folder) if !folder.is_dir() => refuse("the folder does not exist"),
        _ if path.is_dir() => refuse("is a folder, not a file"),
        _ => Ok(()),
    }
}

fn plan(args: &Args, capacity: usize) -> Plan {
    let nothing = args.prefill.is_empty() && args.decode.is_empty() && args.end_to_end.is_empty();
    let fitting = |lengths: &[usize]| lengths.iter().copied().filter(|n| *n < capacity).collect();
    Plan {
        prefill: match nothing {
            true => fitting(&[37, 128, 512]),
            false => args.prefill.clone(),
        },
        decode: match nothing {
            true => fitting(&[64, 300, 1024]),
            false => args.decode.clone(),
        },
        end_to_end: args.end_to_end.clone(),
        warmup: args.warmup,
        repetitions: args.repetitions,
        decode_samples: args.decode_samples,
        runs: args.runs,
        outputs: args.outputs,
        profile: args.profile,
    }
}

fn workload(args: &Args, package: &Package) -> Result<Workload, Failure> {
    let vocabulary = package.vocabulary()?;
    let largest = *package.manifest.capacities.last().expect("a package has one");
    Ok(match &args.prompts {
        Some(path) => Workload::read(path, vocabulary)?,
        None => {
            let lengths = args.prefill.iter().chain(&args.decode).copied();
            let longest = lengths
                .chain(args.end_to_end.iter().map(|(n, _)| *n))
                .max()
                .unwrap_or(0);
            // A length that exceeds every cache is refused later, with a better message.
            let longest = longest.min(largest);
            Workload::of_seed(
                args.sampler.seed.unwrap_or(0),
                vocabulary,
                longest,
                largest,
                args.outputs,
            )
        }
    })
}

/// The document to compare outputs with; refused before measuring.
fn reference(path: &Path, workload: &Workload) -> Result<Document, Failure> {
    let document = bench::read(path)?;
    match &document.outputs {
        Some(outputs) if outputs.prompts == workload.prompts => Ok(document),
        Some(_) => Err(Failure::input("its outputs are for other prompts")
            .at(path)
            .help(OTHER_PROMPTS)),
        None => Err(Failure::input("it has no outputs to compare with").at(path)),
    }
}

/// A session with everything loaded that the plan needs, and the load time. With `--first-load` it is opened twice with
/// the same kernel cache, which is empty at first and must outlive the session.
fn open(args: &Args, plan: &Plan, workload: &Workload) -> Result<(Option<TempDir>, Session, Load), Failure> {
    let (prompt, total) = plan.extent(workload);
    let timed = |kernels: Option<&Path>| -> Result<(Session, f64), Failure> {
        let start = Instant::now();
        let package = Package::open(&args.package)?;
        let options = SessionOptions {
            kernels,
            no_graphs: args.no_cuda_graphs,
            ..args.place.options(prompt, total)
        };
        let session = Session::open(&package, &options)?;
        Ok((session, start.elapsed().as_secs_f64() * 1e3))
    };
    if !args.first_load {
        let kernels = kernels_folder(&Package::open(&args.package)?);
        let before = files(kernels.as_deref());
        let (mut session, load_ms) = timed(None)?;
        let after = files(kernels.as_deref());
        let on_gpu = session.instruments().is_some();
        let load = Load {
            load_ms: Some(load_ms),
            first_load_ms: None,
            kernels_kept: on_gpu.then_some(!before.is_empty() && before == after),
        };
        return Ok((None, session, load));
    }
    let folder = tempfile::tempdir()?;
    let (mut session, first) = timed(Some(folder.path()))?;
    // The CPU has no cache: all its loads are the same.
    let on_gpu = session.instruments().is_some();
    drop(session);
    let (session, load_ms) = timed(Some(folder.path()))?;
    let load = Load {
        load_ms: Some(load_ms),
        first_load_ms: on_gpu.then_some(first),
        kernels_kept: on_gpu.then_some(true),
    };
    Ok((Some(folder), session, load))
}

/// Names in the kernel cache: a load that compiles adds some.
fn files(folder: Option<&Path>) -> BTreeSet<OsString> {
    let files = folder.and_then(|folder| std::fs::read_dir(folder).ok());
    files
        .into_iter()
        .flatten()
        .filter_map(|file| Some(file.ok()?.file_name()))
        .collect()
}

#[cfg(feature = "engines")]
use crate::decode::cuda::kernels_folder;

#[cfg(not(feature = "engines"))]
fn kernels_folder(_: &Package) -> Option<PathBuf> {
    None
}

type Versions = std::collections::BTreeMap<String, Option<String>>;

/// Machine and versions, with the bandwidth of the memory that holds the weights.
fn surroundings(
    session: &mut Session,
    args: &Args,
    package: &Package,
    threads: usize,
) -> Result<(Machine, Versions), Failure> {
    let lapidary = Some(env!("CARGO_PKG_VERSION").to_string());
    let mut versions = Versions::from([("lapidary".to_string(), lapidary)]);
    let mut machine = match session.instruments() {
        None => Machine {
            copy_bandwidth_bytes_per_s: args.copy_bandwidth.or_else(|| Some(machine::copy_bandwidth(threads))),
            ..machine::machine(None)
        },
        Some(device) => {
            let facts = device.facts();
            versions.insert("tensorrt".to_string(), Some(facts.tensorrt.clone()));
            versions.insert("cuda".to_string(), Some(facts.driver.cuda_version.clone()));
            Machine {
                copy_bandwidth_bytes_per_s: match args.copy_bandwidth {
                    Some(given) => Some(given),
                    None => Some(device.copy_bandwidth()?),
                },
                ..machine::machine(Some(&facts))
            }
        }
    };
    let dtype = model::dtype(package.manifest.dtype);
    let stated = machine
        .gpu
        .as_ref()
        .and_then(|gpu| machine::stated_peak(&gpu.name, dtype));
    let asked = args.peak_flops.map(|flops| Peak {
        flops,
        source: args.peak_flops_source.clone(),
    });
    machine.peak_flops = asked.or(stated);
    Ok((machine, versions))
}
