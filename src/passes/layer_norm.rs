//! `(x - mean(x)) / sqrt(mean((x - mean(x))²) + ε) · w + b` in separate operators becomes `LayerNormalization`.
//!
//! The division has the forms that `rms_norm` recognizes; scale and bias may each be missing.

use super::PassError;
use super::pattern::{before_widening, binary, finish, last_dim, only_reader, redefine, vector_weight};
use super::rms_norm::{fuse, is_centered, normalized, source_of_dtype};
use crate::graph::op::{Binary, Op};
use crate::graph::{Graph, ValueId};

/// Writes `LayerNormalization` in place of its parts. Returns the number of rewrites.
pub fn run(graph: &mut Graph) -> Result<usize, PassError> {
    let uses = graph.uses();
    let mut rewrites = 0;
    for id in graph.node_ids().collect::<Vec<_>>() {
        let Some(start) = graph.node(id).output(0) else {
            continue;
        };
        let Some(mut found) = normalized(graph, start) else {
            continue;
        };
        if !is_centered(graph, found.x) {
            continue;
        }
        let Some([z, _]) = binary(graph, before_widening(graph, found.x), Binary::Sub) else {
            continue;
        };
        let length = last_dim(graph, found.x);
        found.x = z;
        let Some(fused) = fuse(graph, &uses, start, &found, length) else {
            continue;
        };
        let op = Op::LayerNormalization {
            axis: -1,
            epsilon: found.epsilon,
        };
        let mut inputs = vec![Some(fused.x), Some(fused.scale)];
        let mut node = fused.node;
        // The bias, if the only reader adds one.
        let end = graph.node(node).output(0).expect("fuse gives the node of a value");
        if let Some((sum, bias)) = bias_after(graph, &uses, end, length)
            && source_of_dtype(graph, z, end).is_some()
        {
            let dtype = graph.value(end).dtype.unwrap_or(bias.dtype());
            let name = format!("{}.bias", graph.node(sum).name);
            inputs.push(Some(graph.add_constant(&name, bias.cast(dtype))));
            node = sum;
        }
        redefine(graph, node, op, inputs);
        rewrites += 1;
    }
    finish(graph, rewrites)
}

type Uses = std::collections::HashMap<ValueId, Vec<(crate::graph::NodeId, usize)>>;

fn bias_after(
    graph: &Graph,
    uses: &Uses,
    end: ValueId,
    length: Option<usize>,
) -> Option<(crate::graph::NodeId, crate::graph::Constant)> {
    let reader = only_reader(graph, uses, end)?;
    let node = graph.node(reader);
    (node.op == Op::Binary(Binary::Add)).then_some(())?;
    let other = node.inputs.iter().flatten().copied().find(|v| *v != end)?;
    Some((reader, vector_weight(graph, other, length)?))
}
