//! Weights of a canonical graph as a checkpoint of another program: `model.safetensors` under Hugging Face's names, or
//! TensorRT-LLM's `config.json` and `rank0.safetensors`.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::checkpoint::{Convention, TENSORRT_LLM, has_gate};
use super::source::constants_of_modules;
use super::{WriteError, write};
use crate::graph::{Constant, Graph, Op};
use crate::help::Help;
use crate::passes::Architecture;
use crate::tensor::DType;

/// A checkpoint that cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Of the file or folder.
        path: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
    /// The tensors cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// Modules that the convention does not know.
    #[error("{convention} has no name for {}", modules.join(", "))]
    NoName {
        /// Its name.
        convention: &'static str,
        /// Which.
        modules: Vec<String>,
    },
    /// No weight of the graph is known for what it is.
    #[error("the modules of this model are not known, so they cannot be named")]
    NoModules,
}

impl Help for ExportError {
    fn help(&self) -> Option<String> {
        match self {
            ExportError::Write(error) => error.help(),
            _ => None,
        }
    }
}

/// Writes a checkpoint into `folder`, which is made if it is not there; files of the same names must not be. Gives the
/// number of tensors.
pub fn export(
    graph: &Graph,
    architecture: &Architecture,
    convention: &'static Convention,
    folder: &Path,
) -> Result<usize, ExportError> {
    let modules = constants_of_modules(graph);
    let tensors = tensors(&modules, convention)?;
    fs::create_dir_all(folder).map_err(|source| ExportError::Io {
        path: folder.to_path_buf(),
        source,
    })?;
    let of_tensorrt_llm = convention.name == TENSORRT_LLM.name;
    let file = if of_tensorrt_llm {
        "rank0.safetensors"
    } else {
        "model.safetensors"
    };
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    write(&folder.join(file), &tensors, &metadata, &mut |_, _, _| Ok(()), |_| {})?;
    if of_tensorrt_llm {
        let path = folder.join("config.json");
        let mut text = serde_json::to_string_pretty(&config(graph, architecture, &modules)).expect("plain data");
        text.push('\n');
        fs::write(&path, text).map_err(|source| ExportError::Io { path, source })?;
    }
    Ok(tensors.len())
}

/// The tensors of the convention, each made of its modules.
pub(super) fn tensors(
    modules: &HashMap<String, Constant>,
    convention: &'static Convention,
) -> Result<Vec<(String, Constant)>, ExportError> {
    let mut tensors = BTreeMap::new();
    let mut unnamed = Vec::new();
    for module in modules.keys() {
        let places = convention.places(module, has_gate(modules));
        // A fused tensor only where all its parts are there and no tensor of its own is known.
        let place = places
            .iter()
            .find(|p| p.modules.iter().all(|m| modules.contains_key(m)));
        let Some(place) = place else {
            unnamed.push(module.clone());
            continue;
        };
        let parts: Vec<Constant> = place.modules.iter().map(|m| modules[m].clone()).collect();
        let whole = match &parts[..] {
            [one] => one.clone(),
            several => Constant::concat(several, 0),
        };
        let transposed = place.transposed && whole.shape().len() == 2;
        tensors.insert(
            place.names[0].clone(),
            if transposed { whole.transposed(&[1, 0]) } else { whole },
        );
    }
    unnamed.sort();
    match (modules.is_empty(), unnamed.is_empty()) {
        (true, _) => Err(ExportError::NoModules),
        (false, false) => Err(ExportError::NoName {
            convention: convention.name,
            modules: unnamed,
        }),
        (false, true) => Ok(tensors.into_iter().collect()),
    }
}

/// Field names of TensorRT-LLM's checkpoint format.
fn config(graph: &Graph, a: &Architecture, modules: &HashMap<String, Constant>) -> serde_json::Value {
    let ops = || graph.node_ids().map(|id| &graph.node(id).op);
    let epsilon = ops().find_map(|op| match op {
        Op::RmsNormalization { epsilon, .. } | Op::LayerNormalization { epsilon, .. } => Some(*epsilon),
        _ => None,
    });
    let activation = ops().find_map(|op| match op {
        Op::Swish { .. } => Some("silu"),
        Op::Gelu { tanh: true } => Some("gelu_new"),
        Op::Gelu { tanh: false } => Some("gelu"),
        _ => None,
    });
    let dtype = modules.get("embedding.weight").map_or(DType::F32, Constant::dtype);
    let positions = modules.get("positions.weight").map(|c| c.shape()[0]);
    json!({
        "architecture": if positions.is_some() { "GPT2LMHeadModel" } else { "LlamaForCausalLM" },
        "dtype": if dtype.is_half() { dtype.onnx_name() } else { "float32" },
        "logits_dtype": "float32",
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.heads,
        "num_key_value_heads": a.kv_heads,
        "head_size": a.head_dim,
        "hidden_size": a.hidden,
        "intermediate_size": a.intermediate,
        "vocab_size": a.vocabulary,
        "position_embedding_type": if positions.is_some() { "learned_absolute" } else { "rope_gpt_neox" },
        "max_position_embeddings": positions.or(a.max_positions),
        "hidden_act": activation,
        "norm_epsilon": epsilon,
        "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1},
        "quantization": {"quant_algo": null, "kv_cache_quant_algo": null},
    })
}
