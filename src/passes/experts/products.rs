//! The matrix products of a mixture of experts, with their constants and biases.

use super::region::Flow;
use crate::graph::op::{Binary, Op};
use crate::graph::{Constant, Graph, NodeId, ValueId};

/// A constant operand of a product or a sum.
#[derive(Clone, Debug)]
pub struct Weight {
    /// With its movements so far.
    pub constant: Constant,
    /// Experts whose slices of the first axis are selected, in order; `None`: unchanged.
    pub index: Option<ValueId>,
}

/// One product with a constant.
#[derive(Clone, Debug)]
pub struct Product {
    pub node: NodeId,
    /// The other operand, with rows of `depth` elements.
    pub x: ValueId,
    /// The result of the product itself.
    pub result: ValueId,
    /// The result with its bias.
    pub end: ValueId,
    /// Matrices `[out, in]`, stacked on a first axis if there are three.
    pub weight: Weight,
    /// One element per output, for each expert if they are stacked.
    pub bias: Option<Weight>,
    /// x is the right operand, so rows are columns of the operands.
    pub from_right: bool,
}

impl Product {
    /// Elements of a row of x.
    pub fn depth(&self) -> usize {
        self.weight.constant.shape().last().copied().unwrap_or(0)
    }
    /// Elements of a row of the result.
    pub fn columns(&self) -> usize {
        let shape = self.weight.constant.shape();
        shape.len().checked_sub(2).map_or(0, |axis| shape[axis])
    }
    /// Matrices on the first axis; `None` if there is only one.
    pub fn stacked(&self) -> Option<usize> {
        match self.weight.constant.shape() {
            [count, _, _] => Some(*count),
            _ => None,
        }
    }
}

/// A value as a constant, followed through movements that keep each expert's elements together.
pub fn weight(graph: &Graph, value: ValueId) -> Option<Weight> {
    if let Some(constant) = graph.constant(value) {
        return constant.dtype().is_float().then(|| Weight {
            constant: constant.clone(),
            index: None,
        });
    }
    let (_, node) = graph.def(value)?;
    let input = || weight(graph, node.input(0)?);
    match &node.op {
        Op::Identity => input(),
        Op::Cast { to } if to.is_float() => {
            let weight = input()?;
            Some(Weight {
                constant: weight.constant.cast(*to),
                ..weight
            })
        }
        Op::Transpose { perm } => {
            let weight = input()?;
            let rank = weight.constant.shape().len();
            let reversed: Vec<usize> = (0..rank).rev().collect();
            let perm = perm.clone().unwrap_or(reversed);
            // The axis of the experts stays the first.
            let keeps = weight.index.is_none() || perm.first() == Some(&0);
            (perm.len() == rank && keeps).then(|| Weight {
                constant: weight.constant.transposed(&perm),
                ..weight
            })
        }
        // One of several matrices, by index.
        Op::Gather { axis: 0 } if graph.constant(node.input(1)?).is_some() => {
            let weight = input().filter(|weight| weight.index.is_none())?;
            let at = graph.constant(node.input(1)?)?;
            let [count, rest @ ..] = weight.constant.shape() else {
                return None;
            };
            let at = (at.shape().is_empty() || at.len() == 1 && at.shape().len() == 1)
                .then(|| at.materialize().ok()?.scalar())
                .flatten()? as i64;
            let at = usize::try_from(if at < 0 { at + *count as i64 } else { at }).ok()?;
            let shape = rest.to_vec();
            (at < *count).then(|| Weight {
                constant: weight.constant.sliced(0, at, at + 1).reshaped(shape),
                index: None,
            })
        }
        Op::Gather { axis: 0 } | Op::GatherNd { batch_dims: 0 } => {
            let weight = input().filter(|weight| weight.index.is_none())?;
            let index = node.input(1)?;
            let one_axis = match node.op {
                Op::Gather { .. } => true,
                _ => graph.shape(index)?.last()?.is_one(),
            };
            one_axis.then_some(Weight {
                index: Some(index),
                ..weight
            })
        }
        Op::Squeeze | Op::Unsqueeze | Op::Reshape { .. } => {
            // A movement after the gather would have to be applied to each slice.
            let weight = input().filter(|weight| weight.index.is_none())?;
            let shape = graph.shape(value)?.iter().map(|d| usize::try_from(d.as_const()?).ok());
            let shape = shape.collect::<Option<Vec<_>>>()?;
            let volume: usize = shape.iter().product();
            (volume == weight.constant.len()).then(|| Weight {
                constant: weight.constant.reshaped(shape),
                index: None,
            })
        }
        _ => None,
    }
}

/// The product that a node is, if one operand is a constant.
pub fn product(flow: &Flow<'_>, id: NodeId) -> Option<Product> {
    let graph = flow.graph;
    let node = graph.node(id);
    let (a, b) = (node.input(0)?, node.input(1)?);
    let result = node.output(0)?;
    let turned = |weight: Weight| {
        let rank = weight.constant.shape().len();
        let mut perm: Vec<usize> = (0..rank).collect();
        (rank >= 2).then(|| {
            perm.swap(rank - 2, rank - 1);
            Weight {
                constant: weight.constant.transposed(&perm),
                ..weight
            }
        })
    };
    let (x, weight, from_right, bias) = match &node.op {
        Op::MatMul => match (weight(graph, a), weight(graph, b)) {
            (None, Some(weight)) => (a, turned(weight)?, false, None),
            (Some(weight), None) => (b, weight, true, None),
            _ => return None,
        },
        Op::Gemm {
            alpha,
            beta,
            trans_a: false,
            trans_b,
        } if *alpha == 1.0 && (*beta == 1.0 || node.input(2).is_none()) => {
            let weight = weight(graph, b)?;
            let weight = if *trans_b { weight } else { turned(weight)? };
            let bias = match node.input(2) {
                Some(bias) => Some(self::weight(graph, bias)?),
                None => None,
            };
            (a, weight, false, bias)
        }
        Op::FusedMatMul {
            alpha,
            trans_a: false,
            trans_b,
        } if *alpha == 1.0 => {
            let weight = weight(graph, b)?;
            (a, if *trans_b { weight } else { turned(weight)? }, false, None)
        }
        _ => return None,
    };
    if !(2..=3).contains(&weight.constant.shape().len()) || graph.constant(x).is_some() {
        return None;
    }
    let (end, bias) = match bias {
        Some(bias) => (result, Some(bias)),
        None => match bias_behind(flow, result) {
            Some((end, bias)) => (end, Some(bias)),
            None => (result, None),
        },
    };
    Some(Product {
        node: id,
        x,
        result,
        end,
        weight,
        bias,
        from_right,
    })
}

/// The sum with a constant after a product, across operators that only change its shape.
fn bias_behind(flow: &Flow<'_>, result: ValueId) -> Option<(ValueId, Weight)> {
    let graph = flow.graph;
    let mut at = result;
    loop {
        let node = graph.node(flow.only_reader(at)?);
        match node.op {
            Op::Squeeze | Op::Unsqueeze | Op::Reshape { .. } | Op::Identity if node.input(0) == Some(at) => {
                at = node.output(0)?;
            }
            Op::Binary(Binary::Add) => {
                let other = node.inputs.iter().flatten().copied().find(|v| *v != at)?;
                let weight = weight(graph, other).filter(|weight| weight.constant.len() > 1)?;
                return Some((node.output(0)?, weight));
            }
            _ => return None,
        }
    }
}
