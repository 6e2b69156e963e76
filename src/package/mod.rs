//! Packages on disk: a directory with everything needed to run a model, and to describe it without running it.
//!
//! ```text
//! PKG/manifest.json         see `manifest`
//! PKG/graph.onnx            the canonical graph; its weights are external data that points into the next file
//! PKG/weights.safetensors   every weight once, aligned, readable by anything that reads safetensors; absent if stripped
//! PKG/constants.safetensors tables that passes computed, rotary angles for example; absent if there are none
//! PKG/engines/*.plan        TensorRT engines, one per profile
//! PKG/tokenizer/            the model's own tokenizer files
//! ```
//!
//! `write` builds a package in a temporary sibling folder that is renamed at the end, so a package is complete or
//! absent. [`Package::open`] checks version and sizes, [`Package::check_hashes`] every byte; [`Package::graph`] maps
//! the weights and returns the canonical graph. [`refit()`] replaces the weights of a package, [`strip`] removes them,
//! [`Package::adapted`] merges an adapter in memory. Any ONNX runtime can run `graph.onnx` in place. Other modules own
//! lowering, engines, sessions and the meaning of weights ([`crate::weights`]).

mod adapted;
mod error;
pub mod manifest;
mod plans;
mod refit;
mod staging;
mod strip;
mod write;

use std::fs;
use std::path::{Path, PathBuf};

pub use adapted::Adapted;
pub use error::PackageError;
pub use manifest::Manifest;
use manifest::QuantizedEntry;
pub(crate) use plans::PlanCache;
#[cfg(feature = "cli")]
pub(crate) use refit::transposed_note;
pub use refit::{DifferingWeight, RefitError, RefitRequest, differing_weights, find_weights, refit};
pub use staging::{check_target, remove_unfinished};
pub use strip::strip;
pub use write::{ManifestHeader, Writer};

use crate::graph::{Graph, infer};
use crate::interface::{Interface, Role};
use crate::onnx;
use crate::text::Tokenizer;
use crate::weights::matching::{Required, RequiredWeight};
use crate::weights::model::{ModelWeight, ModelWeights};
use crate::weights::source::{SourceContext, WeightSource};
use crate::weights::{modules, norm_parameter};

pub(crate) const MANIFEST: &str = "manifest.json";
pub(crate) const GRAPH: &str = "graph.onnx";
pub(crate) const WEIGHTS: &str = "weights.safetensors";
pub(crate) const CONSTANTS: &str = "constants.safetensors";
pub(crate) const ENGINES: &str = "engines";
/// Subfolder of [`ENGINES`] for kernels that TensorRT compiled at load, stored for the next process. Not part of the
/// package itself.
pub(crate) const KERNELS: &str = "kernels";
pub(crate) const TOKENIZER: &str = "tokenizer";

pub(crate) fn manifest_path(folder: &Path) -> PathBuf {
    folder.join(MANIFEST)
}

/// A package on disk whose manifest was read and whose files exist with the right sizes.
#[derive(Clone, Debug)]
pub struct Package {
    /// Its folder.
    pub folder: PathBuf,
    /// The manifest as read.
    pub manifest: Manifest,
}

impl Package {
    /// Reads the manifest, and checks its version and the sizes of all files, but no hashes.
    pub fn open(folder: &Path) -> Result<Self, PackageError> {
        let path = manifest_path(folder);
        if !path.is_file() {
            let path = folder.to_path_buf();
            return Err(match fs::metadata(folder) {
                Err(source) => PackageError::Io { path, source },
                Ok(_) => PackageError::NotAPackage { path },
            });
        }
        let text = fs::read_to_string(&path).map_err(PackageError::io(&path))?;
        let damaged = |message: String| PackageError::Manifest {
            path: path.clone(),
            message,
        };
        // Only the version first: a newer manifest may have another structure.
        let value: serde_json::Value = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
        let version = value["format_version"]
            .as_u64()
            .ok_or_else(|| damaged("it has no format_version".into()))?;
        if version > u64::from(manifest::FORMAT_VERSION) {
            return Err(PackageError::Newer {
                path: folder.to_path_buf(),
                found: version,
            });
        }
        let manifest: Manifest = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
        if manifest.capacities.is_empty() {
            return Err(damaged("it lists no cache capacity".into()));
        }
        let package = Package {
            folder: folder.to_path_buf(),
            manifest,
        };
        for (file, bytes) in package.files() {
            let path = package.path(file)?;
            let found = fs::metadata(&path)
                .map_err(|_| PackageError::Missing { path: path.clone() })?
                .len();
            if found != bytes {
                return Err(PackageError::Size {
                    path,
                    expected: bytes,
                    found,
                });
            }
        }
        Ok(package)
    }

    /// Every file named in the manifest, with its size.
    fn files(&self) -> impl Iterator<Item = (&str, u64)> {
        let m = &self.manifest;
        let tokenizer = m.tokenizer.iter().flat_map(|t| &t.files);
        let engines = m.engines.iter().map(|e| (e.file.as_str(), e.bytes));
        let weights = self.stored_weights().map(|w| (w.file.as_str(), w.bytes));
        std::iter::once((m.graph.file.as_str(), m.graph.bytes))
            .chain(weights)
            .chain(engines)
            .chain(tokenizer.map(|f| (f.file.as_str(), f.bytes)))
    }

    /// The name of its folder.
    pub fn name(&self) -> String {
        let folder = self.folder.canonicalize().unwrap_or_else(|_| self.folder.clone());
        let name = folder.file_name().map(|name| name.to_string_lossy().into_owned());
        name.unwrap_or_else(|| "package".to_string())
    }

    /// Bytes of all files named in the manifest, without later additions such as compiled kernels.
    pub fn bytes(&self) -> u64 {
        self.files().map(|(_, bytes)| bytes).sum()
    }

    /// Weights and constants whose files are present.
    fn stored_weights(&self) -> impl Iterator<Item = &manifest::WeightFile> {
        let m = &self.manifest;
        std::iter::once(&m.weights).chain(&m.constants).filter(|w| !w.stripped)
    }

    /// The path of a file of the manifest, which must not lead out of the package.
    pub(crate) fn path(&self, file: &str) -> Result<PathBuf, PackageError> {
        let inside = Path::new(file)
            .components()
            .all(|c| matches!(c, std::path::Component::Normal(_)));
        if !inside {
            return Err(PackageError::Manifest {
                path: manifest_path(&self.folder),
                message: format!("the file {file:?} is outside the package"),
            });
        }
        Ok(self.folder.join(file))
    }

    /// The canonical graph, its weights mapped from the package. A stripped package has none that could run.
    pub fn graph(&self) -> Result<Graph, PackageError> {
        self.check_present()?;
        let path = self.path(&self.manifest.graph.file)?;
        self.with_interface(onnx::read(&path)?, &path)
    }

    /// The graph with its interface, which ONNX stores only as names; it must agree with the manifest.
    fn with_interface(&self, mut graph: Graph, path: &Path) -> Result<Graph, PackageError> {
        let fault = |message: String| PackageError::Manifest {
            path: path.to_path_buf(),
            message,
        };
        graph
            .set_canonical_interface()
            .map_err(|errors| fault(errors.to_string()))?;
        let found = graph.interface.as_ref().map(Interface::signature);
        match &self.manifest.interface {
            Some(expected) if Some(expected) != found.as_ref() => {
                let path = manifest_path(&self.folder).display().to_string();
                Err(fault(format!(
                    "its inputs and outputs are not those that {path} describes"
                )))
            }
            _ => Ok(graph),
        }
    }

    /// Refuses a stripped package.
    pub fn check_present(&self) -> Result<(), PackageError> {
        match self.manifest.weights.stripped {
            true => Err(PackageError::Stripped {
                path: self.folder.clone(),
            }),
            false => Ok(()),
        }
    }

    /// The canonical graph with all types; in a stripped package without the weights.
    pub fn architecture(&self) -> Result<Graph, PackageError> {
        let path = self.path(&self.manifest.graph.file)?;
        let mut graph = onnx::read_stripped(&path)?;
        match infer(&mut graph) {
            Ok(_) => self.with_interface(graph, &path),
            Err(error) => Err(PackageError::Manifest {
                path,
                message: error.to_string(),
            }),
        }
    }

    /// Every weight with its entry in the manifest. In a stripped package the bytes are absent.
    pub fn model_weights(&self) -> Result<ModelWeights, PackageError> {
        self.weights_of(&self.architecture()?)
    }

    /// The same, if the graph of [`Package::architecture`] is available.
    pub(crate) fn weights_of(&self, graph: &Graph) -> Result<ModelWeights, PackageError> {
        let m = &self.manifest;
        let mut weights = Vec::with_capacity(m.weights.tensors.len());
        for entry in &m.weights.tensors {
            let constant = graph.find(&entry.name).and_then(|id| graph.constant(id));
            let Some(constant) = constant else {
                return Err(PackageError::Manifest {
                    path: manifest_path(&self.folder),
                    message: format!("it lists the weight {:?}, which {GRAPH} does not have", entry.name),
                });
            };
            weights.push(ModelWeight {
                name: entry.name.clone(),
                constant: constant.clone(),
                recipe: entry.recipe.clone(),
                modules: entry.modules.clone(),
                learned: entry.learned.clone(),
            });
        }
        let (architecture, export) = (m.architecture_hash.clone(), m.source.blake3.clone());
        Ok(ModelWeights::new(weights, graph, architecture, export))
    }

    /// The package as a source of weights for others.
    pub fn weight_source(&self) -> Result<WeightSource, PackageError> {
        self.check_present()?;
        let graph = self.architecture()?;
        let weights = self.weights_of(&graph)?;
        let architecture = self.manifest.architecture.clone();
        Ok(WeightSource::package(&self.folder, weights, graph, architecture))
    }

    /// The weights that a refit must find, and the properties that determine their tensors.
    pub fn required(&self) -> Result<Required<'_>, PackageError> {
        Ok(self.required_for(&self.architecture()?))
    }

    /// The same, if the graph of [`Package::architecture`] is available.
    fn required_for(&self, graph: &Graph) -> Required<'_> {
        let m = &self.manifest;
        let weights = m.weights.tensors.iter().map(|w| RequiredWeight {
            name: &w.name,
            dtype: w.dtype,
            shape: &w.shape,
            recipe: w.recipe.as_ref(),
            modules: w.modules.as_ref(),
            learned: w.learned.as_ref(),
            blake3: &w.blake3,
            form: w.quantized.as_ref().map(QuantizedEntry::form),
        });
        Required {
            weights: weights.collect(),
            architecture_hash: &m.architecture_hash,
            export_hash: &m.source.blake3,
            scales_embeddings: norm_parameter::scales_embeddings(graph),
            norms: m.norms,
            orders: modules::orders(graph),
        }
    }

    /// How weights from other sources are read for this package.
    pub fn source_context(&self) -> SourceContext {
        let m = &self.manifest;
        // Tables of positions are cut to the package's capacity.
        let positions = m.architecture.max_positions.or(m.capacities.last().copied());
        let windows = m.mask_windows.iter();
        let windows = windows.map(|(name, window)| (name.clone(), Some(*window).filter(|w| *w > 0)));
        SourceContext {
            positions: positions.unwrap_or(1),
            dtype: m.dtype,
            architecture_hash: m.architecture_hash.clone(),
            activations: m.activations.policy,
            mask_windows: windows.collect(),
        }
    }

    /// Row length of the logits.
    pub fn vocabulary(&self) -> Result<usize, PackageError> {
        self.manifest
            .architecture
            .vocabulary
            .ok_or_else(|| PackageError::Manifest {
                path: manifest_path(&self.folder),
                message: "it does not say how large the vocabulary is".into(),
            })
    }

    /// Whether its model takes embeddings instead of token ids.
    pub fn takes_embeddings(&self) -> bool {
        let interface = self.manifest.interface.as_ref();
        interface.is_some_and(|interface| interface.inputs.contains(&Role::Embeddings))
    }

    /// The tokenizer, if the package has one.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>, PackageError> {
        match &self.manifest.tokenizer {
            Some(_) => Ok(Some(Tokenizer::open(&self.folder.join(TOKENIZER))?)),
            None => Ok(None),
        }
    }

    /// Reads every byte and compares with the manifest's hashes.
    pub fn check_hashes(&self) -> Result<(), PackageError> {
        let m = &self.manifest;
        let tokenizer = m.tokenizer.iter().flat_map(|t| &t.files);
        let engines = m.engines.iter().map(|e| (e.file.as_str(), e.blake3.as_str()));
        let files = [(m.graph.file.as_str(), m.graph.blake3.as_str())]
            .into_iter()
            .chain(engines)
            .chain(tokenizer.map(|f| (f.file.as_str(), f.blake3.as_str())));
        for (file, expected) in files {
            let path = self.path(file)?;
            let found = hash_file(&path)?;
            if found != expected {
                let what = "this file".to_string();
                return Err(PackageError::Hash { path, what });
            }
        }
        for weights in self.stored_weights() {
            let path = self.path(&weights.file)?;
            let file = fs::File::open(&path).map_err(PackageError::io(&path))?;
            // SAFETY: packages are written once and renamed into place; nothing changes them while they are mapped.
            let map = unsafe { memmap2::Mmap::map(&file) }.map_err(PackageError::io(&path))?;
            for weight in &weights.tensors {
                for (offset, bytes, blake3) in weight.ranges() {
                    let end = offset.checked_add(bytes);
                    let bytes = end.and_then(|end| map.get(offset as usize..end as usize));
                    if bytes.is_none_or(|bytes| blake3::hash(bytes).to_hex().as_str() != blake3) {
                        let what = format!("the weight {:?}", weight.name);
                        return Err(PackageError::Hash { path, what });
                    }
                }
            }
        }
        Ok(())
    }
}

/// BLAKE3 of a file, in hexadecimal.
pub(crate) fn hash_file(path: &Path) -> Result<String, PackageError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_mmap(path).map_err(PackageError::io(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}
