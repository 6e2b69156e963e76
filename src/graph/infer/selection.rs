//! Operators that choose elements by their value.

use super::node::{NodeInference, Outputs, one};
use super::{Elements, Fact, InferError, MAX_CONTENTS};
use crate::dim::Dim;
use crate::graph::op::Op;
use crate::tensor::DType;

impl NodeInference<'_> {
    /// The rules of [`Family::Selection`](crate::graph::op::Family).
    pub(super) fn selection_rule(&mut self) -> Result<Outputs, InferError> {
        match &self.node.op {
            Op::TopK { axis, .. } => self.top_k(*axis),
            Op::ArgMax { axis, keepdims, .. } => self.arg_max(*axis, *keepdims),
            Op::NonZero => {
                let rank = self.input(0)?.shape.len();
                one(Fact::new(DType::I64, vec![Dim::from(rank), self.fresh(0, 1)]))
            }
            Op::OneHot { axis } => self.one_hot(*axis),
            _ => self.no_rule(),
        }
    }

    fn top_k(&mut self, axis: i64) -> Result<Outputs, InferError> {
        let axis = self.axis_of(0, axis)?;
        let x = self.input(0)?.clone();
        let k = self
            .input(1)?
            .elements
            .as_ref()
            .and_then(|e| e.first().cloned())
            .flatten();
        let k = match k {
            Some(k) => k,
            None => self.fresh(0, axis),
        };
        if let (Some(chosen), Some(all)) = (k.as_const(), x.shape[axis].as_const())
            && !(0..=all).contains(&chosen)
        {
            return Err(self.error(format!("it takes the {chosen} greatest of {all}")));
        }
        let mut shape = x.shape;
        shape[axis] = k;
        Ok(vec![
            Some(Fact::new(x.dtype, shape.clone())),
            Some(Fact::new(DType::I64, shape)),
        ])
    }

    fn arg_max(&mut self, axis: i64, keepdims: bool) -> Result<Outputs, InferError> {
        let axis = self.axis_of(0, axis)?;
        let mut shape = self.input(0)?.shape.clone();
        match keepdims {
            true => shape[axis] = Dim::constant(1),
            false => drop(shape.remove(axis)),
        }
        one(Fact::new(DType::I64, shape))
    }

    fn one_hot(&mut self, axis: i64) -> Result<Outputs, InferError> {
        let mut shape = self.input(0)?.shape.clone();
        let axis = self.axis_in(axis, shape.len() + 1)?;
        let depth = self
            .input(1)?
            .elements
            .as_ref()
            .and_then(|e| e.first().cloned())
            .flatten();
        let depth = match depth {
            Some(depth) => depth,
            None => self.fresh(0, axis),
        };
        shape.insert(axis, depth.clone());
        let elements = match (axis + 1 == shape.len(), depth.as_const()) {
            (true, Some(depth)) => self.one_hot_elements(depth)?,
            _ => None,
        };
        one(Fact::new(self.input(2)?.dtype, shape).with(elements))
    }

    /// The elements of a `OneHot` over the last axis, of known indices: TorchScript makes repeats of one axis this way.
    fn one_hot_elements(&mut self, depth: i64) -> Result<Option<Elements>, InferError> {
        let (indices, values) = (self.input(0)?.consts(), self.input(2)?.elements.clone());
        let (Some(indices), Some(values), true) = (indices, values, (0..=MAX_CONTENTS as i64).contains(&depth)) else {
            return Ok(None);
        };
        let [off, on] = &values[..] else { return Ok(None) };
        let row = |index: i64| {
            let index = if index < 0 { index + depth } else { index };
            (0..depth).map(move |place| if place == index { on.clone() } else { off.clone() })
        };
        Ok(Some(indices.into_iter().flat_map(row).collect()))
    }
}
