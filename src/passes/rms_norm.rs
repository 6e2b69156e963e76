//! `x / sqrt(mean(x²) + ε) · w` in separate operators becomes `RMSNormalization`.
//!
//! Forms: the square as `Pow` or a product with itself; the root as `Sqrt` and a division, `Sqrt` and `Reciprocal` or
//! `Div(1, ·)`, or `Pow(·, -0.5)`; the weight on either side of its product, before or after a cast back to a half
//! type, plain or with 1 added (Gemma), or absent, which gives a scale of ones. Statistics in fp32 around an fp16 `x`
//! become part of the operator, which also uses fp32.

use std::collections::HashMap;

use super::PassError;
use super::pattern::{
    before_widening, binary, either_order, finish, is_scalar, last_dim, mean_of_last, node_of, only_reader, redefine,
    unary, vector_weight, with_scalar,
};
use crate::graph::Constant;
use crate::graph::op::{Binary, Op, Unary};
use crate::graph::{Graph, NodeId, ValueId};
use crate::tensor::{DType, Tensor};

/// A value found to be `x / sqrt(mean(x²) + epsilon)` over the last axis.
pub(super) struct Normalized {
    /// The input of the division, after any cast to fp32.
    pub x: ValueId,
    pub epsilon: f32,
}

/// Matches the computation of `value`.
pub(super) fn normalized(graph: &Graph, value: ValueId) -> Option<Normalized> {
    let candidates: Vec<(ValueId, ValueId)> = if let Some([x, root]) = binary(graph, value, Binary::Div) {
        vec![(x, unary(graph, root, Unary::Sqrt)?)]
    } else {
        let factors = binary(graph, value, Binary::Mul)?;
        let inverse = |[x, inverse]: [ValueId; 2]| Some((x, inverse_root(graph, inverse)?));
        either_order(factors).into_iter().filter_map(inverse).collect()
    };
    candidates.into_iter().find_map(|(x, shifted)| {
        let (mean, epsilon) = with_scalar(graph, shifted, Binary::Add)?;
        let squared = square_of(graph, mean_of_last(graph, before_widening(graph, mean))?)?;
        let same = before_widening(graph, squared) == before_widening(graph, x);
        (same && epsilon > 0.0).then_some(Normalized {
            x,
            epsilon: epsilon as f32,
        })
    })
}

/// `v` of `1/sqrt(v)`.
fn inverse_root(graph: &Graph, value: ValueId) -> Option<ValueId> {
    let value = before_widening(graph, value);
    if let Some(root) = unary(graph, value, Unary::Reciprocal) {
        return unary(graph, root, Unary::Sqrt);
    }
    if let Some([one, root]) = binary(graph, value, Binary::Div) {
        return is_scalar(graph, one, 1.0)
            .then(|| unary(graph, root, Unary::Sqrt))
            .flatten();
    }
    let [base, exponent] = binary(graph, value, Binary::Pow)?;
    is_scalar(graph, exponent, -0.5).then_some(base)
}

fn square_of(graph: &Graph, value: ValueId) -> Option<ValueId> {
    if let Some([base, exponent]) = binary(graph, value, Binary::Pow) {
        return is_scalar(graph, exponent, 2.0).then_some(base);
    }
    let [a, b] = binary(graph, value, Binary::Mul)?;
    (a == b).then_some(a)
}

/// The operators after a normalized value: casts to a narrower float and at most one product with a weight.
pub(super) struct Tail {
    /// The last value that belongs to the normalization.
    pub end: ValueId,
    pub scale: Option<Constant>,
}

pub(super) fn tail(
    graph: &Graph,
    uses: &HashMap<ValueId, Vec<(NodeId, usize)>>,
    start: ValueId,
    length: Option<usize>,
) -> Tail {
    let mut end = start;
    let mut scale = None;
    while let Some(reader) = only_reader(graph, uses, end) {
        let node = graph.node(reader);
        let Some(output) = node.output(0) else { break };
        match node.op {
            Op::Cast { to } if to.is_float() && graph.value(end).dtype.is_some() => {}
            Op::Binary(Binary::Mul) if scale.is_none() => {
                let operands = node.inputs.iter().flatten();
                let Some(other) = operands.copied().find(|v| *v != end) else {
                    break;
                };
                match vector_weight(graph, other, length) {
                    Some(weight) => scale = Some(weight),
                    None => break,
                }
            }
            _ => break,
        }
        end = output;
    }
    Tail { end, scale }
}

/// The value along the widening casts before `x` that has the dtype of `end`; `x` itself when dtypes are not known.
pub(super) fn source_of_dtype(graph: &Graph, x: ValueId, end: ValueId) -> Option<ValueId> {
    let wanted = graph.value(end).dtype;
    let source = before_widening(graph, x);
    [source, x].into_iter().find(|v| graph.value(*v).dtype == wanted)
}

/// Writes `RMSNormalization` in place of its parts. Returns the number of rewrites.
pub fn run(graph: &mut Graph) -> Result<usize, PassError> {
    let uses = graph.uses();
    let mut rewrites = 0;
    for id in graph.node_ids().collect::<Vec<_>>() {
        let Some(start) = graph.node(id).output(0) else {
            continue;
        };
        let Some(found) = normalized(graph, start) else {
            continue;
        };
        // That is a LayerNormalization, which has its own pass.
        if is_centered(graph, found.x) {
            continue;
        }
        let length = last_dim(graph, found.x);
        let Some(fused) = fuse(graph, &uses, start, &found, length) else {
            continue;
        };
        let inputs = vec![Some(fused.x), Some(fused.scale)];
        let op = Op::RmsNormalization {
            axis: -1,
            epsilon: found.epsilon,
        };
        redefine(graph, fused.node, op, inputs);
        rewrites += 1;
    }
    finish(graph, rewrites)
}

pub(super) fn is_centered(graph: &Graph, x: ValueId) -> bool {
    binary(graph, before_widening(graph, x), Binary::Sub).is_some_and(|[z, mean]| {
        mean_of_last(graph, before_widening(graph, mean))
            .is_some_and(|of| before_widening(graph, of) == before_widening(graph, z))
    })
}

/// Where the fused operator goes and what it reads.
pub(super) struct Fused {
    pub node: NodeId,
    pub x: ValueId,
    pub scale: ValueId,
}

/// Follows the tail of a normalized value and builds the scale. Chooses the longest tail whose dtype matches some form
/// of `x`.
pub(super) fn fuse(
    graph: &mut Graph,
    uses: &HashMap<ValueId, Vec<(NodeId, usize)>>,
    start: ValueId,
    found: &Normalized,
    length: Option<usize>,
) -> Option<Fused> {
    let whole = tail(graph, uses, start, length);
    let (end, scale) = match source_of_dtype(graph, found.x, whole.end) {
        Some(_) => (whole.end, whole.scale),
        None => (start, None),
    };
    let x = source_of_dtype(graph, found.x, end)?;
    let dtype = graph.value(end).dtype.unwrap_or(DType::F32);
    let name = format!("{}.scale", node_of(graph, end)?.name);
    let scale = match scale {
        Some(scale) => {
            let cast = scale.cast(dtype);
            graph.add_constant(&name, cast)
        }
        None => {
            let ones = vec![1.0; length?];
            graph.add_constant(&name, Tensor::from_f64_as(dtype, vec![ones.len()], &ones))
        }
    };
    let (node, _) = graph.producer_of(end)?;
    Some(Fused { node, x, scale })
}
