//! One node: selects the rule of its family, and gives rules access to operands and equations.

use std::collections::BTreeSet;

use super::{Fact, InferError, Operand};
use crate::dim::{Dim, Unifier};
use crate::graph::op::{Family, TypeRule};
use crate::graph::{Graph, Node, Shape};
use crate::tensor::DType;

/// One node with what is known about its inputs.
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

/// The message of `no_rule`; a test looks for operators with this message.
pub(in crate::graph) const NO_RULE: &str = "its types have no rule; this is a bug in Lapidary";

impl NodeInference<'_> {
    /// The types of the outputs, by the rule in the operator's table entry or of its family.
    pub(super) fn rule(&mut self) -> Result<Outputs, InferError> {
        let info = self.node.op.info();
        if info.types == TypeRule::LikeInput {
            return self.like_input(0);
        }
        match info.family {
            Family::Elementwise => self.elementwise_rule(),
            Family::Reduction => self.reduction_rule(),
            Family::Product => self.product_rule(),
            Family::Normalization => self.normalization_rule(),
            Family::Movement => self.movement_rule(),
            Family::Indexing => self.indexing_rule(),
            Family::Selection => self.selection_rule(),
            Family::Attention => self.attention_rule(),
            Family::Experts => self.experts_rule(),
            Family::Quantization => self.quantization_rule(),
            Family::Unknown => Ok(Vec::new()),
        }
    }

    /// For an operator that its family's rules do not list.
    pub(super) fn no_rule(&self) -> Result<Outputs, InferError> {
        Err(self.error(NO_RULE))
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

    /// Two dims of a broadcast: equal, unless one of them is 1.
    ///
    /// `tokens` with `past + tokens` is not an equation (it would make `past` 0): such an export works for one token or
    /// for no past, and the result is the greater of the two in both cases.
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

    /// Numbers that must be known, such as axes.
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
