//! From an export to a package: all steps in order.
//!
//! [`convert()`] reads an export, makes it canonical, writes weights and graph, adds the tokenizer, builds the engines
//! of the targets and moves the package to its final location, completely or not at all. It takes a [`Conversion`] (a
//! resolved [`Spec`](crate::spec::Spec)) and reports to a [`Progress`]. [`examine()`] reports beforehand whether that
//! is possible, and why not. [`engines`] also builds engines for a refit. Flags and printing belong to the command
//! line.

mod branches;
pub mod engines;
mod error;
mod examine;
mod files;
mod masks;
#[cfg(feature = "engines")]
mod tune;

use std::path::Path;
use std::sync::Arc;

pub use engines::EngineOptions;
pub use error::ConvertError;
pub use examine::{Examination, examine};
pub use files::{FilesError, ModelFiles, Variant, find as find_model};

use crate::graph::{Graph, infer};
use crate::graph::{Obstacle, Obstacles, verify};
use crate::interface::Role;
use crate::onnx;
use crate::package::manifest::{ExportFile, PassRecord, QuantizationRecord};
use crate::package::{self, Manifest, ManifestHeader, PackageError, PlanCache, Writer};
use crate::passes;
use crate::quantize::{self, QuantizeError};
use crate::spec::Conversion;
use crate::target::Quantization;
use crate::tensor::DType;
use crate::text::{self, Tokenizer};
use crate::weights::WriteError;
use crate::weights::checks::Allowed;
use crate::weights::embeddings::{self, EmbeddingError};
use crate::weights::norm_parameter;

/// Receives the progress of a conversion. Every method has a default that does nothing; `()` implements it.
pub trait Progress: Send + Sync {
    /// Work of unknown length began: `reading`, `rewriting`, `tuning`, `engines`.
    fn step(&self, what: &str) {
        let _ = what;
    }

    /// Progress in bytes.
    fn bytes(&self, what: &'static str, done: u64, total: u64) {
        let _ = (what, done, total);
    }

    /// Progress as a share, 0 to 1.
    fn share(&self, what: &str, share: f32) {
        let _ = (what, share);
    }

    /// A note to print.
    fn note(&self, line: &str) {
        let _ = line;
    }

    /// Called before engines are built. The result is queried often, from several threads, whether to stop; it is
    /// dropped when all engines are built.
    fn stop_signal(&self) -> Arc<dyn Fn() -> bool + Send + Sync> {
        Arc::new(|| false)
    }
}

impl Progress for () {}

/// Options of a conversion that do not change the package's contents.
#[derive(Clone)]
pub struct ConvertOptions<'a> {
    /// Replace an existing package.
    pub force: bool,
    /// Which export of a folder: `q4f16`.
    pub variant: Option<&'a str>,
    /// The table of token embeddings, for an export that takes embeddings: `embed_tokens.onnx`, `.npy`, or a checkpoint.
    /// Looked for beside the export if not given.
    pub embeddings: Option<&'a Path>,
    /// The table's tensor in a checkpoint, if its name is ambiguous.
    pub embeddings_tensor: Option<&'a str>,
    /// Invalid values to accept.
    pub allowed: Allowed,
    /// Convert an export without its external data to a stripped package.
    pub without_weights: bool,
    /// Write the canonical graph here too, as ONNX with its weights beside it.
    pub emit_onnx: Option<&'a Path>,
    /// The TensorRT library; searched if not given.
    pub tensorrt_lib: Option<&'a Path>,
    /// Measure the lowerings of each engine on this machine's GPU and use the fastest.
    pub tune: bool,
    /// Folder of the plan cache.
    pub engine_cache: Option<&'a Path>,
    /// Receives the progress.
    pub progress: Arc<dyn Progress>,
}

impl Default for ConvertOptions<'_> {
    fn default() -> Self {
        ConvertOptions {
            force: false,
            variant: None,
            embeddings: None,
            embeddings_tensor: None,
            allowed: Allowed::default(),
            without_weights: false,
            emit_onnx: None,
            tensorrt_lib: None,
            tune: false,
            engine_cache: None,
            progress: Arc::new(()),
        }
    }
}

/// Result of a conversion.
pub struct Converted {
    /// The converted export, and the other files in its folder.
    pub files: ModelFiles,
    /// The manifest of the package.
    pub manifest: Manifest,
    /// The conversion as executed, with the choices of tuning.
    pub conversion: Conversion,
    /// Tokens of the tokenizer; `None` if there is none, and the package takes token ids only.
    pub tokenizer_ids: Option<usize>,
    /// Properties of the model's files that the package or its engines lack: one line each.
    pub warnings: Vec<String>,
}

/// Converts an export to the package `output`: `path` is its file, or a folder for [`find_model`].
pub fn convert(
    path: &Path,
    output: &Path,
    mut conversion: Conversion,
    options: &ConvertOptions<'_>,
) -> Result<Converted, ConvertError> {
    // Cheap checks come first.
    package::check_target(output, options.force)?;
    let library = engines::library(&conversion.targets, options.tensorrt_lib)?;
    if options.tune {
        let library = library.as_ref().ok_or(ConvertError::NothingToTune)?;
        #[cfg(feature = "engines")]
        tune::check(library)?;
        #[cfg(not(feature = "engines"))]
        let _ = library;
    }
    let progress = &options.progress;
    progress.step("reading");
    let files = files::find(path, options.variant)?;
    let (model, configs) = (files.model.as_path(), files.configs.as_path());
    let mut tokenizer = match conversion.tokenizer.as_ref().or(files.tokenizer.as_ref()) {
        Some(path) => Some(Tokenizer::open(path)?),
        None => None,
    };
    let text = match &conversion.calibrate {
        Some(path) => Some(calibration_text(model, path, tokenizer.as_ref())?),
        None => None,
    };
    let graph = match options.without_weights {
        true => onnx::read_stripped(model)?,
        false => onnx::read(model)?,
    };
    let source = source(model, &graph)?;
    let switch = graph.producer.switch.clone();

    progress.step("rewriting");
    examine::mask_windows(&files, &graph, &mut conversion);
    let mut canonical = examine::canonical(&files, graph, &conversion, options.allowed.overflow)?;
    if let Some(switch) = switch.filter(|_| !options.without_weights) {
        progress.step("comparing branches");
        branches::check(model, &switch)?;
    }
    let no_table = embeddings(model, &mut canonical, options)?;
    let limit = canonical.architecture.max_positions;
    let capacities = capacities(model, &conversion, limit, trained_context(configs))?;
    let quantization = match &conversion.quantize {
        Some(quantization) => {
            let made = quantized(&mut canonical, quantization, text.as_ref(), &**progress);
            Some(made.map_err(|source| ConvertError::Quantize {
                path: model.to_path_buf(),
                source,
            })?)
        }
        None => None,
    };
    if library.is_some() {
        let nodes = crate::lower::rotations_before_norms(&canonical.graph);
        if !nodes.is_empty() {
            let path = model.to_path_buf();
            return Err(ConvertError::WrongEngines { path, nodes });
        }
        engines::check_batch(&canonical.graph, &conversion, model)?;
    }
    if let Some(path) = options.emit_onnx {
        onnx::write_with_data(&canonical.graph, path).map_err(|source| ConvertError::Emit {
            path: path.to_path_buf(),
            source,
        })?;
    }

    let header = ManifestHeader {
        source,
        architecture: canonical.architecture.clone(),
        dtype: canonical.architecture.cache_dtype,
        targets: conversion.targets.clone(),
        weight_mode: conversion.weights,
        refit: conversion.refit,
        capacities: capacities.clone(),
        prefill: conversion.prefill.clone(),
        passes: canonical.report.iter().map(pass).collect(),
        activations: canonical.activations.clone(),
    };
    let mask_windows = conversion.mask_windows.clone();
    let written = Writer::new(
        output,
        options.force,
        &canonical.graph,
        header,
        options.allowed,
        |done, total| progress.bytes("weights", done, total),
    );
    let mut writer = written.map_err(|error| match error {
        source @ PackageError::Weights(WriteError::Numbers { .. }) => ConvertError::Numbers {
            path: model.to_path_buf(),
            source,
        },
        error => error.into(),
    })?;
    let vocabulary = canonical.architecture.vocabulary;
    if let Some(quantization) = quantization {
        writer.quantization(quantization);
    }
    writer.mask_windows(mask_windows);
    writer.norms(norm_parameter::of_config(configs));
    // From here on the weights are those of the package, mapped; the export is not needed any more.
    let of_engines = match &library {
        Some(_) => engines::warnings(&canonical.graph, &conversion),
        None => Vec::new(),
    };
    drop(canonical);
    let mut warnings = match &mut tokenizer {
        Some(tokenizer) => {
            if let Some(vocabulary) = vocabulary {
                tokenizer.limit_end_tokens(vocabulary);
            }
            writer.tokenizer(tokenizer)?;
            std::mem::take(&mut tokenizer.warnings)
        }
        None => {
            let mut end = text::end_tokens_of_configs(configs)?;
            if let Some(vocabulary) = vocabulary {
                end.limit(vocabulary);
            }
            writer.eos_token_ids(end.ids);
            end.warnings
        }
    };
    if let Some(library) = &library {
        #[cfg(feature = "engines")]
        if options.tune {
            tune::tune(&mut writer, library, &mut conversion, &capacities, &**progress)?;
        }
        let engines = EngineOptions {
            model,
            cache: options.engine_cache.map(PlanCache::new),
            progress: progress.clone(),
        };
        engines::build(&mut writer, library, &engines, &conversion, &capacities)?;
        warnings.extend(of_engines);
    }
    let manifest = writer.finish()?;
    warnings.extend(no_table);
    let activations = &manifest.activations;
    if !activations.left_out.is_empty() {
        warnings.push(format!(
            "{} activations that the export rounds to codes stay floating point; the manifest names them",
            activations.left_out.len()
        ));
    }
    // The result, not the request.
    conversion.capacities = capacities;
    Ok(Converted {
        files,
        manifest,
        conversion,
        tokenizer_ids: tokenizer.as_ref().map(Tokenizer::vocabulary),
        warnings,
    })
}

/// Adds the embedding table to a model that takes embeddings: the requested one, or `embed_tokens.onnx` beside it.
/// Returns a warning if there is none.
fn embeddings(
    model: &Path,
    canonical: &mut passes::Canonical,
    options: &ConvertOptions<'_>,
) -> Result<Option<String>, ConvertError> {
    let graph = &mut canonical.graph;
    let Some(width) = graph.embedding_width() else {
        return match options.embeddings {
            Some(path) => Err(EmbeddingError::NotNeeded {
                model: model.to_path_buf(),
                path: path.to_path_buf(),
            }
            .into()),
            None => Ok(None),
        };
    };
    let beside = files::embed_tokens(model);
    let Some(path) = options.embeddings.or(beside.as_deref()) else {
        return Ok(Some(
            "the model takes embeddings, and there is no table that gives them for tokens: a prompt is given as embeddings, and \
             gets one token (see --embeddings)"
                .to_string(),
        ));
    };
    let input = graph
        .interface
        .as_ref()
        .and_then(|interface| interface.input(Role::Embeddings));
    let dtype = input.and_then(|id| graph.value(id).dtype).unwrap_or(DType::F32);
    let vocabulary = canonical.architecture.vocabulary.unwrap_or(0);
    let table = embeddings::read_for(path, options.embeddings_tensor, vocabulary, width, dtype)?;
    graph.set_embedding(table);
    Ok(None)
}

/// The text to calibrate on, as tokens.
fn calibration_text(model: &Path, path: &Path, tokenizer: Option<&Tokenizer>) -> Result<quantize::Text, ConvertError> {
    let text = match tokenizer {
        Some(tokenizer) => quantize::Text::read(path, tokenizer).map_err(QuantizeError::Text),
        None => Err(QuantizeError::NoTokenizer),
    };
    text.map_err(|source| ConvertError::Quantize {
        path: model.to_path_buf(),
        source,
    })
}

/// Quantizes the canonical graph in place.
fn quantized(
    canonical: &mut passes::Canonical,
    quantization: &Quantization,
    text: Option<&quantize::Text>,
    progress: &dyn Progress,
) -> Result<QuantizationRecord, QuantizeError> {
    if let (Some(text), Some(known)) = (text, canonical.architecture.vocabulary) {
        text.check_ids(known)?;
    }
    let share = |share: f32| progress.share("calibrating", share);
    let calibration = text.map(|text| quantize::Calibration {
        text,
        longest: canonical.architecture.max_positions,
        progress: &share,
    });
    quantize::quantize(&mut canonical.graph, quantization, calibration.as_ref())
}

/// Refuses graphs that no pass can handle.
fn check(model: &Path, graph: &Graph) -> Result<(), ConvertError> {
    let mut typed = graph.clone();
    // The passes report why the graph cannot be sorted or typed.
    if typed.sort().is_err() || infer(&mut typed).is_err() {
        return Ok(());
    }
    let faults = faults(&typed);
    match faults.is_empty() {
        true => Ok(()),
        false => Err(ConvertError::Invalid {
            path: model.to_path_buf(),
            faults,
        }),
    }
}

/// All operands of the wrong number or type in a typed graph. The passes report unknown operators, and why a graph
/// cannot be typed.
pub fn faults(typed: &Graph) -> Vec<String> {
    let Err(Obstacles(obstacles)) = verify(typed) else {
        return Vec::new();
    };
    let counts = |o: &&Obstacle| {
        !matches!(
            o,
            Obstacle::Untyped { .. } | Obstacle::Structure { .. } | Obstacle::UnknownOp { .. }
        )
    };
    obstacles.iter().filter(counts).map(Obstacle::to_string).collect()
}

fn source(model: &Path, graph: &Graph) -> Result<ExportFile, PackageError> {
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

/// The context length of the model's training, from the `config.json` in this folder. For a multimodal model, that of
/// its text.
fn trained_context(configs: &Path) -> Option<usize> {
    let text = std::fs::read_to_string(configs.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_str(&text).ok()?;
    let context = [&config, &config["text_config"]]
        .iter()
        .flat_map(|config| ["max_position_embeddings", "n_positions"].map(|key| &config[key]))
        .find_map(|context| context.as_u64())?;
    usize::try_from(context).ok().filter(|n| *n > 0)
}

/// The requested capacities, or the defaults limited to the model's context. `limit`: the positions in the graph's
/// tables. `trained`: the context length of the training, which an explicit capacity may exceed.
fn capacities(
    model: &Path,
    conversion: &Conversion,
    limit: Option<usize>,
    trained: Option<usize>,
) -> Result<Vec<usize>, ConvertError> {
    let mut capacities = conversion.capacities.clone();
    let beyond = |limit: Option<usize>, capacity: usize| limit.is_some_and(|limit| capacity > limit);
    if conversion.explicit_capacities {
        return match capacities.iter().find(|c| beyond(limit, **c)) {
            Some(too_large) => Err(ConvertError::Capacity {
                path: model.to_path_buf(),
                capacity: *too_large,
                limit: limit.unwrap_or_default(),
            }),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Spec;

    fn conversion(text: &str) -> Conversion {
        Spec::parse(text).unwrap().resolve().unwrap()
    }

    #[test]
    fn default_capacities_follow_the_context_and_asked_ones_are_held_to_it() {
        let (model, default) = (Path::new("m.onnx"), conversion(""));
        let cut = |limit, trained| capacities(model, &default, limit, trained).unwrap();
        assert_eq!(cut(Some(4096), Some(8192)), [256, 1024, 4096]);
        assert_eq!(cut(Some(4096), Some(2048)), [256, 1024, 2048]);
        assert_eq!(cut(Some(1024), None), [256, 1024]);
        assert_eq!(cut(Some(64), Some(2048)), [64]);
        assert_eq!(cut(None, None), [256, 1024, 4096]);
        let asked = conversion("capacity: [128, 64]");
        assert_eq!(capacities(model, &asked, Some(128), Some(32)).unwrap(), [64, 128]);
        let error = capacities(model, &asked, Some(100), None).unwrap_err();
        assert_eq!(
            error.to_string(),
            "m.onnx: capacity 128 is larger than the 100 positions that the export has tables for"
        );
    }
}
