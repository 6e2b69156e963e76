//! Roles of inputs with unknown names: `arg1`, `input.3`.
//!
//! An input is followed forward, through casts and other operators that only pass integers on, to its readers: rows of
//! a table of floats are looked up by token ids or by positions, angles are computed from positions, comparisons and
//! sums read masks, and operators of attention read lengths. An input that matches no role, or two, gets none, and the
//! export is refused with the input's name. If a role is wrong, a later proof fails.

use std::collections::{HashMap, HashSet};

use super::InputRole;
use crate::graph::op::{Binary, Op, Unary};
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::tensor::DType;

/// Readers of each value.
pub(super) type Uses = HashMap<ValueId, Vec<(NodeId, usize)>>;

/// The readers of an input, by kind.
#[derive(Default)]
struct Readers {
    /// Rows of tables of floats that are looked up.
    tables: Vec<usize>,
    /// Angles, or tables of a rotary embedding.
    angles: bool,
    /// Comparisons, selections, sums.
    mask: bool,
    /// Positions where a cache is written, one per token.
    writes: bool,
    /// The first of them.
    first: bool,
    /// Lengths of operators of attention.
    last_position: bool,
    total: bool,
}

/// The role of an integer or boolean input.
pub(super) fn role(graph: &Graph, id: ValueId, uses: &Uses) -> Option<InputRole> {
    let value = graph.value(id);
    if !value.dtype.is_some_and(|dtype| dtype.is_int() || dtype == DType::Bool) {
        return None;
    }
    let shape = value.shape.as_ref()?;
    let readers = readers(graph, id, uses);
    if shape.len() < 2 {
        let free = shape.first().is_some_and(|dim| dim.as_const().is_none());
        return match readers {
            Readers {
                last_position: true, ..
            } => Some(InputRole::LastPosition),
            Readers { total: true, .. } => Some(InputRole::TotalLength),
            Readers { first: true, .. } => Some(InputRole::PastLength),
            Readers { angles: true, .. } | Readers { writes: true, .. } if free => Some(InputRole::Positions),
            _ => None,
        };
    }
    match readers {
        Readers { angles: true, .. } => Some(InputRole::Positions),
        Readers { tables, .. } if !tables.is_empty() => Some(match is_vocabulary(graph, &tables, uses) {
            true => InputRole::InputIds,
            false => InputRole::Positions,
        }),
        Readers { mask: true, .. } if shape.len() == 2 => Some(InputRole::PaddingMask),
        Readers { mask: true, .. } => Some(InputRole::FullMask),
        _ => None,
    }
}

/// [`InputRole::FullMask`] for floats `[.., tokens, total]` that are added to something, and read by nothing else.
pub(super) fn float_mask(graph: &Graph, id: ValueId, uses: &Uses) -> Option<InputRole> {
    let value = graph.value(id);
    let deep = value.shape.as_ref().is_some_and(|shape| shape.len() > 2);
    if !deep || !value.dtype.is_some_and(DType::is_float) {
        return None;
    }
    let mut seen: HashSet<ValueId> = HashSet::from([id]);
    let mut stack = vec![id];
    let mut added = false;
    while let Some(value) = stack.pop() {
        for (node, input) in uses.get(&value).into_iter().flatten() {
            let node = graph.node(*node);
            match node.op {
                Op::Binary(Binary::Add) => added = true,
                Op::Attention(_) if *input == 3 => added = true,
                Op::Shape { .. } | Op::Size => {}
                Op::Cast { .. }
                | Op::Unsqueeze
                | Op::Squeeze
                | Op::Reshape { .. }
                | Op::Expand
                | Op::Identity
                | Op::Slice => stack.extend(node.outputs.iter().flatten().filter(|v| seen.insert(**v))),
                _ => return None,
            }
        }
    }
    added.then_some(InputRole::FullMask)
}

/// Whether a table with this many rows is the token embedding: it has as many rows as the logits, or it is the only or
/// the largest table.
fn is_vocabulary(graph: &Graph, tables: &[usize], uses: &Uses) -> bool {
    let rows = tables.iter().copied().max().unwrap_or(0);
    let all = graph.inputs.iter().map(|id| readers(graph, *id, uses).tables);
    let largest = all.flatten().max().unwrap_or(0);
    rows == largest
}

fn readers(graph: &Graph, id: ValueId, uses: &Uses) -> Readers {
    let mut found = Readers::default();
    let mut seen: HashSet<ValueId> = HashSet::from([id]);
    let mut stack = vec![id];
    while let Some(value) = stack.pop() {
        for (node, input) in uses.get(&value).into_iter().flatten() {
            let node = graph.node(*node);
            let constant = |i: usize| node.input(i).and_then(|v| graph.constant(v));
            let carried = match &node.op {
                Op::Gather { axis: 0 } if *input == 1 => {
                    let table = constant(0).filter(|table| table.dtype().is_float());
                    match table.map(|table| table.shape()) {
                        Some([rows, _]) => match node.output(0).is_some_and(|out| is_rotary(graph, out, uses)) {
                            true => found.angles = true,
                            false => found.tables.push(*rows),
                        },
                        Some(_) => found.angles = true,
                        None => found.mask = true,
                    }
                    false
                }
                Op::RotaryEmbedding { .. } => {
                    found.angles = true;
                    false
                }
                Op::GroupQueryAttention(_) => {
                    found.last_position |= *input == 5;
                    found.total |= *input == 6;
                    found.angles |= *input == 9;
                    false
                }
                Op::TensorScatter { .. } => {
                    found.first |= *input == 2;
                    false
                }
                Op::Attention(_) => {
                    found.total |= *input == 6;
                    found.mask |= *input == 3;
                    false
                }
                Op::ScatterNd { .. } | Op::ScatterElements { .. } => {
                    found.writes |= *input > 0;
                    false
                }
                Op::Binary(
                    Binary::Equal
                    | Binary::Less
                    | Binary::Greater
                    | Binary::LessOrEqual
                    | Binary::GreaterOrEqual
                    | Binary::And
                    | Binary::Or,
                )
                | Op::Where
                | Op::Reduce { .. }
                | Op::Unary(Unary::Not)
                | Op::CumSum { .. } => {
                    found.mask = true;
                    false
                }
                // 1 - mask, and positions plus an offset.
                Op::Binary(Binary::Sub) if *input == 1 => {
                    found.mask = true;
                    false
                }
                // Angles are products with frequencies.
                Op::Binary(Binary::Mul) | Op::MatMul => {
                    let angles = node.output(0).is_some_and(|out| reaches_angle(graph, out, uses));
                    found.angles |= angles;
                    found.mask |= !angles;
                    false
                }
                Op::Cast { to } => {
                    found.mask |= *to == DType::Bool;
                    true
                }
                Op::Unsqueeze
                | Op::Squeeze
                | Op::Reshape { .. }
                | Op::Expand
                | Op::Identity
                | Op::Transpose { .. }
                | Op::Flatten { .. }
                | Op::Slice
                | Op::Concat { .. }
                | Op::Binary(Binary::Add | Binary::Sub) => true,
                _ => false,
            };
            if carried {
                stack.extend(node.outputs.iter().flatten().filter(|v| seen.insert(**v)));
            }
        }
    }
    found
}

/// Whether cosines or sines are computed from a value, with at most operators on angles in between.
fn reaches_angle(graph: &Graph, from: ValueId, uses: &Uses) -> bool {
    reaches(graph, from, uses, |node| {
        matches!(node.op, Op::Unary(Unary::Cos | Unary::Sin))
    })
}

/// Whether rows of a table are cosines or sines: they are multiplied before they are normalized or added.
fn is_rotary(graph: &Graph, from: ValueId, uses: &Uses) -> bool {
    let constant = |node: &Node| node.inputs.iter().flatten().any(|v| graph.constant(*v).is_some());
    reaches(graph, from, uses, |node| match node.op {
        // A factor of the whole table is not a rotation.
        Op::Binary(Binary::Mul) => !constant(node),
        Op::RotaryEmbedding { .. } => true,
        _ => false,
    }) && !reaches(graph, from, uses, |node| {
        matches!(
            node.op,
            Op::Binary(Binary::Add)
                | Op::RmsNormalization { .. }
                | Op::LayerNormalization { .. }
                | Op::MatMul
                | Op::Unary(_)
                | Op::Reduce { .. }
                | Op::Binary(Binary::Pow)
        )
    })
}

/// Whether the first reader of a value, after operators that move elements, is one of `wanted`.
fn reaches(graph: &Graph, from: ValueId, uses: &Uses, wanted: impl Fn(&Node) -> bool) -> bool {
    let mut seen: HashSet<ValueId> = HashSet::from([from]);
    let mut stack = vec![from];
    while let Some(value) = stack.pop() {
        for (node, _) in uses.get(&value).into_iter().flatten() {
            let node = graph.node(*node);
            if wanted(node) {
                return true;
            }
            let moves = matches!(
                node.op,
                Op::Cast { .. }
                    | Op::Unsqueeze
                    | Op::Squeeze
                    | Op::Reshape { .. }
                    | Op::Expand
                    | Op::Identity
                    | Op::Transpose { .. }
                    | Op::Concat { .. }
                    | Op::Slice
                    | Op::Split { .. }
            );
            if moves {
                stack.extend(node.outputs.iter().flatten().filter(|v| seen.insert(**v)));
            }
        }
    }
    false
}
