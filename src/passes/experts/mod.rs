//! Mixtures of experts become `Routing` and `Experts`.
//!
//! Exporters write them in many ways: matrices gathered for every token, a loop over experts with `NonZero` and
//! scatters, all experts times weights that are mostly 0. There is no list of forms here. A `TopK` is the anchor. The
//! block is between the value from which everything is computed and the value in which everything is combined
//! (`region`). Executing it with substitutes for tokens, logits and results of products shows what it does (`trial`):
//! `routing` finds how experts are chosen, `products` the constants of the products, `gating` the function between
//! them, `sums` which result belongs to which expert. `body` proves the whole, and `weights` brings matrices into the
//! canonical form. A block that does not match is refused, with the reason.
//!
//! The blocks of all layers have the same structure, but each is proved separately. Products, nearly all of the work,
//! are not executed.

mod body;
mod gating;
mod products;
mod region;
mod routing;
mod sums;
mod trial;
mod weights;

use std::collections::HashSet;

use super::PassError;
use super::attention::Obstacle;
use super::roles::Roles;
use crate::graph::op::{Experts, Op};
use crate::graph::{Constant, Graph, NodeId, ValueId};
use body::Block;
use region::Flow;

/// Number of values after a choice that are considered as the result of its experts.
const REACH: usize = 8;

/// Writes every mixture of experts as canonical operators. Returns the number of blocks, and every choice that was not
/// recognized.
pub fn run(graph: &mut Graph, roles: &Roles) -> Result<(usize, Vec<Obstacle>), PassError> {
    graph.sort()?;
    let mut blocks = Vec::new();
    let mut obstacles = Vec::new();
    let flow = Flow::new(graph);
    for id in choices(&flow) {
        match block(&flow, roles, id) {
            Ok(block) => blocks.push(block),
            Err(reason) => obstacles.push(Obstacle {
                layer: None,
                at: graph.node(id).name.clone(),
                reason: format!("the mixture of experts that begins here was not understood: {reason}"),
            }),
        }
    }
    let mut count = blocks.len();
    for block in blocks {
        write(graph, block);
    }
    count += raise(graph);
    if count > 0 {
        graph.sort()?;
        graph.remove_dead_nodes();
    }
    Ok((count, obstacles))
}

/// Choices of experts: a top-k along the last axis on which no other choice depends.
fn choices(flow: &Flow<'_>) -> Vec<NodeId> {
    let graph = flow.graph;
    let all: Vec<NodeId> = graph
        .node_ids()
        .filter(|id| routing::choice(graph, *id).is_some_and(|choice| flow.carries.contains(&choice.scores)))
        .collect();
    let is_ahead = |id: NodeId| {
        // Groups of experts are chosen shortly before the experts.
        let behind = flow.descendants(id);
        all.iter().any(|other| {
            let choice = routing::choice(graph, *other).expect("it is one");
            *other != id && behind.contains(&choice.scores) && depends_closely(flow, &behind, choice.scores)
        })
    };
    all.iter().copied().filter(|id| !is_ahead(*id)).collect()
}

/// Whether scores depend on a choice before everything after that choice is combined.
fn depends_closely(flow: &Flow<'_>, behind: &HashSet<ValueId>, scores: ValueId) -> bool {
    // With a linear layer in between, the choice belongs to an earlier layer.
    let linear = |value: &ValueId| {
        let producer = flow.graph.def(*value).map(|(_, node)| &node.op);
        matches!(producer, Some(Op::MatMul | Op::Gemm { .. } | Op::FusedMatMul { .. }))
    };
    let dominators = std::iter::once(scores).chain(flow.dominators(scores));
    !dominators.take_while(|v| behind.contains(v)).any(|v| linear(&v))
}

fn block(flow: &Flow<'_>, roles: &Roles, id: NodeId) -> Result<Block, String> {
    let graph = flow.graph;
    let choice = routing::choice(graph, id).expect("the caller found it");
    let candidates = routing::candidates(flow, roles, &choice)?;
    let before_logits: HashSet<ValueId> = flow.dominators(candidates[0].logits).collect();
    let ends = flow.postdominators(id, REACH);
    // The experts are combined at the first value with as many elements as the tokens.
    let mut reason = None;
    for end in &ends {
        let mut dominators = flow.dominators(*end);
        let Some(x) = dominators.find(|v| before_logits.contains(v)) else {
            continue;
        };
        if volume(graph, x).is_none() || volume(graph, x) != volume(graph, *end) {
            continue;
        }
        let (x, y) = (as_tokens(flow, x), as_result(flow, *end, x));
        let rounded = flow.cone(y, &[x]).into_iter().any(|id| {
            let op = &graph.node(id).op;
            matches!(op, Op::RoundToCodes { .. } | Op::DynamicRoundToCodes)
        });
        if rounded {
            return Err(
                "activations are rounded to codes inside, which is not known of experts; --activations float leaves them in \
                 floating point"
                    .to_string(),
            );
        }
        match body::recognize(flow, roles, &candidates, [x, y]) {
            Ok(block) => return Ok(block),
            // Report the nearest value, where a block with a small difference ends.
            Err(why) => drop(reason.get_or_insert(why)),
        }
    }
    Err(reason.unwrap_or_else(|| "the results of its experts do not come together".to_string()))
}

fn volume(graph: &Graph, value: ValueId) -> Option<crate::dim::Dim> {
    let shape = graph.shape(value)?;
    Some(shape.iter().fold(crate::dim::Dim::constant(1), |n, dim| &n * dim))
}

/// A value before reshapes that only merge leading axes.
fn as_tokens(flow: &Flow<'_>, mut x: ValueId) -> ValueId {
    let graph = flow.graph;
    while let Some((_, node)) = graph.def(x)
        && is_reshape(&node.op)
        && let Some(before) = node.input(0)
        && let (Some(from), Some(to)) = (graph.shape(before), graph.shape(x))
        && from.last() == to.last()
        && from.len() >= to.len()
    {
        x = before;
    }
    x
}

/// A result after reshapes to the shape of the tokens.
fn as_result(flow: &Flow<'_>, end: ValueId, x: ValueId) -> ValueId {
    let graph = flow.graph;
    let x = as_tokens(flow, x);
    let mut y = end;
    let mut best = end;
    while let Some(reader) = flow.only_reader(y)
        && is_reshape(&graph.node(reader).op)
        && let Some(next) = graph.node(reader).output(0)
    {
        y = next;
        if graph.shape(y).is_some() && graph.shape(y) == graph.shape(x) {
            best = y;
        }
    }
    best
}

fn is_reshape(op: &Op) -> bool {
    matches!(
        op,
        Op::Reshape { .. } | Op::Flatten { .. } | Op::Squeeze | Op::Unsqueeze | Op::Identity
    )
}

/// A weight of all experts, named like those of one without its number.
fn named(constant: Constant) -> Constant {
    const NUMBER: &str = "experts.0.";
    let name = constant.origin().filter(|name| name.contains(NUMBER));
    match name.map(|name| name.replace(NUMBER, "experts.")) {
        Some(name) => constant.with_origin(&name),
        None => constant,
    }
}

/// Replaces a block.
fn write(graph: &mut Graph, block: Block) {
    let Block {
        found,
        x,
        y,
        gating,
        gate,
        up,
        down,
        biases,
    } = block;
    let experts = found.experts;
    let base = graph.value(y).name.clone();
    let rank = graph.shape(x).map_or(0, Vec::len);
    let logits = like_tokens(graph, found.logits, x, experts, &format!("{base}/logits"));
    let constant = |graph: &mut Graph, what: &str, constant: Constant| {
        let name = constant
            .origin()
            .map_or_else(|| format!("{base}/{what}"), str::to_string);
        graph.add_constant(&name, constant)
    };
    let correction = found.correction.and_then(|value| {
        let vector = graph.constant(value)?.reshaped(vec![experts]);
        let vector = vector.cast(graph.value(logits).dtype.unwrap_or(vector.dtype()));
        Some(constant(graph, "correction", vector))
    });
    let (weights, chosen) = (
        graph.add_value(&format!("{base}/weights")),
        graph.add_value(&format!("{base}/experts")),
    );
    let mut inputs = vec![Some(logits)];
    inputs.extend(correction.map(Some));
    let outputs = vec![Some(weights), Some(chosen)];
    graph.add_node_with_outputs(&format!("{base}/routing"), Op::Routing(found.routing), inputs, outputs);
    let mut inputs = vec![Some(x), Some(weights), Some(chosen)];
    inputs.push(Some(constant(graph, "gate", gate)));
    inputs.push(up.map(|up| constant(graph, "up", up)));
    inputs.push(Some(constant(graph, "down", down)));
    for (bias, what) in biases.into_iter().zip(["gate_bias", "up_bias", "down_bias"]) {
        inputs.push(bias.map(|bias| constant(graph, what, bias)));
    }
    while inputs.last() == Some(&None) {
        inputs.pop();
    }
    let op = Op::Experts(Experts {
        experts,
        activation: gating.activation,
        alpha: gating.alpha,
        beta: gating.beta,
        limit: gating.limit,
    });
    let same_shape = graph.shape(y) == graph.shape(x);
    let (dtype, shape) = (graph.value(y).dtype, graph.shape(y).cloned());
    if same_shape || rank == 0 {
        let node = graph.add_node_with_outputs(&base, op, inputs, vec![None]);
        redirect(graph, node, y);
    } else {
        let out = graph.add_value(&format!("{base}/tokens"));
        (graph.value_mut(out).dtype, graph.value_mut(out).shape) = (dtype, graph.shape(x).cloned());
        graph.add_node_with_outputs(&base, op, inputs, vec![Some(out)]);
        let width = shape.as_ref().and_then(|s| s.last()?.as_const()).unwrap_or(-1);
        let target = graph.add_i64(&format!("{base}/flat"), &[-1, width]);
        let node = graph.add_node_with_outputs(
            &format!("{base}/flatten"),
            Op::Reshape { allowzero: false },
            vec![Some(out), Some(target)],
            vec![None],
        );
        redirect(graph, node, y);
    }
    (graph.value_mut(y).dtype, graph.value_mut(y).shape) = (dtype, shape);
}

/// Experts of tokens with merged leading axes (the form of ONNX Runtime's operators) get the original tokens.
fn raise(graph: &mut Graph) -> usize {
    let flow = Flow::new(graph);
    let mut found = Vec::new();
    for id in graph.node_ids() {
        let node = graph.node(id);
        let (Op::Experts(_), Some(flat), Some(weights)) = (&node.op, node.input(0), node.input(1)) else {
            continue;
        };
        let x = as_tokens(&flow, flat);
        let routing = graph.producer_of(weights).map(|(node, _)| node);
        let routing = routing.filter(|id| matches!(graph.node(*id).op, Op::Routing(_)));
        if let Some(routing) = routing.filter(|_| x != flat && graph.shape(x).is_some_and(|s| s.len() > 2)) {
            found.push((id, routing, x));
        }
    }
    let count = found.len();
    for (id, routing, x) in found {
        let node = graph.node(id).clone();
        let (Some(logits), Some(y)) = (graph.node(routing).input(0), node.output(0)) else {
            continue;
        };
        let experts = graph.shape(logits).and_then(|s| s.last()?.as_const());
        let name = format!("{}.logits", node.name);
        let logits = like_tokens(graph, logits, x, experts.map_or(0, |n| n as usize), &name);
        graph.node_mut(routing).inputs[0] = Some(logits);
        for output in graph.node(routing).outputs.clone().into_iter().flatten() {
            graph.value_mut(output).shape = None;
        }
        let mut inputs = node.inputs.clone();
        inputs[0] = Some(x);
        let tokens = graph.add_value(&format!("{}.tokens", node.name));
        let (dtype, shape) = (graph.value(y).dtype, graph.shape(y).cloned());
        graph.remove_node(id);
        graph.add_node_with_outputs(&node.name, node.op, inputs, vec![Some(tokens)]);
        let width = shape.as_ref().and_then(|s| s.last()?.as_const()).unwrap_or(-1);
        let target = graph.add_i64(&format!("{}.joined", node.name), &[-1, width]);
        let op = Op::Reshape { allowzero: false };
        graph.add_node_with_outputs(&node.name, op, vec![Some(tokens), Some(target)], vec![Some(y)]);
        (graph.value_mut(y).dtype, graph.value_mut(y).shape) = (dtype, shape);
    }
    count
}

/// Makes another node define a value as its first output.
fn redirect(graph: &mut Graph, node: NodeId, value: ValueId) {
    let fresh = graph.node(node).clone();
    graph.remove_node(node);
    graph.add_node_with_outputs(&fresh.name, fresh.op, fresh.inputs, vec![Some(value)]);
}

/// Logits with the leading axes of the tokens.
fn like_tokens(graph: &mut Graph, logits: ValueId, x: ValueId, experts: usize, name: &str) -> ValueId {
    let (Some(from), Some(to)) = (graph.shape(logits).cloned(), graph.shape(x).cloned()) else {
        return logits;
    };
    if from.len() == to.len() {
        return logits;
    }
    let leading = to.len() - 1;
    let sizes = Op::Shape {
        start: 0,
        end: Some(leading as i64),
    };
    let sizes = graph.add_node(&format!("{name}/leading"), sizes, &[x]);
    let last = graph.add_i64(&format!("{name}/experts"), &[experts as i64]);
    let target = graph.add_node(&format!("{name}/shape"), Op::Concat { axis: 0 }, &[sizes, last]);
    let made = graph.add_node(name, Op::Reshape { allowzero: false }, &[logits, target]);
    let mut shape = to[..leading].to_vec();
    shape.push(crate::dim::Dim::from(experts));
    (graph.value_mut(made).dtype, graph.value_mut(made).shape) = (graph.value(logits).dtype, Some(shape));
    made
}
