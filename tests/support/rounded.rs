//! Canonical graphs with rounding inside attention.

use lapidary::graph::Graph;
use lapidary::graph::op::{Op, RoundedAttention, Rounding};
use lapidary::tensor::DType;

/// A canonical graph with its keys and values rounded as they are read, and scores and probabilities in its attention.
pub fn rounded(mut graph: Graph, scores: Option<Rounding>, probabilities: Option<Rounding>) -> Graph {
    for id in graph.node_ids().collect::<Vec<_>>() {
        let node = graph.node(id).clone();
        let Op::Attention(attention) = &node.op else { continue };
        for input in [1, 2] {
            let cache = node.input(input).unwrap();
            let to = [DType::U8, DType::F8E4M3Fn][input - 1];
            let (scale, zero_point) = [(0.013, 120), (0.004, 0)][input - 1];
            let how = Rounding { to, scale, zero_point };
            let near = graph.add_node(&format!("{}.near.{input}", node.name), how.operator(), &[cache]);
            let (dtype, shape) = (graph.value(cache).dtype, graph.value(cache).shape.clone());
            (graph.value_mut(near).dtype, graph.value_mut(near).shape) = (dtype, shape);
            graph.node_mut(id).inputs[input] = Some(near);
        }
        graph.node_mut(id).op = Op::RoundedAttention(RoundedAttention {
            scale: attention.scale.unwrap_or(0.25),
            softcap: attention.softcap,
            scores,
            capped: scores.map(|how| how.scaled(3.0)),
            probabilities,
        });
    }
    graph.sort().unwrap();
    graph
}
