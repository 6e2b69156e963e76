//! Computations that TensorRT gets wrong, found in a canonical graph before an engine is built.
//!
//! A rotary embedding in single layers (products with rows of cosines and sines, half of the elements negated and
//! swapped) that is followed by a norm: engines of such a model gave logits that differed from the CPU's on an H200
//! with TensorRT-RTX 1.6.1, in fp32 and fp16, with weights bound, embedded and stripped (HunYuan;
//! benches/results/h200-families.json). Rotations that are recognized become `RotaryEmbedding` and are not affected.

use crate::graph::op::{Binary, Op};
use crate::graph::{Graph, Node, ValueId};
use crate::interface::Role;

/// Nodes that normalize the sum of two products with rows looked up by position.
pub fn rotations_before_norms(graph: &Graph) -> Vec<String> {
    let Some(positions) = graph.interface.as_ref().and_then(|of| of.input(Role::PositionIds)) else {
        return Vec::new();
    };
    let is_norm = |node: &Node| matches!(node.op, Op::RmsNormalization { .. } | Op::LayerNormalization { .. });
    let nodes = graph.node_ids().map(|id| graph.node(id));
    let norms = nodes.filter(|node| is_norm(node) && node.input(0).is_some_and(|x| is_rotation(graph, x, positions)));
    norms.map(|node| node.name.clone()).collect()
}

/// Whether a product with rows of positions is among the terms of a sum.
fn is_rotation(graph: &Graph, x: ValueId, positions: ValueId) -> bool {
    let (mut stack, mut terms) = (vec![x], 0);
    while let Some(value) = stack.pop() {
        let Some((_, node)) = graph.def(value) else { continue };
        terms += 1;
        match node.op {
            Op::Binary(Binary::Add | Binary::Sub) if terms < 32 => stack.extend(node.inputs.iter().flatten()),
            Op::Binary(Binary::Mul) if node.inputs.iter().flatten().any(|v| is_row(graph, *v, positions)) => {
                return true;
            }
            _ => {}
        }
    }
    false
}

/// Rows of a table, looked up by position.
fn is_row(graph: &Graph, mut at: ValueId, positions: ValueId) -> bool {
    while let Some((_, node)) = graph.def(at) {
        at = match &node.op {
            Op::Gather { .. } => return node.input(1) == Some(positions),
            Op::Cast { .. }
            | Op::Identity
            | Op::Reshape { .. }
            | Op::Unsqueeze
            | Op::Squeeze
            | Op::Transpose { .. } => match node.input(0) {
                Some(input) => input,
                None => return false,
            },
            _ => return false,
        };
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lower::synthetic::Decoder;
    use crate::tensor::{DType, Tensor};

    #[test]
    fn products_with_rows_of_positions_before_a_norm() {
        let mut graph = Decoder::tiny().graph();
        // Recognized norms and rotations do not count.
        assert!(rotations_before_norms(&graph).is_empty());
        let positions = graph.find(&Role::PositionIds.name()).unwrap();
        let table = graph.add_constant("table", Tensor::from_f32(vec![4, 8], &[0.5; 32]));
        let weight = graph.add_constant("weight", Tensor::from_f32(vec![8], &[1.0; 8]));
        let x = graph.add_input("x", DType::F32, Vec::new());
        let rows = graph.add_node("rows", Op::Gather { axis: 0 }, &[table, positions]);
        let turned = graph.add_node("turned", Op::Binary(Binary::Mul), &[x, rows]);
        let sum = graph.add_node("sum", Op::Binary(Binary::Add), &[turned, x]);
        let norm = Op::RmsNormalization {
            axis: -1,
            epsilon: 1e-5,
        };
        graph.add_node("embedded", norm.clone(), &[rows, weight]);
        graph.add_node("plain", norm.clone(), &[x, weight]);
        assert!(rotations_before_norms(&graph).is_empty());
        graph.add_node("normalized", norm, &[sum, weight]);
        assert_eq!(rotations_before_norms(&graph), ["normalized"]);
    }
}
