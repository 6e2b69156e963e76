//! Computes constants, and replaces shape arithmetic with known results by constants.
//!
//! A node whose inputs are all constants becomes a constant if the result is small or no larger than its inputs. The
//! bytes of weights are not read: moving, converting, scaling or shifting a weight becomes a recipe ([`Constant`]).
//! Integer values whose elements inference knows become constants; a `Reshape` whose target is known as dims gets a
//! constant target with at most one -1, and 0 for dims that it copies. Then `cleanup` removes operators without effect.
//!
//! A transposed matrix that a `MatMul` reads stays: the canonical graph reads weights in this form.

use std::collections::HashMap;

use super::pattern::{finish, ints, scalar};
use super::{PassError, cleanup};
use crate::dim::Dim;
use crate::graph::Constant;
use crate::graph::eval::{eval_node, slice_range};
use crate::graph::infer::{InferenceFacts, infer};
use crate::graph::op::{Binary, Op};
use crate::graph::{Definition, Graph, Node, NodeId, ValueId};
use crate::tensor::{DType, Tensor};

/// Results up to this many bytes are always stored; larger inputs are weights.
const SMALL: usize = 64 << 10;

/// Computes constants, moves weights by recipe and resolves shape arithmetic. Returns the number of rewrites.
pub fn run(graph: &mut Graph) -> Result<usize, PassError> {
    let mut rewrites = 0;
    loop {
        let facts = infer(graph)?;
        let round = fold_nodes(graph) + fold_contents(graph, &facts) + settle_reshapes(graph, &facts);
        finish(graph, round)?;
        let round = round + cleanup::run(graph)?;
        if round == 0 {
            return Ok(rewrites);
        }
        rewrites += round;
    }
}

/// Nodes of constants become constants, in order, so that one run folds whole chains.
pub(super) fn fold_nodes(graph: &mut Graph) -> usize {
    let uses = graph.uses();
    let mut count = 0;
    for id in graph.node_ids().collect::<Vec<_>>() {
        let node = graph.node(id);
        if node.inputs.iter().all(Option::is_none) || is_weight_read(graph, &uses, node) {
            continue;
        }
        let inputs: Option<Vec<Option<Constant>>> = node
            .inputs
            .iter()
            .map(|input| match input {
                Some(value) => graph.constant(*value).cloned().map(Some),
                None => Some(None),
            })
            .collect();
        let Some(results) = inputs.and_then(|inputs| fold(graph, node, &inputs)) else {
            continue;
        };
        let outputs = node.outputs.clone();
        for (output, result) in outputs.into_iter().zip(results) {
            if let (Some(output), Some(result)) = (output, result) {
                graph.set_constant(output, result);
            }
        }
        count += 1;
    }
    count
}

fn is_weight_read(graph: &Graph, uses: &HashMap<ValueId, Vec<(NodeId, usize)>>, node: &Node) -> bool {
    let Op::Transpose { perm } = &node.op else { return false };
    let swaps = perm.as_deref().is_none_or(|p| p == [1, 0]);
    let readers = node.output(0).and_then(|v| uses.get(&v));
    swaps
        && readers.is_some_and(|r| {
            r.iter()
                .any(|(id, input)| *input == 1 && graph.node(*id).op == Op::MatMul)
        })
}

/// The outputs of a node of constants, if they are worth storing.
fn fold(graph: &Graph, node: &Node, inputs: &[Option<Constant>]) -> Option<Vec<Option<Constant>>> {
    let present = || inputs.iter().flatten();
    if present().any(is_weight)
        && let Some(results) = deferred(graph, node, inputs)
    {
        return Some(results.into_iter().map(Some).collect());
    }
    // Shapes are known without reading bytes.
    if matches!(node.op, Op::Shape { .. } | Op::Size) {
        let hollow = inputs[0].as_ref()?;
        return shape_result(&node.op, hollow).map(|c| vec![Some(c)]);
    }
    let total: usize = present().map(Constant::byte_len).sum();
    if result_bytes(graph, node, inputs)? > SMALL.max(total) {
        return None;
    }
    let tensors: Vec<Option<Tensor>> = inputs
        .iter()
        .map(|c| c.as_ref().map(Constant::materialize).transpose())
        .collect::<Result<_, _>>()
        .ok()?;
    // A node that cannot be computed stays unchanged, for the verifier or the user.
    let results = eval_node(&node.op, &tensors, node.outputs.len()).ok()?;
    Some(results.into_iter().map(|t| t.map(Constant::from)).collect())
}

/// Large, or a parameter of the model: its recipe must survive for weights that come later.
fn is_weight(constant: &Constant) -> bool {
    constant.byte_len() > SMALL || constant.dtype().is_float() && constant.len() >= 2 && constant.origin().is_some()
}

fn shape_result(op: &Op, of: &Constant) -> Option<Constant> {
    let dims: Vec<i64> = of.shape().iter().map(|d| *d as i64).collect();
    let tensor = match op {
        Op::Size => Tensor::from_i64(vec![], &[dims.iter().copied().fold(1, i64::saturating_mul)]),
        Op::Shape { start, end } => {
            let rank = dims.len() as i64;
            let clamp = |at: i64| (if at < 0 { at + rank } else { at }).clamp(0, rank) as usize;
            let (start, end) = (clamp(*start), clamp(end.unwrap_or(rank)));
            let part = &dims[start..end.max(start)];
            Tensor::from_i64(vec![part.len()], part)
        }
        _ => return None,
    };
    Some(tensor.into())
}

/// Bytes of the largest output, from inference or the operator's inputs; `None` if neither determines them.
fn result_bytes(graph: &Graph, node: &Node, inputs: &[Option<Constant>]) -> Option<usize> {
    let inferred = |value: &ValueId| -> Option<usize> {
        let value = graph.value(*value);
        let dims = value.shape.as_ref()?.iter();
        let elements = dims
            .map(|d| usize::try_from(d.as_const()?).ok())
            .collect::<Option<Vec<_>>>()?;
        value.dtype?.byte_len_of(&elements)
    };
    let outputs: Option<Vec<usize>> = node.outputs.iter().flatten().map(inferred).collect();
    if let Some(bytes) = outputs.and_then(|o| o.into_iter().max()) {
        return Some(bytes);
    }
    // Only operators that read a shape can produce more elements than the product of their inputs' volumes.
    if matches!(node.op, Op::Expand | Op::ConstantOfShape { .. } | Op::Range | Op::Tile) {
        return None;
    }
    inputs
        .iter()
        .flatten()
        .try_fold(8usize, |n, c| n.checked_mul(c.len().max(1)))
}

/// The results for a large constant without reading its bytes, one constant per output.
fn deferred(graph: &Graph, node: &Node, inputs: &[Option<Constant>]) -> Option<Vec<Constant>> {
    let x = inputs.first()?.as_ref()?;
    let rank = x.shape().len();
    let axis_of = |axis: i64| {
        usize::try_from(if axis < 0 { axis + rank as i64 } else { axis })
            .ok()
            .filter(|a| *a < rank)
    };
    let list = |i: usize| ints(graph, node.input(i)?);
    let result = match &node.op {
        Op::Identity => x.clone(),
        Op::Transpose { perm } => {
            let perm = perm.clone().unwrap_or_else(|| (0..rank).rev().collect());
            let mut sorted = perm.clone();
            sorted.sort_unstable();
            sorted.into_iter().eq(0..rank).then(|| x.transposed(&perm))?
        }
        Op::Cast { to } if to.is_float() && x.dtype().is_float() => x.cast(*to),
        Op::Reshape { .. } | Op::Squeeze | Op::Unsqueeze | Op::Flatten { .. } => {
            let hollow = Hollow(x);
            x.reshaped(hollow.reshaped(node, list)?)
        }
        Op::Slice => {
            let (starts, ends) = (list(1)?, list(2)?);
            let axes = if node.input(3).is_some() {
                list(3)?
            } else {
                (0..starts.len() as i64).collect()
            };
            let steps = if node.input(4).is_some() {
                list(4)?
            } else {
                vec![1; starts.len()]
            };
            let mut result = x.clone();
            for i in 0..starts.len() {
                let axis = axis_of(*axes.get(i)?)?;
                let (start, step, count) = slice_range(x.shape()[axis], starts[i], *ends.get(i)?, *steps.get(i)?)?;
                if step != 1 {
                    return None;
                }
                result = result.sliced(axis, start, start + count);
            }
            result
        }
        Op::Split { axis } => {
            let axis = axis_of(*axis)?;
            let length = x.shape()[axis];
            let sizes: Vec<usize> = match node.input(1) {
                Some(_) => list(1)?
                    .into_iter()
                    .map(|s| usize::try_from(s).ok())
                    .collect::<Option<_>>()?,
                None => {
                    let chunk = length.div_ceil(node.outputs.len().max(1));
                    let part = |i: usize| chunk.min(length.saturating_sub(i * chunk));
                    (0..node.outputs.len()).map(part).collect()
                }
            };
            (sizes.iter().sum::<usize>() == length).then_some(())?;
            let mut start = 0;
            let parts = sizes.into_iter().map(|size| {
                start += size;
                x.sliced(axis, start - size, start)
            });
            return Some(parts.collect());
        }
        Op::Concat { axis } => {
            let parts: Vec<Constant> = inputs.iter().cloned().collect::<Option<_>>()?;
            let axis = axis_of(*axis)?;
            let fits = |p: &Constant| {
                p.dtype() == x.dtype()
                    && p.shape().len() == rank
                    && (0..rank).all(|k| k == axis || p.shape()[k] == x.shape()[k])
            };
            parts.iter().all(fits).then(|| Constant::concat(&parts, axis))?
        }
        Op::Binary(op) => return scaled(graph, node, *op, inputs).map(|c| vec![c]),
        _ => return None,
    };
    Some(vec![result])
}

/// A weight multiplied by, divided by, plus or minus a number.
fn scaled(graph: &Graph, node: &Node, op: Binary, inputs: &[Option<Constant>]) -> Option<Constant> {
    let [Some(a), Some(b)] = inputs else { return None };
    let keeps = |x: &Constant, number: &Constant| x.dtype().is_float() && x.shape().len() >= number.shape().len();
    let right = || scalar(graph, node.input(1)?).filter(|_| keeps(a, b));
    let left = || scalar(graph, node.input(0)?).filter(|_| keeps(b, a));
    match op {
        Binary::Mul => right().map(|n| a.scaled(n)).or_else(|| left().map(|n| b.scaled(n))),
        Binary::Add => right().map(|n| a.offset(n)).or_else(|| left().map(|n| b.offset(n))),
        Binary::Sub => right().map(|n| a.offset(-n)),
        // By a power of two this is exact; by anything else the reciprocal's rounding stays below that of fp32.
        Binary::Div => right().filter(|n| *n != 0.0).map(|n| a.scaled(1.0 / n)),
        _ => None,
    }
}

/// A constant of which only the shape is used.
struct Hollow<'a>(&'a Constant);

impl Hollow<'_> {
    /// The result shape of a reshaping operator. The evaluator would need the bytes.
    fn reshaped(&self, node: &Node, list: impl Fn(usize) -> Option<Vec<i64>>) -> Option<Vec<usize>> {
        let from = self.0.shape();
        let resolve = |axis: i64, rank: usize| {
            usize::try_from(if axis < 0 { axis + rank as i64 } else { axis })
                .ok()
                .filter(|a| *a < rank)
        };
        let shape = match &node.op {
            Op::Reshape { allowzero } => crate::graph::eval::reshape_target(from, &list(1)?, *allowzero).ok()?,
            Op::Flatten { axis } => {
                let at = if *axis < 0 { axis + from.len() as i64 } else { *axis };
                let at = usize::try_from(at).ok().filter(|a| *a <= from.len())?;
                vec![from[..at].iter().product(), from[at..].iter().product()]
            }
            Op::Squeeze => {
                let gone: Vec<usize> = match node.input(1) {
                    Some(_) => list(1)?
                        .into_iter()
                        .map(|a| resolve(a, from.len()))
                        .collect::<Option<_>>()?,
                    None => (0..from.len()).filter(|k| from[*k] == 1).collect(),
                };
                (0..from.len()).filter(|k| !gone.contains(k)).map(|k| from[k]).collect()
            }
            Op::Unsqueeze => {
                let axes = list(1)?;
                let rank = from.len() + axes.len();
                let new: Vec<usize> = axes.into_iter().map(|a| resolve(a, rank)).collect::<Option<_>>()?;
                let mut old = from.iter();
                let dim = |k: usize| if new.contains(&k) { Some(1) } else { old.next().copied() };
                (0..rank).map(dim).collect::<Option<_>>()?
            }
            _ => return None,
        };
        let volume = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
        (volume == Some(self.0.len())).then_some(shape)
    }
}

/// Integer values that inference knows to be numbers become constants.
fn fold_contents(graph: &mut Graph, facts: &InferenceFacts) -> usize {
    let mut count = 0;
    for id in graph.value_ids() {
        let value = graph.value(id);
        let Definition::Node { .. } = value.definition else {
            continue;
        };
        let (Some(dtype), Some(shape)) = (value.dtype, &value.shape) else {
            continue;
        };
        let shape: Option<Vec<usize>> = shape.iter().map(|d| usize::try_from(d.as_const()?).ok()).collect();
        let (Some(shape), Some(numbers)) = (shape, facts.contents(id).and_then(|c| c.as_consts())) else {
            continue;
        };
        let volume = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
        if volume != Some(numbers.len()) {
            continue;
        }
        let tensor = match dtype {
            DType::I64 => Tensor::from_i64(shape, &numbers),
            DType::I32 => Tensor::from_i32(shape, &numbers.iter().map(|n| *n as i32).collect::<Vec<_>>()),
            DType::Bool => Tensor::from_bool(shape, &numbers.iter().map(|n| *n != 0).collect::<Vec<_>>()),
            _ => continue,
        };
        graph.set_constant(id, tensor.into());
        count += 1;
    }
    count
}

/// Reshapes to computed targets that a constant target can express for all sizes.
fn settle_reshapes(graph: &mut Graph, facts: &InferenceFacts) -> usize {
    let mut count = 0;
    for id in graph.node_ids().collect::<Vec<_>>() {
        let node = graph.node(id);
        if !matches!(node.op, Op::Reshape { .. }) {
            continue;
        }
        let (Some(x), Some(target)) = (node.input(0), node.input(1)) else {
            continue;
        };
        if graph.constant(target).is_some() {
            continue;
        }
        // The result's shape is more precise than the target's elements, which may contain a -1.
        let from = graph.shape(x).cloned();
        let to = node.output(0).and_then(|y| graph.shape(y).cloned());
        let known = facts.contents(target).is_some();
        let (Some(from), Some(to), true) = (from, to, known) else {
            continue;
        };
        let Some(target) = target_of(&from, &to) else { continue };
        let name = format!("{}.target", node.name);
        let target = graph.add_i64(&name, &target);
        let node = graph.node_mut(id);
        node.op = Op::Reshape { allowzero: false };
        node.inputs[1] = Some(target);
        count += 1;
    }
    count
}

/// A constant target from one shape to another: numbers unchanged, 0 where the dim keeps its position, one -1.
fn target_of(from: &[Dim], to: &[Dim]) -> Option<Vec<i64>> {
    let mut wild = false;
    to.iter()
        .enumerate()
        .map(|(i, dim)| match dim.as_const() {
            // A constant 0 would mean a copy.
            Some(0) => None,
            Some(number) => Some(number),
            None if from.get(i) == Some(dim) => Some(0),
            None if !std::mem::replace(&mut wild, true) => Some(-1),
            None => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshape_targets_copy_before_they_infer() {
        let d = |text: &str| Dim::parse(text);
        let from = [d("batch"), d("tokens"), d("64")];
        assert_eq!(
            target_of(&from, &[d("batch"), d("tokens"), d("4"), d("16")]),
            Some(vec![0, 0, 4, 16])
        );
        assert_eq!(target_of(&from, &[d("batch*tokens"), d("64")]), Some(vec![-1, 64]));
        assert_eq!(target_of(&from, &[d("tokens"), d("batch"), d("64")]), None);
        assert_eq!(target_of(&from, &[d("0"), d("4")]), None);
    }
}
