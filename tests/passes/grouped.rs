//! What newer versions of ONNX Runtime's `GroupQueryAttention` do inside: it becomes what older exports do around it.

use lapidary::graph::op::Op;
use lapidary::graph::{Graph, ValueId};
use lapidary::passes::{CanonicalizeOptions, canonicalize};

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
