//! Codes of activations that are moved, joined or processed by other operators between `QuantizeLinear` and
//! `DequantizeLinear`, as in a static QDQ export after ONNX Runtime's optimizer.
//!
//! With one scale for all elements `DequantizeLinear` commutes with every movement, so [`dequantize_first`] puts it
//! first: floats are moved, as in the quantizer's own file, and the pass `quantized` finds its pairs. [`left`] names
//! the codes without a pair, each with its operator and the cause.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use super::attention::Obstacle;
use super::dependence::{Dependence, classify, reaching_outputs};
use super::pattern::{node_of, redefine, scalar};
use super::roles::Roles;
use crate::graph::op::{Op, ScatterMode};
use crate::graph::{Graph, Node, NodeId, ValueId};

/// Inputs whose elements an operator returns unchanged; `None` for operators that compute.
fn moved(node: &Node) -> Option<Vec<usize>> {
    Some(match &node.op {
        Op::Identity
        | Op::Reshape { .. }
        | Op::Transpose { .. }
        | Op::Squeeze
        | Op::Unsqueeze
        | Op::Flatten { .. }
        | Op::Expand
        | Op::Tile
        | Op::Split { .. }
        | Op::Slice
        | Op::Gather { .. }
        | Op::GatherElements { .. }
        | Op::GatherNd { .. } => vec![0],
        Op::Concat { .. } => (0..node.inputs.len()).collect(),
        Op::Where => vec![1, 2],
        Op::ScatterNd {
            mode: ScatterMode::Replace,
        }
        | Op::ScatterElements {
            mode: ScatterMode::Replace,
            ..
        } => vec![0, 2],
        Op::TensorScatter { .. } => vec![0, 1],
        _ => return None,
    })
}

/// Whether scales are one for all elements.
fn is_one(graph: &Graph, scale: ValueId) -> bool {
    let ones = |shape: &crate::graph::Shape| shape.iter().all(|dim| dim.is_one());
    graph.shape(scale).is_some_and(ones)
}

/// A scale or zero point: the number of a constant, so that equal ones are the same, or a value.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Part {
    Number(u64),
    Value(ValueId),
}

/// Codes as read by a `DequantizeLinear` with one scale, or by a movement.
type Reading<T> = (T, Part, Part);

fn parts(graph: &Graph, scale: ValueId, zero: Option<ValueId>) -> (Part, Part) {
    let part = |value: ValueId| match scalar(graph, value) {
        Some(number) => Part::Number(number.to_bits()),
        None => Part::Value(value),
    };
    (part(scale), zero.map_or(Part::Number(0), part))
}

/// Puts `DequantizeLinear` before the movements of its codes. Returns the number of rewrites.
pub(super) fn dequantize_first(graph: &mut Graph) -> Result<usize, super::PassError> {
    let is_last = |id: &NodeId| matches!(graph.node(*id).op, Op::DequantizeLinear { block_size: 0, .. });
    let mut work: Vec<NodeId> = graph.node_ids().filter(is_last).collect();
    let mut rewrites = 0;
    // One for all that read the same codes the same way, preferably one that computes an output of the graph.
    let mut known: HashMap<Reading<ValueId>, ValueId> = HashMap::new();
    for id in &work {
        let node = graph.node(*id);
        if let (Some(codes), Some(scale), Some(floats)) = (node.input(0), node.input(1), node.output(0)) {
            let (scale, zero) = parts(graph, scale, node.input(2));
            let first = known.entry((codes, scale, zero)).or_insert(floats);
            if graph.outputs.contains(&floats) && !graph.outputs.contains(first) {
                *first = floats;
            }
        }
    }
    work.retain(|id| {
        let node = graph.node(*id);
        let (Some(codes), Some(scale), Some(floats)) = (node.input(0), node.input(1), node.output(0)) else {
            return false;
        };
        let (scale, zero) = parts(graph, scale, node.input(2));
        let first = known[&(codes, scale, zero)];
        if first != floats {
            redefine(graph, *id, Op::Identity, vec![Some(first)]);
            rewrites += 1;
        }
        first == floats
    });
    let mut in_floats: HashMap<Reading<NodeId>, Vec<Option<ValueId>>> = HashMap::new();
    while let Some(id) = work.pop() {
        let node = graph.node(id);
        let (Some(codes), Some(scale), zero) = (node.input(0), node.input(1), node.input(2)) else {
            continue;
        };
        let Some((from, place)) = graph.producer_of(codes) else {
            continue;
        };
        let source = graph.node(from).clone();
        let Some(elements) = moved(&source).filter(|_| is_one(graph, scale)) else {
            continue;
        };
        let (of_scale, of_zero) = parts(graph, scale, zero);
        let key = (from, of_scale, of_zero);
        if let Entry::Vacant(entry) = in_floats.entry(key) {
            let dtype = graph.value(scale).dtype;
            let typed_as = |graph: &mut Graph, made: ValueId, like: ValueId| {
                let shape = graph.value(like).shape.clone();
                let value = graph.value_mut(made);
                (value.dtype, value.shape) = (dtype, shape);
            };
            let mut inputs = source.inputs.clone();
            for input in elements {
                let Some(codes) = inputs.get(input).copied().flatten() else {
                    continue;
                };
                let reading = (codes, of_scale, of_zero);
                let floats = match known.get(&reading) {
                    Some(floats) => *floats,
                    None => {
                        let name = format!("{}.floats", graph.value(codes).name);
                        let op = Op::DequantizeLinear { axis: 0, block_size: 0 };
                        let parts: Vec<ValueId> = [Some(codes), Some(scale), zero].into_iter().flatten().collect();
                        let floats = graph.add_node(&name, op, &parts);
                        typed_as(graph, floats, codes);
                        work.extend(graph.producer_of(floats).map(|(id, _)| id));
                        known.insert(reading, floats);
                        floats
                    }
                };
                inputs[input] = Some(floats);
            }
            let mut outputs = Vec::new();
            for output in &source.outputs {
                outputs.push(output.map(|output| {
                    let name = format!("{}.floats", graph.value(output).name);
                    let made = graph.add_value(&name);
                    typed_as(graph, made, output);
                    made
                }));
            }
            graph.add_node_with_outputs(&source.name, source.op, inputs, outputs.clone());
            entry.insert(outputs);
        }
        if let Some(floats) = in_floats[&key].get(place).copied().flatten() {
            redefine(graph, id, Op::Identity, vec![Some(floats)]);
            rewrites += 1;
        }
    }
    super::pattern::finish(graph, rewrites)
}

/// Codes of activations that the pass `quantized` could not turn into roundings, each node with the cause, and the
/// names of the nodes after them.
#[derive(Default)]
pub(super) struct Left {
    /// Empty if there are none.
    pub obstacles: Vec<Obstacle>,
    /// Nodes whose recognition they can prevent.
    pub behind: HashSet<String>,
}

/// Remaining codes that affect the model's outputs. Those of positions, masks and shapes are executed.
pub(super) fn left(graph: &Graph, roles: &Roles) -> Left {
    let is_of_codes = |op: &Op| {
        matches!(
            op,
            Op::QuantizeLinear { .. } | Op::DequantizeLinear { .. } | Op::DynamicQuantizeLinear | Op::MatMulInteger
        )
    };
    let all: Vec<NodeId> = graph.node_ids().filter(|id| is_of_codes(&graph.node(*id).op)).collect();
    if all.is_empty() {
        return Left::default();
    }
    let (matters, dependence, uses) = (reaching_outputs(graph), classify(graph, roles), graph.uses());
    let mut left = Left::default();
    let mut behind: HashSet<ValueId> = HashSet::new();
    // Operators that a `DequantizeLinear` names as its cause.
    let mut causes: HashSet<NodeId> = HashSet::new();
    let mut reasons: Vec<(NodeId, String)> = Vec::new();
    let counts = |id: &NodeId| {
        let output = graph.node(*id).output(0);
        output.is_some_and(|v| matters.contains(&v) && dependence.get(&v) == Some(&Dependence::Data))
    };
    let (last, first): (Vec<NodeId>, Vec<NodeId>) = all
        .into_iter()
        .filter(counts)
        .partition(|id| matches!(graph.node(*id).op, Op::DequantizeLinear { .. }));
    for id in last {
        let node = graph.node(id);
        behind.extend(node.outputs.iter().flatten());
        if let Op::DequantizeLinear { axis, block_size } = node.op
            && let Some(reason) = of_dequantize(graph, node, axis, block_size)
        {
            causes.extend(
                node.input(0)
                    .and_then(|codes| graph.producer_of(codes))
                    .map(|(id, _)| id),
            );
            reasons.push((id, reason));
        }
    }
    for id in first {
        let node = graph.node(id);
        behind.extend(node.outputs.iter().flatten());
        let reason = match (&node.op, node.output(0)) {
            (Op::MatMulInteger, _) => Some(
                "its operands are not codes of one DynamicQuantizeLinear and a constant, or its result is not multiplied by \
                 both scales"
                    .to_string(),
            ),
            (_, Some(output)) if graph.outputs.contains(&output) => Some("its codes are an output of the model".to_string()),
            // Named where the codes are used.
            (_, Some(output)) => uses.get(&output).into_iter().flatten().find_map(|(user, _)| {
                let (id, user) = (*user, graph.node(*user));
                let computes = moved(user).is_none() && !is_of_codes(&user.op) && !causes.contains(&id);
                let known = !matches!(user.op, Op::Unknown { .. } | Op::Shape { .. } | Op::Size);
                (computes && known).then(|| format!("{} ({}) computes on its codes", user.op.name(), user.name))
            }),
            _ => None,
        };
        reasons.extend(reason.map(|reason| (id, reason)));
    }
    reasons.sort_by_key(|(id, _)| *id);
    left.obstacles.extend(reasons.into_iter().map(|(id, reason)| Obstacle {
        layer: None,
        at: graph.node(id).name.clone(),
        reason: format!("{}{reason}", of_codes(&graph.node(id).op)),
    }));
    for id in graph.node_ids() {
        let node = graph.node(id);
        let follows = node.inputs.iter().flatten().any(|input| behind.contains(input));
        if follows || node.outputs.iter().flatten().any(|output| behind.contains(output)) {
            behind.extend(node.outputs.iter().flatten());
            left.behind.insert(node.name.clone());
            // Recognition reports names of values, too.
            let outputs = node.outputs.iter().flatten();
            left.behind
                .extend(outputs.map(|output| graph.value(*output).name.clone()));
        }
    }
    left
}

/// The start of a reason from [`left`].
fn of_codes(op: &Op) -> String {
    format!(
        "the operator {} does not round activations in a way that is understood: ",
        op.name()
    )
}

/// Whether an obstacle is one of [`left`].
pub(super) fn is_left(obstacle: &Obstacle) -> bool {
    obstacle
        .reason
        .contains(" does not round activations in a way that is understood: ")
}

/// Why a `DequantizeLinear` has no pair; `None` if an unknown operator is the cause, which is reported separately.
fn of_dequantize(graph: &Graph, node: &Node, axis: i64, block_size: usize) -> Option<String> {
    let (codes, scale) = (node.input(0)?, node.input(1)?);
    if block_size != 0 {
        return Some(format!("activations are quantized in blocks of {block_size}"));
    }
    if !is_one(graph, scale) {
        return Some(format!("activations have a scale for each index of axis {axis}"));
    }
    let Some(source) = node_of(graph, codes) else {
        return Some("its codes are an input of the model, or a constant whose scale is none".to_string());
    };
    let numbers = |node: &Node| {
        let zero = node.input(2).map_or(Some(0.0), |zero| scalar(graph, zero));
        Some((scalar(graph, node.input(1)?)?, zero?))
    };
    match &source.op {
        Op::Unknown { .. } => None,
        Op::QuantizeLinear { block_size: 0, .. } => Some(match (numbers(source), numbers(node)) {
            (Some((a, b)), Some((c, d))) => format!(
                "codes of scale {a} and zero point {b} (of {}) are read with scale {c} and zero point {d}",
                source.name
            ),
            _ => format!("its scale, or that of {}, is no constant", source.name),
        }),
        Op::QuantizeLinear { block_size, .. } => Some(format!("activations are quantized in blocks of {block_size}")),
        Op::DynamicQuantizeLinear => Some(format!("codes of {} are read with another scale", source.name)),
        op => Some(format!(
            "its codes come from {} ({}), which computes on them",
            op.name(),
            source.name
        )),
    }
}
