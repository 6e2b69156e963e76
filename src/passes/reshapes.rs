//! Reshapes with a constant target instead of a computed one.
//!
//! Exporters compute the target of a reshape from the shape of any tensor, even of caches. Once dims are symbolic, the
//! target is known; here it becomes a constant with at most one -1, or, if two symbolic dims cannot be copied or
//! inferred (`[batch * tokens, n]` to `[batch, tokens, n]`), a computation on the shape of `input_ids`.

use crate::dim::{Dim, Sym};
use crate::graph::op::{Binary, Op};
use crate::graph::{Graph, NodeId, ValueId};

/// One entry of a reshape target.
enum Entry {
    Constant(i64),
    /// A number times the batch size, the token count or both.
    Product {
        factor: i64,
        batch: bool,
        tokens: bool,
    },
}

/// The dim as a product, if it is one.
fn product(dim: &Dim) -> Option<Entry> {
    let (batch, tokens) = (Dim::sym(Sym::batch()), Dim::sym(Sym::tokens()));
    let both = &batch * &tokens;
    let choices = [(both, true, true), (batch, true, false), (tokens, false, true)];
    choices.into_iter().find_map(|(divisor, batch, tokens)| {
        let factor = dim.div_exact(&divisor)?.as_const()?;
        Some(Entry::Product { factor, batch, tokens })
    })
}

/// The entries of the target, if ONNX `Reshape` (with `allowzero = 0`) and the shape of `input_ids` can express it.
fn entries(from: &[Dim], to: &[Dim]) -> Option<Vec<Entry>> {
    let mut entries = Vec::with_capacity(to.len());
    let mut inferred = false;
    // A dim at the same position is copied with 0; the last of the others is inferred with -1.
    let copied = |i: usize| from.get(i) == Some(&to[i]);
    let solve_for = (0..to.len()).rev().find(|i| to[*i].as_const().is_none() && !copied(*i));
    for (i, dim) in to.iter().enumerate() {
        entries.push(if let Some(size) = dim.as_const() {
            if size == 0 {
                return None;
            }
            Entry::Constant(size)
        } else if copied(i) {
            Entry::Constant(0)
        } else if Some(i) == solve_for && !inferred {
            inferred = true;
            Entry::Constant(-1)
        } else {
            product(dim)?
        });
    }
    Some(entries)
}

/// `x` under the shape `to`. `None` if the target cannot be expressed. The result has its type set.
pub fn reshape_to(graph: &mut Graph, input_ids: ValueId, x: ValueId, to: &[Dim], name: &str) -> Option<ValueId> {
    let from = graph.shape(x)?.clone();
    if from == to {
        return Some(x);
    }
    let target = target(graph, input_ids, &from, to, name)?;
    let dtype = graph.value(x).dtype;
    let output = graph.add_node(name, Op::Reshape { allowzero: false }, &[x, target]);
    let value = graph.value_mut(output);
    (value.dtype, value.shape) = (dtype, Some(to.to_vec()));
    Some(output)
}

/// The target of a reshape from one shape to another. `None` if it cannot be expressed.
pub fn target(graph: &mut Graph, input_ids: ValueId, from: &[Dim], to: &[Dim], name: &str) -> Option<ValueId> {
    let entries = entries(from, to)?;
    let name = format!("{name}.shape");
    let constant = |entry: &Entry| match entry {
        Entry::Constant(size) => Some(*size),
        _ => None,
    };
    if let Some(all) = entries.iter().map(constant).collect::<Option<Vec<i64>>>() {
        return Some(graph.add_i64(&name, &all));
    }
    let mut parts = Vec::with_capacity(entries.len());
    for entry in entries {
        let (factor, axes) = match entry {
            Entry::Constant(size) => (size, [None, None]),
            Entry::Product { factor, batch, tokens } => (factor, [batch.then_some(0), tokens.then_some(1)]),
        };
        let mut factors = Vec::new();
        for axis in axes.into_iter().flatten() {
            let op = Op::Shape {
                start: axis,
                end: Some(axis + 1),
            };
            factors.push(graph.add_node(&name, op, &[input_ids]));
        }
        if factor != 1 || factors.is_empty() {
            factors.push(graph.add_i64(&name, &[factor]));
        }
        let product = factors
            .into_iter()
            .reduce(|a, b| graph.add_node(&name, Op::Binary(Binary::Mul), &[a, b]));
        parts.extend(product);
    }
    Some(graph.add_node(&name, Op::Concat { axis: 0 }, &parts))
}

/// Gives every reshape whose result has a known shape a constant target if possible, and removes reshapes that do
/// nothing. Returns the number of rewrites.
pub fn run(graph: &mut Graph, input_ids: ValueId) -> usize {
    let ids: Vec<NodeId> = graph.node_ids().collect();
    let mut rewrites = 0;
    for id in ids {
        let node = graph.node(id);
        if !matches!(node.op, Op::Reshape { .. }) {
            continue;
        }
        let (Some(x), Some(old), Some(output)) = (node.input(0), node.input(1), node.output(0)) else {
            continue;
        };
        let (Some(from), Some(to)) = (graph.shape(x).cloned(), graph.shape(output).cloned()) else {
            continue;
        };
        if from == to && !graph.outputs.contains(&output) {
            graph.replace_uses(output, x);
            rewrites += 1;
            continue;
        }
        if graph.constant(old).is_some() && matches!(node.op, Op::Reshape { allowzero: false }) {
            continue;
        }
        let name = graph.value(output).name.clone();
        if let Some(target) = target(graph, input_ids, &from, &to, &name) {
            let node = graph.node_mut(id);
            node.op = Op::Reshape { allowzero: false };
            node.inputs[1] = Some(target);
            rewrites += 1;
        }
    }
    rewrites
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::DType;

    fn constant_target(from: &[&str], to: &[&str]) -> Option<Vec<i64>> {
        let dims = |names: &[&str]| names.iter().map(|n| Dim::parse(n)).collect::<Vec<_>>();
        let mut graph = Graph::new("g");
        let ids = graph.add_input("ids", DType::I64, dims(&["batch", "tokens"]));
        let x = graph.add_input("x", DType::F32, dims(from));
        let y = reshape_to(&mut graph, ids, x, &dims(to), "y")?;
        let target = graph.def(y)?.1.input(1)?;
        Some(graph.constant(target)?.materialize().unwrap().to_i64())
    }

    #[test]
    fn targets_are_constant_where_onnx_can_say_them() {
        assert_eq!(
            constant_target(&["batch", "tokens", "64"], &["batch", "tokens", "4", "16"]),
            Some(vec![0, 0, 4, 16])
        );
        assert_eq!(
            constant_target(&["batch", "tokens", "64"], &["batch*tokens", "64"]),
            Some(vec![-1, 64])
        );
        assert_eq!(
            constant_target(&["batch", "tokens", "64"], &["tokens", "64", "batch"]),
            None
        );
    }

    #[test]
    fn two_dims_out_of_one_come_from_the_token_ids() {
        let dims = |names: &[&str]| names.iter().map(|n| Dim::parse(n)).collect::<Vec<_>>();
        let mut graph = Graph::new("g");
        let ids = graph.add_input("ids", DType::I64, dims(&["batch", "tokens"]));
        let x = graph.add_input("x", DType::F32, dims(&["batch*tokens", "64"]));
        let y = reshape_to(&mut graph, ids, x, &dims(&["batch", "tokens", "64"]), "y").unwrap();
        let target = graph.def(y).unwrap().1.input(1).unwrap();
        assert!(matches!(graph.def(target).unwrap().1.op, Op::Concat { axis: 0 }));
    }
}
