//! The conversion of one model, as data: from a package, or from a file if the package is not available.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bench::model::dtype;
use crate::help::{Fault, Help};
use crate::lower::{self, LowerError};
use crate::network::{Profile, WeightMode};
use crate::package::manifest::{ExportFile, PassRecord};
use crate::package::{Package, PackageError};
use crate::passes::Architecture;
use crate::target::{Prefill, Refit};

/// The value of `schema`.
pub const SCHEMA: &str = "lapidary-conversion/1";

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Conversion {
    pub schema: String,
    /// The package's folder.
    pub name: String,
    pub lapidary: String,
    pub source: ExportFile,
    pub architecture: Architecture,
    pub dtype: String,
    pub capacities: Vec<usize>,
    pub prefill: Prefill,
    pub weight_mode: WeightMode,
    /// In order.
    pub passes: Vec<PassRecord>,
    pub weights: WeightFacts,
    /// One per engine; without engines, for decode and for a first prefill on the CPU.
    pub profiles: Vec<LoweredProfile>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WeightFacts {
    pub tensors: usize,
    pub bytes: u64,
    pub set_hash: String,
    /// Stored with another tensor of the same bytes.
    pub shared: usize,
    /// Weights whose axes are in another order than in the export.
    pub transposed: usize,
    /// Weights whose place in the model is known.
    pub named: usize,
    pub stripped: bool,
}

/// A network lowered for one profile, and its engine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LoweredProfile {
    pub profile: String,
    /// Layers by kind; weights are counted separately.
    pub layers: BTreeMap<String, usize>,
    pub weights: usize,
    pub engine: Option<EngineFacts>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EngineFacts {
    pub bytes: u64,
    pub build_ms: u64,
    pub weight_mode: WeightMode,
    pub refit: Refit,
    pub tensorrt: String,
}

impl LoweredProfile {
    pub fn total(&self) -> usize {
        self.layers.values().sum()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConversionError {
    #[error(transparent)]
    Package(#[from] PackageError),
    #[error(transparent)]
    Lower(#[from] LowerError),
}

impl Help for ConversionError {
    fn fault(&self) -> Fault {
        match self {
            ConversionError::Package(error) => error.fault(),
            ConversionError::Lower(error) => error.fault(),
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            ConversionError::Package(error) => error.help(),
            ConversionError::Lower(error) => error.help(),
        }
    }
}

/// The facts of a package; its networks are lowered again to be counted. Needs no weights.
pub fn conversion(package: &Package) -> Result<Conversion, ConversionError> {
    let manifest = &package.manifest;
    let graph = package.architecture()?;
    let mut profiles = Vec::new();
    for engine in &manifest.engines {
        let options = lower::LowerOptions {
            weight_mode: engine.weight_mode,
            ..engine.lowering.clone()
        };
        profiles.push(LoweredProfile {
            engine: Some(EngineFacts {
                bytes: engine.bytes,
                build_ms: engine.build_ms,
                weight_mode: engine.weight_mode,
                refit: engine.refit,
                tensorrt: engine.tensorrt_version.clone(),
            }),
            ..lowered(&graph, &engine.profile, &options)?
        });
    }
    if profiles.is_empty() {
        let capacity = manifest.capacities[0];
        let tokens = match &manifest.prefill {
            Prefill::Chunks(chunks) => chunks.first().copied().unwrap_or(1),
            Prefill::Range(range) => range.opt,
        };
        for profile in [
            Profile::decode(capacity),
            Profile::prefill(tokens.min(capacity), capacity),
        ] {
            profiles.push(lowered(&graph, &profile, &lower::LowerOptions::default())?);
        }
    }
    let weights = &manifest.weights.tensors;
    let counted =
        |of: &dyn Fn(&crate::package::manifest::WeightEntry) -> bool| weights.iter().filter(|w| of(w)).count();
    Ok(Conversion {
        schema: SCHEMA.to_string(),
        name: package.name(),
        lapidary: manifest.lapidary_version.clone(),
        source: manifest.source.clone(),
        architecture: manifest.architecture.clone(),
        dtype: dtype(manifest.dtype).to_string(),
        capacities: manifest.capacities.clone(),
        prefill: manifest.prefill.clone(),
        weight_mode: manifest.weight_mode,
        passes: manifest.passes.clone(),
        weights: WeightFacts {
            tensors: weights.len(),
            bytes: manifest.weights.bytes,
            set_hash: manifest.weights.set_hash.clone(),
            shared: counted(&|w| w.same_as.is_some()),
            transposed: counted(&|w| w.recipe.as_ref().is_some_and(|r| r.is_transposed())),
            named: counted(&|w| w.modules.is_some()),
            stripped: manifest.weights.stripped,
        },
        profiles,
    })
}

fn lowered(
    graph: &crate::graph::Graph,
    profile: &Profile,
    options: &lower::LowerOptions,
) -> Result<LoweredProfile, LowerError> {
    let network = lower::lower(graph, profile, options)?;
    let mut layers = BTreeMap::new();
    for layer in &network.layers {
        *layers.entry(layer.kind.name().to_string()).or_insert(0) += 1;
    }
    layers.remove("Weight");
    Ok(LoweredProfile {
        profile: profile.to_string(),
        layers,
        weights: network.weights.len(),
        engine: None,
    })
}
