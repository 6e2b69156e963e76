//! Values that the same probabilities weigh apart become one value.
//!
//! Differential attention (DiffLlama) computes scores of queries and keys once and multiplies their softmax with two values.
//! `P · v₀` and `P · v₁` are the parts of `P · [v₀, v₁]`, so the values are joined along their last axis, and the result is split
//! again: one attention is left, whose values are wider than its keys. The same of two `Attention` operators that differ in
//! their values alone. Runs before `latent`, which caches the joined rows.

use std::collections::HashMap;

use super::PassError;
use super::pattern::{finish, nan_guarded};
use crate::graph::op::Op;
use crate::graph::{Graph, NodeId, ValueId};
use crate::tensor::Tensor;

/// Operators that may stand between a softmax and the products with its result.
const BETWEEN: usize = 4;

/// Joins them. Gives the number of values that became parts of others.
pub fn run(graph: &mut Graph) -> Result<usize, PassError> {
    let mut groups: Vec<Vec<NodeId>> = Vec::new();
    let mut known: HashMap<Vec<Option<ValueId>>, Vec<usize>> = HashMap::new();
    for id in graph.node_ids() {
        let node = graph.node(id);
        let (at, others) = match node.op {
            Op::MatMul => (1, vec![node.input(0)]),
            Op::Attention(_) => (
                2,
                [&node.inputs[..2], &node.inputs[3.min(node.inputs.len())..]].concat(),
            ),
            _ => continue,
        };
        let one_output = node.outputs.iter().flatten().count() == 1 && node.output(0).is_some();
        if !one_output || !may_join(graph, node.input(at)) || (at == 1 && !is_softmax(graph, node.input(0))) {
            continue;
        }
        let alike = known.entry(others).or_default();
        let like = |group: &&usize| {
            let first = graph.node(groups[**group][0]);
            let shapes = [first, node].map(|node| graph.shape(node.input(at)?).and_then(|shape| shape.split_last()));
            let [Some((_, of_first)), Some((_, of_this))] = shapes else {
                return false;
            };
            first.op == node.op && of_first == of_this
        };
        match alike.iter().find(like) {
            Some(group) => groups[*group].push(id),
            None => {
                alike.push(groups.len());
                groups.push(vec![id]);
            }
        }
    }
    let mut rewrites = 0;
    for group in groups.into_iter().filter(|group| group.len() > 1) {
        rewrites += group.len();
        join(graph, &group);
    }
    finish(graph, rewrites)
}

/// Values of an attention: `[batch, heads, slots, head_dim]`, with a known head_dim, and not constant.
fn may_join(graph: &Graph, value: Option<ValueId>) -> bool {
    let Some(value) = value.filter(|value| graph.constant(*value).is_none()) else {
        return false;
    };
    let shape = graph.shape(value).filter(|shape| shape.len() == 4);
    shape.is_some_and(|shape| shape[3].as_const().is_some() && shape[1].as_const().is_some())
}

/// Whether a value is the result of a softmax, but for casts and a guard against rows that are no numbers.
fn is_softmax(graph: &Graph, value: Option<ValueId>) -> bool {
    let mut at = value;
    for _ in 0..BETWEEN {
        let Some((_, node)) = at.and_then(|value| graph.def(value)) else {
            return false;
        };
        at = match node.op {
            Op::Softmax { .. } => return true,
            Op::Identity | Op::Cast { .. } => node.input(0),
            Op::Where => nan_guarded(graph, node),
            _ => return false,
        };
    }
    false
}

fn join(graph: &mut Graph, group: &[NodeId]) {
    let first = graph.node(group[0]).clone();
    let at = if first.op == Op::MatMul { 1 } else { 2 };
    let values: Vec<ValueId> = group
        .iter()
        .map(|id| graph.node(*id).input(at).expect("it has one"))
        .collect();
    let sizes: Vec<i64> = values
        .iter()
        .map(|value| {
            graph
                .shape(*value)
                .and_then(|shape| shape.last()?.as_const())
                .expect("it is known")
        })
        .collect();
    let name = &first.name;
    let joined = graph.add_node(&format!("{name}.values"), Op::Concat { axis: -1 }, &values);
    let mut inputs = first.inputs.clone();
    inputs[at] = Some(joined);
    let all = graph.add_value(&format!("{name}.all"));
    graph.value_mut(all).dtype = first.output(0).and_then(|output| graph.value(output).dtype);
    let outputs: Vec<Option<ValueId>> = group.iter().map(|id| graph.node(*id).output(0)).collect();
    for id in group {
        graph.remove_node(*id);
    }
    graph.add_node_with_outputs(name, first.op.clone(), inputs, vec![Some(all)]);
    let sizes = graph.add_constant(&format!("{name}.sizes"), Tensor::from_i64(vec![sizes.len()], &sizes));
    graph.add_node_with_outputs(
        &format!("{name}.parts"),
        Op::Split { axis: -1 },
        vec![Some(all), Some(sizes)],
        outputs,
    );
}
