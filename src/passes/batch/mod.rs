//! An export for a fixed number of sequences becomes one for any number.
//!
//! The tensors of such an export have one row per sequence, and its reshape targets contain the number. [`follow`]
//! finds the axis that counts the sequences after each operator of the canonical graph, and refuses an operator that
//! mixes sequences or treats them differently. Then the number becomes `batch` in every shape and target. Masks,
//! positions and caches were recognized earlier by execution with all sequences.

mod follow;

use super::attention::Obstacle;
use super::reshapes;
use crate::dim::{Dim, Sym};
use crate::graph::op::Op;
use crate::graph::{Graph, NodeId, ValueId};
use crate::tensor::Tensor;
use follow::{Followed, follow};

/// Rewrites a graph with a canonical interface whose `number` of sequences is fixed. Returns the number of values with
/// an axis for them.
pub fn run(graph: &mut Graph, number: usize) -> Result<usize, Vec<Obstacle>> {
    let Followed {
        axes,
        cut,
        reshapes,
        expands,
    } = follow(graph, number)?;
    let (number, batch) = (Dim::from(number), Dim::sym(Sym::batch()));
    for (value, axis) in &axes {
        if let Some(dim) = graph
            .value_mut(*value)
            .shape
            .as_mut()
            .and_then(|shape| shape.get_mut(*axis))
            && let Some(times) = dim.div_exact(&number)
        {
            *dim = &times * &batch;
        }
    }
    for (node, input, axis) in cut {
        cut_to_one(graph, node, input, axis);
    }
    let interface = graph.interface.as_ref().expect("emit gave the graph its interface");
    let token_input = interface.token_input();
    let mut obstacles = Vec::new();
    for id in reshapes {
        let node = graph.node(id);
        let (name, ends) = (node.name.clone(), (node.input(0), node.output(0)));
        let target = match ends {
            (Some(from), Some(to)) => {
                let shapes = (graph.shape(from).cloned(), graph.shape(to).cloned());
                let (from, to) = (shapes.0.unwrap_or_default(), shapes.1.unwrap_or_default());
                reshapes::target(graph, token_input, &from, &to, &name)
            }
            _ => None,
        };
        match target {
            Some(target) => {
                let node = graph.node_mut(id);
                node.op = Op::Reshape { allowzero: false };
                node.inputs[1] = Some(target);
            }
            None => obstacles.push(Obstacle {
                layer: None,
                at: name,
                reason: "no target of a reshape says its shape for any number of sequences".into(),
            }),
        }
    }
    if !obstacles.is_empty() {
        return Err(obstacles);
    }
    for (node, axis) in expands {
        keep_axis(graph, node, axis);
    }
    Ok(axes.len())
}

/// Cuts an operand that repeats one row per sequence to the first row.
fn cut_to_one(graph: &mut Graph, node: NodeId, input: usize, axis: usize) {
    let Some(x) = graph.node(node).input(input) else { return };
    let name = format!("{}.row", graph.value(x).name);
    let row = match graph.constant(x).map(|constant| constant.sliced(axis, 0, 1)) {
        Some(row) => graph.add_constant(&name, row),
        None => slice(graph, x, axis, 0, 1, &name),
    };
    graph.node_mut(node).inputs[input] = Some(row);
}

fn slice(graph: &mut Graph, x: ValueId, axis: usize, start: i64, end: i64, name: &str) -> ValueId {
    let operands = [start, end, axis as i64].map(|value| graph.add_i64(&format!("{name}.slice"), &[value]));
    graph.add_node(name, Op::Slice, &[x, operands[0], operands[1], operands[2]])
}

/// Sets this axis in the target of an `Expand` to 1, which keeps the dim.
fn keep_axis(graph: &mut Graph, id: NodeId, axis: usize) {
    let node = graph.node(id);
    let Some((old, name)) = node.input(1).map(|old| (old, format!("{}.shape", node.name))) else {
        return;
    };
    let known = graph.constant(old).and_then(|target| target.materialize().ok());
    let target = match known.map(|target| Tensor::to_i64(&target)) {
        Some(mut target) => {
            target[axis] = 1;
            graph.add_i64(&name, &target)
        }
        None => {
            let mut parts = Vec::new();
            if axis > 0 {
                parts.push(slice(graph, old, 0, 0, axis as i64, &name));
            }
            parts.push(graph.add_i64(&name, &[1]));
            parts.push(slice(graph, old, 0, axis as i64 + 1, i64::MAX, &name));
            graph.add_node(&name, Op::Concat { axis: 0 }, &parts)
        }
    };
    graph.node_mut(id).inputs[1] = Some(target);
}
