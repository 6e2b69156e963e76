//! Sources of new weights: an ONNX export, a safetensors file, a Hugging Face or TensorRT-LLM folder, a package.
//!
//! A [`WeightSource`] returns tensors by name and, if possible, by module (see [`super::modules`]). All bytes stay in
//! mapped files.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use serde::de::{Deserializer as _, IgnoredAny, MapAccess, Visitor};

use super::checkpoint::{CONVENTIONS, Convention, has_gate};
use super::metadata;
use super::model::{LeafError, ModelWeights, NameKind, architecture_hash};
use super::modules;
use super::norm_parameter::{self, NormParameter};
use super::quantized_checkpoint;
use crate::graph::{Constant, Graph};
use crate::help::Help;
use crate::passes::{ActivationPolicy, Architecture, MaskWindows};
use crate::tensor::{DType, Tensor};
use crate::{onnx, passes};

/// Names of Hugging Face's shards.
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";

/// An opened source.
pub struct WeightSource {
    /// File or folder.
    pub path: PathBuf,
    /// Display name: `an ONNX export`, `Hugging Face, Llama-like`.
    pub kind: String,
    /// Tensors by their names in the source.
    pub tensors: BTreeMap<String, Constant>,
    /// Orders of tensors of a quantized checkpoint whose columns are reordered.
    orders: HashMap<String, Vec<i64>>,
    /// How a checkpoint stores norms, by its `config.json`.
    pub norms: Option<NormParameter>,
    names: Names,
}

/// The package for which weights are opened: an export is converted with the package's settings.
#[derive(Clone, Debug)]
pub struct SourceContext {
    /// Maximum rows of tables of positions.
    pub positions: usize,
    /// Element type of the package.
    pub dtype: DType,
    /// Architecture hash of the package ([`ModelWeights::architecture_hash`]).
    pub architecture_hash: String,
    /// Treatment of activations in the package.
    pub activations: ActivationPolicy,
    /// The package's windows of masks that are inputs of the export.
    pub mask_windows: MaskWindows,
}

/// How modules are found.
enum Names {
    /// By the tensors' names.
    Checkpoint(&'static Convention),
    /// By their role in a graph.
    Model(Box<Model>),
    /// Not at all, with the reason if there is one.
    None(Option<String>),
}

/// A source that is a graph.
struct Model {
    weights: ModelWeights,
    /// See [`modules::orders`].
    orders: HashMap<String, Vec<i64>>,
    graph: Graph,
    architecture: Architecture,
}

/// A source that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the file or folder.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// Contents that are not valid weights.
    #[error("{}: {message}", path.display())]
    Invalid {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
        /// What to do about it.
        help: Option<String>,
    },
    /// An export that cannot be read.
    #[error(transparent)]
    Onnx(#[from] onnx::ReadError),
}

impl SourceError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> SourceError {
        move |source| SourceError::Io {
            path: path.to_path_buf(),
            source,
        }
    }

    pub(super) fn invalid(path: &Path, message: impl Into<String>) -> SourceError {
        SourceError::Invalid {
            path: path.to_path_buf(),
            message: message.into(),
            help: None,
        }
    }

    /// What to do about an invalid source.
    pub(super) fn with_help(mut self, advice: impl Into<String>) -> SourceError {
        if let SourceError::Invalid { help, .. } = &mut self {
            *help = Some(advice.into());
        }
        self
    }
}

impl Help for SourceError {
    fn help(&self) -> Option<String> {
        match self {
            SourceError::Io { .. } => None,
            SourceError::Invalid { help, .. } => help.clone(),
            SourceError::Onnx(error) => error.help(),
        }
    }
}

impl WeightSource {
    /// Opens a file or folder; its contents decide what it is.
    pub fn open(path: &Path, context: &SourceContext) -> Result<WeightSource, SourceError> {
        let metadata = fs::metadata(path).map_err(SourceError::io(path))?;
        if metadata.is_dir() {
            return WeightSource::folder(path, context);
        }
        match path.extension().and_then(|e| e.to_str()) {
            Some("onnx") => WeightSource::export(path, context),
            Some("safetensors") => WeightSource::checkpoint(path, safetensors(path)?),
            Some("json") if path.to_string_lossy().ends_with(".safetensors.index.json") => {
                WeightSource::checkpoint(path, sharded(path)?)
            }
            Some("bin" | "pt" | "pth" | "ckpt") => Err(SourceError::invalid(
                path,
                "is a PyTorch pickle, which can run code when it is read",
            )
            .with_help("save the model as safetensors and give that")),
            _ => Err(SourceError::invalid(path, "is neither .onnx nor .safetensors")
                .with_help("give one of these, or a folder that holds one")),
        }
    }

    fn folder(path: &Path, context: &SourceContext) -> Result<WeightSource, SourceError> {
        let index = path.join(INDEX);
        if index.is_file() {
            return WeightSource::checkpoint(path, sharded(&index)?);
        }
        let single = path.join(SINGLE);
        if single.is_file() {
            return WeightSource::checkpoint(path, safetensors(&single)?);
        }
        let mut of = HashMap::<&str, Vec<PathBuf>>::new();
        for entry in fs::read_dir(path).map_err(SourceError::io(path))? {
            let file = entry.map_err(SourceError::io(path))?.path();
            for extension in ["safetensors", "onnx"] {
                if file.extension().is_some_and(|e| e == extension) {
                    of.entry(extension).or_default().push(file.clone());
                }
            }
        }
        let mut several = |extension: &str| of.remove(extension).unwrap_or_default();
        match (&several("safetensors")[..], &several("onnx")[..]) {
            ([one], _) => WeightSource::checkpoint(path, safetensors(one)?),
            ([], [one]) => WeightSource::export(one, context),
            ([], []) => Err(SourceError::invalid(path, "holds no .safetensors and no .onnx")
                .with_help("give the file, or a folder with one")),
            (shards, models) => {
                let files: Vec<String> = shards.iter().chain(models).map(|f| f.display().to_string()).collect();
                Err(SourceError::invalid(
                    path,
                    format!("holds several files and no {INDEX}: {}", files.join(", ")),
                )
                .with_help("name one of them"))
            }
        }
    }

    fn checkpoint(path: &Path, mut tensors: BTreeMap<String, Constant>) -> Result<WeightSource, SourceError> {
        let quantized = quantized_checkpoint::assemble(path, &mut tensors)?;
        // The convention that knows most of the names.
        let module_paths = [
            "embedding",
            "norm",
            "layers.0.attention.query",
            "layers.0.feed_forward.up",
            // `post_attention_layernorm` is this one's name, or with the next one another's.
            "layers.0.feed_forward_norm",
            "layers.0.feed_forward_output_norm",
        ];
        let knows = |c: &Convention| {
            let found = module_paths.iter().filter(|module| {
                let places = c.places(&format!("{module}.weight"), true);
                places
                    .iter()
                    .flat_map(|p| &p.names)
                    .any(|name| tensors.contains_key(name))
            });
            found.count()
        };
        let best = CONVENTIONS
            .into_iter()
            .max_by_key(|c| knows(c))
            .filter(|c| knows(c) > 0);
        let mut kind = best.map_or("a checkpoint of unknown names", |c| c.name).to_string();
        if let Some(quantized) = &quantized {
            kind += &format!(", {}", quantized.method);
        }
        Ok(WeightSource {
            path: path.to_path_buf(),
            kind,
            tensors,
            orders: quantized.map(|quantized| quantized.orders).unwrap_or_default(),
            norms: norm_parameter::of_config(if path.is_dir() {
                path
            } else {
                path.parent().unwrap_or(path)
            }),
            names: best.map_or(Names::None(None), Names::Checkpoint),
        })
    }

    fn export(path: &Path, context: &SourceContext) -> Result<WeightSource, SourceError> {
        let graph = onnx::read(path)?;
        let mut tensors = BTreeMap::new();
        for id in graph.value_ids() {
            if let Some(constant) = graph.constant(id)
                && let Some(name) = constant.origin()
            {
                tensors.insert(name.to_string(), constant.clone());
            }
        }
        let hash = export_hash(path)?;
        // Unchanged, or with the package's settings, whichever gives the package's graph.
        let mut names = Names::None(None);
        for dtype in [None, Some(context.dtype)] {
            let options = passes::CanonicalizeOptions {
                dtype,
                max_positions: context.positions,
                // Overflow is refused when the weights are written.
                allow_overflow: true,
                activations: context.activations,
                mask_windows: context.mask_windows.clone(),
            };
            match passes::canonicalize(graph.clone(), &options) {
                Ok(canonical) => {
                    let is_same = architecture_hash(&canonical.graph) == context.architecture_hash;
                    if is_same || !matches!(names, Names::Model(_)) {
                        names = Names::Model(Box::new(Model {
                            weights: ModelWeights::of_graph(&canonical.graph, hash.clone()),
                            orders: modules::orders(&canonical.graph),
                            graph: canonical.graph,
                            architecture: canonical.architecture,
                        }));
                    }
                    if is_same {
                        break;
                    }
                }
                // An export that cannot be converted still has names.
                Err(error) if matches!(names, Names::None(_)) => {
                    names = Names::None(Some(format!("its structure was not understood: {error}")));
                }
                Err(_) => {}
            }
        }
        Ok(WeightSource {
            path: path.to_path_buf(),
            kind: "an ONNX export".to_string(),
            tensors,
            orders: HashMap::new(),
            norms: None,
            names,
        })
    }

    /// The weights of a package, its typed canonical graph and its architecture.
    pub fn package(path: &Path, weights: ModelWeights, graph: Graph, architecture: Architecture) -> WeightSource {
        let tensors = weights.iter().map(|w| (w.name.clone(), w.constant.clone()));
        WeightSource {
            path: path.to_path_buf(),
            kind: "a package".to_string(),
            tensors: tensors.collect(),
            orders: HashMap::new(),
            norms: None,
            names: Names::Model(Box::new(Model {
                weights,
                orders: modules::orders(&graph),
                graph,
                architecture,
            })),
        }
    }

    /// The weights of a graph, if the source is one.
    pub fn model(&self) -> Option<&ModelWeights> {
        match &self.names {
            Names::Model(model) => Some(&model.weights),
            _ => None,
        }
    }

    /// The canonical graph, if the source is one.
    pub fn graph(&self) -> Option<(&Graph, &Architecture)> {
        match &self.names {
            Names::Model(model) => Some((&model.graph, &model.architecture)),
            _ => None,
        }
    }

    /// A module's tensor, as `[out, in]`, and its name in the source. `rows` has the rows of all modules of the model.
    pub fn module(&self, module: &str, rows: &HashMap<String, usize>) -> Result<Option<(String, Constant)>, LeafError> {
        match &self.names {
            Names::Model(model) => {
                let found = model.weights.tensor(NameKind::Module, module)?;
                Ok(found.map(|(weight, constant)| {
                    let name = weight.constant.origin().unwrap_or(&weight.name);
                    (name.to_string(), constant)
                }))
            }
            Names::Checkpoint(convention) => {
                let tensor = |name: &str| self.tensors.get(name).cloned();
                Ok(convention.find(module, has_gate(rows), tensor, rows))
            }
            Names::None(_) => Ok(None),
        }
    }

    /// The order of a matrix's columns, if it differs from that of the inputs; `tensor` holds the module here.
    pub fn order(&self, module: &str, tensor: &str) -> Option<&Vec<i64>> {
        match &self.names {
            Names::Model(model) => model.orders.get(module),
            _ => self.orders.get(tensor),
        }
    }

    /// Whether its tensors are identified by their role in a graph, which is more reliable than names.
    pub fn is_graph(&self) -> bool {
        matches!(self.names, Names::Model(_))
    }

    /// Whether the roles of tensors are known: from a graph, or from names.
    pub fn knows_modules(&self) -> bool {
        !matches!(self.names, Names::None(_))
    }

    /// The name of a module in this source, for messages.
    pub fn expected_name(&self, module: &str, has_gate: bool) -> Option<String> {
        match &self.names {
            Names::Checkpoint(convention) => convention.places(module, has_gate).first()?.names.first().cloned(),
            _ => None,
        }
    }

    /// Why modules could not be found, if there is a reason.
    pub fn trouble(&self) -> Option<&str> {
        match &self.names {
            Names::None(why) => why.as_deref(),
            _ => None,
        }
    }
}

fn export_hash(path: &Path) -> Result<String, SourceError> {
    let mut hasher = blake3::Hasher::new();
    hasher.update_mmap(path).map_err(SourceError::io(path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// The tensors of one file, mapped; quantized weights in Lapidary's own files are assembled. Header, offsets and
/// lengths are checked before any byte is used.
pub(super) fn safetensors(path: &Path) -> Result<BTreeMap<String, Constant>, SourceError> {
    let invalid = |message: String| SourceError::invalid(path, message);
    let file = fs::File::open(path).map_err(SourceError::io(path))?;
    if file.metadata().map_err(SourceError::io(path))?.len() < 8 {
        return Err(invalid("is not a safetensors file: it has fewer than 8 bytes".into()));
    }
    // SAFETY: as for every model file: numbers that are checked where they are used; only another process that writes
    // to the file could change them.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(SourceError::io(path))?;
    let bytes = Bytes::from_owner(map);
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes"));
    let header = usize::try_from(length)
        .ok()
        .and_then(|n| bytes.get(8..n.checked_add(8)?));
    if let Some(header) = header {
        let names = names_of(header).map_err(|e| invalid(format!("its header is not valid: {e}")))?;
        let mut seen = HashSet::new();
        if let Some(twice) = names.iter().find(|name| !seen.insert(name.as_str())) {
            return Err(invalid(format!("has two tensors called {twice:?}")));
        }
    }
    let parsed = safetensors::SafeTensors::deserialize(&bytes)
        .map_err(|e| invalid(format!("is not a valid safetensors file, or is truncated: {e}")))?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes).map_err(|e| invalid(e.to_string()))?;
    let mut stored = BTreeMap::new();
    for (name, view) in parsed.iter() {
        // Unsupported types are left out, and are reported as missing if needed.
        let Some(dtype) = DType::of_safetensors_name(&view.dtype().to_string()) else {
            continue;
        };
        let data = match view.data() {
            [] => Bytes::new(),
            data => bytes.slice_ref(data),
        };
        let tensor = Tensor::new(dtype, view.shape().to_vec(), data).map_err(|e| invalid(format!("{name:?}: {e}")))?;
        stored.insert(name.to_string(), tensor);
    }
    let mut tensors = match header.metadata() {
        Some(metadata) => metadata::apply(metadata, &mut stored).map_err(|e| invalid(e.to_string()))?,
        None => BTreeMap::new(),
    };
    for (name, tensor) in stored {
        let constant = Constant::tensor(tensor).with_origin(&name);
        tensors.insert(name, constant);
    }
    Ok(tensors)
}

/// The keys of a JSON object, including duplicates, which maps lose.
fn names_of(header: &[u8]) -> Result<Vec<String>, serde_json::Error> {
    struct Names;
    impl<'de> Visitor<'de> for Names {
        type Value = Vec<String>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object of tensors")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut names = Vec::new();
            while let Some((name, IgnoredAny)) = map.next_entry()? {
                names.push(name);
            }
            Ok(names)
        }
    }
    serde_json::Deserializer::from_slice(header).deserialize_map(Names)
}

/// The tensors of all shards that an index names.
fn sharded(index: &Path) -> Result<BTreeMap<String, Constant>, SourceError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let invalid = |message: String| SourceError::invalid(index, message);
    let text = fs::read_to_string(index).map_err(SourceError::io(index))?;
    let parsed: Index = serde_json::from_str(&text).map_err(|e| invalid(format!("is not a valid index: {e}")))?;
    let folder = index.parent().unwrap_or(Path::new("."));
    let mut shards: HashMap<&str, BTreeMap<String, Constant>> = HashMap::new();
    let mut tensors = BTreeMap::new();
    for (name, shard) in &parsed.weight_map {
        let path = Path::new(shard);
        let inside = path.components().all(|c| matches!(c, std::path::Component::Normal(_)));
        if !inside {
            return Err(invalid(format!(
                "puts {name:?} into {shard:?}, outside its folder, which is refused"
            )));
        }
        if !shards.contains_key(shard.as_str()) {
            shards.insert(shard, safetensors(&folder.join(path))?);
        }
        let found = shards[shard.as_str()].get(name).cloned();
        tensors.insert(
            name.clone(),
            found.ok_or_else(|| invalid(format!("puts {name:?} into {shard:?}, which does not hold it")))?,
        );
    }
    Ok(tensors)
}
