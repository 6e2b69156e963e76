//! Navigation in a canonical graph: across reshapes, casts and biases to the products and norms around a value.

use std::collections::HashMap;

use super::{Linear, Reader, is_norm};
use crate::dim::Dim;
use crate::graph::op::{Binary, Op, Unary};
use crate::graph::{NodeId, ValueId};

impl Reader<'_> {
    /// Back over operators that change neither elements nor their order.
    pub(super) fn plain(&self, mut value: ValueId) -> ValueId {
        while let Some((_, node)) = self.graph.def(value) {
            match (&node.op, node.input(0)) {
                (Op::Reshape { .. } | Op::Cast { .. } | Op::Identity | Op::Squeeze | Op::Unsqueeze, Some(input)) => {
                    value = input;
                }
                (op, Some(input)) if is_rounding(op) => value = input,
                _ => break,
            }
        }
        value
    }

    pub(super) fn norm_before(&self, value: ValueId) -> Option<NodeId> {
        let (id, node) = self.graph.def(self.plain(value))?;
        match node.op {
            // The rows for logits may be selected after the norm.
            Op::Gather { .. } => self.norm_before(node.input(0)?),
            Op::Binary(Binary::Mul) => self.norm_before(self.scaled(id)?),
            _ => is_norm(&node.op).then_some(id),
        }
    }

    /// The linear layer that an operand of an attention comes from.
    pub(super) fn linear_before(&self, operand: ValueId) -> Option<Linear> {
        let (mut at, mut columns, mut norm) = (operand, None, None);
        loop {
            let (id, output) = self.graph.producer_of(at)?;
            let node = self.graph.node(id);
            match &node.op {
                Op::Split { .. } if columns.is_none() => {
                    columns = Some(self.part(id, output)?);
                    at = node.input(0)?;
                }
                Op::Transpose { .. }
                | Op::Reshape { .. }
                | Op::Cast { .. }
                | Op::Squeeze
                | Op::Unsqueeze
                | Op::RotaryEmbedding { .. } => at = node.input(0)?,
                Op::TensorScatter { .. } => at = node.input(1)?,
                Op::Slice if columns.is_none() => {
                    columns = Some(self.columns(id)?);
                    at = node.input(0)?;
                }
                op if is_rounding(op) => at = node.input(0)?,
                op if is_norm(op) && norm.is_none() => {
                    norm = Some(id);
                    at = node.input(0)?;
                }
                Op::Binary(Binary::Mul) => at = self.scaled(id)?,
                Op::Binary(Binary::Add) if self.is_rotated(node.input(0)?) => at = node.input(0)?,
                Op::Binary(Binary::Add) | Op::MatMul => {
                    let (linear, _) = self.linear_at(self.product_of(at)?)?;
                    return Some(Linear {
                        columns,
                        norm,
                        ..linear
                    });
                }
                _ => return None,
            }
        }
    }

    /// Whether a value is a part of a rotation: cosines and sines are rounded apart.
    fn is_rotated(&self, value: ValueId) -> bool {
        let part = self.graph.def(self.plain(value));
        part.is_some_and(|(_, node)| matches!(node.op, Op::RotaryEmbedding { .. }))
    }

    /// The operand of a product with a constant number or vector.
    fn scaled(&self, node: NodeId) -> Option<ValueId> {
        let node = self.graph.node(node);
        let scale = |v: ValueId| {
            self.graph
                .constant(v)
                .is_some_and(|c| c.shape().len() <= 1 || c.len() == 1)
        };
        match (node.input(0)?, node.input(1)?) {
            (x, factor) | (factor, x) if scale(factor) && self.graph.constant(x).is_none() => Some(x),
            _ => None,
        }
    }

    /// Columns of a matrix product in an output of a split.
    pub(super) fn part(&self, split: NodeId, output: usize) -> Option<(usize, usize)> {
        let node = self.graph.node(split);
        let width = |i: usize| {
            self.graph
                .shape(node.output(i)?)?
                .last()?
                .as_const()
                .map(|w| w as usize)
        };
        let rank = self.graph.shape(node.input(0)?)?.len() as i64;
        let last = matches!(node.op, Op::Split { axis } if axis == -1 || axis == rank - 1);
        let start = (0..output).map(width).sum::<Option<usize>>()?;
        last.then_some((start, start + width(output)?))
    }

    /// Columns of a matrix product in a slice: one slice of the last axis, all columns in one group.
    pub(super) fn columns(&self, slice: NodeId) -> Option<(usize, usize)> {
        let node = self.graph.node(slice);
        let shape = self.graph.shape(node.input(0)?)?;
        let number = |i: usize| match node.input(i) {
            Some(value) => {
                let tensor = self.graph.constant(value)?.materialize().ok()?;
                tensor.scalar().map(|v| v as i64)
            }
            None => Some(1),
        };
        let (start, end, axis, step) = (number(1)?, number(2)?, number(3)?, number(4)?);
        let rank = shape.len() as i64;
        let axis = if axis < 0 { axis + rank } else { axis };
        let groups = shape.iter().rev().nth(1).filter(|_| rank == 4);
        let in_one = groups.is_none_or(|d| d.as_const() == Some(1));
        let width = shape.last().and_then(Dim::as_const)?;
        let valid = axis == rank - 1 && step == 1 && in_one && 0 <= start && start < end;
        valid.then(|| (start as usize, end.min(width) as usize))
    }

    /// The product of a value, possibly with a bias.
    fn product_of(&self, value: ValueId) -> Option<NodeId> {
        let (id, node) = self.graph.def(self.plain(value))?;
        match node.op {
            Op::MatMul => Some(id),
            Op::Binary(Binary::Add) => {
                let constant = |v: ValueId| self.graph.constant(v).is_some();
                match (node.input(0)?, node.input(1)?) {
                    (x, bias) | (bias, x) if constant(bias) => self.product_of(x),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// The linear layer of a product, and its result with the bias.
    pub(super) fn linear_at(&self, product: NodeId) -> Option<(Linear, ValueId)> {
        let node = self.graph.node(product);
        let weight = self.matrix(node.input(1)?)?;
        let mut end = node.output(0)?;
        let mut bias = None;
        // A bias may come after the unflattening of the result.
        let mut at = end;
        while bias.is_none() {
            let Some([(user, input)]) = self.uses.get(&at).map(Vec::as_slice) else {
                break;
            };
            let user = self.graph.node(*user);
            match user.op {
                Op::Reshape { .. } | Op::Cast { .. } if *input == 0 => at = user.output(0)?,
                ref op if is_rounding(op) => at = user.output(0)?,
                Op::Binary(Binary::Add) => {
                    let other = user.input(1 - input)?;
                    if self.graph.constant(other).is_none_or(|c| c.shape().len() != 1) {
                        break;
                    }
                    (bias, end) = (Some(other), user.output(0)?);
                }
                _ => break,
            }
        }
        let input = node.input(0)?;
        let gather = self.graph.def(self.plain(input)).map(|(id, _)| id);
        let linear = Linear {
            product,
            input,
            order: gather.and_then(|id| self.order_at(id)),
            weight,
            bias,
            columns: None,
            norm: None,
        };
        Some((linear, end))
    }

    /// The order in which a gather selects the elements of a token; the weights are then in that order.
    pub(super) fn order_at(&self, gather: NodeId) -> Option<Vec<i64>> {
        let node = self.graph.node(gather);
        let Op::Gather { axis } = node.op else { return None };
        let (tokens, indices) = (node.input(0)?, self.graph.constant(node.input(1)?)?);
        let shape = self.graph.shape(tokens)?;
        let last = axis == -1 || axis + 1 == shape.len() as i64;
        let all = shape.last()?.as_const() == Some(indices.len() as i64);
        if !last || !all || self.graph.constant(tokens).is_some() || indices.shape().len() != 1 {
            return None;
        }
        Some(indices.materialize().ok()?.to_i64())
    }

    /// The constant `[out, in]` that a product reads transposed.
    fn matrix(&self, operand: ValueId) -> Option<ValueId> {
        let (_, node) = self.graph.def(operand)?;
        let value = node.input(0)?;
        let is_matrix = self.graph.constant(value).is_some_and(|c| c.shape().len() == 2);
        (matches!(node.op, Op::Transpose { .. }) && is_matrix).then_some(value)
    }

    /// The products that a value reaches over element-wise operators, in the graph's order, and whether there is an
    /// activation in between.
    pub(super) fn products_after(&self, value: ValueId) -> Vec<(NodeId, bool)> {
        let mut found: Vec<(NodeId, bool)> = Vec::new();
        let mut stack = vec![(value, false)];
        while let Some((value, active)) = stack.pop() {
            for (user, input) in self.uses.get(&value).into_iter().flatten() {
                let node = self.graph.node(*user);
                let next = match &node.op {
                    Op::MatMul if *input == 0 => {
                        if !found.iter().any(|(id, _)| id == user) {
                            found.push((*user, active));
                        }
                        continue;
                    }
                    Op::Swish { .. } | Op::Gelu { .. } => true,
                    Op::Unary(Unary::Relu | Unary::Sigmoid | Unary::Tanh | Unary::Erf | Unary::Softplus) => true,
                    Op::Reshape { .. } | Op::Transpose { .. } if *input == 0 => active,
                    op if is_rounding(op) => active,
                    Op::Gather { .. } if *input == 0 && self.order_at(*user).is_some() => active,
                    Op::Cast { .. } | Op::Identity | Op::Binary(Binary::Mul) => active,
                    // A bias; not the residual stream.
                    Op::Binary(Binary::Add)
                        if node.input(1 - input).is_some_and(|v| self.graph.constant(v).is_some()) =>
                    {
                        active
                    }
                    _ => continue,
                };
                stack.extend(node.output(0).map(|output| (output, next)));
            }
        }
        let place: HashMap<NodeId, usize> = self.graph.node_ids().enumerate().map(|(i, id)| (id, i)).collect();
        found.sort_by_key(|(id, _)| place[id]);
        found
    }

    /// The only reader of a value that `is_meant` holds for, over reshapes and casts.
    pub(super) fn only(&self, value: ValueId, is_meant: impl Fn(&Op) -> bool + Copy) -> Option<NodeId> {
        let mut found = None;
        for (user, _) in self.uses.get(&value)? {
            let node = self.graph.node(*user);
            let hit = match &node.op {
                op if is_meant(op) => Some(*user),
                op if is_rounding(op) => self.only(node.output(0)?, is_meant),
                Op::Reshape { .. } | Op::Cast { .. } => self.only(node.output(0)?, is_meant),
                _ => None,
            };
            if hit.is_some() && found.is_some() && hit != found {
                return None;
            }
            found = found.or(hit);
        }
        found
    }
}

/// Whether an operator only rounds an activation to the values of codes.
pub(super) fn is_rounding(op: &Op) -> bool {
    matches!(op, Op::RoundToCodes { .. } | Op::DynamicRoundToCodes)
}
