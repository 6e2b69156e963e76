//! `lapidary convert`: an export becomes a package.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::progress::Progress;
use super::value_checks::ValueChecks;
use super::{Failure, info, print, words};
use crate::convert::{ConvertOptions, Variant, convert};
use crate::network::WeightMode;
use crate::passes::{ActivationPolicy, MaskWindows};
use crate::spec::{Conversion, Spec};
use crate::target::{Precision, Prefill, Quantization, Refit, Target};

#[derive(clap::Args)]
pub struct Args {
    /// The export, or a folder with it: a Hugging Face folder, its onnx/ folder, or one with a genai_config.json
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Which export of the folder, as q4f16 or the name of its file [default: the plain one, or the only one]
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
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
    /// What becomes of activations that the export quantizes: rounded as its codes say, inside attention too; rounded outside
    /// attention alone; or left in floating point [default: quantized]
    #[arg(long, value_parser = words::<ActivationPolicy>(&["quantized", "partial", "float"]))]
    activations: Option<ActivationPolicy>,
    /// How many positions a mask that the caller fills lets a query attend to, the last ones: a number, or `full` for all
    /// (repeatable; needed where an export takes masks of [batch, 1, tokens, total], one for each kind of layer)
    #[arg(long, value_name = "INPUT=N", value_parser = mask_window)]
    mask_window: Vec<(String, usize)>,
    /// Quantize weights in floating point: int4, int8 or fp8, then options such as int4,group=32
    ///
    /// After the format, between commas: group=N (codes along the depth that share a scale), group=channel or group=auto (32
    /// or a number near it that divides the depth); symmetric or asymmetric (with zero points); keep=NAME (a weight, a module
    /// or a pattern with * that stays in floating point, besides lm_head and embeddings, which do by default) or keep=none
    /// (nothing stays). The default is group=auto for int4 and int8, group=channel for fp8, and symmetric
    #[arg(long, value_name = "FORMAT")]
    quantize: Option<Quantization>,
    /// Measure activations on this text, and scale channels and weigh errors by them (needs the tokenizer)
    #[arg(long, value_name = "TEXT", conflicts_with = "without_weights")]
    calibrate: Option<PathBuf>,
    /// Sizes the cache can have, in tokens [default: 256,1024,4096, as far as the model's context reaches]
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    capacity: Option<Vec<usize>>,
    /// Chunks that engines take a prompt in, or a range min:opt:max [default: 128,256,512,2048]
    #[arg(long, value_name = "N,N")]
    prefill: Option<Prefill>,
    /// Decode and prefill of a capacity in one engine with two optimization profiles; needs a range as --prefill
    #[arg(long)]
    one_engine: bool,
    /// Decode kernels of our own between TensorRT's engines, for bound weights in 16 bits, int8 or int4 [default: on where they
    /// can be used]
    #[arg(long, value_enum)]
    kernels: Option<Kernels>,
    /// Also build engines that decode N sequences in one step (2 to 16). No command uses them yet: `serve` runs on the CPU
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    batch: Option<Vec<usize>>,
    /// tokenizer.json, or a folder with it [default: beside the model, if there]
    #[arg(long, value_name = "FILE_OR_DIR")]
    tokenizer: Option<PathBuf>,
    /// The table of token embeddings of an export that takes embeddings: embed_tokens.onnx, a checkpoint (file or folder) or
    /// a .npy of [vocabulary, hidden] [default: embed_tokens.onnx beside the model, if there]
    #[arg(long, value_name = "FILE_OR_DIR")]
    embeddings: Option<PathBuf>,
    /// Which tensor of the checkpoint is the table
    #[arg(long, value_name = "NAME", requires = "embeddings")]
    embeddings_tensor: Option<String>,
    /// Write the canonical graph as ONNX too, with its weights in FILE.data
    #[arg(long, value_name = "FILE")]
    emit_onnx: Option<PathBuf>,
    /// Convert an export whose external data is not there: the package is a stripped one, for `lapidary refit` to fill
    #[arg(long, conflicts_with = "emit_onnx")]
    without_weights: bool,
    #[command(flatten)]
    value_checks: ValueChecks,
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

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum Kernels {
    On,
    Off,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let start = Instant::now();
    let progress = Progress::new();
    let options = ConvertOptions {
        force: args.force,
        variant: args.variant.as_deref(),
        embeddings: args.embeddings.as_deref(),
        embeddings_tensor: args.embeddings_tensor.as_deref(),
        allowed: args.value_checks.allowed(),
        without_weights: args.without_weights,
        emit_onnx: args.emit_onnx.as_deref(),
        tensorrt_lib: args.tensorrt_lib.as_deref(),
        tune: args.tune,
        engine_cache: args.engine_cache.as_deref(),
        progress: Arc::new(progress.handle()),
    };
    let converted = convert(&args.model, &args.output, conversion(&args)?, &options)?;
    drop(progress);
    for warning in &converted.warnings {
        eprintln!("warning: {warning}");
    }
    let manifest = &converted.manifest;
    if let Some(path) = &args.save_spec {
        save_spec(path, &converted.conversion)?;
    }

    if args.json {
        return super::print_json(manifest);
    }
    let mut text = info::summary(manifest);
    let files = &converted.files;
    if !files.variants.is_empty() {
        text += &format!("took {}\n", files.model.display());
    }
    let is_taken = |variant: &&Variant| args.model.join(&variant.file) == files.model;
    let others: Vec<String> = files
        .variants
        .iter()
        .filter(|v| !is_taken(v))
        .map(Variant::to_string)
        .collect();
    if !others.is_empty() {
        text += &format!("others, for --variant: {}\n", others.join(", "));
    }
    if converted.tokenizer_ids.is_none() {
        text += "no tokenizer was found beside the model: the package takes token ids only (see --tokenizer)\n";
    }
    let ids = converted.tokenizer_ids.unwrap_or(0);
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

/// `sliding_attention_mask=512`, `full_attention_mask=full`
pub fn mask_window(text: &str) -> Result<(String, usize), String> {
    let (name, window) = text.rsplit_once('=').ok_or("it must be INPUT=N or INPUT=full")?;
    let window = match window {
        "full" => 0,
        number => number
            .parse()
            .ok()
            .filter(|n| *n > 0)
            .ok_or_else(|| format!("{number:?} is neither a number above 0 nor `full`"))?,
    };
    Ok((name.to_string(), window))
}

/// As the passes take them.
pub fn mask_windows(windows: impl IntoIterator<Item = (String, usize)>) -> MaskWindows {
    let window = |(name, window): (String, usize)| (name, Some(window).filter(|w| *w > 0));
    windows.into_iter().map(window).collect()
}

/// The conversion as a spec that makes it again, with or without a GPU.
fn save_spec(path: &Path, conversion: &Conversion) -> Result<(), Failure> {
    let spec = Spec {
        description: None,
        targets: Some(conversion.targets.clone()),
        weights: Some(conversion.weights),
        refit: Some(conversion.refit),
        dtype: conversion.dtype,
        mask_windows: Some(conversion.mask_windows.clone()).filter(|windows| !windows.is_empty()),
        activations: Some(conversion.activations).filter(|policy| *policy != ActivationPolicy::default()),
        quantize: conversion.quantize.clone(),
        // A spec may lie anywhere, and the text stays where it is.
        calibrate: conversion
            .calibrate
            .as_ref()
            .map(|text| text.canonicalize().unwrap_or_else(|_| text.clone())),
        capacity: Some(conversion.capacities.clone()),
        prefill: Some(conversion.prefill.clone()),
        one_engine: conversion.one_engine.then_some(true),
        tokenizer: None,
        kernels: conversion.kernels,
        batch: Some(conversion.batch.clone()).filter(|batch| !batch.is_empty()),
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
        activations: args.activations,
        mask_windows: Some(args.mask_window.iter().cloned().collect())
            .filter(|windows: &BTreeMap<_, _>| !windows.is_empty()),
        quantize: args.quantize.clone(),
        calibrate: args.calibrate.clone(),
        capacity: args.capacity.clone(),
        prefill: args.prefill.clone(),
        one_engine: args.one_engine.then_some(true),
        tokenizer: args.tokenizer.clone(),
        kernels: args.kernels.map(|kernels| kernels == Kernels::On),
        batch: args.batch.clone(),
        lowering: None,
        tuned: None,
    };
    let file = match &args.spec {
        Some(path) => Spec::read(path)?,
        None => Spec::default(),
    };
    Ok(flags.or(file).resolve()?)
}
