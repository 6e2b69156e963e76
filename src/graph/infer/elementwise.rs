//! Operators that work element by element, with broadcasting.

use super::elements;
use super::node::{NodeInference, Outputs, one};
use super::{Elements, Fact, InferError};
use crate::dim::Dim;
use crate::graph::op::{Binary, Op, Unary};
use crate::tensor::DType;

impl NodeInference<'_> {
    /// The rules of [`Family::Elementwise`](crate::graph::op::Family).
    pub(super) fn elementwise_rule(&mut self) -> Result<Outputs, InferError> {
        match &self.node.op {
            Op::Unary(op) => self.unary(*op),
            Op::Binary(op) => self.binary(*op),
            Op::Cast { to } => self.cast(*to),
            Op::CastLike => self.cast(self.input(1)?.dtype),
            Op::Where => self.select(),
            Op::Identity => one(self.input(0)?.clone()),
            Op::Clip => self.clip(),
            _ => self.no_rule(),
        }
    }

    pub(super) fn unary(&mut self, op: Unary) -> Result<Outputs, InferError> {
        let x = self.input(0)?;
        let dtype = match op {
            Unary::IsNan | Unary::Not => DType::Bool,
            _ => x.dtype,
        };
        let of = |e: &Option<Dim>| elements::unary(op, e.as_ref()?, x.dtype);
        let elements = x.elements.as_ref().map(|e| e.iter().map(of).collect());
        one(Fact::new(dtype, x.shape.clone()).with(elements))
    }

    pub(super) fn binary(&mut self, op: Binary) -> Result<Outputs, InferError> {
        let (a, b) = (self.input(0)?.clone(), self.input(1)?.clone());
        let shape = self.broadcast(&a.shape, &b.shape, 0, 1)?;
        let dtype = if op.is_predicate() { DType::Bool } else { a.dtype };
        let elements = || -> Option<Elements> {
            let (left, right) = (spread(&a, &shape)?, spread(&b, &shape)?);
            let pairs = left.iter().zip(&right);
            let of = |(x, y): (&Option<Dim>, &Option<Dim>)| elements::binary(op, x.as_ref()?, y.as_ref()?, a.dtype);
            Some(pairs.map(of).collect())
        };
        let elements = elements();
        one(Fact::new(dtype, shape).with(elements))
    }

    pub(super) fn cast(&mut self, to: DType) -> Result<Outputs, InferError> {
        let x = self.input(0)?;
        let of = |e: &Option<Dim>| elements::cast(e.as_ref()?, to);
        let elements = x.elements.as_ref().map(|e| e.iter().map(of).collect());
        one(Fact::new(to, x.shape.clone()).with(elements))
    }

    /// `Where`: condition, then, else.
    pub(super) fn select(&mut self) -> Result<Outputs, InferError> {
        let [condition, yes, no] = [self.input(0)?.clone(), self.input(1)?.clone(), self.input(2)?.clone()];
        let shape = self.broadcast(&yes.shape, &no.shape, 1, 2)?;
        let shape = self.broadcast(&condition.shape, &shape, 0, 1)?;
        let elements = || -> Option<Elements> {
            // A branch may be unknown where the other is selected.
            let unknown = |fact: &Fact| spread(fact, &shape).or_else(|| Some(vec![None; elements::volume(&shape)?]));
            let (c, y, n) = (unknown(&condition)?, unknown(&yes)?, unknown(&no)?);
            let pick = |i: usize| match c[i].as_ref().and_then(Dim::as_const) {
                Some(0) => n[i].clone(),
                Some(_) => y[i].clone(),
                None if y[i] == n[i] => y[i].clone(),
                None => None,
            };
            Some((0..c.len()).map(pick).collect())
        };
        let elements = elements();
        one(Fact::new(yes.dtype, shape).with(elements))
    }

    pub(super) fn clip(&mut self) -> Result<Outputs, InferError> {
        let x = self.input(0)?;
        let bound = |i: usize, op: Binary, elements: Option<Elements>| match self.node.input(i) {
            None => elements,
            Some(_) => {
                let bound = self.optional(i)?.single()?;
                let of = |e: &Option<Dim>| elements::binary(op, e.as_ref()?, bound, x.dtype);
                elements.map(|e| e.iter().map(of).collect())
            }
        };
        let elements = bound(2, Binary::Min, bound(1, Binary::Max, x.elements.clone()));
        one(Fact::new(x.dtype, x.shape.clone()).with(elements))
    }
}

/// The elements of a fact, broadcast to a shape.
pub(super) fn spread(fact: &Fact, shape: &[Dim]) -> Option<Elements> {
    let elements = fact.elements.as_ref()?;
    Some(elements::pick(
        elements,
        elements::broadcast_indices(&fact.shape, shape)?,
    ))
}
