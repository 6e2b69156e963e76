//! `lapidary refit`: replaces the weights of a package.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::progress::Progress;
use super::value_checks::ValueChecks;
use super::{Failure, JsonForm, bytes, print, print_json, words};
use crate::convert::{EngineOptions, engines};
use crate::lower;
use crate::network::WeightMode;
use crate::package::{self, MANIFEST, Package, PlanCache};
use crate::spec::{Conversion, Tuned};
use crate::weights::lora::Adapter;
use crate::weights::source::WeightSource;

#[derive(clap::Args)]
pub struct Args {
    /// The package
    #[arg(value_name = "PKG")]
    package: PathBuf,
    /// Source of the weights: an ONNX export, a safetensors file, a Hugging Face folder or another package
    #[arg(long, value_name = "FILE_OR_DIR")]
    from: PathBuf,
    /// LoRA adapter to merge (a folder that PEFT saved)
    #[arg(long, value_name = "DIR")]
    lora: Option<PathBuf>,
    /// Quantize the weights that the adapter changes again, in their present format
    #[arg(long, requires = "lora")]
    requantize: bool,
    /// Accept any weights of the architecture, or only those that the package had [default: as converted, else general]
    #[arg(long, value_parser = words::<Mode>(&["general", "identical"]))]
    mode: Option<Mode>,
    #[command(flatten)]
    value_checks: ValueChecks,
    /// Ignore tensors that the package does not use
    #[arg(long)]
    ignore_extra: bool,
    /// TensorRT library, for engines that hold weights and are built again
    #[arg(long, value_name = "PATH")]
    tensorrt_lib: Option<PathBuf>,
    /// Folder of engine plans to reuse and to add to
    #[arg(long, value_name = "DIR")]
    engine_cache: Option<PathBuf>,
    /// Print the new manifest as JSON
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "pretty")]
    json: Option<JsonForm>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
enum Mode {
    General,
    Identical,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let package = Package::open(&args.package)?;
    let manifest = &package.manifest;
    let library = match manifest.weight_mode {
        WeightMode::Embed => engines::library(&manifest.targets, args.tensorrt_lib.as_deref())?,
        WeightMode::Bind | WeightMode::Strip => None,
    };
    let progress = Progress::new();
    progress.step("reading");
    let source = open(&args.from, &package)?;
    let adapter = args.lora.as_deref().map(Adapter::open).transpose()?;
    let adapter = adapter.map(|adapter| adapter.requantizing(args.requantize));
    let name = args
        .lora
        .as_deref()
        .and_then(Path::file_name)
        .unwrap_or_default()
        .to_string_lossy();
    let options = package::RefitRequest {
        source: &source,
        adapter: adapter.as_ref().map(|adapter| (&*name, adapter)),
        identical: args.mode.map(|mode| mode == Mode::Identical),
        allowed: args.value_checks.allowed(),
        extra_allowed: args.ignore_extra,
    };
    let mut writer = package::refit(&package, &options, |done, total| progress.bytes("weights", done, total))?;
    if let Some(library) = &library {
        let conversion = Conversion {
            targets: manifest.targets.clone(),
            weights: manifest.weight_mode,
            refit: manifest.refit,
            dtype: None,
            activations: manifest.activations.policy,
            mask_windows: manifest.mask_windows.clone(),
            quantize: None,
            calibrate: None,
            capacities: manifest.capacities.clone(),
            explicit_capacities: true,
            prefill: manifest.prefill.clone(),
            one_engine: manifest.engines.iter().any(|engine| engine.built_as.is_some()),
            // Each engine's lowering contains it.
            prefill_copy: false,
            tokenizer: None,
            kernels: None,
            batch: manifest
                .engines
                .iter()
                .map(|engine| engine.profile.batch)
                .filter(|batch| *batch > 1)
                .collect(),
            lowering: lower::LowerOptions::for_engines(),
            tuned: manifest
                .engines
                .iter()
                .map(|engine| Tuned {
                    profile: engine.profile.to_string(),
                    lowering: engine.lowering.clone(),
                })
                .collect(),
        };
        let options = EngineOptions {
            model: &args.package,
            cache: args.engine_cache.as_deref().map(PlanCache::new),
            progress: Arc::new(progress.handle()),
        };
        engines::build(&mut writer, library, &options, &conversion, &manifest.capacities)?;
    }
    let new = writer.finish()?;
    drop(progress);
    if let Some(form) = args.json {
        return print_json(&new, form);
    }
    let same = match new.weights.set_hash == manifest.weights.set_hash {
        true => "the weight set it had",
        false if manifest.weights.set_hash.is_empty() => "its first weight set",
        false => "another weight set than it had",
    };
    print(&format!(
        "{}: {} weights, {}, from {} ({}): {same}, {}\n",
        args.package.display(),
        new.weights.tensors.len(),
        bytes(new.weights.bytes),
        args.from.display(),
        source.kind,
        new.weights.set_hash
    ))
}

/// Opens the source of weights for a package. A folder with a manifest is a package.
pub fn open(path: &Path, target: &Package) -> Result<WeightSource, Failure> {
    if path.join(MANIFEST).is_file() {
        let package = Package::open(path)?;
        return Ok(package.weight_source()?);
    }
    Ok(WeightSource::open(path, &target.source_context())?)
}
