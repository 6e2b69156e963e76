//! How a checkpoint stores a norm: the factor of normalized values, or that factor minus 1.
//!
//! Gemma's models compute `norm(x) * (1 + w)` and their checkpoints hold `w` (transformers, `GemmaRMSNorm`,
//! `Gemma2RMSNorm`, `Gemma3RMSNorm`). An exporter may leave the addition in the graph, where the weight's recipe shows
//! it, or put `1 + w` into the initializer, under the checkpoint's name for `w`. Then other evidence must decide: the
//! `model_type` in the checkpoint's `config.json`, that the graph multiplies embeddings by the square root of the
//! hidden size as these models do, or values that the package had.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::graph::op::{Binary, Op};
use crate::graph::{Graph, ValueId};
use crate::interface::Role;

/// How checkpoints store a norm's factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormParameter {
    /// The factor.
    Factor,
    /// The factor minus 1.
    FactorMinusOne,
}

/// Values of `model_type` in `config.json`, without a trailing `_text`, whose norms are `1 + w`: the models of
/// transformers 5.13 whose norm adds 1 to its weight, and models that contain one of them.
const MINUS_ONE: [&str; 17] = [
    "gemma",
    "gemma2",
    "gemma3",
    "minimax_m3_vl",
    "muse_glimmer",
    "muse_spark",
    "nemotron",
    "paligemma",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "recurrent_gemma",
    "shieldgemma2",
    "step3p7",
    "t5gemma",
    "t5gemma2",
    "vaultgemma",
];

/// From the `config.json` of a checkpoint, or the `genai_config.json` of an ONNX Runtime GenAI model; `None` if neither
/// names a model type.
pub fn of_config(folder: &Path) -> Option<NormParameter> {
    let read =
        |file: &str| -> Option<Value> { serde_json::from_str(&fs::read_to_string(folder.join(file)).ok()?).ok() };
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_string);
    let mut types: Vec<String> = Vec::new();
    if let Some(config) = read("config.json") {
        let parts = [Some(&config), config.get("text_config"), config.get("language_config")];
        types.extend(
            parts
                .into_iter()
                .flatten()
                .filter_map(|part| text(part.get("model_type"))),
        );
        // TensorRT-LLM's checkpoints store the factor for every model.
        if types.is_empty() && config.get("architecture").is_some() {
            return Some(NormParameter::Factor);
        }
    }
    if let Some(config) = read("genai_config.json") {
        types.extend(text(config.get("model").and_then(|model| model.get("type"))));
    }
    let adds_one = |name: &String| MINUS_ONE.contains(&name.trim_end_matches("_text"));
    match types.iter().any(adds_one) {
        true => Some(NormParameter::FactorMinusOne),
        false => (!types.is_empty()).then_some(NormParameter::Factor),
    }
}

/// Whether a graph with RMS norms multiplies embeddings by the square root of their width.
pub fn scales_embeddings(graph: &Graph) -> bool {
    let nodes = || graph.node_ids().map(|id| graph.node(id));
    if !nodes().any(|node| matches!(node.op, Op::RmsNormalization { .. })) {
        return false;
    }
    let uses = graph.uses();
    let role = |value: ValueId| graph.interface.as_ref().and_then(|interface| interface.role_of(value));
    let embeddings = nodes().filter(|node| {
        let rows = node.input(1);
        matches!(node.op, Op::Gather { .. })
            && node.input(0).is_some_and(|table| graph.constant(table).is_some())
            && rows.is_some_and(|rows| role(behind_casts(graph, rows)) == Some(Role::TokenIds))
    });
    for embedding in embeddings {
        let table = embedding.input(0).and_then(|table| graph.constant(table));
        let Some(width) = table.and_then(|table| table.shape().last().copied()) else {
            continue;
        };
        let mut stack: Vec<ValueId> = embedding.output(0).into_iter().collect();
        while let Some(value) = stack.pop() {
            for (user, input) in uses.get(&value).into_iter().flatten() {
                let node = graph.node(*user);
                match node.op {
                    Op::Cast { .. } | Op::Identity | Op::Reshape { .. } => stack.extend(node.output(0)),
                    Op::Binary(Binary::Mul) => {
                        let factor = node.input(1 - input).and_then(|factor| graph.constant(factor));
                        let factor = factor.filter(|c| c.len() == 1).and_then(|c| c.materialize().ok());
                        // Half-precision exports round it.
                        let close = |f: f64| (f / (width as f64).sqrt() - 1.0).abs() < 0.01;
                        if factor.is_some_and(|factor| close(factor.to_f64()[0])) {
                            return true;
                        }
                    }
                    _ => {}
                }
            }
        }
    }
    false
}

fn behind_casts(graph: &Graph, mut value: ValueId) -> ValueId {
    while let Some((_, node)) = graph.def(value)
        && let Op::Cast { .. } | Op::Identity | Op::Reshape { .. } | Op::Squeeze | Op::Unsqueeze = node.op
        && let Some(input) = node.input(0)
    {
        value = input;
    }
    value
}

/// Whether an exporter lost the name of an initializer, and so may have computed it.
pub fn is_lost(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    !["norm", "ln_", "ln1", "ln2", "ln."]
        .iter()
        .any(|part| name.contains(part))
}
