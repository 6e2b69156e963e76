//! Every linear layer becomes `MatMul(x, Transpose(weight))` with a constant weight `[out, in]`, and `Add(·, bias)`.
//!
//! PyTorch stores weights in this order, and engines read it fastest for one token (see the docs of `lower`). Forms:
//! `MatMul` with a constant `[in, out]`, `Gemm` of either orientation with its factors, and either of them on an input
//! flattened to two axes and unflattened afterwards (GPT-2's `Conv1D`), whose reshapes move after the layer, where they
//! cancel with the unflattening (`cleanup`). No weight's bytes are read.

use std::collections::HashMap;

use super::PassError;
use super::pattern::{finish, node_of, only_reader, redefine, vector_weight};
use crate::dim::Dim;
use crate::graph::Constant;
use crate::graph::op::{Binary, Op};
use crate::graph::{Graph, NodeId, ValueId};
use crate::tensor::Tensor;

/// Brings every linear layer into the canonical form. Returns the number of rewrites.
pub fn run(graph: &mut Graph) -> Result<usize, PassError> {
    let mut rewrites = 0;
    let mut weights = Weights::default();
    for id in graph.node_ids().collect::<Vec<_>>() {
        let done = match graph.node(id).op {
            Op::Gemm {
                alpha,
                beta,
                trans_a,
                trans_b,
            } => gemm(graph, &mut weights, id, [alpha, beta], [trans_a, trans_b]),
            Op::MatMul => matmul(graph, &mut weights, id),
            _ => None,
        };
        rewrites += usize::from(done.is_some());
    }
    graph.sort()?;
    let uses = graph.uses();
    for id in graph.node_ids().collect::<Vec<_>>() {
        rewrites += usize::from(unflatten_later(graph, &uses, id).is_some());
    }
    finish(graph, rewrites)
}

/// Transposed reads of weights so far, so that a weight used twice stays one.
#[derive(Default)]
struct Weights {
    /// By the constant, whether it is `[out, in]`, and the factor's bits.
    made: HashMap<(ValueId, bool, u32), ValueId>,
}

impl Weights {
    /// `[in, out]` as the transpose of a constant `[out, in]`, times `factor`.
    fn transposed(&mut self, graph: &mut Graph, value: ValueId, is_out_in: bool, factor: f32) -> ValueId {
        let key = (value, is_out_in, factor.to_bits());
        if let Some(made) = self.made.get(&key) {
            return *made;
        }
        let constant = graph.constant(value).expect("the caller has seen the constant").clone();
        let name = graph.value(value).name.clone();
        let weight = if is_out_in && factor == 1.0 {
            value
        } else {
            let transposed = if is_out_in {
                constant
            } else {
                constant.transposed(&[1, 0])
            };
            let transposed = if factor == 1.0 {
                transposed
            } else {
                transposed.scaled(f64::from(factor))
            };
            let suffix = if is_out_in { "scaled" } else { "transposed" };
            graph.add_constant(&format!("{name}.{suffix}"), transposed)
        };
        let made = transpose(graph, &format!("{name}.read"), weight);
        self.made.insert(key, made);
        made
    }
}

/// A typed `Transpose` of a matrix.
fn transpose(graph: &mut Graph, name: &str, x: ValueId) -> ValueId {
    let perm = Some(vec![1, 0]);
    let made = graph.add_node(name, Op::Transpose { perm }, &[x]);
    let shape = graph.shape(x).map(|s| s.iter().rev().cloned().collect());
    (graph.value_mut(made).dtype, graph.value_mut(made).shape) = (graph.value(x).dtype, shape);
    made
}

fn is_matrix(graph: &Graph, value: ValueId) -> bool {
    graph
        .constant(value)
        .is_some_and(|c| c.shape().len() == 2 && c.dtype().is_float())
}

fn matmul(graph: &mut Graph, weights: &mut Weights, id: NodeId) -> Option<()> {
    let node = graph.node(id);
    let (x, weight) = (node.input(0)?, node.input(1)?);
    if !is_matrix(graph, weight) || graph.constant(x).is_some() {
        return None;
    }
    let transposed = weights.transposed(graph, weight, false, 1.0);
    redefine(graph, id, Op::MatMul, vec![Some(x), Some(transposed)]);
    Some(())
}

fn gemm(
    graph: &mut Graph,
    weights: &mut Weights,
    id: NodeId,
    [alpha, beta]: [f32; 2],
    [trans_a, trans_b]: [bool; 2],
) -> Option<()> {
    let node = graph.node(id).clone();
    let y = node.output(0)?;
    let (mut a, mut b) = (node.input(0)?, node.input(1)?);
    let c = node.input(2).filter(|_| beta != 0.0);
    let dtype = graph.value(y).dtype.or(graph.value(a).dtype)?;
    // Integers have no factors.
    if !dtype.is_float() {
        return None;
    }
    if trans_a {
        a = transpose(graph, &format!("{}.a", node.name), a);
    }
    let mut factor = alpha;
    if is_matrix(graph, b) {
        b = weights.transposed(graph, b, trans_b, alpha);
        factor = 1.0;
    } else if trans_b {
        b = transpose(graph, &format!("{}.b", node.name), b);
    }
    // The operators after the product; the last one computes the node's output.
    let mut steps: Vec<(Op, ValueId)> = Vec::new();
    let number = |graph: &mut Graph, what: &str, value: f32| {
        let tensor = Tensor::from_f64_as(dtype, vec![], &[f64::from(value)]);
        graph.add_constant(&format!("{}.{what}", node.name), tensor)
    };
    if factor != 1.0 {
        steps.push((Op::Binary(Binary::Mul), number(graph, "alpha", factor)));
    }
    if let Some(c) = c {
        let bias = match graph.constant(c).cloned() {
            Some(constant) if beta != 1.0 => {
                graph.add_constant(&format!("{}.bias", node.name), constant.scaled(f64::from(beta)))
            }
            None if beta != 1.0 => {
                let beta = number(graph, "beta", beta);
                graph.add_node(&format!("{}.c", node.name), Op::Binary(Binary::Mul), &[c, beta])
            }
            _ => c,
        };
        steps.push((Op::Binary(Binary::Add), bias));
    }
    let mut at = (Op::MatMul, a, b);
    for (op, operand) in steps {
        let between = graph.add_value(&format!("{}.product", node.name));
        (graph.value_mut(between).dtype, graph.value_mut(between).shape) = (Some(dtype), graph.shape(y).cloned());
        let inputs = vec![Some(at.1), Some(at.2)];
        graph.add_node_with_outputs(&node.name, at.0, inputs, vec![Some(between)]);
        at = (op, between, operand);
    }
    redefine(graph, id, at.0, vec![Some(at.1), Some(at.2)]);
    Some(())
}

/// `MatMul(Reshape(x), w) [+ bias]` where the reshape only merges the leading axes of `x` becomes
/// `Reshape(MatMul(x, w) [+ bias])`.
fn unflatten_later(graph: &mut Graph, uses: &HashMap<ValueId, Vec<(NodeId, usize)>>, id: NodeId) -> Option<()> {
    let node = graph.node(id).clone();
    if node.op != Op::MatMul {
        return None;
    }
    let (flat, weight, product) = (node.input(0)?, node.input(1)?, node.output(0)?);
    let reshape = node_of(graph, flat)?;
    if !matches!(reshape.op, Op::Reshape { .. } | Op::Flatten { .. } | Op::Squeeze) {
        return None;
    }
    let x = reshape.input(0)?;
    let (before, after) = (graph.shape(x)?.clone(), graph.shape(flat)?);
    let merges = after.len() == 2 && before.len() >= 3 && before.last() == after.last();
    let matrix = graph.shape(weight)?;
    if !merges || matrix.len() != 2 || !reads_weight(graph, weight) {
        return None;
    }
    let out = matrix[1].clone();
    let width = out.as_const()?;
    let mut shape = before[..before.len() - 1].to_vec();
    shape.push(out);

    // The bias moves along if it is a vector and the product's only reader.
    let bias = only_reader(graph, uses, product).and_then(|sum| {
        let reader = graph.node(sum);
        (reader.op == Op::Binary(Binary::Add)).then_some(())?;
        let other = reader.inputs.iter().flatten().copied().find(|v| *v != product)?;
        let vector: Constant = vector_weight(graph, other, usize::try_from(width).ok())?;
        Some((sum, other, vector))
    });
    let dtype = graph.value(product).dtype;
    let typed = |graph: &mut Graph, value: ValueId, shape: &[Dim]| {
        (graph.value_mut(value).dtype, graph.value_mut(value).shape) = (dtype, Some(shape.to_vec()));
    };
    let mut whole = graph.add_node(&node.name, Op::MatMul, &[x, weight]);
    typed(graph, whole, &shape);
    let mut end = id;
    if let Some((sum, other, vector)) = bias {
        let bias = if graph.constant(other).is_some_and(|c| c.shape().len() == 1) {
            other
        } else {
            graph.add_constant(&format!("{}.bias", node.name), vector)
        };
        let name = graph.node(sum).name.clone();
        whole = graph.add_node(&name, Op::Binary(Binary::Add), &[whole, bias]);
        typed(graph, whole, &shape);
        end = sum;
    }
    let target = graph.add_i64(&format!("{}.flat", node.name), &[-1, width]);
    redefine(
        graph,
        end,
        Op::Reshape { allowzero: false },
        vec![Some(whole), Some(target)],
    );
    Some(())
}

/// Whether a value is a constant matrix or the transpose of one.
fn reads_weight(graph: &Graph, value: ValueId) -> bool {
    is_matrix(graph, value)
        || node_of(graph, value).is_some_and(|node| {
            matches!(node.op, Op::Transpose { .. }) && node.input(0).is_some_and(|w| is_matrix(graph, w))
        })
}
