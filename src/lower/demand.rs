//! Which nodes and constants are needed as data. Shape arithmetic is not: layers carry their dims as numbers.

use std::collections::HashSet;

use crate::graph::{Graph, Node, NodeId, Op, ValueId};

pub(super) struct Demand {
    pub nodes: HashSet<NodeId>,
    /// Constants in order of first use, by the nodes, then by the outputs.
    pub constants: Vec<ValueId>,
}

pub(super) fn demand(graph: &Graph) -> Demand {
    let mut wanted: HashSet<ValueId> = graph.outputs.iter().copied().collect();
    let mut nodes = HashSet::new();
    for id in graph.node_ids().rev() {
        let node = graph.node(id);
        if node.outputs.iter().flatten().any(|v| wanted.contains(v)) {
            nodes.insert(id);
            wanted.extend(data_inputs(graph, node));
        }
    }
    let mut constants = Vec::new();
    let mut seen = HashSet::new();
    let live = graph.node_ids().filter(|id| nodes.contains(id));
    let read = live.flat_map(|id| data_inputs(graph, graph.node(id)));
    for value in read.chain(graph.outputs.iter().copied()) {
        if graph.constant(value).is_some() && seen.insert(value) {
            constants.push(value);
        }
    }
    Demand { nodes, constants }
}

/// The values a node's layers read. The others are parameters, read while lowering.
pub(super) fn data_inputs(graph: &Graph, node: &Node) -> Vec<ValueId> {
    let at = |indices: &[usize]| -> Vec<ValueId> { indices.iter().filter_map(|i| node.input(*i)).collect() };
    match &node.op {
        Op::Range => at(&[0]).into_iter().filter(|v| graph.constant(*v).is_none()).collect(),
        // The product reads through a transpose of its operands.
        Op::MatMul => at(&[0, 1]).into_iter().map(|v| through_transpose(graph, v).0).collect(),
        op => {
            let info = op.info();
            let is_data = |i: &usize| !info.inputs.get(*i).is_some_and(|input| input.parameter);
            (0..node.inputs.len())
                .filter(is_data)
                .filter_map(|i| node.input(i))
                .collect()
        }
    }
}

/// The value under a `Transpose` that swaps only the last two axes, and whether there was one.
pub(crate) fn through_transpose(graph: &Graph, value: ValueId) -> (ValueId, bool) {
    if let Some((_, node)) = graph.def(value)
        && let Op::Transpose { perm } = &node.op
        && let Some(source) = node.input(0)
    {
        let swaps = match perm {
            Some(perm) => swaps_matrix(perm),
            None => graph.shape(source).is_some_and(|s| s.len() == 2),
        };
        if swaps {
            return (source, true);
        }
    }
    (value, false)
}

fn swaps_matrix(perm: &[usize]) -> bool {
    let rank = perm.len();
    rank >= 2 && perm[rank - 2..] == [rank - 1, rank - 2] && perm[..rank - 2].iter().enumerate().all(|(i, p)| i == *p)
}
