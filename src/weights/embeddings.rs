//! The table of token embeddings of a model that takes embeddings: from its own file, because its export has none.
//!
//! Multimodal models are exported in parts: a decoder that takes `inputs_embeds`, and `embed_tokens.onnx`, which
//! returns the row of each token. [`read`] returns the rows of all tokens, `[vocabulary, hidden]`: from such an export
//! if it is a table whose rows are at most scaled, from a checkpoint, or from a `.npy` file. An export that computes
//! anything else is refused.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::source::{SourceContext, SourceError, WeightSource};
use crate::graph::op::{Binary, Op};
use crate::graph::{Constant, Graph, ValueId, infer};
use crate::help::Help;
use crate::onnx;
use crate::passes::{self, ActivationPolicy, MaskWindows};
use crate::tensor::npy::{self, NpyError};
use crate::tensor::{DType, Tensor};

/// A file without a usable table of embeddings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EmbeddingError {
    /// Not an array of floats.
    #[error(transparent)]
    Npy(#[from] NpyError),
    /// Not a readable export.
    #[error(transparent)]
    Onnx(#[from] onnx::ReadError),
    /// Not a readable checkpoint.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// An export that computes something else.
    #[error("{}: it is not a table of token embeddings: {reason}", path.display())]
    NoTable {
        /// The file.
        path: PathBuf,
        /// The reason.
        reason: String,
    },
    /// A checkpoint in which no tensor, or more than one, matches.
    #[error("{}: {reason}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The candidates.
        reason: String,
    },
    /// A table of another size.
    #[error(
        "{}: the table of embeddings is {found:?}, and the model needs [{vocabulary} or more, {width}]", path.display()
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Shape of the table.
        found: Vec<usize>,
        /// Size of the model's vocabulary.
        vocabulary: usize,
        /// Elements of an embedding.
        width: usize,
    },
    /// The export of the model takes token ids.
    #[error("{}: the model takes token ids and has its own embeddings; {} is for models that take embeddings", model.display(), path.display())]
    NotNeeded {
        /// The export.
        model: PathBuf,
        /// The file.
        path: PathBuf,
    },
}

impl Help for EmbeddingError {
    fn help(&self) -> Option<String> {
        match self {
            EmbeddingError::Npy(error) => error.help(),
            EmbeddingError::Onnx(error) => error.help(),
            EmbeddingError::Source(error) => error.help(),
            EmbeddingError::NoTable { .. } => {
                Some("save the embeddings of all tokens as .npy, [vocabulary, hidden], and give that".to_string())
            }
            EmbeddingError::Tensor { .. } => Some("name the tensor with --embeddings-tensor NAME".to_string()),
            EmbeddingError::Size { .. } => Some("give the table of this very model".to_string()),
            EmbeddingError::NotNeeded { .. } => Some("leave --embeddings out".to_string()),
        }
    }
}

/// Suffixes of the table's name in checkpoints.
const NAMES: [&str; 6] = [
    "embed_tokens.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "token_embedding.weight",
    "embed_in.weight",
    "wte.weight",
];

/// The table in a file: `.npy`, an export that returns embeddings for token ids, or a checkpoint (file or folder), in
/// which `tensor` names the table.
pub fn read(path: &Path, tensor: Option<&str>) -> Result<Constant, EmbeddingError> {
    match path.extension().and_then(|e| e.to_str()) {
        Some("npy") => Ok(Constant::tensor(npy::read(path)?).with_origin("embeddings")),
        Some("onnx") => {
            let graph = onnx::read(path)?;
            of_graph(graph).map_err(|reason| EmbeddingError::NoTable {
                path: path.to_path_buf(),
                reason,
            })
        }
        _ => of_checkpoint(path, tensor),
    }
}

/// Like [`read`], for a model with this many tokens and elements, in the dtype of its embeddings.
pub fn read_for(
    path: &Path,
    tensor: Option<&str>,
    vocabulary: usize,
    width: usize,
    dtype: DType,
) -> Result<Constant, EmbeddingError> {
    let table = read(path, tensor)?;
    match table.shape() {
        [rows, columns] if *rows >= vocabulary && *columns == width => Ok(table.cast(dtype)),
        found => Err(EmbeddingError::Size {
            path: path.to_path_buf(),
            found: found.to_vec(),
            vocabulary,
            width,
        }),
    }
}

fn of_checkpoint(path: &Path, tensor: Option<&str>) -> Result<Constant, EmbeddingError> {
    let refuse = |reason: String| EmbeddingError::Tensor {
        path: path.to_path_buf(),
        reason,
    };
    // Passes for exports only.
    let context = SourceContext {
        positions: 1,
        dtype: DType::F32,
        architecture_hash: String::new(),
        activations: ActivationPolicy::default(),
        mask_windows: MaskWindows::new(),
    };
    let source = WeightSource::open(path, &context)?;
    if let Some(name) = tensor {
        return match source.tensors.get(name) {
            Some(constant) => Ok(constant.clone()),
            None => Err(refuse(format!("it has no tensor {name:?}"))),
        };
    }
    if let Some(family) = scaled_family(path) {
        return Err(EmbeddingError::NoTable {
            path: path.to_path_buf(),
            reason: format!("{family} scales the rows of its table before the decoder takes them"),
        });
    }
    if let Ok(Some((_, constant))) = source.module("embedding.weight", &HashMap::new()) {
        return Ok(constant);
    }
    let ends = |name: &&String| NAMES.iter().any(|end| name.ends_with(end));
    let named: Vec<&String> = source.tensors.keys().filter(ends).collect();
    match named[..] {
        [one] => Ok(source.tensors[one].clone()),
        [] => Err(refuse(
            "no tensor of it is called as tables of token embeddings are".into(),
        )),
        ref several => {
            let names: Vec<&str> = several.iter().map(|name| name.as_str()).collect();
            Err(refuse(format!(
                "several of its tensors may be meant: {}",
                names.join(", ")
            )))
        }
    }
}

/// Gemma 3 multiplies inside its embedding module, so its decoders expect scaled rows.
fn scaled_family(path: &Path) -> Option<String> {
    let folder = if path.is_dir() { path } else { path.parent()? };
    let text = std::fs::read_to_string(folder.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_str(&text).ok()?;
    let family = config["model_type"].as_str()?;
    family.starts_with("gemma3").then(|| family.to_string())
}

/// The table of an export from token ids to embeddings.
fn of_graph(mut graph: Graph) -> Result<Constant, String> {
    let tidy = |error: passes::PassError| error.to_string();
    graph.sort().map_err(|error| error.to_string())?;
    graph.remove_dead_nodes();
    infer(&mut graph).map_err(|error| error.to_string())?;
    passes::fold::run(&mut graph).map_err(tidy)?;
    passes::cleanup::run(&mut graph).map_err(tidy)?;
    let [mut at] = graph.outputs[..] else {
        return Err(format!("it has {} outputs", graph.outputs.len()));
    };
    let mut factor = 1.0;
    loop {
        let name = graph.value(at).name.clone();
        let Some((_, node)) = graph.def(at) else {
            return Err(format!("{name} is not computed from token ids"));
        };
        let (x, y) = (node.input(0), node.input(1));
        match node.op {
            Op::Cast { .. } | Op::Identity => at = x.ok_or("a cast has no input")?,
            Op::Binary(op @ (Binary::Mul | Binary::Div)) => {
                let of = |v: Option<ValueId>| {
                    let constant = graph.constant(v?).filter(|constant| constant.len() == 1)?;
                    Some(constant.materialize().ok()?.to_f64()[0])
                };
                (at, factor) = match (of(x), of(y), op) {
                    (_, Some(number), Binary::Div) => (x.ok_or("no dividend")?, factor / number),
                    (_, Some(number), _) => (x.ok_or("no factor")?, factor * number),
                    (Some(number), None, Binary::Mul) => (y.ok_or("no factor")?, factor * number),
                    _ => return Err(format!("{} multiplies by more than one number", node.name)),
                };
            }
            Op::Gather { axis: 0 } => {
                let table = x.and_then(|v| graph.constant(v));
                let table = table.filter(|table| table.shape().len() == 2 && table.dtype().is_float());
                let table = table.ok_or_else(|| format!("{} reads no matrix of floats", node.name))?;
                if !y.is_some_and(|ids| are_ids(&graph, ids)) {
                    return Err(format!("{} is not indexed by the export's token ids", node.name));
                }
                return of_table(table, factor).map_err(|error| error.to_string());
            }
            ref op => return Err(format!("{} computes {}", node.name, op.name())),
        }
    }
}

fn of_table(table: &Constant, factor: f64) -> Result<Constant, crate::graph::ConstantError> {
    // Quantized codes are for products; a session reads rows.
    let plain = match table.as_quantized() {
        Some(_) => {
            let tensor: Tensor = table.materialize()?;
            let constant = Constant::tensor(tensor);
            match table.origin() {
                Some(name) => constant.with_origin(name),
                None => constant,
            }
        }
        None => table.clone(),
    };
    Ok(if factor == 1.0 { plain } else { plain.scaled(factor) })
}

/// Whether a value is the graph's only input, integers, possibly cast.
fn are_ids(graph: &Graph, mut id: ValueId) -> bool {
    while let Some((_, node)) = graph.def(id) {
        match (&node.op, node.input(0)) {
            (Op::Cast { .. } | Op::Identity, Some(x)) => id = x,
            _ => return false,
        }
    }
    graph.inputs.contains(&id) && graph.value(id).dtype.is_some_and(DType::is_int)
}
