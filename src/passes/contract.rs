//! Checks that a graph is canonical: the interface and operators that the head of `graph` defines for the lowering.

use std::collections::{BTreeMap, HashMap};

use super::attention::Obstacle;
use crate::graph::Graph;
use crate::graph::op::Op;
use crate::interface::InterfaceErrors;

/// Everything that prevents the graph from being canonical; empty if it is.
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

/// The interface that `emit` set must agree with the names, dtypes and shapes: readers of the graph's file have only
/// those.
fn interface(graph: &Graph, obstacles: &mut Vec<Obstacle>) {
    match graph.canonical_interface() {
        Err(errors) => obstacles.extend(interface_obstacles(errors)),
        Ok(named) if graph.interface.as_ref() != Some(&named) => {
            let text = |signature: crate::interface::Signature| {
                let roles: Vec<String> = signature
                    .inputs
                    .iter()
                    .chain(&signature.outputs)
                    .map(|r| r.name())
                    .collect();
                roles.join(", ")
            };
            let found = graph.interface.as_ref().map(|known| text(known.signature()));
            obstacles.push(obstacle(
                "interface",
                format!(
                    "is {}, but its names say {}",
                    found.unwrap_or_else(|| "missing".into()),
                    text(named.signature())
                ),
            ));
        }
        Ok(_) => {}
    }
    let logits = graph.outputs.first().map(|id| graph.value(*id));
    if let Some(logits) = logits
        && (logits.dtype.is_none() || logits.shape.is_none())
    {
        obstacles.push(obstacle("logits", "have no known dtype and shape".into()));
    }
}

/// Faults of an interface as obstacles.
pub fn interface_obstacles(errors: InterfaceErrors) -> Vec<Obstacle> {
    let errors = errors.0.into_iter();
    errors.map(|error| obstacle("interface", error.to_string())).collect()
}

/// The operators of a canonical graph. Recognition must have removed all others.
pub fn is_canonical(op: &Op) -> bool {
    match op {
        Op::Attention(how) => !how.is_causal && how.q_num_heads.is_none() && how.scale.is_some(),
        Op::TensorScatter { axis, circular } => *axis == 2 && !circular,
        _ => op.info().canonical,
    }
}

/// Unknown operators, each with its nodes.
pub fn unknown(graph: &Graph) -> Vec<Obstacle> {
    let mut obstacles = Vec::new();
    refused(graph, |op| matches!(op, Op::Unknown { .. }), &mut obstacles);
    obstacles
}

/// Whether an obstacle is one of [`unknown`].
pub fn is_unknown_operator(obstacle: &Obstacle) -> bool {
    obstacle.reason.starts_with("the operator ") && obstacle.reason.ends_with(" is not supported")
}

/// Whether an obstacle is an operator of ONNX Runtime on codes, `QAttention` for example.
pub fn is_unknown_on_codes(obstacle: &Obstacle) -> bool {
    let name = obstacle.reason.strip_prefix("the operator com.microsoft::");
    let known = ["QLinear", "QAttention", "QGemm", "QEmbed", "QOrdered", "QConv", "QSkip"];
    name.is_some_and(|name| known.iter().any(|start| name.starts_with(start)))
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
