//! Features inside newer versions of ONNX Runtime's `GroupQueryAttention`: they become the separate operators of older
//! exports.

use lapidary::graph::op::Op;
use lapidary::graph::{Graph, ValueId};
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use lapidary::tensor::Tensor;

use crate::decoder::{Decoder, distance};
use crate::refusals::{export, nodes, refusal_at, says};

/// The RMS normalization that an operand comes from, past reshapes, with what it normalizes.
fn norm_before(graph: &Graph, mut value: ValueId) -> (ValueId, ValueId, f32) {
    loop {
        let (_, node) = graph.def(value).expect("a norm is before it");
        match node.op {
            Op::RmsNormalization { epsilon, .. } => {
                let mut x = node.input(0).unwrap();
                while let Some((_, node)) = graph.def(x).filter(|(_, node)| matches!(node.op, Op::Reshape { .. })) {
                    x = node.input(0).unwrap();
                }
                return (x, node.input(1).unwrap(), epsilon);
            }
            _ => value = node.input(0).unwrap(),
        }
    }
}

/// Qwen3 with the norms of its heads inside the operator.
fn fused() -> Graph {
    let mut graph = export("qwen3-ort-genai");
    let attentions = nodes(&graph, |op| matches!(op, Op::GroupQueryAttention(_)));
    assert_eq!(attentions.len(), 2);
    for id in attentions {
        let norms = [0, 1].map(|i| norm_before(&graph, graph.node(id).input(i).unwrap()));
        let node = graph.node_mut(id);
        node.inputs.resize(16, None);
        for (i, (x, weight, epsilon)) in norms.into_iter().enumerate() {
            node.inputs[i] = Some(x);
            node.inputs[14 + i] = Some(weight);
            let Op::GroupQueryAttention(how) = &mut node.op else {
                unreachable!("it was chosen as one")
            };
            how.qk_norm_epsilon = epsilon;
        }
    }
    graph.sort().unwrap();
    graph.remove_dead_nodes();
    graph
}

fn logits(graph: Graph) -> Vec<f64> {
    let options = CanonicalizeOptions {
        max_positions: 64,
        ..CanonicalizeOptions::default()
    };
    let graph = canonicalize(graph, &options).unwrap_or_else(|e| panic!("{e}")).graph;
    let mut decoder = Decoder::new(&graph, 1, 24);
    let mut logits = decoder.step(&[vec![5, 9, 2, 7, 11]]);
    logits.extend(decoder.step(&[vec![3]]));
    logits.concat()
}

#[test]
fn norms_of_heads_inside_are_those_before() {
    let difference = distance(&logits(fused()), &logits(export("qwen3-ort-genai")));
    assert!(difference < 1e-5, "{difference:e}");
}

#[test]
fn a_norm_of_queries_alone_is_named() {
    let mut graph = fused();
    for id in nodes(&graph, |op| matches!(op, Op::GroupQueryAttention(_))) {
        graph.node_mut(id).inputs.truncate(15);
    }
    says(&refusal_at(graph, 64), &["k_norm_weight"]);
}

/// Sinks of a head as a constant of the operator; one of 0 is what `smooth_softmax` has.
#[test]
fn sinks_inside_the_operator() {
    let with = |change: &dyn Fn(&mut Graph, lapidary::graph::NodeId)| {
        let mut graph = export("llama-ort-genai");
        for id in nodes(&graph, |op| matches!(op, Op::GroupQueryAttention(_))) {
            change(&mut graph, id);
        }
        graph
    };
    let sinks = |values: [f32; 4]| {
        move |graph: &mut Graph, id| {
            let sinks = graph.add_constant("sinks", Tensor::from_f32(vec![4], &values));
            let node = graph.node_mut(id);
            node.inputs.resize(12, None);
            node.inputs[11] = Some(sinks);
        }
    };
    let smooth = |graph: &mut Graph, id| {
        let Op::GroupQueryAttention(how) = &mut graph.node_mut(id).op else {
            unreachable!("it was chosen as one")
        };
        how.smooth_softmax = 1;
    };
    let plain = logits(export("llama-ort-genai"));
    let zero = logits(with(&sinks([0.0; 4])));
    assert!(distance(&logits(with(&smooth)), &zero) < 1e-6);
    assert!(distance(&zero, &plain) > 1e-2);
    // A sink this low has no share.
    assert!(distance(&logits(with(&sinks([-200.0; 4]))), &plain) < 1e-5);
    let canonical = |graph| canonicalize(graph, &CanonicalizeOptions::default()).unwrap().graph;
    let some = canonical(with(&sinks([0.5, -1.0, 2.0, 0.0])));
    let biased = nodes(&some, |op| matches!(op, Op::BiasedAttention(_)));
    let read = some.node(biased[0]).input(5).and_then(|v| some.constant(v)).unwrap();
    assert_eq!(read.materialize().unwrap().to_f32(), [0.5, -1.0, 2.0, 0.0]);
    // Of three heads for four.
    let mut wrong = export("llama-ort-genai");
    for id in nodes(&wrong, |op| matches!(op, Op::GroupQueryAttention(_))) {
        let sinks = wrong.add_constant("sinks", Tensor::from_f32(vec![3], &[0.0; 3]));
        wrong.node_mut(id).inputs.resize(12, None);
        wrong.node_mut(id).inputs[11] = Some(sinks);
    }
    says(&refusal_at(wrong, 64), &["head_sink", "sinks"]);
}

/// Hidden states beside the logits are no output of a package.
#[test]
fn hidden_states_beside_the_logits() {
    let mut graph = export("llama-ort-genai");
    graph.sort().unwrap();
    let norms = nodes(&graph, |op| {
        matches!(op, Op::SkipRmsNormalization { .. } | Op::RmsNormalization { .. })
    });
    let hidden = graph.node(*norms.last().unwrap()).output(0).unwrap();
    graph.outputs.insert(0, hidden);
    let same = distance(&logits(graph), &logits(export("llama-ort-genai")));
    assert!(same < 1e-6, "{same:e}");
    // Two outputs of which neither is read by the other: either could be meant.
    let mut graph = export("llama-ort-genai");
    let logits = graph.find("logits").unwrap();
    let (head, _) = graph.def(logits).unwrap();
    let node = graph.node(head).clone();
    let inputs: Vec<ValueId> = node.inputs.iter().flatten().copied().collect();
    let other = graph.add_node("value_head", node.op, &inputs);
    graph.outputs.push(other);
    says(&refusal_at(graph, 64), &["value_head", "2 outputs are no caches"]);
}
