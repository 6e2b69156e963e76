//! SiLU, quick GELU and both GELUs, written as several operators, become `Swish` and `Gelu`.
//!
//! There are too many forms to list them. A `Sigmoid`, `Erf` or `Tanh` is the anchor; every pair of a value `x` shortly
//! before it and a value `y` shortly after it that is computed from `x` and scalars alone is a candidate; and the
//! candidate's values on a grid of samples identify the function.

use std::collections::{HashMap, HashSet};

use super::PassError;
use super::pattern::{finish, redefine};
use crate::graph::eval::Evaluator;
use crate::graph::op::{Binary, Op, Unary};
use crate::graph::{Graph, NodeId, ValueId};
use crate::tensor::{DType, Tensor};

/// Maximum number of operators of an activation on either side of its anchor; `gelu_new` has five before it.
const REACH: usize = 7;

/// Writes `Swish`, `Gelu` and related functions in place of the operators that compute them. Returns the number of
/// rewrites.
pub fn run(graph: &mut Graph) -> Result<usize, PassError> {
    let uses = graph.uses();
    let mut rewrites = 0;
    for id in graph.node_ids().collect::<Vec<_>>() {
        let Op::Unary(anchor @ (Unary::Sigmoid | Unary::Erf | Unary::Tanh)) = graph.node(id).op else {
            continue;
        };
        if let Some((node, x, op)) = recognize(graph, &uses, id, anchor) {
            redefine(graph, node, op, vec![Some(x)]);
            rewrites += 1;
        }
    }
    finish(graph, rewrites)
}

fn recognize(
    graph: &Graph,
    uses: &HashMap<ValueId, Vec<(NodeId, usize)>>,
    anchor_id: NodeId,
    anchor: Unary,
) -> Option<(NodeId, ValueId, Op)> {
    let before = nearby(vec![graph.node(anchor_id).input(0)?], |v| {
        let node = graph.def(v).map(|(_, node)| node).filter(|n| is_elementwise(&n.op));
        node.map_or_else(Vec::new, |n| n.inputs.iter().flatten().copied().collect())
    });
    let after = nearby(vec![graph.node(anchor_id).output(0)?], |v| {
        let readers = uses.get(&v).map_or(&[][..], Vec::as_slice);
        let outputs = readers
            .iter()
            .map(|(id, _)| graph.node(*id))
            .filter(|n| is_elementwise(&n.op));
        outputs.filter_map(|n| n.output(0)).collect()
    });
    // The activation ends in a product; the farthest one that matches is the complete activation.
    for y in after.into_iter().rev() {
        let (node, definition) = graph.def(y)?;
        if !matches!(definition.op, Op::Binary(Binary::Mul | Binary::Div)) {
            continue;
        }
        for x in before.iter().copied().filter(|x| graph.constant(*x).is_none()) {
            if graph.value(x).dtype == graph.value(y).dtype
                && is_function_of(graph, y, x)
                && let Some(op) = by_values(graph, x, y, anchor)
            {
                return Some((node, x, op));
            }
        }
    }
    None
}

/// Values reached within [`REACH`] steps, nearest first.
fn nearby(start: Vec<ValueId>, next: impl Fn(ValueId) -> Vec<ValueId>) -> Vec<ValueId> {
    let mut seen: HashSet<ValueId> = start.iter().copied().collect();
    let mut found = start;
    let mut from = 0;
    for _ in 0..REACH {
        let to = found.len();
        for i in from..to {
            for value in next(found[i]) {
                if seen.insert(value) {
                    found.push(value);
                }
            }
        }
        from = to;
    }
    found
}

fn is_elementwise(op: &Op) -> bool {
    match op {
        Op::Unary(_) | Op::Identity => true,
        Op::Binary(op) => matches!(op, Binary::Add | Binary::Sub | Binary::Mul | Binary::Div | Binary::Pow),
        Op::Cast { to } => to.is_float(),
        _ => false,
    }
}

/// Whether `y` is computed element by element from `x` and scalar constants alone.
fn is_function_of(graph: &Graph, y: ValueId, x: ValueId) -> bool {
    let mut seen = HashSet::from([y]);
    let mut stack = vec![y];
    let mut reached = false;
    while let Some(value) = stack.pop() {
        if value == x {
            reached = true;
            continue;
        }
        if graph.constant(value).is_some_and(|c| c.len() == 1) {
            continue;
        }
        match graph.def(value) {
            Some((_, node)) if is_elementwise(&node.op) && seen.len() <= 4 * REACH => {
                stack.extend(node.inputs.iter().flatten().filter(|v| seen.insert(**v)));
            }
            _ => return false,
        }
    }
    reached
}

fn by_values(graph: &Graph, x: ValueId, y: ValueId, anchor: Unary) -> Option<Op> {
    let dtype = graph.value(x).dtype.unwrap_or(DType::F32);
    // 1 comes first: at 1, the value of x · sigmoid(αx) gives α. Eighths are exact in every float type.
    let samples: Vec<f64> = std::iter::once(1.0)
        .chain((-64..=64).map(|i| f64::from(i) / 8.0))
        .collect();
    let tensor = Tensor::from_f64_as(dtype, vec![samples.len()], &samples);
    let run = |graph: &Graph| {
        let value = Evaluator::new(graph, HashMap::from([(x, tensor.clone())]))
            .value(y)
            .ok()?;
        (value.len() == samples.len()).then(|| value.to_f64())
    };
    let found = run(graph)?;
    let op = match anchor {
        Unary::Erf => Op::Gelu { tanh: false },
        Unary::Tanh => Op::Gelu { tanh: true },
        _ => {
            let share = found[0];
            let alpha = (share / (1.0 - share)).ln();
            let known = [1.0, 1.702].into_iter().find(|k| (alpha - k).abs() < 5e-3);
            let alpha = known.unwrap_or(alpha) as f32;
            (alpha.is_finite() && alpha != 0.0).then_some(Op::Swish { alpha })?
        }
    };
    let wanted = crate::graph::eval::eval_op(
        &op,
        &[Some(Tensor::from_f64_as(DType::F64, vec![samples.len()], &samples))],
    )
    .ok()?;
    let wanted = wanted.into_iter().next()??.to_f64();
    // Constants are rounded to the dtype and each operator rounds once. The two GELUs differ by 4e-4; where half types
    // cannot show that, their anchors distinguish them.
    let tolerance = match dtype {
        DType::F16 => 4e-3,
        DType::Bf16 => 3e-2,
        _ => 2e-6,
    };
    let agrees = |(f, w): (&f64, &f64)| (f - w).abs() <= tolerance * (1.0 + w.abs());
    found.iter().zip(&wanted).all(agrees).then_some(op)
}
