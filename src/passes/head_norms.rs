//! Joins norms of single heads into one norm of all heads.
//!
//! `Concat(norm(x₀) · w₀, norm(x₁) · w₁, …)` of the pieces of one split, each a single row of an axis with its own
//! parameters (queries and keys of StableLM 2 with `qk_layernorm`), becomes `norm(x) · w`, with the parameters stacked
//! along that axis. Runs after `layer_norm` and `rms_norm`.

use super::PassError;
use super::pattern::{finish, redefine};
use crate::graph::op::{Binary, Op};
use crate::graph::{Constant, Graph, Node, NodeId, ValueId};
use crate::tensor::Tensor;

/// Writes one norm in place of those of single heads. Returns the number of rewrites.
pub fn run(graph: &mut Graph) -> Result<usize, PassError> {
    let mut rewrites = 0;
    for id in graph.node_ids().collect::<Vec<_>>() {
        let Some(found) = joined(graph, id) else { continue };
        rewrite(graph, id, found);
        rewrites += 1;
    }
    finish(graph, rewrites)
}

/// A `Concat` of norms.
struct Joined {
    /// The norm of each piece.
    op: Op,
    /// The input of the split.
    x: ValueId,
    /// `[pieces, 1.., last]`
    scale: Constant,
    /// The same for biases, if there are any.
    bias: Option<Constant>,
}

fn joined(graph: &Graph, id: NodeId) -> Option<Joined> {
    let node = graph.node(id);
    let Op::Concat { axis } = node.op else { return None };
    let norms: Vec<&Node> = node
        .inputs
        .iter()
        .map(|input| graph.def((*input)?).map(|(_, norm)| norm))
        .collect::<Option<_>>()?;
    let first = *norms.first()?;
    let (split, source) = graph.def(first.input(0)?)?;
    let Op::Split { axis: split_axis } = source.op else {
        return None;
    };
    let x = source.input(0)?;
    let rank = graph.shape(x)?.len();
    let from_start = |axis: i64| if axis < 0 { axis + rank as i64 } else { axis } as usize;
    let heads = from_start(axis);
    let last = match first.op {
        Op::LayerNormalization { axis, .. } | Op::RmsNormalization { axis, .. } => from_start(axis),
        _ => return None,
    };
    let whole = heads == from_start(split_axis) && last + 1 == rank && heads < last;
    if !whole || source.outputs.len() != norms.len() {
        return None;
    }
    for (i, norm) in norms.iter().enumerate() {
        let piece = norm.input(0)?;
        let in_order = graph.producer_of(piece)? == (split, i);
        if !in_order || norm.op != first.op || !graph.shape(piece)?.get(heads)?.is_one() {
            return None;
        }
    }
    let biased = first.input(2).is_some();
    let stacked = |i: usize| -> Option<Constant> {
        let parts: Vec<Constant> = norms
            .iter()
            .map(|norm| {
                let part = graph.constant(norm.input(i)?)?;
                let [length] = *part.shape() else { return None };
                let mut shape = vec![1; rank - heads];
                shape[rank - heads - 1] = length;
                Some(part.reshaped(shape))
            })
            .collect::<Option<_>>()?;
        let alike = |part: &Constant| part.shape() == parts[0].shape() && part.dtype() == parts[0].dtype();
        parts.iter().all(alike).then(|| Constant::concat(&parts, 0))
    };
    if norms.iter().any(|norm| norm.input(2).is_some() != biased) {
        return None;
    }
    Some(Joined {
        op: first.op.clone(),
        x,
        scale: stacked(1)?,
        bias: if biased { Some(stacked(2)?) } else { None },
    })
}

fn rewrite(graph: &mut Graph, id: NodeId, found: Joined) {
    let name = graph.node(id).name.clone();
    let Joined { op, x, scale, bias } = found;
    let length = scale.shape().last().copied().expect("it has the axis of the norm");
    let ones = Tensor::from_f64_as(scale.dtype(), vec![length], &vec![1.0; length]);
    let ones = graph.add_constant(&format!("{name}.ones"), ones);
    let norm = graph.add_node(&format!("{name}.norm"), op, &[x, ones]);
    let scale = graph.add_constant(&format!("{name}.scale"), scale);
    let (last, operands) = match bias {
        None => (Binary::Mul, [norm, scale]),
        Some(bias) => {
            let product = graph.add_node(&format!("{name}.scaled"), Op::Binary(Binary::Mul), &[norm, scale]);
            (
                Binary::Add,
                [product, graph.add_constant(&format!("{name}.bias"), bias)],
            )
        }
    };
    redefine(graph, id, Op::Binary(last), operands.map(Some).to_vec());
}
