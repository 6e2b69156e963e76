//! Makes a package: weights first, as they are computed, then the graph that points to them, the rest as it comes, and
//! the manifest last.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::manifest::{self, Engine, FORMAT_VERSION, Manifest, Pass, Source, StoredFile, Weight};
use super::staging::Staging;
use super::{ENGINES, GRAPH, MANIFEST, Package, PackageError, TOKENIZER, WEIGHTS, hash_file};
use crate::backend::tensorrt::Refit;
use crate::decode::tokenizer::Tokenizer;
use crate::graph::{Constant, Graph, ValueId};
use crate::network::WeightMode;
use crate::passes::Architecture;
use crate::spec::{Prefill, Target};
use crate::tensor::DType;
use crate::{lower, onnx, weights};

/// What the manifest says besides the files.
#[derive(Clone, Debug)]
pub struct Facts {
    pub source: Source,
    pub architecture: Architecture,
    pub dtype: DType,
    pub targets: Vec<Target>,
    pub weight_mode: WeightMode,
    pub refit: Refit,
    pub capacities: Vec<usize>,
    pub prefill: Prefill,
    pub passes: Vec<Pass>,
}

/// A package being written. Dropping it leaves nothing behind.
pub struct Writer {
    staging: Staging,
    force: bool,
    manifest: Manifest,
}

impl Writer {
    /// Writes weights and graph. `progress` is told the bytes of weights done so far and in all.
    pub fn new(
        target: &Path,
        force: bool,
        graph: &Graph,
        facts: Facts,
        progress: impl FnMut(u64, u64),
    ) -> Result<Self, PackageError> {
        let staging = Staging::new(target, force)?;
        let (weights, layout) = write_weights(staging.folder(), graph, progress)?;
        let path = staging.folder().join(GRAPH);
        onnx::write(graph, &path, Some(&layout)).map_err(|source| PackageError::Graph {
            path: path.clone(),
            source,
        })?;
        let manifest = Manifest {
            format_version: FORMAT_VERSION,
            lapidary_version: env!("CARGO_PKG_VERSION").to_string(),
            source: facts.source,
            architecture: facts.architecture,
            dtype: facts.dtype,
            targets: facts.targets,
            weight_mode: facts.weight_mode,
            refit: facts.refit,
            capacities: facts.capacities,
            prefill: facts.prefill,
            graph: stored(staging.folder(), GRAPH)?,
            weights,
            engines: Vec::new(),
            tokenizer: None,
            eos_token_ids: BTreeSet::new(),
            passes: facts.passes,
        };
        Ok(Writer {
            staging,
            force,
            manifest,
        })
    }

    /// The package so far, for example to lower its graph with the weights mapped from where they will stay.
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
            // The first may have another name where it was given as a file; the folder follows the usual names.
            let name = match i {
                0 => Path::new(crate::decode::tokenizer::FILES[0]),
                _ => Path::new(from.file_name().expect("opened as a file")),
            };
            let to = folder.join(name);
            fs::copy(from, &to).map_err(PackageError::io(&to))?;
            files.push(stored(
                self.staging.folder(),
                &format!("{TOKENIZER}/{}", name.display()),
            )?);
        }
        self.manifest.tokenizer = Some(manifest::Tokenizer {
            files,
            chat_template: tokenizer.chat_template.is_some(),
        });
        self.manifest.eos_token_ids = tokenizer.eos_ids.clone();
        Ok(())
    }

    /// Tokens that end a text, where there is no tokenizer that says so.
    pub fn eos_token_ids(&mut self, ids: BTreeSet<u32>) {
        self.manifest.eos_token_ids = ids;
    }

    /// Adds a plan. `engine.file`, `bytes` and `blake3` are filled in here; `weights` are the names it takes.
    pub fn engine(&mut self, mut engine: Engine, plan: &[u8], weights: &HashSet<String>) -> Result<(), PackageError> {
        let folder = self.staging.folder().join(ENGINES);
        fs::create_dir_all(&folder).map_err(PackageError::io(&folder))?;
        let label = engine.profile.to_string();
        engine.file = format!("{ENGINES}/{label}-{}.plan", engine.target);
        let path: PathBuf = self.staging.folder().join(&engine.file);
        fs::write(&path, plan).map_err(PackageError::io(&path))?;
        engine.bytes = plan.len() as u64;
        engine.blake3 = blake3::hash(plan).to_hex().to_string();
        for weight in &mut self.manifest.weights.tensors {
            if weights.contains(&weight.name) && !weight.engines.contains(&label) {
                weight.engines.push(label.clone());
            }
        }
        self.manifest.engines.push(engine);
        Ok(())
    }

    /// Writes the manifest and puts the package in its place.
    pub fn finish(self) -> Result<Manifest, PackageError> {
        let path = self.staging.folder().join(MANIFEST);
        let mut text = serde_json::to_string_pretty(&self.manifest).expect("plain data serialises");
        text.push('\n');
        fs::write(&path, text).map_err(PackageError::io(&path))?;
        self.staging.commit(self.force)?;
        Ok(self.manifest)
    }
}

fn stored(folder: &Path, file: &str) -> Result<StoredFile, PackageError> {
    let path = folder.join(file);
    Ok(StoredFile {
        file: file.to_string(),
        bytes: fs::metadata(&path).map_err(PackageError::io(&path))?.len(),
        blake3: hash_file(&path)?,
    })
}

fn write_weights(
    folder: &Path,
    graph: &Graph,
    mut progress: impl FnMut(u64, u64),
) -> Result<(manifest::Weights, onnx::Layout), PackageError> {
    let (ids, tensors): (Vec<ValueId>, Vec<(String, Constant)>) = lower::stored_weights(graph)
        .into_iter()
        .map(|(id, weight)| (id, (weight.name, weight.constant)))
        .unzip();
    let total: u64 = tensors.iter().map(|(_, c)| c.byte_len() as u64).sum();
    let metadata = BTreeMap::from([("format".to_string(), "lapidary".to_string())]);
    let path = folder.join(WEIGHTS);
    let stored = weights::write(&path, &tensors, &metadata, |done| progress(done, total))?;
    let mut layout = onnx::Layout::new();
    let mut entries = Vec::with_capacity(tensors.len());
    for (((name, constant), id), at) in tensors.into_iter().zip(ids).zip(stored) {
        layout.insert(
            id,
            onnx::Placement {
                file: WEIGHTS.to_string(),
                offset: at.offset,
                length: at.bytes,
            },
        );
        entries.push(Weight {
            source_name: constant.origin().map(str::to_string),
            name,
            dtype: constant.dtype(),
            shape: constant.shape().to_vec(),
            blake3: at.blake3,
            offset: at.offset,
            bytes: at.bytes,
            same_as: at.same_as,
            engines: Vec::new(),
        });
    }
    let set = entries
        .iter()
        .map(|w| (w.name.as_str(), w.dtype, w.shape.as_slice(), w.blake3.as_str()));
    let weights = manifest::Weights {
        file: WEIGHTS.to_string(),
        bytes: fs::metadata(&path).map_err(PackageError::io(&path))?.len(),
        set_hash: weights::set_hash(set),
        tensors: entries,
    };
    Ok((weights, layout))
}
