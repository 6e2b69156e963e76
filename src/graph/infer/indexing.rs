//! Operators that read or write at given indices.

use super::elements;
use super::node::{NodeInference, Outputs, one};
use super::{Elements, Fact, InferError};
use crate::dim::Dim;
use crate::graph::op::{Op, ScatterMode};

impl NodeInference<'_> {
    /// The rules of [`Family::Indexing`](crate::graph::op::Family).
    pub(super) fn indexing_rule(&mut self) -> Result<Outputs, InferError> {
        match &self.node.op {
            Op::Gather { axis } => self.gather(*axis),
            Op::GatherElements { axis } => self.gather_elements(*axis),
            Op::GatherNd { batch_dims } => self.gather_nd(*batch_dims),
            Op::ScatterNd { mode } => self.scatter_nd(*mode),
            Op::ScatterElements { axis, mode } => self.scatter_elements(*axis, *mode),
            Op::TensorScatter { axis, .. } => self.tensor_scatter(*axis),
            _ => self.no_rule(),
        }
    }

    pub(super) fn gather(&mut self, axis: i64) -> Result<Outputs, InferError> {
        let (x, index) = (self.input(0)?, self.input(1)?);
        let axis = self.axis_of(0, axis)?;
        let mut shape = x.shape[..axis].to_vec();
        shape.extend(index.shape.iter().cloned());
        shape.extend(x.shape[axis + 1..].iter().cloned());
        let elements = || -> Option<Elements> {
            let e = x.elements.as_ref().filter(|_| axis == 0)?;
            let inner = elements::volume(&x.shape[1..])?;
            let rows = x.shape[0].as_const()?;
            let mut out = Elements::new();
            for i in index.elements.as_ref()? {
                let i = i.as_ref().and_then(Dim::as_const);
                let row = i.and_then(|i| usize::try_from(if i < 0 { i.saturating_add(rows) } else { i }).ok());
                match row.and_then(|row| row.checked_mul(inner)) {
                    Some(first) => out.extend(elements::pick(e, first..first.saturating_add(inner))),
                    None => out.extend(std::iter::repeat_n(None, inner)),
                }
            }
            Some(out)
        };
        one(Fact::new(x.dtype, shape).with(elements()))
    }

    pub(super) fn gather_elements(&mut self, axis: i64) -> Result<Outputs, InferError> {
        self.axis_of(0, axis)?;
        let (x, index) = (self.input(0)?, self.input(1)?);
        one(Fact::new(x.dtype, index.shape.clone()))
    }

    pub(super) fn gather_nd(&mut self, batch_dims: usize) -> Result<Outputs, InferError> {
        let (x, index) = (self.input(0)?.clone(), self.input(1)?.clone());
        let depth = index.shape.last().and_then(Dim::as_const);
        let depth = depth.and_then(|d| usize::try_from(d).ok());
        let depth = depth.filter(|d| d.checked_add(batch_dims).is_some_and(|n| n <= x.shape.len()));
        let Some(depth) = depth.filter(|_| batch_dims < index.shape.len()) else {
            let (left, right) = (self.operand(0), self.operand(1));
            return Err(self.error(format!(
                "{right} does not index {left} with {batch_dims} batch dimensions"
            )));
        };
        let mut shape = index.shape[..index.shape.len() - 1].to_vec();
        for k in 0..batch_dims {
            shape[k] = self.unify(&x.shape[k], &index.shape[k], 0, 1)?;
        }
        shape.extend(x.shape[batch_dims + depth..].iter().cloned());
        one(Fact::new(x.dtype, shape))
    }

    pub(super) fn scatter_nd(&mut self, mode: ScatterMode) -> Result<Outputs, InferError> {
        let (x, index, update) = (self.input(0)?.clone(), self.input(1)?.clone(), self.input(2)?.clone());
        let depth = index.shape.last().and_then(Dim::as_const);
        let depth = depth
            .and_then(|d| usize::try_from(d).ok())
            .filter(|d| *d <= x.shape.len());
        if let Some(depth) = depth {
            // Updates: the indices' shape without its last dim, then the dims of the data that an index does not
            // address.
            let mut wanted = index.shape[..index.shape.len() - 1].to_vec();
            wanted.extend(x.shape[depth..].iter().cloned());
            if wanted.len() != update.shape.len() {
                return Err(self.error(format!("{} is not of the shape {wanted:?}", self.operand(2))));
            }
            for (dim, wanted) in update.shape.iter().zip(&wanted) {
                self.unify(dim, wanted, 2, 1)?;
            }
        }
        let elements = self.scattered(&x, &index, &update, mode);
        one(Fact::new(x.dtype, x.shape).with(elements))
    }

    pub(super) fn scatter_elements(&mut self, axis: i64, mode: ScatterMode) -> Result<Outputs, InferError> {
        self.axis_of(0, axis)?;
        let (x, index, update) = (self.input(0)?.clone(), self.input(1)?.clone(), self.input(2)?.clone());
        if index.shape.len() != x.shape.len() || update.shape.len() != x.shape.len() {
            let (data, index) = (self.operand(0), self.operand(1));
            return Err(self.error(format!("{index} and {} have another rank than {data}", self.operand(2))));
        }
        for (a, b) in index.shape.iter().zip(&update.shape) {
            self.unify(a, b, 1, 2)?;
        }
        let elements = self.scattered(&x, &index, &update, mode);
        one(Fact::new(x.dtype, x.shape).with(elements))
    }

    /// Writes into a vector, as TorchScript does to set a length in a shape.
    fn scattered(&self, x: &Fact, index: &Fact, update: &Fact, mode: ScatterMode) -> Option<Elements> {
        let mut elements = x
            .elements
            .clone()
            .filter(|_| x.shape.len() == 1 && mode == ScatterMode::Replace)?;
        let size = elements.len() as i64;
        let indices = index.consts()?;
        let updates = update.elements.as_ref().filter(|u| u.len() == indices.len())?;
        for (i, update) in indices.into_iter().zip(updates) {
            let at = usize::try_from(if i < 0 { i.saturating_add(size) } else { i }).ok()?;
            *elements.get_mut(at)? = update.clone();
        }
        Some(elements)
    }

    /// The update matches the cache on every axis except the one it is written along.
    pub(super) fn tensor_scatter(&mut self, axis: i64) -> Result<Outputs, InferError> {
        let (cache, update) = (self.input(0)?.clone(), self.input(1)?.clone());
        let axis = self.axis_of(0, axis)?;
        if update.shape.len() != cache.shape.len() {
            let (cache, update) = (self.operand(0), self.operand(1));
            return Err(self.error(format!("{cache} and {update} have different ranks")));
        }
        let mut shape = cache.shape.clone();
        for k in (0..shape.len()).filter(|k| *k != axis) {
            shape[k] = self.unify(&cache.shape[k], &update.shape[k], 0, 1)?;
        }
        if let Some(indices) = self.optional(2).cloned()
            && let [batch] = indices.shape.as_slice()
        {
            self.unify(&shape[0], batch, 0, 2)?;
        }
        one(Fact::new(cache.dtype, shape))
    }
}
