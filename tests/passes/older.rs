//! Exports of opset 11: they become the same graph as exports of the same model in a later opset.

use std::collections::HashMap;

use lapidary::graph::{Graph, dump};
use lapidary::onnx::proto::{AttributeProto, ModelProto, NodeProto, TensorProto, attribute_type};
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use prost::Message;

use crate::canonical::exports;

fn numbers(tensor: &TensorProto) -> Option<Vec<i64>> {
    const INT64: i32 = 7;
    if tensor.data_type != Some(INT64) {
        return None;
    }
    let raw = tensor.raw_data.as_ref();
    let raw = raw.map(|raw| {
        raw.chunks(8)
            .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
            .collect()
    });
    raw.or_else(|| Some(tensor.int64_data.clone()))
}

/// Lists that became inputs as attributes, and the last axis of a softmax as the number that it is in attention.
fn of_opset_11(mut model: ModelProto) -> (ModelProto, usize) {
    let graph = model.graph.as_mut().unwrap();
    let initializers = graph.initializer.iter();
    let mut lists: HashMap<String, Vec<i64>> = initializers
        .filter_map(|tensor| Some((tensor.name.clone()?, numbers(tensor)?)))
        .collect();
    let constant = |node: &NodeProto| {
        let value = node.attribute.iter().find(|a| a.name.as_deref() == Some("value"))?;
        Some((node.output.first()?.clone(), numbers(value.t.as_ref()?)?))
    };
    lists.extend(graph.node.iter().filter_map(constant));
    let mut changed = 0;
    for node in &mut graph.node {
        let op = node.op_type.clone().unwrap_or_default();
        match op.as_str() {
            "Softmax" => {
                for axis in node.attribute.iter_mut().filter(|a| a.name.as_deref() == Some("axis")) {
                    axis.i = Some(3);
                }
            }
            "Squeeze" | "Unsqueeze" | "Split" | "ReduceMean" | "ReduceSum" if node.input.len() == 2 => {
                let name = if op == "Split" { "split" } else { "axes" };
                node.attribute.push(AttributeProto {
                    name: Some(name.to_string()),
                    r#type: Some(attribute_type::INTS),
                    ints: lists[&node.input.pop().unwrap()].clone(),
                    ..AttributeProto::default()
                });
            }
            _ => continue,
        }
        changed += 1;
    }
    for import in &mut model.opset_import {
        if import.domain.as_deref().unwrap_or_default().is_empty() {
            import.version = Some(11);
        }
    }
    (model, changed)
}

fn canonical(graph: Graph) -> String {
    let options = CanonicalizeOptions {
        max_positions: 64,
        ..CanonicalizeOptions::default()
    };
    let graph = canonicalize(graph, &options).unwrap().graph;
    // The first line names the opsets of the export.
    dump(&graph).to_string().lines().skip(1).collect::<Vec<_>>().join("\n")
}

#[test]
fn exports_of_opset_11_become_the_same_graph() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["llama-optimum", "mistral-optimum", "gpt2-optimum"] {
        let export = exports().into_iter().find(|e| e.name == name).unwrap();
        let (model, changed) =
            of_opset_11(ModelProto::decode(std::fs::read(&export.path).unwrap().as_slice()).unwrap());
        assert!(changed > 10, "{name}: {changed}");
        let path = folder.path().join("model.onnx");
        std::fs::write(&path, model.encode_to_vec()).unwrap();
        assert_eq!(
            canonical(lapidary::onnx::read(&path).unwrap()),
            canonical(export.read()),
            "{name}"
        );
    }
}

/// OPT's scores have a lower bound after the mask. One that affects only hidden positions changes nothing.
#[test]
fn a_floor_under_masked_scores() {
    use lapidary::graph::op::{Binary, Op};
    use lapidary::tensor::Tensor;

    use crate::refusals::{export, nodes, refusal_at, rewire, says};

    let with_floor = |floor: f32| {
        let mut graph = export("llama-optimum");
        for node in nodes(&graph, |op| matches!(op, Op::Softmax { .. })) {
            rewire(&mut graph, node, 0, |graph, scores| {
                let floor = graph.add_constant("floor", Tensor::from_f32(vec![], &[floor]));
                graph.add_node("lifted", Op::Binary(Binary::Max), &[scores, floor])
            });
        }
        graph
    };
    assert_eq!(canonical(with_floor(f32::MIN)), canonical(export("llama-optimum")));
    says(&refusal_at(with_floor(-5.0), 64), &["Max", "lifted"]);
}
