//! Exports with parts that are not what they seem: each is refused with a reason.

use lapidary::graph::op::{Binary, Op, Reduction, Unary};
use lapidary::graph::{Graph, NodeId, ValueId};
use lapidary::help::Help;
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use lapidary::tensor::{DType, Tensor};

use crate::canonical::exports;

pub fn export(name: &str) -> Graph {
    let export = exports().into_iter().find(|e| e.name == name);
    export.unwrap_or_else(|| panic!("the fixture {name} is there")).read()
}

fn refusal(graph: Graph) -> String {
    refusal_at(graph, 64)
}

/// Why the export is refused for packages of this many positions.
pub fn refusal_at(graph: Graph, max_positions: usize) -> String {
    let options = CanonicalizeOptions {
        max_positions,
        ..CanonicalizeOptions::default()
    };
    match canonicalize(graph, &options) {
        Ok(_) => panic!("it was accepted"),
        Err(error) => format!("{error}; {}", error.help().unwrap_or_default()),
    }
}

pub fn nodes(graph: &Graph, wanted: impl Fn(&Op) -> bool) -> Vec<NodeId> {
    graph.node_ids().filter(|id| wanted(&graph.node(*id).op)).collect()
}

/// The additive mask of each softmax: the node that adds it.
pub fn mask_additions(graph: &Graph) -> Vec<NodeId> {
    let softmaxes = nodes(graph, |op| matches!(op, Op::Softmax { .. }));
    softmaxes
        .into_iter()
        .map(|id| graph.producer_of(graph.node(id).input(0).unwrap()).unwrap().0)
        .collect()
}

/// Replaces an operand of a node by a new value.
pub fn rewire(graph: &mut Graph, node: NodeId, input: usize, new: impl FnOnce(&mut Graph, ValueId) -> ValueId) {
    let old = graph.node(node).input(input).unwrap();
    let new = new(graph, old);
    graph.node_mut(node).inputs[input] = Some(new);
}

pub fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[test]
fn a_mask_that_depends_on_tokens() {
    let mut graph = export("llama-dynamo-opset18");
    let ids = graph.find("input_ids").unwrap();
    for node in mask_additions(&graph) {
        rewire(&mut graph, node, 1, |graph, mask| {
            let ids = graph.add_node("ids.float", Op::Cast { to: DType::F32 }, &[ids]);
            let largest = Op::Reduce {
                reduction: Reduction::Max,
                keepdims: false,
                noop_with_empty_axes: false,
            };
            let largest = graph.add_node("ids.largest", largest, &[ids]);
            graph.add_node("mask.scaled", Op::Binary(Binary::Mul), &[mask, largest])
        });
    }
    says(
        &refusal(graph),
        &["layer 0", "layer 1", "mask.scaled", "is not a function of positions"],
    );
}

#[test]
fn a_bias_that_is_no_mask() {
    let mut graph = export("llama-dynamo-static");
    for node in mask_additions(&graph) {
        rewire(&mut graph, node, 1, |graph, mask| {
            let bends: Vec<f32> = (0..32).map(|slot| if slot < 9 { 0.25 } else { 0.5 }).collect();
            let bias = graph.add_constant("bias", Tensor::from_f32(vec![32], &bends));
            graph.add_node("mask.biased", Op::Binary(Binary::Add), &[mask, bias])
        });
    }
    says(&refusal(graph), &["layer 0", "adds 0.25", "slot", "ALiBi"]);
}

#[test]
fn a_mask_that_looks_ahead() {
    let mut graph = export("llama-torchscript-static");
    for id in nodes(&graph, |op| matches!(op, Op::Binary(Binary::LessOrEqual))) {
        graph.node_mut(id).op = Op::Binary(Binary::GreaterOrEqual);
    }
    says(&refusal(graph), &["layer 0", "its mask is not", "attend to slot"]);
}

#[test]
fn a_rotation_that_depends_on_the_length() {
    let mut graph = export("llama-dynamo-opset18");
    let ids = graph.find("input_ids").unwrap();
    for id in nodes(&graph, |op| matches!(op, Op::Unary(Unary::Cos | Unary::Sin))) {
        rewire(&mut graph, id, 0, |graph, angle| {
            let tokens = graph.add_node("tokens", Op::Shape { start: 1, end: Some(2) }, &[ids]);
            let tokens = graph.add_node("tokens.float", Op::Cast { to: DType::F32 }, &[tokens]);
            graph.add_node("angle", Op::Binary(Binary::Mul), &[angle, tokens])
        });
    }
    says(
        &refusal(graph),
        &["layer 0", "its rotary table depends on more than the position"],
    );
}

#[test]
fn caches_that_no_output_updates() {
    let mut graph = export("llama-optimum");
    // The second layer's keys are not returned.
    let kept: Vec<ValueId> = graph
        .outputs
        .iter()
        .copied()
        .filter(|o| graph.value(*o).name != "present.1.key")
        .collect();
    graph.outputs = kept;
    says(
        &refusal(graph),
        &["layer 1", "no output is the update of the cache past_key_values.1.key"],
    );
}

#[test]
fn a_cache_written_at_the_wrong_place() {
    let mut graph = export("llama-dynamo-static");
    let scatters = nodes(&graph, |op| matches!(op, Op::ScatterNd { .. }));
    rewire(&mut graph, scatters[0], 1, |graph, index| {
        let one = graph.add_constant("one", Tensor::from_i64(vec![], &[1]));
        graph.add_node("index.next", Op::Binary(Binary::Add), &[index, one])
    });
    says(
        &refusal(graph),
        &["layer 0", "is not the cache with the new rows after the past ones"],
    );
}

#[test]
fn inputs_that_nobody_can_name() {
    let mut graph = export("llama-optimum");
    let odd = graph.add_input("temperature", DType::F32, vec![]);
    let logits = graph.outputs[0];
    graph.outputs[0] = graph.add_node("scaled", Op::Binary(Binary::Mul), &[logits, odd]);
    says(&refusal(graph), &["not clear what these inputs are for: temperature"]);
}

#[test]
fn a_model_without_a_cache() {
    let mut graph = export("llama-optimum");
    let pasts: Vec<ValueId> = graph
        .inputs
        .iter()
        .copied()
        .filter(|i| graph.value(*i).name.starts_with("past"))
        .collect();
    for past in pasts {
        let dtype = graph.value(past).dtype.unwrap();
        let empty = graph.add_constant("empty", Tensor::from_f64_as(dtype, vec![1, 2, 0, 16], &[]));
        graph.replace_uses(past, empty);
    }
    let kept = graph
        .inputs
        .iter()
        .copied()
        .filter(|i| !graph.value(*i).name.starts_with("past"));
    graph.inputs = kept.collect();
    says(
        &refusal(graph),
        &["takes no past keys and values", "text-generation-with-past"],
    );
}

#[test]
fn unknown_operators_are_named_with_their_nodes() {
    let mut graph = export("llama-optimum");
    let silus = nodes(&graph, |op| matches!(op, Op::Unary(Unary::Sigmoid)));
    let names: Vec<String> = silus.iter().map(|id| graph.node(*id).name.clone()).collect();
    for id in silus {
        graph.node_mut(id).op = Op::Unknown {
            domain: "ai.example".into(),
            op_type: "Swoosh".into(),
        };
    }
    let text = refusal(graph);
    says(&text, &["ai.example::Swoosh", &names[0], &names[1]]);
}

#[test]
fn malformed_models_are_refused_without_a_panic() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/bad");
    let mut refused = 0;
    for folder in std::fs::read_dir(root).unwrap() {
        let file = folder.unwrap().path().join("model.onnx");
        if let Ok(graph) = lapidary::onnx::read(&file) {
            let text = refusal(graph);
            assert!(
                !text.is_empty() && !text.contains("bug in Lapidary"),
                "{}: {text}",
                file.display()
            );
            refused += 1;
        }
    }
    assert!(refused > 2, "{refused} models could be read");
}

#[test]
fn attention_operators_with_operands_that_they_do_not_take() {
    let mut integers = export("mistral-mobius");
    for id in nodes(&integers, |op| matches!(op, Op::Cast { to: DType::Bool })) {
        integers.node_mut(id).op = Op::Cast { to: DType::I8 };
    }
    says(&refusal(integers), &["head counts, that are not understood"]);
    let mut no_heads = export("mistral-mobius");
    for id in nodes(&no_heads, |op| matches!(op, Op::Attention(_))) {
        if let Op::Attention(how) = &mut no_heads.node_mut(id).op {
            how.kv_num_heads = Some(0);
        }
    }
    assert!(!refusal(no_heads).is_empty());
    let mut no_heads = export("llama-ort-genai");
    for id in nodes(&no_heads, |op| matches!(op, Op::GroupQueryAttention(_))) {
        if let Op::GroupQueryAttention(how) = &mut no_heads.node_mut(id).op {
            (how.num_heads, how.kv_num_heads) = (0, 0);
        }
    }
    assert!(!refusal(no_heads).is_empty());
}
