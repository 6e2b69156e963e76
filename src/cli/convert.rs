//! `lapidary convert`: converts an export to a package.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::progress::Progress;
use super::value_checks::ValueChecks;
use super::{Failure, JsonForm, info, print, words};
use crate::convert::{ConvertOptions, Variant, convert};
use crate::network::WeightMode;
use crate::passes::{ActivationPolicy, MaskWindows};
use crate::spec::{Conversion, Spec};
use crate::target::{Precision, Prefill, Quantization, Refit, Target};

#[derive(clap::Args)]
pub struct Args {
    /// The ONNX export, or its folder: a Hugging Face folder, its onnx/ folder, or one with a genai_config.json
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// The package to write
    #[arg(short, long, value_name = "PKG")]
    output: PathBuf,
    /// Replace an existing package
    #[arg(long)]
    force: bool,
    /// Conversion spec; flags override it
    #[arg(long, value_name = "FILE.yaml")]
    spec: Option<PathBuf>,
    /// Write the settings of this conversion as a spec, with the choices of --tune
    #[arg(long, value_name = "FILE.yaml")]
    save_spec: Option<PathBuf>,
    /// Print the manifest as JSON
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,

    /// Which export of the folder: a suffix such as q4f16, or a file name [default: the one without suffix, or the only one]
    #[arg(long, value_name = "NAME", help_heading = "Input")]
    variant: Option<String>,
    /// tokenizer.json or its folder [default: beside the model]
    #[arg(long, value_name = "FILE_OR_DIR", help_heading = "Input")]
    tokenizer: Option<PathBuf>,
    /// Token embeddings of an export that takes embeddings: embed_tokens.onnx, a checkpoint (file or folder) or a .npy of
    /// [vocabulary, hidden] [default: embed_tokens.onnx beside the model]
    #[arg(long, value_name = "FILE_OR_DIR", help_heading = "Input")]
    embeddings: Option<PathBuf>,
    /// With --embeddings: the tensor in the checkpoint
    #[arg(long, value_name = "NAME", requires = "embeddings", help_heading = "Input")]
    embeddings_tensor: Option<String>,
    /// Window of a mask of [batch, 1, tokens, total] that the caller fills: the number of last positions that a query
    /// attends to, or `full` (repeatable, one for each such input)
    #[arg(long, value_name = "INPUT=N", value_parser = mask_window, help_heading = "Input")]
    mask_window: Vec<(String, usize)>,
    /// Convert an export whose external data is missing, to a package without weights, for `lapidary refit`
    #[arg(long, conflicts_with = "emit_onnx", help_heading = "Input")]
    without_weights: bool,
    #[command(flatten, next_help_heading = "Input")]
    value_checks: ValueChecks,

    /// Targets; every package runs on the CPU [default: cpu]
    #[arg(long, value_enum, value_delimiter = ',', help_heading = "Package")]
    target: Option<Vec<Target>>,
    /// Element type of weights and caches [default: the export's]
    #[arg(long, value_enum, help_heading = "Package")]
    dtype: Option<Precision>,
    /// Cache capacities, in tokens [default: 256,1024,4096, up to the model's context length]
    #[arg(long, value_name = "N,N", value_delimiter = ',', help_heading = "Package")]
    capacity: Option<Vec<usize>>,
    /// Also write the canonical graph as ONNX, with weights in FILE.data
    #[arg(long, value_name = "FILE", help_heading = "Package")]
    emit_onnx: Option<PathBuf>,

    /// Quantize floating-point weights: int4, int8 or fp8, with options as in int4,group=32
    ///
    /// Options, separated by commas: group=N (values along the depth that share a scale), group=channel or group=auto (32,
    /// or a number near 32 that divides the depth); symmetric or asymmetric (with zero points); keep=NAME (a weight, a
    /// module or a pattern with * that stays in floating point, besides lm_head and embeddings, which do by default) or
    /// keep=none. The default is group=auto for int4 and int8, group=channel for fp8, and symmetric
    #[arg(long, value_name = "FORMAT", help_heading = "Quantization")]
    quantize: Option<Quantization>,
    /// Calibrate on this text: scale channels by measured activations, and compensate errors of codes by later codes
    /// (needs a tokenizer)
    #[arg(
        long,
        value_name = "TEXT",
        conflicts_with = "without_weights",
        help_heading = "Quantization"
    )]
    calibrate: Option<PathBuf>,
    /// Activations that the export quantizes: rounded to their codes everywhere, rounded outside attention only, or in
    /// floating point [default: quantized]
    #[arg(long, value_parser = words::<ActivationPolicy>(&["quantized", "partial", "float"]), help_heading = "Quantization")]
    activations: Option<ActivationPolicy>,

    /// How engines get their weights: bound at load and shared, embedded in each engine, or refitted at load
    /// [default: bind]
    #[arg(long, value_parser = words::<WeightMode>(&["bind", "embed", "strip"]), help_heading = "Engines")]
    weights: Option<WeightMode>,
    /// Whether engines accept new weights: none, any of the architecture, or only the same ones [default: none]
    #[arg(long, value_parser = words::<Refit>(&["none", "general", "identical"]), help_heading = "Engines")]
    refit: Option<Refit>,
    /// Prefill chunk sizes, or one dynamic range min:opt:max [default: 128,256,512,2048]
    #[arg(long, value_name = "N,N", help_heading = "Engines")]
    prefill: Option<Prefill>,
    /// One engine per capacity for decode and prefill, with two optimization profiles (needs a range as --prefill)
    #[arg(long, help_heading = "Engines")]
    one_engine: bool,
    /// Prompts of a quantized package run on a floating-point copy of its weights, which the GPU holds beside the codes
    /// [default: on for bound weights; off is slower and needs as much scratch memory]
    #[arg(long, value_enum, help_heading = "Engines")]
    prefill_copy: Option<Switch>,
    /// Lapidary's decode kernels between TensorRT engines, for bound weights in 16 bits, int8 or int4 [default: on where
    /// supported]
    #[arg(long, value_enum, help_heading = "Engines")]
    kernels: Option<Switch>,
    /// Also build engines that decode N sequences in one step (2 to 16), for `serve`
    #[arg(long, value_name = "N,N", value_delimiter = ',', help_heading = "Engines")]
    batch: Option<Vec<usize>>,
    /// Measure the ways to lower each engine on this machine's GPU and keep the fastest
    #[arg(long, help_heading = "Engines")]
    tune: bool,
    /// Folder of engine plans to reuse and to add to
    #[arg(long, value_name = "DIR", help_heading = "Engines")]
    engine_cache: Option<PathBuf>,
    /// TensorRT library to build with
    #[arg(long, value_name = "PATH", help_heading = "Engines")]
    tensorrt_lib: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
enum Switch {
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
        super::warning(warning);
    }
    let manifest = &converted.manifest;
    if let Some(path) = &args.save_spec {
        save_spec(path, &converted.conversion)?;
    }

    if let Some(form) = args.json {
        return super::print_json(manifest, form);
    }
    let mut text = info::summary(manifest);
    let files = &converted.files;
    if !files.variants.is_empty() {
        text += &format!("export: {}\n", files.model.display());
    }
    let is_taken = |variant: &&Variant| args.model.join(&variant.file) == files.model;
    let others: Vec<String> = files
        .variants
        .iter()
        .filter(|v| !is_taken(v))
        .map(Variant::to_string)
        .collect();
    if !others.is_empty() {
        text += &format!("other variants (--variant): {}\n", others.join(", "));
    }
    if converted.tokenizer_ids.is_none() {
        text += "no tokenizer found beside the model: the package takes token ids only (see --tokenizer)\n";
    }
    let ids = converted.tokenizer_ids.unwrap_or(0);
    if let Some(known) = manifest.architecture.vocabulary.filter(|known| ids > *known) {
        text += &format!(
            "the tokenizer has {ids} tokens, the model's vocabulary {known}: check that it is the model's tokenizer\n"
        );
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

/// In the form of the passes.
pub fn mask_windows(windows: impl IntoIterator<Item = (String, usize)>) -> MaskWindows {
    let window = |(name, window): (String, usize)| (name, Some(window).filter(|w| *w > 0));
    windows.into_iter().map(window).collect()
}

/// The conversion as a spec that repeats it, with or without a GPU.
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
        // The spec can be in any folder, and the text does not move.
        calibrate: conversion
            .calibrate
            .as_ref()
            .map(|text| text.canonicalize().unwrap_or_else(|_| text.clone())),
        capacity: Some(conversion.capacities.clone()),
        prefill: Some(conversion.prefill.clone()),
        one_engine: conversion.one_engine.then_some(true),
        prefill_copy: Some(conversion.prefill_copy),
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
        prefill_copy: args.prefill_copy.map(|copy| copy == Switch::On),
        tokenizer: args.tokenizer.clone(),
        kernels: args.kernels.map(|kernels| kernels == Switch::On),
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
