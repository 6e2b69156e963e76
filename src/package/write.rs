//! Writes a package: weights first, as they are computed, then the graph that refers to them, other files, and
//! the manifest last.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::manifest::{
    self, EngineEntry, ExportFile, FORMAT_VERSION, Manifest, PassRecord, Place, StoredFile, WeightEntry,
};
use super::staging::Staging;
use super::{CONSTANTS, ENGINES, GRAPH, MANIFEST, Package, PackageError, TOKENIZER, WEIGHTS, hash_file};
use crate::graph::{Constant, Graph, ValueId};
use crate::interface::Interface;
use crate::network::WeightMode;
use crate::passes::{Activations, Architecture};
use crate::target::{Prefill, Refit, Target};
use crate::tensor::DType;
use crate::text::{self, Tokenizer};
use crate::weights::checks::{self, Allowed};
use crate::weights::model::architecture_hash;
use crate::weights::norm_parameter::NormParameter;
use crate::weights::recipe::Recipe;
use crate::{lower, onnx, weights};

/// The manifest's contents besides the files.
#[derive(Clone, Debug)]
pub struct ManifestHeader {
    /// The export.
    pub source: ExportFile,
    /// Sizes of the model.
    pub architecture: Architecture,
    /// Element type of weights and caches.
    pub dtype: DType,
    /// Targets of the conversion.
    pub targets: Vec<Target>,
    /// How weights enter engines.
    pub weight_mode: WeightMode,
    /// Which weights of engines can be replaced.
    pub refit: Refit,
    /// Slots a cache can have, ascending.
    pub capacities: Vec<usize>,
    /// How prompts are cut for engines.
    pub prefill: Prefill,
    /// Report of each pass, in order.
    pub passes: Vec<PassRecord>,
    /// Which activations are rounded to codes.
    pub activations: Activations,
}

/// A package being written. Dropping it removes all its files.
pub struct Writer {
    staging: Staging,
    force: bool,
    manifest: Manifest,
}

impl Writer {
    /// Writes weights and graph; invalid values are refused unless `allowed`. `progress` gets the bytes of weights
    /// written so far and in total.
    pub fn new(
        target: &Path,
        force: bool,
        graph: &Graph,
        header: ManifestHeader,
        allowed: Allowed,
        progress: impl FnMut(u64, u64),
    ) -> Result<Self, PackageError> {
        let staging = Staging::new(target, force)?;
        let modules = weights::modules::modules(graph);
        let describe = |id: ValueId, constant: &Constant| {
            let recipe = Recipe::of(constant);
            Provenance {
                source_name: constant.origin().map(str::to_string),
                modules: modules
                    .get(&id)
                    .map(|modules| modules.clone().stored_as(recipe.as_ref())),
                recipe,
                learned: None,
            }
        };
        let stored_graph = write_graph(&staging, graph, describe, &mut checks::inspector(allowed), progress)?;
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            lapidary_version: env!("CARGO_PKG_VERSION").to_string(),
            source: header.source,
            architecture: header.architecture,
            dtype: header.dtype,
            targets: header.targets,
            weight_mode: header.weight_mode,
            refit: header.refit,
            interface: graph.interface.as_ref().map(Interface::signature),
            capacities: header.capacities,
            prefill: header.prefill,
            graph: stored_graph.graph,
            architecture_hash: architecture_hash(graph),
            weights: stored_graph.weights,
            constants: stored_graph.constants,
            norms: None,
            mask_windows: BTreeMap::new(),
            quantization: None,
            engines: Vec::new(),
            tuning: None,
            tokenizer: None,
            eos_token_ids: BTreeSet::new(),
            passes: header.passes,
            activations: header.activations,
        };
        Ok(Writer {
            staging,
            force,
            manifest,
        })
    }

    /// Continues with a package that is staged except for the manifest.
    pub(super) fn resume(staging: Staging, force: bool, manifest: Manifest) -> Self {
        Writer {
            staging,
            force,
            manifest,
        }
    }

    /// The package so far, for example to lower its graph with the weights mapped from their final file.
    pub fn package(&self) -> Package {
        Package {
            folder: self.staging.folder().to_path_buf(),
            manifest: self.manifest.clone(),
        }
    }

    /// Copies the tokenizer's files.
    pub fn tokenizer(&mut self, tokenizer: &Tokenizer) -> Result<(), PackageError> {
        let folder = self.staging.folder().join(TOKENIZER);
        fs::create_dir(&folder).map_err(PackageError::io(&folder))?;
        let mut files = Vec::new();
        for (i, from) in tokenizer.files.iter().enumerate() {
            // The first may have another name if it was given as a file; in the package it gets the usual name.
            let name = match i {
                0 => Path::new(text::FILES[0]),
                _ => Path::new(from.file_name().expect("opened as a file")),
            };
            let to = folder.join(name);
            fs::copy(from, &to).map_err(PackageError::io(&to))?;
            files.push(stored(
                self.staging.folder(),
                &format!("{TOKENIZER}/{}", name.display()),
            )?);
        }
        self.manifest.tokenizer = Some(manifest::TokenizerFiles {
            files,
            chat_template: tokenizer.chat_template.is_some(),
        });
        self.manifest.eos_token_ids = tokenizer.eos_ids.clone();
        Ok(())
    }

    /// Tokens that end a text, if no tokenizer defines them.
    pub fn eos_token_ids(&mut self, ids: BTreeSet<u32>) {
        self.manifest.eos_token_ids = ids;
    }

    /// The windows of the export's masks that the caller fills.
    pub fn mask_windows(&mut self, windows: BTreeMap<String, usize>) {
        self.manifest.mask_windows = windows;
    }

    /// How checkpoints of this model store norms, if known.
    pub fn norms(&mut self, norms: Option<NormParameter>) {
        self.manifest.norms = norms;
    }

    /// How weights in floating point were quantized.
    pub fn quantization(&mut self, quantization: manifest::QuantizationRecord) {
        self.manifest.quantization = Some(quantization);
    }

    /// The measurements behind the choices of the engines' lowerings.
    pub fn tuning(&mut self, tuning: crate::tune::Tuning) {
        self.manifest.tuning = Some(tuning);
    }

    /// Adds a plan, or another profile of the same. `engine.file`, `bytes` and `blake3` are filled in here; `weights`
    /// are the names of its weights.
    pub fn engine(
        &mut self,
        mut engine: EngineEntry,
        plan: &[u8],
        weights: &HashSet<String>,
    ) -> Result<(), PackageError> {
        let folder = self.staging.folder().join(ENGINES);
        fs::create_dir_all(&folder).map_err(PackageError::io(&folder))?;
        let label = engine.profile.to_string();
        engine.file = format!("{ENGINES}/{}-{}.plan", engine.lowered_for(), engine.target);
        let path: PathBuf = self.staging.folder().join(&engine.file);
        fs::write(&path, plan).map_err(PackageError::io(&path))?;
        engine.bytes = plan.len() as u64;
        engine.blake3 = blake3::hash(plan).to_hex().to_string();
        let constants = self.manifest.constants.iter_mut().flat_map(|c| &mut c.tensors);
        for weight in self.manifest.weights.tensors.iter_mut().chain(constants) {
            if weights.contains(&weight.name) && !weight.engines.contains(&label) {
                weight.engines.push(label.clone());
            }
        }
        self.manifest.engines.push(engine);
        Ok(())
    }

    /// Writes the manifest and moves the package to its final location.
    pub fn finish(self) -> Result<Manifest, PackageError> {
        let path = self.staging.folder().join(MANIFEST);
        let mut text = serde_json::to_string_pretty(&self.manifest).expect("plain data serializes");
        text.push('\n');
        fs::write(&path, text).map_err(PackageError::io(&path))?;
        self.staging.commit(self.force)?;
        Ok(self.manifest)
    }
}

pub(super) fn stored(folder: &Path, file: &str) -> Result<StoredFile, PackageError> {
    let path = folder.join(file);
    Ok(StoredFile {
        file: file.to_string(),
        bytes: fs::metadata(&path).map_err(PackageError::io(&path))?.len(),
        blake3: hash_file(&path)?,
    })
}

/// The source of a weight.
pub(super) struct Provenance {
    pub source_name: Option<String>,
    /// `None`: a pass computed it, so it is not a weight of the model.
    pub recipe: Option<Recipe>,
    pub modules: Option<Recipe>,
    pub learned: Option<Recipe>,
}

/// The files of a graph and their contents.
pub(super) struct StoredGraph {
    pub graph: StoredFile,
    pub weights: manifest::WeightFile,
    pub constants: Option<manifest::WeightFile>,
}

/// Writes the weights of a graph, the tables that passes computed, and the graph that refers to both. `inspect` is
/// called with every weight before it is written.
pub(super) fn write_graph(
    staging: &Staging,
    graph: &Graph,
    describe: impl Fn(ValueId, &Constant) -> Provenance,
    inspect: weights::Inspect<'_>,
    mut progress: impl FnMut(u64, u64),
) -> Result<StoredGraph, PackageError> {
    let all: Vec<Entry> = lower::stored_weights(graph)
        .into_iter()
        .map(|(id, weight)| Entry {
            id,
            provenance: describe(id, &weight.constant),
            name: weight.name,
            constant: weight.constant,
        })
        .collect();
    let (of_model, computed): (Vec<Entry>, Vec<Entry>) = all.into_iter().partition(|e| e.provenance.recipe.is_some());
    let mut layout = onnx::Layout::new();
    let constants = match computed.is_empty() {
        true => None,
        false => Some(write_weights(
            staging.folder(),
            CONSTANTS,
            computed,
            &mut layout,
            &mut |_, _, _| Ok(()),
            |_, _| {},
        )?),
    };
    let weights = write_weights(staging.folder(), WEIGHTS, of_model, &mut layout, inspect, &mut progress)?;
    let path = staging.folder().join(GRAPH);
    onnx::write(graph, &path, Some(&layout)).map_err(|source| PackageError::Graph {
        path: path.clone(),
        source,
    })?;
    Ok(StoredGraph {
        graph: stored(staging.folder(), GRAPH)?,
        weights,
        constants,
    })
}

struct Entry {
    id: ValueId,
    name: String,
    constant: Constant,
    provenance: Provenance,
}

fn write_weights(
    folder: &Path,
    file: &str,
    entries: Vec<Entry>,
    layout: &mut onnx::Layout,
    inspect: weights::Inspect<'_>,
    mut progress: impl FnMut(u64, u64),
) -> Result<manifest::WeightFile, PackageError> {
    let tensors: Vec<(String, Constant)> = entries.iter().map(|e| (e.name.clone(), e.constant.clone())).collect();
    let total: u64 = tensors.iter().map(|(_, c)| c.stored_byte_len() as u64).sum();
    let metadata = BTreeMap::from([("format".to_string(), "lapidary".to_string())]);
    let path = folder.join(file);
    // A model without its weights gives a stripped package for a later refit.
    let stripped = tensors.iter().any(|(_, constant)| !constant.is_present());
    let stored = match stripped {
        true => weights::placements(&tensors),
        false => weights::write(&path, &tensors, &metadata, inspect, |done| progress(done, total))?,
    };
    let mut weights = Vec::with_capacity(entries.len());
    for (entry, stored) in entries.into_iter().zip(stored) {
        let placement = |tensor: &weights::StoredTensor| onnx::Placement {
            file: file.to_string(),
            offset: tensor.offset,
            length: tensor.bytes,
        };
        layout.insert(entry.id, stored.tensors().into_iter().map(placement).collect());
        let at = Place::of(stored);
        weights.push(WeightEntry {
            name: entry.name,
            source_name: entry.provenance.source_name,
            recipe: entry.provenance.recipe,
            modules: entry.provenance.modules,
            learned: entry.provenance.learned,
            dtype: entry.constant.dtype(),
            shape: entry.constant.shape().to_vec(),
            blake3: at.blake3,
            offset: at.offset,
            bytes: at.bytes,
            same_as: at.same_as,
            quantized: at.quantized,
            engines: Vec::new(),
        });
    }
    let (bytes, set_hash) = match stripped {
        true => (total, String::new()),
        false => (
            fs::metadata(&path).map_err(PackageError::io(&path))?.len(),
            weights::set_hash(weights.iter().map(WeightEntry::line)),
        ),
    };
    Ok(manifest::WeightFile {
        file: file.to_string(),
        bytes,
        set_hash,
        stripped,
        refit: None,
        tensors: weights,
    })
}
