//! The rules of a graph, checked all at once.
//!
//! Input: a graph after inference. Output: every obstacle in it: values without a definition, nodes out of order,
//! unknown operators (each with the names of all its nodes), missing or surplus inputs, element types that an operator
//! does not accept or that differ where they must be equal. Inference checks shapes.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use super::op::Op;
use super::{Definition, Graph, Node, ValueId};
use crate::tensor::DType;

/// Something that prevents a graph from being compiled.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum Obstacle {
    /// An unknown operator or attribute, with all nodes that have it.
    UnknownOp { op: String, nodes: Vec<String> },
    /// A node has too many or too few inputs or outputs.
    Arity { node: String, op: String, reason: String },
    /// An operand has an element type that the operator does not accept.
    DType {
        node: String,
        op: String,
        operand: String,
        dtype: DType,
        wanted: &'static str,
    },
    /// Two operands must have the same element type.
    MixedDTypes {
        node: String,
        op: String,
        left: (String, DType),
        right: (String, DType),
    },
    /// Inference could not type a value.
    Untyped { value: String, node: String },
    /// The graph's internal structure is inconsistent: a bug in a pass, not an error of the export.
    Structure { reason: String },
}

/// A message names at most this many nodes and counts the rest.
const MAX_NAMES: usize = 12;

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::UnknownOp { op, nodes } => {
                let names: Vec<String> = nodes.iter().take(MAX_NAMES).map(|n| format!("{n:?}")).collect();
                let noun = if nodes.len() == 1 { "node" } else { "nodes" };
                write!(f, "the operator {op} is not supported ({noun} {}", names.join(", "))?;
                match nodes.len().checked_sub(MAX_NAMES) {
                    Some(more) if more > 0 => write!(f, " and {more} more)"),
                    _ => write!(f, ")"),
                }
            }
            Obstacle::Arity { node, op, reason } => write!(f, "node {node:?} ({op}) {reason}"),
            Obstacle::DType {
                node,
                op,
                operand,
                dtype,
                wanted,
            } => write!(f, "node {node:?} ({op}): {operand:?} is {dtype} but must be {wanted}"),
            Obstacle::MixedDTypes { node, op, left, right } => write!(
                f,
                "node {node:?} ({op}): {:?} is {} and {:?} is {}, but they must be of one type",
                left.0, left.1, right.0, right.1
            ),
            Obstacle::Untyped { value, node } => {
                write!(
                    f,
                    "the type of {value:?}, computed by node {node:?}, cannot be inferred"
                )
            }
            Obstacle::Structure { reason } => write!(f, "broken graph: {reason}"),
        }
    }
}

/// All obstacles of a graph, one per line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Obstacles(pub Vec<Obstacle>);

impl fmt::Display for Obstacles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, obstacle) in self.0.iter().enumerate() {
            write!(f, "{}{obstacle}", if i > 0 { "\n" } else { "" })?;
        }
        Ok(())
    }
}

/// Checks every rule. As far as operators and element types are concerned, a graph that passes can be lowered or
/// written.
pub fn verify(graph: &Graph) -> Result<(), Obstacles> {
    let mut obstacles = Vec::new();
    structure(graph, &mut obstacles);
    let mut unknown: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for id in graph.node_ids() {
        let node = graph.node(id);
        if let Op::Unknown { .. } = node.op {
            unknown.entry(node.op.name()).or_default().push(node.name.clone());
        } else if arity(node, &mut obstacles) {
            dtypes(graph, node, &mut obstacles);
        }
    }
    // After an unknown operator nothing is typed; that is not an additional obstacle.
    if unknown.is_empty() {
        untyped(graph, &mut obstacles);
    }
    let unknown = unknown.into_iter().map(|(op, nodes)| Obstacle::UnknownOp { op, nodes });
    obstacles.splice(0..0, unknown);
    if obstacles.is_empty() {
        Ok(())
    } else {
        Err(Obstacles(obstacles))
    }
}

fn structure(graph: &Graph, obstacles: &mut Vec<Obstacle>) {
    let mut broken = |reason: String| obstacles.push(Obstacle::Structure { reason });
    let mut names = HashSet::new();
    let name = |v: ValueId| &graph.value(v).name;
    for value in graph.value_ids() {
        if !names.insert(name(value)) {
            broken(format!("two values are named {:?}", name(value)));
        }
    }
    let mut ready: HashSet<ValueId> = HashSet::new();
    for input in &graph.inputs {
        if !matches!(graph.value(*input).definition, Definition::Input) {
            broken(format!("the input {:?} is defined by something else", name(*input)));
        }
        if !ready.insert(*input) {
            broken(format!("the input {:?} is listed twice", name(*input)));
        }
    }
    let available = |v: ValueId, ready: &HashSet<ValueId>| ready.contains(&v) || graph.constant(v).is_some();
    for id in graph.node_ids() {
        let node = graph.node(id);
        for input in node.inputs.iter().flatten().filter(|v| !available(**v, &ready)) {
            broken(format!(
                "node {:?} reads {:?}, which is not defined before it",
                node.name,
                name(*input)
            ));
        }
        for (i, output) in node.outputs.iter().enumerate() {
            let Some(value) = *output else { continue };
            let defined =
                matches!(graph.value(value).definition, Definition::Node { node, output } if node == id && output == i);
            if !defined || !ready.insert(value) {
                broken(format!(
                    "{:?} has another definition than node {:?}",
                    name(value),
                    node.name
                ));
            }
        }
    }
    for output in graph.outputs.iter().filter(|v| !available(**v, &ready)) {
        broken(format!("the output {:?} has no definition", name(*output)));
    }
}

fn untyped(graph: &Graph, obstacles: &mut Vec<Obstacle>) {
    for id in graph.node_ids() {
        let node = graph.node(id);
        for output in node.outputs.iter().flatten() {
            let value = graph.value(*output);
            if value.dtype.is_none() || value.shape.is_none() {
                obstacles.push(Obstacle::Untyped {
                    value: value.name.clone(),
                    node: node.name.clone(),
                });
            }
        }
    }
}

/// Checks the number of inputs and outputs.
fn arity(node: &Node, obstacles: &mut Vec<Obstacle>) -> bool {
    let info = node.op.info();
    let mut wrong = |reason: String| {
        obstacles.push(Obstacle::Arity {
            node: node.name.clone(),
            op: node.op.name(),
            reason,
        });
        false
    };
    let mut required = (0..info.inputs.len()).filter(|i| !info.inputs[*i].optional);
    if let Some(missing) = required.find(|i| node.input(*i).is_none()) {
        return wrong(format!("has no input {missing}, which it needs"));
    }
    if info.variadic && node.inputs.iter().any(Option::is_none) {
        return wrong("omits one of its inputs".to_string());
    }
    let (inputs, most) = (node.inputs.len(), info.inputs.len());
    if inputs > most && !info.variadic {
        return wrong(format!("has {inputs} inputs, but takes at most {most}"));
    }
    let outputs = node.outputs.len();
    if outputs > info.outputs {
        return wrong(format!("has {outputs} outputs, but gives at most {}", info.outputs));
    }
    true
}

fn dtypes(graph: &Graph, node: &Node, obstacles: &mut Vec<Obstacle>) {
    let info = node.op.info();
    let mut first: Option<(String, DType)> = None;
    for (i, input) in node.inputs.iter().enumerate() {
        let Some(value) = input.map(|v| graph.value(v)) else {
            continue;
        };
        let Some(dtype) = value.dtype else { continue };
        let Some(allowed) = info.inputs.get(i).or(info.inputs.last()) else {
            continue;
        };
        if !allowed.types.takes(dtype) {
            obstacles.push(Obstacle::DType {
                node: node.name.clone(),
                op: node.op.name(),
                operand: value.name.clone(),
                dtype,
                wanted: allowed.types.name(),
            });
        } else if allowed.same {
            match &first {
                None => first = Some((value.name.clone(), dtype)),
                Some(first) if first.1 != dtype => obstacles.push(Obstacle::MixedDTypes {
                    node: node.name.clone(),
                    op: node.op.name(),
                    left: first.clone(),
                    right: (value.name.clone(), dtype),
                }),
                Some(_) => {}
            }
        }
    }
}
