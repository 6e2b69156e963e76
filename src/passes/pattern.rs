//! Small queries on a graph, for patterns.

use crate::graph::Constant;
use crate::graph::op::{Binary, Op, Reduction, Unary};
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::tensor::DType;

/// Constants with more elements are weights, whose values patterns ignore.
const MAX_ASKED: usize = 64;

/// The value of a constant of exactly one element.
pub(super) fn scalar(graph: &Graph, value: ValueId) -> Option<f64> {
    let constant = graph.constant(value).filter(|c| c.len() == 1)?;
    constant.materialize().ok()?.scalar()
}

/// Whether a constant is this number, rounded to its dtype.
pub(super) fn is_scalar(graph: &Graph, value: ValueId, wanted: f64) -> bool {
    scalar(graph, value).is_some_and(|found| (found - wanted).abs() <= 1e-3 * wanted.abs())
}

/// The elements of a small integer constant.
pub(super) fn ints(graph: &Graph, value: ValueId) -> Option<Vec<i64>> {
    let constant = graph.constant(value)?;
    let asked = constant.len() <= MAX_ASKED && constant.dtype().is_int();
    asked.then(|| constant.materialize().ok()).flatten().map(|t| t.to_i64())
}

pub(super) fn node_of(graph: &Graph, value: ValueId) -> Option<&Node> {
    graph.def(value).map(|(_, node)| node)
}

pub(super) fn unary(graph: &Graph, value: ValueId, op: Unary) -> Option<ValueId> {
    let node = node_of(graph, value)?;
    (node.op == Op::Unary(op)).then(|| node.input(0)).flatten()
}

/// The value that a node passes on where it is a number: the `x` of `Where(IsNaN(x), _, x)`.
pub(super) fn nan_guarded(graph: &Graph, node: &Node) -> Option<ValueId> {
    let x = node.input(2)?;
    let is_guard = matches!(node.op, Op::Where) && unary(graph, node.input(0)?, Unary::IsNan) == Some(x);
    is_guard.then_some(x)
}

pub(super) fn binary(graph: &Graph, value: ValueId, op: Binary) -> Option<[ValueId; 2]> {
    let node = node_of(graph, value)?;
    (node.op == Op::Binary(op)).then_some(())?;
    Some([node.input(0)?, node.input(1)?])
}

/// The operands of a commutative operator in both orders.
pub(super) fn either_order([a, b]: [ValueId; 2]) -> [[ValueId; 2]; 2] {
    [[a, b], [b, a]]
}

/// `x op c` or `c op x` with a scalar constant `c`, for commutative operators.
pub(super) fn with_scalar(graph: &Graph, value: ValueId, op: Binary) -> Option<(ValueId, f64)> {
    either_order(binary(graph, value, op)?)
        .into_iter()
        .find_map(|[x, c]| scalar(graph, c).map(|c| (x, c)))
}

pub(super) fn rank(graph: &Graph, value: ValueId) -> Option<usize> {
    graph.shape(value).map(Vec::len)
}

/// The dim of the last axis, if it is a number.
pub(super) fn last_dim(graph: &Graph, value: ValueId) -> Option<usize> {
    let dim = graph.shape(value)?.last()?.as_const()?;
    usize::try_from(dim).ok()
}

pub(super) fn same_shape(graph: &Graph, a: ValueId, b: ValueId) -> bool {
    graph.shape(a).is_some() && graph.shape(a) == graph.shape(b)
}

/// The operand of a mean over only the last axis that keeps the axis.
pub(super) fn mean_of_last(graph: &Graph, value: ValueId) -> Option<ValueId> {
    let node = node_of(graph, value)?;
    let Op::Reduce {
        reduction: Reduction::Mean,
        keepdims: true,
        ..
    } = node.op
    else {
        return None;
    };
    let x = node.input(0)?;
    let [axis] = ints(graph, node.input(1)?)?[..] else {
        return None;
    };
    let last = axis == -1 || rank(graph, x).is_some_and(|rank| axis == rank as i64 - 1);
    last.then_some(x)
}

/// The value before lossless casts: from a narrower float type, or to the same.
pub(super) fn before_widening(graph: &Graph, mut value: ValueId) -> ValueId {
    while let Some(Node {
        op: Op::Cast { to },
        inputs,
        ..
    }) = node_of(graph, value)
        && let Some(Some(x)) = inputs.first()
        && let Some(from) = graph.value(*x).dtype
        && is_widening(from, *to)
    {
        value = *x;
    }
    value
}

fn is_widening(from: DType, to: DType) -> bool {
    from == to || (from.is_float() && to.is_float() && from.bits() < to.bits())
}

/// A value that is a constant, or a cast of one or its sum with a scalar that is not folded yet. No bytes are read.
pub(super) fn weight(graph: &Graph, value: ValueId) -> Option<Constant> {
    if let Some(constant) = graph.constant(value) {
        return Some(constant.clone());
    }
    let node = node_of(graph, value)?;
    match node.op {
        Op::Cast { to } if to.is_float() => weight(graph, node.input(0)?).map(|c| c.cast(to)),
        Op::Identity => weight(graph, node.input(0)?),
        Op::Binary(Binary::Add) => {
            let (x, addend) = with_scalar(graph, value, Binary::Add)?;
            let constant = weight(graph, x)?;
            (!constant.shape().is_empty()).then(|| constant.offset(addend))
        }
        _ => None,
    }
}

/// A weight with one element per element of the last axis (`[n]`, `[1, n]` …), as `[n]`.
pub(super) fn vector_weight(graph: &Graph, value: ValueId, length: Option<usize>) -> Option<Constant> {
    let constant = weight(graph, value)?;
    let (last, leading) = constant.shape().split_last()?;
    let last = *last;
    let fits = leading.iter().all(|d| *d == 1) && constant.dtype().is_float();
    // A single element is the vector of a hidden size of 1, or a scalar that happens to have an axis.
    (fits && (length == Some(last) || (length.is_none() && last > 1))).then(|| constant.reshaped(vec![last]))
}

/// Replaces the computation of a node's first output; the node's name and the output's name and type stay.
pub(super) fn redefine(graph: &mut Graph, node: NodeId, op: Op, inputs: Vec<Option<ValueId>>) {
    let node = graph.node_mut(node);
    node.op = op;
    node.inputs = inputs;
}

/// The only reader of a value that is read once and is not a graph output.
pub(super) fn only_reader(
    graph: &Graph,
    uses: &std::collections::HashMap<ValueId, Vec<(NodeId, usize)>>,
    value: ValueId,
) -> Option<NodeId> {
    match uses.get(&value).map(Vec::as_slice) {
        Some([(node, _)]) if !graph.outputs.contains(&value) => Some(*node),
        _ => None,
    }
}

/// The last step of every pass.
pub(super) fn finish(graph: &mut Graph, rewrites: usize) -> Result<usize, super::PassError> {
    if rewrites > 0 {
        graph.sort()?;
        graph.remove_dead_nodes();
    }
    Ok(rewrites)
}
