//! `lapidary convert`: an export becomes a package.

use std::path::{Path, PathBuf};
use std::time::Instant;

use super::engines::{self, Builder};
use super::numbers::Numbers;
use super::progress::Progress;
use super::{Failure, info, inspect, print, tune, words};
use crate::backend::tensorrt::Refit;
use crate::decode::tokenizer::{self, Tokenizer};
use crate::graph::Graph;
use crate::graph::infer::infer;
use crate::network::WeightMode;
use crate::package::manifest::{ExportFile, PassRecord};
use crate::package::{self, ManifestHeader, PackageError, PlanCache, Writer};
use crate::spec::{Conversion, Precision, Prefill, Spec, Target};
use crate::weights::WriteError;
use crate::{onnx, passes};

#[derive(clap::Args)]
pub struct Args {
    /// The export
    #[arg(value_name = "MODEL.onnx")]
    model: PathBuf,
    /// The package to make
    #[arg(short, long, value_name = "PKG")]
    output: PathBuf,
    /// A conversion spec; flags override it
    #[arg(long, value_name = "FILE.yaml")]
    spec: Option<PathBuf>,
    /// What to run on; every package runs on the CPU [default: cpu]
    #[arg(long, value_enum, value_delimiter = ',')]
    target: Option<Vec<Target>>,
    /// How weights enter engines [default: bind]
    #[arg(long, value_parser = words::<WeightMode>(&["bind", "embed", "strip"]))]
    weights: Option<WeightMode>,
    /// Whether engines can take new weights later [default: none]
    #[arg(long, value_parser = words::<Refit>(&["none", "general", "identical"]))]
    refit: Option<Refit>,
    /// Element type of weights and caches [default: the export's]
    #[arg(long, value_enum)]
    dtype: Option<Precision>,
    /// Sizes the cache can have, in tokens [default: 256,1024,4096, as far as the model's context reaches]
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    capacity: Option<Vec<usize>>,
    /// Chunks that engines take a prompt in, or a range min:opt:max [default: 128,512]
    #[arg(long, value_name = "N,N")]
    prefill: Option<Prefill>,
    /// Decode and prefill of a capacity in one engine with two optimization profiles; needs a range as --prefill
    #[arg(long)]
    one_engine: bool,
    /// tokenizer.json, or a folder with it [default: beside the model, if there]
    #[arg(long, value_name = "FILE_OR_DIR")]
    tokenizer: Option<PathBuf>,
    /// Write the canonical graph as ONNX too, with its weights in FILE.data
    #[arg(long, value_name = "FILE")]
    emit_onnx: Option<PathBuf>,
    /// Convert an export whose external data is not there: the package is a stripped one, for `lapidary refit` to fill
    #[arg(long, conflicts_with = "emit_onnx")]
    without_weights: bool,
    #[command(flatten)]
    numbers: Numbers,
    /// Replace an existing package
    #[arg(long)]
    force: bool,
    /// The TensorRT library to build with
    #[arg(long, value_name = "PATH")]
    tensorrt_lib: Option<PathBuf>,
    /// Time the ways to lower each engine on the GPU of this machine and take the fastest
    #[arg(long)]
    tune: bool,
    /// Write what was done as a spec, choices of --tune included
    #[arg(long, value_name = "FILE.yaml")]
    save_spec: Option<PathBuf>,
    /// Keep plans here, and take from here those that were built before
    #[arg(long, value_name = "DIR")]
    engine_cache: Option<PathBuf>,
    /// Print the manifest as JSON
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let start = Instant::now();
    // What can fail without work fails first.
    package::check_target(&args.output, args.force)?;
    let mut conversion = conversion(&args)?;
    let library = engines::library(&conversion.targets, args.tensorrt_lib.as_deref())?;
    match &library {
        Some(library) if args.tune => tune::check(library)?,
        None if args.tune => {
            return Err(Failure::input("--tune chooses between engines, and none are asked for")
                .help("use it with --target tensorrt-rtx"));
        }
        _ => {}
    }
    let progress = Progress::new();
    progress.step("reading");
    let tokenizer = find_tokenizer(&args.model, conversion.tokenizer.as_deref())?;
    let graph = match args.without_weights {
        true => onnx::read_stripped(&args.model)?,
        false => onnx::read(&args.model)?,
    };
    let source = source(&args.model, &graph)?;

    progress.step("rewriting");
    check(&args.model, &graph)?;
    let options = passes::CanonicalizeOptions {
        dtype: conversion.dtype.map(Precision::dtype),
        max_positions: *conversion.capacities.last().expect("resolved to at least one"),
        allow_overflow: args.numbers.allowed().overflow,
    };
    let canonical = passes::canonicalize(graph, &options).map_err(|e| Failure::pass(&args.model, e))?;
    let capacities = capacities(
        &conversion,
        canonical.architecture.max_positions,
        trained_context(&args.model),
    )
    .map_err(|failure| failure.at(&args.model))?;
    if let Some(path) = &args.emit_onnx {
        emit(path, &canonical.graph)?;
    }

    let facts = ManifestHeader {
        source,
        architecture: canonical.architecture.clone(),
        dtype: canonical.architecture.cache_dtype,
        targets: conversion.targets.clone(),
        weight_mode: conversion.weights,
        refit: conversion.refit,
        capacities: capacities.clone(),
        prefill: conversion.prefill.clone(),
        passes: canonical.report.iter().map(pass).collect(),
    };
    let allowed = args.numbers.allowed();
    let written = Writer::new(
        &args.output,
        args.force,
        &canonical.graph,
        facts,
        allowed,
        |done, total| {
            progress.bytes("weights", done, total);
        },
    );
    let mut writer = written.map_err(|error| match error {
        PackageError::Weights(WriteError::Numbers { .. }) => Failure::from(error).at(&args.model),
        error => error.into(),
    })?;
    // From here on the weights are those of the package, mapped; the export is not needed any more.
    drop(canonical);
    match &tokenizer {
        Some(tokenizer) => writer.tokenizer(tokenizer)?,
        None => {
            let folder = args.model.parent().unwrap_or(Path::new("."));
            writer.eos_token_ids(tokenizer::eos_ids_of_configs(folder));
        }
    }
    if let Some(library) = &library {
        if args.tune {
            tune::tune(&mut writer, library, &mut conversion, &capacities, &progress)?;
        }
        let builder = Builder {
            library,
            model: &args.model,
            cache: args.engine_cache.as_deref().map(PlanCache::new),
        };
        engines::build(&mut writer, &builder, &conversion, &capacities, &progress)?;
    }
    let manifest = writer.finish()?;
    drop(progress);
    if let Some(path) = &args.save_spec {
        save_spec(path, &conversion, &capacities)?;
    }

    if args.json {
        return super::print_json(&manifest);
    }
    let mut text = info::tell(&manifest);
    if tokenizer.is_none() {
        text += "no tokenizer was found beside the model: the package takes token ids only (see --tokenizer)\n";
    }
    let ids = tokenizer.as_ref().map_or(0, Tokenizer::vocabulary);
    if let Some(known) = manifest.architecture.vocabulary.filter(|known| ids > *known) {
        text += &format!("the tokenizer has {ids} tokens and the model knows {known}: is it this model's?\n");
    }
    text += &format!(
        "wrote {} in {:.1} s\n",
        args.output.display(),
        start.elapsed().as_secs_f64()
    );
    print(&text)
}

/// The conversion as a spec that makes it again, with or without a GPU.
fn save_spec(path: &Path, conversion: &Conversion, capacities: &[usize]) -> Result<(), Failure> {
    let spec = Spec {
        description: None,
        targets: Some(conversion.targets.clone()),
        weights: Some(conversion.weights),
        refit: Some(conversion.refit),
        dtype: conversion.dtype,
        capacity: Some(capacities.to_vec()),
        prefill: Some(conversion.prefill.clone()),
        one_engine: conversion.one_engine.then_some(true),
        tokenizer: None,
        lowering: Some(conversion.lowering.clone()),
        tuned: Some(conversion.tuned.clone()).filter(|tuned| !tuned.is_empty()),
    };
    std::fs::write(path, spec.to_yaml()).map_err(|error| Failure::input(error).at(path))
}

fn conversion(args: &Args) -> Result<Conversion, Failure> {
    let flags = Spec {
        description: None,
        targets: args.target.clone(),
        weights: args.weights,
        refit: args.refit,
        dtype: args.dtype,
        capacity: args.capacity.clone(),
        prefill: args.prefill.clone(),
        one_engine: args.one_engine.then_some(true),
        tokenizer: args.tokenizer.clone(),
        lowering: None,
        tuned: None,
    };
    let file = match &args.spec {
        Some(path) => Spec::read(path)?,
        None => Spec::default(),
    };
    Ok(flags.or(file).resolve()?)
}

/// Refuses what no pass should have to look at.
fn check(model: &Path, graph: &Graph) -> Result<(), Failure> {
    let mut typed = graph.clone();
    // What keeps the graph from being sorted or typed is the passes' to tell.
    if typed.sort().is_err() || infer(&mut typed).is_err() {
        return Ok(());
    }
    let message = match &inspect::faults(&typed)[..] {
        [] => return Ok(()),
        [one] => one.clone(),
        several => format!(
            "the model cannot be converted, for {} reasons:\n  {}",
            several.len(),
            several.join("\n  ")
        ),
    };
    Err(Failure::input(message)
        .at(model)
        .help(format!("`lapidary inspect {}` shows the whole model", model.display())))
}

/// The tokenizer asked for, or the one beside the model.
fn find_tokenizer(model: &Path, asked: Option<&Path>) -> Result<Option<Tokenizer>, Failure> {
    if let Some(path) = asked {
        return Ok(Some(Tokenizer::open(path)?));
    }
    let beside = model.with_file_name(tokenizer::FILES[0]);
    match beside.is_file() {
        true => Ok(Some(Tokenizer::open(&beside)?)),
        false => Ok(None),
    }
}

fn source(model: &Path, graph: &Graph) -> Result<ExportFile, Failure> {
    let io = |source| PackageError::Io {
        path: model.to_path_buf(),
        source,
    };
    let producer = &graph.producer;
    Ok(ExportFile {
        file: model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        blake3: package::hash_file(model)?,
        bytes: std::fs::metadata(model).map_err(io)?.len(),
        exporter: onnx::exporter(graph).to_string(),
        producer: format!("{} {}", producer.name, producer.version).trim().to_string(),
        opsets: producer
            .opsets
            .iter()
            .map(|(domain, version)| match domain.as_str() {
                "" => ("ai.onnx".to_string(), *version),
                _ => (domain.clone(), *version),
            })
            .collect(),
    })
}

fn pass(report: &passes::PassReport) -> PassRecord {
    PassRecord {
        name: report.name.to_string(),
        rewrites: report.rewrites,
        nodes_before: report.nodes_before,
        nodes_after: report.nodes_after,
    }
}

/// The context the model was trained for, if a `config.json` beside the export says.
fn trained_context(model: &Path) -> Option<usize> {
    let text = std::fs::read_to_string(model.with_file_name("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_str(&text).ok()?;
    let context = ["max_position_embeddings", "n_positions"]
        .iter()
        .find_map(|key| config[key].as_u64())?;
    usize::try_from(context).ok().filter(|n| *n > 0)
}

/// The capacities asked for, or the defaults cut to the model's context. `limit`: the graph has tables for so many
/// positions and no more. `trained`: what the model was trained for, which one may exceed if one asks for it.
fn capacities(conversion: &Conversion, limit: Option<usize>, trained: Option<usize>) -> Result<Vec<usize>, Failure> {
    let mut capacities = conversion.capacities.clone();
    let beyond = |limit: Option<usize>, capacity: usize| limit.is_some_and(|limit| capacity > limit);
    if conversion.explicit_capacities {
        return match capacities.iter().find(|c| beyond(limit, **c)) {
            Some(too_large) => Err(Failure::input(format!(
                "capacity {too_large} is larger than the {} positions that the export has tables for",
                limit.unwrap_or_default()
            ))
            .help(format!("use a --capacity of at most {}", limit.unwrap_or_default()))),
            None => Ok(capacities),
        };
    }
    let context = limit.into_iter().chain(trained).min();
    let all = capacities.len();
    capacities.retain(|c| !beyond(context, *c));
    if capacities.len() < all {
        capacities.extend(context);
    }
    capacities.dedup();
    Ok(capacities)
}

fn emit(path: &Path, graph: &Graph) -> Result<(), Failure> {
    onnx::write_with_data(graph, path).map_err(|e| Failure::input(e).at(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversion(text: &str) -> Conversion {
        Spec::parse(text).unwrap().resolve().unwrap()
    }

    #[test]
    fn default_capacities_follow_the_context_and_asked_ones_are_held_to_it() {
        let default = conversion("");
        let cut = |limit, trained| capacities(&default, limit, trained).unwrap();
        assert_eq!(cut(Some(4096), Some(8192)), [256, 1024, 4096]);
        assert_eq!(cut(Some(4096), Some(2048)), [256, 1024, 2048]);
        assert_eq!(cut(Some(1024), None), [256, 1024]);
        assert_eq!(cut(Some(64), Some(2048)), [64]);
        assert_eq!(cut(None, None), [256, 1024, 4096]);
        let asked = conversion("capacity: [128, 64]");
        assert_eq!(capacities(&asked, Some(128), Some(32)).unwrap(), [64, 128]);
        let error = capacities(&asked, Some(100), None).unwrap_err();
        assert_eq!(
            error.message,
            "capacity 128 is larger than the 100 positions that the export has tables for"
        );
    }
}
