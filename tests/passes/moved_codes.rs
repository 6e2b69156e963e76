//! Codes that are moved between `QuantizeLinear` and `DequantizeLinear`, as ONNX Runtime's optimizer leaves them: the
//! canonical graph computes the same, and operators that are not roundings are refused by name.

use std::collections::HashSet;

use lapidary::graph::op::{Op, Unary};
use lapidary::graph::{Graph, ValueId, infer};
use lapidary::tensor::{DType, Tensor};

use crate::refusals::{nodes, refusal_at, rewire, says};
use crate::rounded::{Codes, Random, canonical, codes, difference, inside_attention, of_exporter, round};

/// Puts movements before the `DequantizeLinear` in front of them, as often as there are any. Gives how often that was.
fn move_codes(graph: &mut Graph) -> usize {
    let mut moved = 0;
    let mut done: HashSet<ValueId> = HashSet::new();
    loop {
        let movements = nodes(graph, |op| {
            matches!(
                op,
                Op::Transpose { .. }
                    | Op::Reshape { .. }
                    | Op::Unsqueeze
                    | Op::Squeeze
                    | Op::Slice
                    | Op::Expand
                    | Op::Gather { .. }
                    | Op::Split { .. }
            )
        });
        let next = movements.into_iter().find_map(|id| {
            let node = graph.node(id);
            let (_, source) = graph.def(node.input(0)?)?;
            let dequantizes = matches!(source.op, Op::DequantizeLinear { .. });
            let fresh = node.outputs.iter().flatten().all(|output| !done.contains(output));
            (dequantizes && fresh).then(|| (node.clone(), source.clone()))
        });
        let Some((node, source)) = next else { break };
        let mut inputs = node.inputs.clone();
        inputs[0] = source.input(0);
        let mut outputs = Vec::new();
        for output in node.outputs.iter().flatten() {
            done.insert(*output);
            let name = format!("{}.codes", graph.value(*output).name);
            let codes = graph.add_value(&name);
            let parts = [codes, source.input(1).unwrap(), source.input(2).unwrap()];
            let floats = graph.add_node(&format!("{name}.floats"), source.op.clone(), &parts);
            graph.replace_uses(*output, floats);
            outputs.push(Some(codes));
        }
        graph.add_node_with_outputs(&format!("{}.codes", node.name), node.op, inputs, outputs);
        moved += 1;
    }
    graph.sort().unwrap();
    graph.remove_dead_nodes();
    infer(graph).unwrap();
    moved
}

#[test]
fn codes_that_are_moved() {
    let (mut moved, mut accepted) = (0, 0);
    for (name, seed) in [("llama-optimum", 5), ("gpt2-optimum", 6), ("qwen3-optimum", 7)] {
        let graph = of_exporter(name);
        let places = inside_attention(&graph);
        let mut random = Random(seed);
        for trial in 0..8 {
            let (mut edited, mut chosen) = (graph.clone(), HashSet::new());
            for _ in 0..1 + random.below(3) {
                let (value, largest) = places[random.below(places.len())];
                if chosen.insert(value) {
                    // The evaluator moves no codes of floats.
                    let codes = match codes(&mut random, largest) {
                        Codes(DType::F8E4M3Fn, scale, _) => Codes(DType::I8, scale * 448.0 / 127.0, 0),
                        integer => integer,
                    };
                    round(&mut edited, value, codes);
                }
            }
            let apart = canonical(edited.clone());
            let count = move_codes(&mut edited);
            let together = canonical(edited.clone());
            // Where they are cannot matter to whether they are understood.
            assert_eq!(apart.is_ok(), together.is_ok(), "{name}, {trial}: {:?}", together.err());
            if let Ok(together) = together {
                let worst = difference(&edited, &together);
                assert!(worst < 2e-5, "{name}, {trial}: {worst:.1e}");
                (moved, accepted) = (moved + count, accepted + 1);
            }
        }
    }
    println!("{accepted} accepted, {moved} movements of codes");
    assert!(moved >= 20 && accepted >= 10, "{moved}, {accepted}");
}

/// Two inputs of linear layers, each in its own layer of the model.
fn inputs_of_layers(graph: &Graph) -> Vec<ValueId> {
    let constant = |id: Option<ValueId>| id.is_some_and(|id| graph.constant(id).is_some());
    let products = nodes(graph, |op| matches!(op, Op::MatMul));
    let linear = products.into_iter().filter(|id| constant(graph.node(*id).input(1)));
    let mut found: Vec<ValueId> = linear.filter_map(|id| graph.node(id).input(0)).collect();
    found.dedup();
    vec![found[0], found[found.len() - 2]]
}

#[test]
fn codes_that_are_no_roundings_are_named_all_at_once() {
    let graph = of_exporter("llama-optimum");
    let places = inputs_of_layers(&graph);
    let of = |graph: &Graph, op: fn(&Op) -> bool| -> Vec<lapidary::graph::NodeId> { nodes(graph, op) };
    let rounded = || {
        let mut graph = graph.clone();
        for value in &places {
            round(&mut graph, *value, Codes(DType::U8, 0.05, 120));
        }
        graph
    };
    // Another scale than that of the codes, and an operator that computes on codes.
    let mut other = rounded();
    let last = of(&other, |op| matches!(op, Op::DequantizeLinear { .. }));
    let scale = other.add_constant("other", Tensor::from_f32(vec![], &[0.5]));
    other.node_mut(last[0]).inputs[1] = Some(scale);
    let second = other.node(last[1]).input(0).unwrap();
    let relu = other.add_node("on_codes", Op::Unary(Unary::Relu), &[second]);
    other.node_mut(last[1]).inputs[0] = Some(relu);
    other.sort().unwrap();
    infer(&mut other).unwrap();
    let text = refusal_at(other, 32);
    says(
        &text,
        &[
            "for 2 reasons",
            "the operator DequantizeLinear does not round activations",
            "zero point 120",
            "read with scale 0.5",
            "come from Relu (on_codes), which computes on them",
        ],
    );
    assert!(!text.contains("cache"), "{text}");
    // With an operator that is not known before them, both are named.
    let mut behind = rounded();
    let quantize = of(&behind, |op| matches!(op, Op::QuantizeLinear { .. }));
    rewire(&mut behind, quantize[0], 0, |graph, x| {
        let op_type = "QAttention".to_string();
        let domain = "com.microsoft".to_string();
        graph.add_node("attend", Op::Unknown { domain, op_type }, &[x])
    });
    let last = of(&behind, |op| matches!(op, Op::DequantizeLinear { .. }));
    let scale = behind.add_constant("other", Tensor::from_f32(vec![], &[0.5]));
    behind.node_mut(last[1]).inputs[1] = Some(scale);
    behind.sort().unwrap();
    let text = refusal_at(behind, 32);
    says(
        &text,
        &[
            "the operator com.microsoft::QAttention is not supported",
            "are read with scale 0.5",
            "give the file that the quantizer wrote",
        ],
    );
    // A scale for each channel.
    let mut other = rounded();
    let all = of(&other, |op| {
        matches!(op, Op::DequantizeLinear { .. } | Op::QuantizeLinear { .. })
    });
    let width = 32;
    let scales = other.add_constant("scales", Tensor::from_f32(vec![width], &vec![0.05; width]));
    let zeros = other.add_constant("zeros", Tensor::from_i64_as(DType::U8, vec![width], &vec![120; width]));
    for id in all {
        let node = other.node_mut(id);
        (node.inputs[1], node.inputs[2]) = (Some(scales), Some(zeros));
        match &mut node.op {
            Op::DequantizeLinear { axis, .. } | Op::QuantizeLinear { axis, .. } => *axis = -1,
            _ => unreachable!(),
        }
    }
    let text = refusal_at(other, 32);
    says(&text, &["for 2 reasons", "a scale for each index of axis -1"]);
}
