//! Decomposes contrib operators into plain ones: normalizations with a residual, scaled and transposing products, the
//! contrib rotary embedding; and `CastLike` becomes `Cast`.
//!
//! An operator whose rank, dtype or width is needed but unknown stays unchanged. The attention passes handle
//! `GroupQueryAttention`, because they know its cache.

use crate::graph::op::{Binary, Op};
use crate::graph::{Graph, NodeId, ValueId};
use crate::passes::PassError;
use crate::passes::pattern::{finish, rank, redefine};
use crate::tensor::{DType, Tensor};

/// Decomposes what it can. Returns the number of rewrites.
pub fn run(graph: &mut Graph) -> Result<usize, PassError> {
    let mut rewrites = 0;
    for id in graph.node_ids().collect::<Vec<_>>() {
        let done = match graph.node(id).op {
            Op::SkipRmsNormalization { epsilon } => {
                let op = Op::RmsNormalization { axis: -1, epsilon };
                skip_norm(graph, id, op, &[2], 3)
            }
            Op::SkipLayerNormalization { epsilon } => {
                let op = Op::LayerNormalization { axis: -1, epsilon };
                skip_norm(graph, id, op, &[2, 3], 4)
            }
            Op::FusedMatMul {
                alpha,
                trans_a,
                trans_b,
            } => fused_matmul(graph, id, alpha, [trans_a, trans_b]),
            Op::ContribRotaryEmbedding {
                interleaved,
                num_heads,
                rotary_dim,
            } => rotary(graph, id, interleaved, num_heads, rotary_dim),
            Op::CastLike => cast_like(graph, id),
            _ => None,
        };
        rewrites += usize::from(done.is_some());
    }
    finish(graph, rewrites)
}

/// `norm(x + skip + bias)`, with the sum as output 3. `weights` are the inputs for the norm.
fn skip_norm(graph: &mut Graph, id: NodeId, op: Op, weights: &[usize], bias: usize) -> Option<()> {
    let node = graph.node(id).clone();
    let used = |v: ValueId| graph.outputs.contains(&v) || graph.uses().contains_key(&v);
    // Statistics for training; no plain operator returns them.
    if [node.output(1), node.output(2)].into_iter().flatten().any(used) {
        return None;
    }
    let y = node.output(0)?;
    let (x, skip) = (node.input(0)?, node.input(1)?);
    let sum = node
        .output(3)
        .unwrap_or_else(|| graph.add_value(&format!("{}.sum", node.name)));
    let add = |graph: &mut Graph, a, b, to| {
        let name = format!("{}.add", node.name);
        graph.add_node_with_outputs(&name, Op::Binary(Binary::Add), vec![Some(a), Some(b)], vec![Some(to)]);
    };
    match node.input(bias) {
        Some(bias) => {
            let first = graph.add_value(&format!("{}.skip", node.name));
            add(graph, x, skip, first);
            add(graph, first, bias, sum);
        }
        None => add(graph, x, skip, sum),
    }
    let (dtype, shape) = (graph.value(x).dtype, graph.shape(x).cloned());
    (graph.value_mut(sum).dtype, graph.value_mut(sum).shape) = (dtype, shape);
    let inputs = std::iter::once(Some(sum)).chain(weights.iter().map(|i| node.input(*i)));
    let inputs = inputs.collect();
    graph.remove_node(id);
    graph.add_node_with_outputs(&node.name, op, inputs, vec![Some(y)]);
    Some(())
}

fn fused_matmul(graph: &mut Graph, id: NodeId, alpha: f32, transposed: [bool; 2]) -> Option<()> {
    let node = graph.node(id).clone();
    let y = node.output(0)?;
    let mut operands = [node.input(0)?, node.input(1)?];
    let mut perms = [None, None];
    for i in 0..2 {
        if transposed[i] {
            let rank = rank(graph, operands[i]).filter(|r| *r >= 2)?;
            let mut perm: Vec<usize> = (0..rank).collect();
            perm.swap(rank - 2, rank - 1);
            perms[i] = Some(perm);
        }
    }
    let dtype = graph.value(operands[0]).dtype;
    if alpha != 1.0 && dtype.is_none() {
        return None;
    }
    for (i, perm) in perms.into_iter().enumerate() {
        if perm.is_some() {
            let name = format!("{}.transpose", node.name);
            operands[i] = graph.add_node(&name, Op::Transpose { perm }, &[operands[i]]);
        }
    }
    let [a, b] = operands.map(Some);
    if alpha == 1.0 {
        redefine(graph, id, Op::MatMul, vec![a, b]);
        return Some(());
    }
    let factor = Tensor::from_f64_as(dtype?, vec![], &[f64::from(alpha)]);
    let factor = graph.add_constant(&format!("{}.alpha", node.name), factor);
    let product = graph.add_value(&format!("{}.product", node.name));
    (graph.value_mut(product).dtype, graph.value_mut(product).shape) = (dtype, graph.shape(y).cloned());
    graph.add_node_with_outputs(&node.name, Op::MatMul, vec![a, b], vec![Some(product)]);
    redefine(graph, id, Op::Binary(Binary::Mul), vec![Some(product), Some(factor)]);
    Some(())
}

fn rotary(graph: &mut Graph, id: NodeId, interleaved: bool, num_heads: Option<usize>, rotary_dim: usize) -> Option<()> {
    let node = graph.node(id).clone();
    let (x, positions) = (node.input(0)?, node.input(1)?);
    let (cos, sin) = (node.input(2)?, node.input(3)?);
    let width = 2 * usize::try_from(graph.shape(cos)?.last()?.as_const()?).ok()?;
    let shape = graph.shape(x)?.clone();
    let (num_heads, head_dim) = match shape.len() {
        4 => (None, usize::try_from(shape[3].as_const()?).ok()?),
        3 => {
            let hidden = usize::try_from(shape[2].as_const()?).ok()?;
            let heads = num_heads.filter(|h| *h > 0).unwrap_or(hidden / width.max(1));
            (Some(heads), hidden.checked_div(heads)?)
        }
        _ => return None,
    };
    let tokens_axis = if shape.len() == 4 { 2 } else { 1 };
    let positions = match graph.shape(positions)?.len() {
        2 => positions,
        // One number: the position of the first token of every row.
        _ => consecutive(graph, &node.name, x, tokens_axis, positions),
    };
    let op = Op::RotaryEmbedding {
        interleaved,
        num_heads,
        rotary_dim: if width == head_dim { 0 } else { rotary_dim.max(width) },
    };
    redefine(graph, id, op, vec![Some(x), Some(cos), Some(sin), Some(positions)]);
    Some(())
}

/// `[batch, tokens]`: `first + 0, first + 1, …` in every row.
fn consecutive(graph: &mut Graph, name: &str, x: ValueId, tokens_axis: i64, first: ValueId) -> ValueId {
    let name = format!("{name}.positions");
    let dim = |graph: &mut Graph, axis: i64| {
        let op = Op::Shape {
            start: axis,
            end: Some(axis + 1),
        };
        graph.add_node(&name, op, &[x])
    };
    let (batch, tokens) = (dim(graph, 0), dim(graph, tokens_axis));
    let none = graph.add_i64(&name, &[]);
    let count = graph.add_node(&name, Op::Reshape { allowzero: false }, &[tokens, none]);
    let zero = graph.add_constant(&name, Tensor::from_i64(vec![], &[0]));
    let one = graph.add_constant(&name, Tensor::from_i64(vec![], &[1]));
    let steps = graph.add_node(&name, Op::Range, &[zero, count, one]);
    let row = graph.add_node(&name, Op::Binary(Binary::Add), &[steps, first]);
    let shape = graph.add_node(&name, Op::Concat { axis: 0 }, &[batch, tokens]);
    graph.add_node(&name, Op::Expand, &[row, shape])
}

fn cast_like(graph: &mut Graph, id: NodeId) -> Option<()> {
    let node = graph.node(id);
    let x = node.input(0)?;
    let to: DType = graph.value(node.input(1)?).dtype?;
    redefine(graph, id, Op::Cast { to }, vec![Some(x)]);
    Some(())
}
