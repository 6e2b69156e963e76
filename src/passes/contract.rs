//! Whether a graph is canonical: the interface and the operators that `graph`'s head promises to the lowering.

use std::collections::{BTreeMap, HashMap};

use super::attention::Obstacle;
use crate::graph::op::Op;
use crate::graph::{Graph, ValueId};
use crate::tensor::DType;

/// Everything that keeps the graph from being canonical; empty if it is.
pub fn check(graph: &Graph) -> Vec<Obstacle> {
    let mut obstacles = super::positions::stale_inputs(graph);
    interface(graph, &mut obstacles);
    operators(graph, &mut obstacles);
    obstacles
}

fn obstacle(at: &str, reason: String) -> Obstacle {
    Obstacle {
        layer: None,
        at: at.to_string(),
        reason,
    }
}

fn interface(graph: &Graph, obstacles: &mut Vec<Obstacle>) {
    let names = |ids: &[ValueId]| -> Vec<String> { ids.iter().map(|id| graph.value(*id).name.clone()).collect() };
    let pairs = graph.inputs.len().saturating_sub(3) / 2;
    let mut inputs = vec!["input_ids".to_string(), "position_ids".into(), "write_indices".into()];
    let mut outputs = vec!["logits".to_string()];
    for i in 0..pairs {
        inputs.extend([format!("key_cache.{i}"), format!("value_cache.{i}")]);
        outputs.extend([format!("updated_key_cache.{i}"), format!("updated_value_cache.{i}")]);
    }
    for (what, found, expected) in [
        ("inputs", names(&graph.inputs), inputs),
        ("outputs", names(&graph.outputs), outputs),
    ] {
        if found != expected {
            obstacles.push(obstacle(
                what,
                format!("are {} where {} are canonical", found.join(", "), expected.join(", ")),
            ));
        }
    }
    let logits = graph.outputs.first().map(|id| graph.value(*id));
    let ids = graph.inputs.first().and_then(|id| graph.shape(*id));
    if let (Some(logits), Some(ids)) = (logits, ids) {
        let fits = logits.shape.as_ref().is_some_and(|s| s.len() == 3 && s[..2] == ids[..]);
        if !fits || !logits.dtype.is_some_and(DType::is_float) {
            let found = format!("{:?} {:?}", logits.dtype, logits.shape);
            obstacles.push(obstacle(
                "logits",
                format!("are {found} where a float for every token, [batch, tokens, vocabulary], was expected"),
            ));
        }
    }
}

/// The operators of a canonical graph. Recognition must have removed all others.
pub fn is_canonical(op: &Op) -> bool {
    match op {
        Op::Attention(how) => !how.is_causal && how.q_num_heads.is_none() && how.scale.is_some(),
        Op::TensorScatter { axis, circular } => *axis == 2 && !circular,
        _ => op.info().canonical,
    }
}

/// Operators that Lapidary does not know at all, each with its nodes.
pub fn unknown(graph: &Graph) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    refused(graph, |op| matches!(op, Op::Unknown { .. }), &mut obstacles);
    obstacles
}

fn operators(graph: &Graph, obstacles: &mut Vec<Obstacle>) {
    refused(graph, |op| !is_canonical(op), obstacles);
}

fn refused(graph: &Graph, refuse: impl Fn(&Op) -> bool, obstacles: &mut Vec<Obstacle>) {
    let mut others: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for id in graph.node_ids() {
        let node = graph.node(id);
        if refuse(&node.op) {
            others.entry(node.op.name()).or_default().push(&node.name);
        }
    }
    for (op, nodes) in others {
        let more = nodes.len().saturating_sub(8);
        let mut at = nodes[..nodes.len() - more].join(", ");
        if more > 0 {
            at += &format!(" and {more} more");
        }
        obstacles.push(obstacle(&at, format!("the operator {op} is not supported")));
    }
}

/// How often each operator occurs.
pub fn histogram(graph: &Graph) -> BTreeMap<String, usize> {
    let mut counts = HashMap::new();
    for id in graph.node_ids() {
        *counts.entry(graph.node(id).op.name()).or_insert(0) += 1;
    }
    counts.into_iter().collect()
}
