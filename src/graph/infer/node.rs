//! One node: the rule it takes, and what rules need to look at operands and to learn equations.

use std::collections::BTreeSet;

use super::{Fact, InferError, Operand};
use crate::dim::{Dim, Unifier};
use crate::graph::op::Op;
use crate::graph::{Graph, Node, Shape};
use crate::tensor::DType;

/// One node with what is known of its inputs.
pub(super) struct NodeInference<'a> {
    pub(super) graph: &'a Graph,
    pub(super) node: &'a Node,
    pub(super) inputs: Vec<Option<Fact>>,
    pub(super) unifier: &'a mut Unifier,
}

/// Types of a node's outputs, in order; `None` for one that cannot be typed.
pub(super) type Outputs = Vec<Option<Fact>>;

pub(super) fn one(fact: Fact) -> Result<Outputs, InferError> {
    Ok(vec![Some(fact)])
}

impl NodeInference<'_> {
    pub(super) fn rule(&mut self) -> Result<Outputs, InferError> {
        let node = self.node;
        match &node.op {
            Op::Unary(op) => self.unary(*op),
            Op::Binary(op) => self.binary(*op),
            Op::Cast { to } => self.cast(*to),
            Op::CastLike => {
                let to = self.input(1)?.dtype;
                self.cast(to)
            }
            Op::Where => self.select(),
            Op::Identity => one(self.input(0)?.clone()),
            Op::Clip => self.clip(),
            Op::Gelu { .. } | Op::Swish { .. } | Op::Trilu { .. } => self.like_input(0),
            Op::Softmax { axis } | Op::LogSoftmax { axis } => {
                self.axis_of(0, *axis)?;
                self.like_input(0)
            }
            Op::MatMul => self.matmul(false, false),
            Op::FusedMatMul { trans_a, trans_b, .. } => self.matmul(*trans_a, *trans_b),
            Op::Gemm { trans_a, trans_b, .. } => self.gemm(*trans_a, *trans_b),
            Op::Reduce {
                reduction,
                keepdims,
                noop_with_empty_axes,
            } => self.reduce(*reduction, *keepdims, *noop_with_empty_axes),
            Op::CumSum { exclusive, reverse } => self.cumsum(*exclusive, *reverse),
            Op::LayerNormalization { axis, .. } | Op::RmsNormalization { axis, .. } => self.normalization(*axis),
            Op::SkipRmsNormalization { .. } | Op::SkipLayerNormalization { .. } => self.skip_normalization(),
            Op::Shape { start, end } => self.shape(*start, *end),
            Op::Size => self.size(),
            Op::Reshape { allowzero } => self.reshape(*allowzero),
            Op::Transpose { perm } => self.transpose(perm.as_deref()),
            Op::Squeeze => self.squeeze(),
            Op::Unsqueeze => self.unsqueeze(),
            Op::Flatten { axis } => self.flatten(*axis),
            Op::Expand => self.expand(),
            Op::Tile => self.tile(),
            Op::Concat { axis } => self.concat(*axis),
            Op::Split { axis } => self.split(*axis),
            Op::Slice => self.slice(),
            Op::Gather { axis } => self.gather(*axis),
            Op::GatherElements { axis } => self.gather_elements(*axis),
            Op::GatherNd { batch_dims } => self.gather_nd(*batch_dims),
            Op::Range => self.range(),
            Op::ConstantOfShape { value } => self.constant_of_shape(value),
            Op::ScatterNd { mode } => self.scatter_nd(*mode),
            Op::ScatterElements { axis, mode } => self.scatter_elements(*axis, *mode),
            Op::TensorScatter { axis, .. } => self.tensor_scatter(*axis),
            Op::RotaryEmbedding { num_heads, .. } => self.rotary_embedding(*num_heads),
            Op::ContribRotaryEmbedding { .. } => self.like_input(0),
            Op::Attention(attention) => self.attention(attention),
            Op::GroupQueryAttention(attention) => self.group_query_attention(attention),
            Op::Unknown { .. } => Ok(Vec::new()),
        }
    }

    pub(super) fn error(&self, reason: impl Into<String>) -> InferError {
        InferError::Node {
            node: self.node.name.clone(),
            op: self.node.op.name(),
            reason: reason.into(),
        }
    }

    /// A required input.
    pub(super) fn input(&self, i: usize) -> Result<&Fact, InferError> {
        let found = self.inputs.get(i).and_then(Option::as_ref);
        found.ok_or_else(|| self.error(format!("its input {i} is missing")))
    }

    pub(super) fn optional(&self, i: usize) -> Option<&Fact> {
        self.inputs.get(i).and_then(Option::as_ref)
    }

    pub(super) fn operand(&self, i: usize) -> Operand {
        let name = self.node.input(i).map(|v| self.graph.value(v).name.clone());
        let fact = self.optional(i);
        Operand {
            name: name.unwrap_or_default(),
            dtype: fact.map_or(DType::F32, |f| f.dtype),
            shape: fact.map(|f| f.shape.clone()).unwrap_or_default(),
        }
    }

    /// Learns that two dims are equal, because inputs `i` and `j` must fit.
    pub(super) fn unify(&mut self, left: &Dim, right: &Dim, i: usize, j: usize) -> Result<Dim, InferError> {
        match self.unifier.unify(left, right) {
            Ok(()) => Ok(self.unifier.resolve(left)),
            Err(conflict) => Err(InferError::Conflict {
                node: self.node.name.clone(),
                op: self.node.op.name(),
                left: self.operand(i),
                right: self.operand(j),
                conflict,
            }),
        }
    }

    /// Two dims of a broadcast: 1 gives way, anything else is equal.
    ///
    /// `tokens` against `past + tokens` is no equation, which would say that `past` is 0: an export that does this works
    /// for one token or for no past, and the result is the greater of the two either way.
    pub(super) fn broadcast_dim(&mut self, left: &Dim, right: &Dim, i: usize, j: usize) -> Result<Dim, InferError> {
        let difference = left - right;
        match (left.is_one(), right.is_one(), difference.as_const()) {
            (_, _, Some(0)) => Ok(left.clone()),
            (true, _, _) => Ok(right.clone()),
            (_, true, _) => Ok(left.clone()),
            (_, _, None) if difference.lower_bound().is_some_and(|low| low >= 0) => Ok(left.clone()),
            (_, _, None) if difference.upper_bound().is_some_and(|high| high <= 0) => Ok(right.clone()),
            _ => self.unify(left, right, i, j),
        }
    }

    /// The shape that inputs `i` and `j` broadcast to; `left` and `right` are (parts of) their shapes.
    pub(super) fn broadcast(&mut self, left: &[Dim], right: &[Dim], i: usize, j: usize) -> Result<Shape, InferError> {
        let rank = left.len().max(right.len());
        let at = |shape: &[Dim], k: usize| (k + shape.len()).checked_sub(rank).map(|k| shape[k].clone());
        (0..rank)
            .map(|k| match (at(left, k), at(right, k)) {
                (Some(a), Some(b)) => self.broadcast_dim(&a, &b, i, j),
                (Some(dim), None) | (None, Some(dim)) => Ok(dim),
                (None, None) => unreachable!("rank is the greater of the two"),
            })
            .collect()
    }

    /// An axis of input `i`, counted from the front.
    pub(super) fn axis_of(&self, i: usize, axis: i64) -> Result<usize, InferError> {
        self.axis_in(axis, self.input(i)?.shape.len())
    }

    pub(super) fn axis_in(&self, axis: i64, rank: usize) -> Result<usize, InferError> {
        let from_front = if axis < 0 {
            axis.saturating_add(rank as i64)
        } else {
            axis
        };
        let found = usize::try_from(from_front).ok().filter(|a| *a < rank);
        found.ok_or_else(|| self.error(format!("axis {axis} is not within its rank {rank}")))
    }

    /// Distinct axes from a constant input.
    pub(super) fn axes_in(&self, axes: &[i64], rank: usize) -> Result<BTreeSet<usize>, InferError> {
        let found: BTreeSet<usize> = axes.iter().map(|a| self.axis_in(*a, rank)).collect::<Result<_, _>>()?;
        if found.len() != axes.len() {
            return Err(self.error(format!("axes {axes:?} name one axis twice")));
        }
        Ok(found)
    }

    /// Numbers that must be known, as axes must.
    pub(super) fn required_consts(&self, i: usize, what: &str) -> Result<Vec<i64>, InferError> {
        let found = self.input(i)?.consts();
        found.ok_or_else(|| {
            let name = self.operand(i).name;
            self.error(format!("its {what}, {name:?}, are not constant"))
        })
    }

    /// A dim that cannot be known, named after output `output` of the node.
    pub(super) fn fresh(&self, output: usize, axis: usize) -> Dim {
        let value = self.node.output(output).or_else(|| self.node.output(0));
        let name = value.map_or(self.node.name.as_str(), |v| self.graph.value(v).name.as_str());
        Dim::named(format!("{name}.{axis}"))
    }

    pub(super) fn require_rank(&self, i: usize, least: usize) -> Result<(), InferError> {
        let operand = self.input(i)?;
        if operand.shape.len() < least {
            return Err(self.error(format!("{} needs {least} dimensions or more", self.operand(i))));
        }
        Ok(())
    }

    /// Output 0 has the type of an input.
    pub(super) fn like_input(&mut self, i: usize) -> Result<Outputs, InferError> {
        let input = self.input(i)?;
        one(Fact::new(input.dtype, input.shape.clone()))
    }
}
