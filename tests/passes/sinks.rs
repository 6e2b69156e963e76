//! Sinks of attention as a factor behind it, and values that one attention reads apart.

use std::path::Path;

use lapidary::graph::Graph;
use lapidary::graph::op::{Op, Reduction, Unary};
use lapidary::onnx;
use lapidary::passes::{CanonicalizeOptions, canonicalize};

use crate::refusals::{nodes, refusal_at, says};

fn family(name: &str) -> Graph {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/families");
    onnx::read(folder.join(name).join("model.onnx")).unwrap()
}

fn canonical(graph: Graph) -> Graph {
    let options = CanonicalizeOptions {
        max_positions: 64,
        ..CanonicalizeOptions::default()
    };
    canonicalize(graph, &options).unwrap().graph
}

/// Granite: `sigmoid(log sum exp(scores) - sink)` times what attention gives without a sink.
#[test]
fn a_share_that_sinks_leave_is_sinks() {
    for name in ["dynamo18-granite-sinks", "torchscript17-granite-sinks"] {
        let graph = canonical(family(name));
        let with_sinks = nodes(&graph, |op| matches!(op, Op::BiasedAttention(_)));
        assert_eq!(with_sinks.len(), 2, "{name}");
        for id in with_sinks {
            let sinks = graph.constant(graph.node(id).input(5).unwrap()).unwrap();
            let sinks = sinks.materialize().unwrap();
            assert_eq!(sinks.shape(), [4], "{name}");
            assert!(sinks.to_f32().iter().any(|sink| *sink != 0.0), "{name}");
        }
        let left = nodes(&graph, |op| {
            matches!(
                op,
                Op::Reduce {
                    reduction: Reduction::LogSumExp,
                    ..
                }
            )
        });
        assert!(left.is_empty(), "{name}");
    }
}

#[test]
fn another_function_of_the_scores_is_refused() {
    let mut graph = family("dynamo18-granite-sinks");
    let shares = nodes(&graph, |op| *op == Op::Unary(Unary::Sigmoid))
        .into_iter()
        .find(|id| {
            let (_, difference) = graph.def(graph.node(*id).input(0).unwrap()).unwrap();
            difference
                .input(0)
                .and_then(|v| graph.def(v))
                .is_some_and(|(_, node)| matches!(node.op, Op::Reduce { .. }))
        });
    graph.node_mut(shares.unwrap()).op = Op::Unary(Unary::Tanh);
    says(
        &refusal_at(graph, 64),
        &["follows from its scores and is not the share that sinks leave"],
    );
}

/// DiffLlama: two values under one softmax are one value of twice the width, which the cache holds.
#[test]
fn values_under_one_softmax_are_cached_as_one() {
    let graph = canonical(family("dynamo18-diffllama"));
    let attentions = nodes(&graph, |op| matches!(op, Op::Attention(_)));
    assert_eq!(attentions.len(), 2);
    let caches = graph.interface.as_ref().unwrap().caches();
    let dims = |of: usize| {
        let shape = graph.shape(caches[of].input).unwrap();
        [1, 3].map(|axis: usize| shape[axis].as_const().unwrap())
    };
    assert_eq!([dims(0), dims(1)], [[4, 4], [4, 8]]);
}
