//! Each pass alone, and all in a row, on every export.

use std::collections::BTreeMap;
use std::path::Path;

use lapidary::graph::infer;
use lapidary::graph::{Graph, Op};
use lapidary::passes::{
    PassError, activation, cleanup, decompose, dtype, fold, head_norms, layer_norm, linear, rms_norm,
};
use lapidary::tensor::DType;

use super::replay::{exports, layers, replay, replay_within, unknown_op};

type Pass = fn(&mut Graph) -> Result<usize, PassError>;

const PASSES: [(&str, Pass); 8] = [
    ("cleanup", cleanup::run),
    ("fold", fold::run),
    ("decompose", decompose::contrib::run),
    ("layer_norm", layer_norm::run),
    ("rms_norm", rms_norm::run),
    ("head_norms", head_norms::run),
    ("activation", activation::run),
    ("linear", linear::run),
];

fn load(folder: &Path) -> Option<Graph> {
    let mut graph = lapidary::onnx::read(folder.join("model.onnx")).unwrap();
    if unknown_op(&graph).is_some() {
        return None;
    }
    infer(&mut graph).unwrap();
    Some(graph)
}

fn name_of(folder: &Path) -> String {
    folder.file_name().unwrap().to_string_lossy().into_owned()
}

fn histogram(graph: &Graph) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for id in graph.node_ids() {
        *counts.entry(graph.node(id).op.name()).or_default() += 1;
    }
    counts
}

#[test]
fn each_pass_alone_keeps_the_meaning() {
    let mut failed = Vec::new();
    for folder in exports() {
        let Some(original) = load(&folder) else { continue };
        for (name, pass) in PASSES {
            let mut graph = original.clone();
            let rewrites = pass(&mut graph).unwrap();
            if rewrites > 0
                && let Err(error) = infer(&mut graph)
                    .map_err(|e| e.to_string())
                    .and_then(|_| replay(&folder, &graph))
            {
                failed.push(format!("{} after {name}: {error}", name_of(&folder)));
            }
            // A second run finds nothing more.
            let again = pass(&mut graph).unwrap();
            if again != 0 {
                failed.push(format!("{}: {name} rewrites {again} times more", name_of(&folder)));
            }
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn norms_and_activations_are_recognized() {
    let mut failed = Vec::new();
    for folder in exports() {
        let Some(mut graph) = load(&folder) else { continue };
        let before = graph.node_ids().count();
        for (_, pass) in PASSES {
            infer(&mut graph).unwrap();
            pass(&mut graph).unwrap();
        }
        let counts = histogram(&graph);
        let count = |op: &str| counts.get(op).copied().unwrap_or(0);
        let name = name_of(&folder);
        println!("{name}: {before} nodes, now {}", graph.node_ids().count());
        // Two norms a layer and a last one; Qwen3 has two more for queries and keys.
        let layers = layers(&folder);
        let norms = count("RMSNormalization") + count("LayerNormalization");
        let wanted = if name.starts_with("qwen3") { 4 } else { 2 } * layers + 1;
        let activations = count("Swish") + count("Gelu");
        let left = ["Erf", "Sigmoid", "Tanh", "ReduceMean"].map(count);
        if norms != wanted || activations != layers || left != [0; 4] {
            failed.push(format!(
                "{name}: {norms} norms, {activations} activations, left over {left:?}"
            ));
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}

/// All passes in a row, twice, and the graph still computes the same.
#[test]
fn all_passes_together_keep_the_meaning() {
    let mut failed = Vec::new();
    for folder in exports() {
        let Some(mut graph) = load(&folder) else { continue };
        for (_, pass) in PASSES.iter().chain(&PASSES) {
            infer(&mut graph).unwrap();
            pass(&mut graph).unwrap();
        }
        let checked = infer(&mut graph)
            .map_err(|e| e.to_string())
            .and_then(|_| replay(&folder, &graph));
        if let Err(error) = checked {
            failed.push(format!("{}: {error}", name_of(&folder)));
        }
        // Every product with a weight reads it as [out, in].
        for id in graph.node_ids() {
            let node = graph.node(id);
            let weight = node.input(1).and_then(|w| graph.constant(w));
            let direct = weight.is_some_and(|w| w.shape().len() == 2) && node.op == Op::MatMul;
            if direct || matches!(node.op, Op::Gemm { .. } | Op::FusedMatMul { .. }) {
                failed.push(format!("{}: {} reads its weight directly", name_of(&folder), node.name));
            }
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}

/// Rewritten exports in every other float type.
#[test]
fn other_dtypes_stay_close() {
    let mut failed = Vec::new();
    for folder in exports() {
        let Some(mut graph) = load(&folder) else { continue };
        for (_, pass) in PASSES {
            infer(&mut graph).unwrap();
            pass(&mut graph).unwrap();
        }
        infer(&mut graph).unwrap();
        for (to, tolerance) in [(DType::F32, 3e-2), (DType::F16, 6e-2), (DType::Bf16, 0.5)] {
            let mut graph = graph.clone();
            dtype::run(&mut graph, to, false).unwrap();
            let checked = infer(&mut graph).map_err(|e| e.to_string());
            let checked = checked.and_then(|_| replay_within(&folder, &graph, Some(tolerance)));
            if let Err(error) = checked {
                failed.push(format!("{} in {to}: {error}", name_of(&folder)));
            }
            let other = |v| graph.value(v).dtype.is_some_and(|d| d.is_float() && d != to);
            let left = graph
                .node_ids()
                .flat_map(|n| graph.node(n).outputs.clone())
                .flatten()
                .find(|v| other(*v));
            if let Some(left) = left {
                failed.push(format!(
                    "{} in {to}: {} is not",
                    name_of(&folder),
                    graph.value(left).name
                ));
            }
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
}
