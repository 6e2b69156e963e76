//! Replaces the weights of a package: all weights are found first, then a new package is written beside the old one and
//! replaces it atomically. If the process is killed, either the old package or the new one exists.

use std::collections::HashMap;

use super::manifest::{EngineEntry, RefitRecord, WeightEntry, WeightFile};
use super::staging::{Staging, carry_kernels, carry_over};
use super::write::{Provenance, write_graph};
use super::{Package, PackageError, Writer};
use crate::graph::{Constant, ValueId};
use crate::help::Help;
use crate::network::WeightMode;
use crate::target;
use crate::weights::checks::{self, Allowed};
use crate::weights::config::{self, ConfigError};
use crate::weights::lora::Adapter;
use crate::weights::matching::{Found, Matched, Mismatch, matched};
use crate::weights::source::WeightSource;
use crate::weights::{WriteError, content_hash, set_hash};

/// The new weights of a package, and options.
pub struct RefitRequest<'a> {
    /// Where the weights come from.
    pub source: &'a WeightSource,
    /// The adapter, with the name of its folder.
    pub adapter: Option<(&'a str, &'a Adapter)>,
    /// Refuse a weight set other than the package's. `None`: the conversion's choice.
    pub identical: Option<bool>,
    /// Invalid values that are allowed.
    pub allowed: Allowed,
    /// Accept tensors of the source that no weight uses.
    pub extra_allowed: bool,
}

/// Weights that do not fit a package.
#[derive(Debug, thiserror::Error)]
pub enum RefitError {
    /// The package cannot be read, or the new one written.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// Weights that are missing, do not fit or are surplus.
    #[error("{0}")]
    Mismatch(#[from] Box<Mismatch>),
    /// Weights whose `config.json` describes another model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// An identical refit of a package that never had weights.
    #[error("{path}: made without weights, so none can be identical to those it had")]
    NeverHad {
        /// Path of the package.
        path: String,
    },
    /// Other weights for a package that was calibrated.
    #[error(
        "{path}: its weights were calibrated together on the text {text:?} when they were quantized, and {source_path} holds \
         others"
    )]
    Calibrated {
        /// Path of the package.
        path: String,
        /// File used for calibration.
        text: String,
        /// Path of the weights.
        source_path: String,
    },
    /// Other weights were requested. Such an engine accepts any values at load, but was optimized for the old ones.
    #[error(
        "{path}: its engines were stripped for an identical refit and take back only the weights that they were built with"
    )]
    OnlyItsOwn {
        /// Path of the package.
        path: String,
    },
    /// Weights differ in an identical refit.
    #[error(
        "{source_path}: another weight set than this package had: {} of {of} weights differ, the first is {:?}{}",
        different.len(), different[0].name, transposed_note(different)
    )]
    NotIdentical {
        /// Path of the weights.
        source_path: String,
        /// Weights with other values than the package's; at least one.
        different: Vec<DifferingWeight>,
        /// Number of weights.
        of: usize,
    },
}

impl Help for RefitError {
    fn help(&self) -> Option<String> {
        match self {
            RefitError::Package(error) => error.help(),
            RefitError::Mismatch(mismatch) => mismatch.help(),
            RefitError::Config(error) => error.help(),
            RefitError::OnlyItsOwn { .. } => Some(
                "convert again with `--weights strip --refit general` for engines that take other weights".to_string(),
            ),
            RefitError::Calibrated { .. } => Some(
                "convert the other weights' export with the same --quantize and --calibrate, or quantize without \
                 --calibrate for packages that take weights in floating point"
                    .to_string(),
            ),
            RefitError::NotIdentical { .. } | RefitError::NeverHad { .. } => {
                Some("use --mode general if other weights are what you want".to_string())
            }
        }
    }
}

/// Finds every weight of a package in a source whose `config.json`, if it has one, describes no other model.
///
/// A property that only follows from the `model_type` is not a contradiction if all values equal the package's: then
/// the package was made from this checkpoint.
pub fn find_weights(
    package: &Package,
    source: &WeightSource,
    adapter: Option<&Adapter>,
    extra_allowed: bool,
) -> Result<Found, RefitError> {
    let manifest = &package.manifest;
    let capacity = manifest.capacities.iter().copied().max();
    let graph = package.architecture()?;
    let required = package.required_for(&graph);
    let find = |adapter| matched(&required, source, adapter, extra_allowed);
    let calibration = manifest.quantization.as_ref().and_then(|q| q.calibration.as_ref());
    if let Some(calibration) = calibration {
        let same_graph = source
            .model()
            .is_some_and(|m| m.architecture_hash == manifest.architecture_hash);
        if !same_graph || adapter.is_some() {
            return Err(RefitError::Calibrated {
                path: package.folder.display().to_string(),
                text: calibration.text.clone(),
                source_path: source.path.display().to_string(),
            });
        }
    }
    let Err(error) = config::check(source, &graph, &manifest.architecture, capacity) else {
        return Ok(find(adapter)?);
    };
    if source.is_graph() {
        // Weights of another architecture are named first: that message is more useful.
        find(adapter)?;
    } else if error.is_of_the_model_type()
        && let Ok(found) = find(None)
        && differing_weights(&manifest.weights, &found.weights)?.is_empty()
    {
        return Ok(find(adapter)?);
    }
    Err(error.into())
}

/// A weight whose bytes would differ from the package's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DifferingWeight {
    /// In the package.
    pub name: String,
    /// Its transpose is equal: the source has one transpose too many or too few.
    pub transposed: bool,
}

/// The weights that would differ from the package's.
pub fn differing_weights(weights: &WeightFile, matched: &[Matched]) -> Result<Vec<DifferingWeight>, PackageError> {
    let mut different = Vec::new();
    for (weight, matched) in weights.tensors.iter().zip(matched) {
        let hash = |constant: &Constant| -> Result<String, PackageError> {
            content_hash(constant).map_err(|source| {
                let name = weight.name.clone();
                PackageError::Weights(WriteError::Constant { name, source })
            })
        };
        if hash(&matched.constant)? == weight.blake3 {
            continue;
        }
        // For others, shapes differ.
        let square = matches!(weight.shape[..], [rows, columns] if rows == columns);
        different.push(DifferingWeight {
            name: weight.name.clone(),
            transposed: square && hash(&matched.constant.transposed(&[1, 0]))? == weight.blake3,
        });
    }
    Ok(different)
}

/// The message about weights that are only transposed; empty if none is.
pub(crate) fn transposed_note(different: &[DifferingWeight]) -> String {
    let transposed: Vec<&str> = different
        .iter()
        .filter(|d| d.transposed)
        .map(|d| d.name.as_str())
        .collect();
    match transposed[..] {
        [] => String::new(),
        [one] => format!("; {one:?} is the transpose of what the package had"),
        [first, ..] => format!(
            "; {} are transposes of what the package had, {first:?} for example",
            transposed.len()
        ),
    }
}

/// Finds, checks and writes the new weights, and copies everything else. The writer's package has the engines without
/// weights; engines with weights are missing, and must be built again before it is finished.
pub fn refit(
    package: &Package,
    refit: &RefitRequest<'_>,
    progress: impl FnMut(u64, u64),
) -> Result<Writer, RefitError> {
    let manifest = &package.manifest;
    let only_its_own = manifest.engines.iter().any(EngineEntry::takes_only_its_own_weights);
    if only_its_own && refit.identical == Some(false) {
        return Err(RefitError::OnlyItsOwn {
            path: package.folder.display().to_string(),
        });
    }
    let identical = refit
        .identical
        .unwrap_or(only_its_own || manifest.refit == target::Refit::Identical);
    let adapter = refit.adapter.map(|(_, adapter)| adapter);
    let found = find_weights(package, refit.source, adapter, refit.extra_allowed)?;
    let norms = found.norms;
    let found = found.weights;
    if identical && manifest.weights.set_hash.is_empty() {
        return Err(RefitError::NeverHad {
            path: package.folder.display().to_string(),
        });
    }
    if identical {
        let different = differing_weights(&manifest.weights, &found)?;
        if !different.is_empty() {
            return Err(RefitError::NotIdentical {
                source_path: refit.source.path.display().to_string(),
                different,
                of: manifest.weights.tensors.len(),
            });
        }
    }
    let mut graph = package.architecture()?;
    let by_name: HashMap<&str, (&WeightEntry, &Matched)> = manifest
        .weights
        .tensors
        .iter()
        .zip(&found)
        .map(|(weight, matched)| (weight.name.as_str(), (weight, matched)))
        .collect();
    let ids: Vec<ValueId> = graph.value_ids().collect();
    for id in ids {
        if let Some((_, matched)) = by_name.get(graph.value(id).name.as_str()) {
            graph.set_constant(id, matched.constant.clone());
        }
    }

    let staging = Staging::new(&package.folder, true).map_err(RefitError::Package)?;
    let describe = |id: ValueId, _: &Constant| match by_name.get(graph.value(id).name.as_str()) {
        Some((weight, matched)) => Provenance {
            source_name: Some(matched.from.join(" + ")),
            recipe: weight.recipe.clone(),
            modules: weight.modules.clone(),
            learned: matched.learned.clone().or_else(|| weight.learned.clone()),
        },
        None => Provenance {
            source_name: None,
            recipe: None,
            modules: None,
            learned: None,
        },
    };
    let stored = write_graph(
        &staging,
        &graph,
        describe,
        &mut checks::inspector(refit.allowed),
        progress,
    )?;
    let mut new = manifest.clone();
    new.graph = stored.graph;
    new.constants = stored.constants;
    new.weights = stored.weights;
    // The engines that read a weight or a table do not change.
    let files = std::iter::once(&manifest.weights).chain(&manifest.constants);
    let engines: HashMap<&str, &Vec<String>> = files
        .flat_map(|w| &w.tensors)
        .map(|w| (w.name.as_str(), &w.engines))
        .collect();
    for weight in std::iter::once(&mut new.weights)
        .chain(&mut new.constants)
        .flat_map(|w| &mut w.tensors)
    {
        if let Some(engines) = engines.get(weight.name.as_str()) {
            weight.engines = (*engines).clone();
        }
    }
    debug_assert_eq!(
        new.weights.set_hash,
        set_hash(new.weights.tensors.iter().map(WeightEntry::line))
    );
    let file_name = |path: &std::path::Path| {
        path.file_name()
            .unwrap_or(path.as_os_str())
            .to_string_lossy()
            .into_owned()
    };
    new.weights.refit = Some(RefitRecord {
        source: file_name(&refit.source.path),
        kind: refit.source.kind.clone(),
        lora: refit.adapter.map(|(name, _)| name.to_string()),
    });
    new.norms = norms;
    new.engines.retain(|engine| engine.weight_mode != WeightMode::Embed);
    carry_over(package, &staging, &new)?;
    carry_kernels(package, &staging);
    Ok(Writer::resume(staging, true, new))
}
