//! Products, reductions and normalizations.

use super::elements;
use super::node::{NodeInference, Outputs, one};
use super::{Elements, Fact, InferError};
use crate::dim::Dim;
use crate::graph::op::{Binary, Op, Reduction};
use crate::tensor::DType;

impl NodeInference<'_> {
    /// The rules of [`Family::Product`](crate::graph::op::Family).
    pub(super) fn product_rule(&mut self) -> Result<Outputs, InferError> {
        match &self.node.op {
            Op::MatMul => self.matmul(false, false),
            Op::FusedMatMul { trans_a, trans_b, .. } => self.matmul(*trans_a, *trans_b),
            Op::Gemm { trans_a, trans_b, .. } => self.gemm(*trans_a, *trans_b),
            _ => self.no_rule(),
        }
    }

    /// The rules of [`Family::Normalization`](crate::graph::op::Family).
    pub(super) fn normalization_rule(&mut self) -> Result<Outputs, InferError> {
        match &self.node.op {
            Op::LayerNormalization { axis, .. } | Op::RmsNormalization { axis, .. } => self.normalization(*axis),
            Op::SkipRmsNormalization { .. } | Op::SkipLayerNormalization { .. } => self.skip_normalization(),
            _ => self.no_rule(),
        }
    }

    /// The rules of [`Family::Reduction`](crate::graph::op::Family).
    pub(super) fn reduction_rule(&mut self) -> Result<Outputs, InferError> {
        match &self.node.op {
            Op::Softmax { axis } | Op::LogSoftmax { axis } => {
                self.axis_of(0, *axis)?;
                self.like_input(0)
            }
            Op::Reduce {
                reduction,
                keepdims,
                noop_with_empty_axes,
            } => self.reduce(*reduction, *keepdims, *noop_with_empty_axes),
            Op::CumSum { exclusive, reverse } => self.cumsum(*exclusive, *reverse),
            _ => self.no_rule(),
        }
    }

    pub(super) fn matmul(&mut self, trans_a: bool, trans_b: bool) -> Result<Outputs, InferError> {
        self.require_rank(0, 1)?;
        self.require_rank(1, 1)?;
        let (a, b) = (self.input(0)?.clone(), self.input(1)?.clone());
        let (mut left, mut right) = (a.shape, b.shape);
        // A vector is a row on the left and a column on the right; its 1 is removed again below.
        let (row, column) = (left.len() == 1, right.len() == 1);
        if row {
            left.insert(0, Dim::constant(1));
        } else if trans_a {
            let n = left.len();
            left.swap(n - 1, n - 2);
        }
        if column {
            right.push(Dim::constant(1));
        } else if trans_b {
            let n = right.len();
            right.swap(n - 1, n - 2);
        }
        let (m, n) = (left.len() - 2, right.len() - 2);
        self.unify(&left[m + 1], &right[n], 0, 1)?;
        let mut shape = self.broadcast(&left[..m], &right[..n], 0, 1)?;
        if !row {
            shape.push(left[m].clone());
        }
        if !column {
            shape.push(right[n + 1].clone());
        }
        one(Fact::new(a.dtype, shape))
    }

    pub(super) fn gemm(&mut self, trans_a: bool, trans_b: bool) -> Result<Outputs, InferError> {
        let (a, b) = (self.input(0)?.clone(), self.input(1)?.clone());
        if a.shape.len() != 2 || b.shape.len() != 2 {
            return Err(self.error(format!("{} and {} are not matrices", self.operand(0), self.operand(1))));
        }
        let (m, k) = (usize::from(trans_a), usize::from(!trans_a));
        let (inner, n) = (usize::from(trans_b), usize::from(!trans_b));
        self.unify(&a.shape[k], &b.shape[inner], 0, 1)?;
        let mut shape = vec![a.shape[m].clone(), b.shape[n].clone()];
        if let Some(c) = self.optional(2).cloned() {
            shape = self.broadcast(&shape, &c.shape, 0, 2)?;
        }
        one(Fact::new(a.dtype, shape))
    }

    pub(super) fn reduce(
        &mut self,
        reduction: Reduction,
        keepdims: bool,
        noop_with_empty_axes: bool,
    ) -> Result<Outputs, InferError> {
        let x = self.input(0)?.clone();
        let rank = x.shape.len();
        let listed = match self.optional(1) {
            Some(_) => self.required_consts(1, "axes")?,
            None => Vec::new(),
        };
        let axes = match (listed.is_empty(), noop_with_empty_axes) {
            (true, true) => return one(Fact::new(x.dtype, x.shape)),
            (true, false) => (0..rank).collect(),
            (false, _) => self.axes_in(&listed, rank)?,
        };
        let dims = x.shape.iter().enumerate().filter_map(|(i, d)| match axes.contains(&i) {
            false => Some(d.clone()),
            true => keepdims.then(|| Dim::constant(1)),
        });
        let shape = dims.collect();
        let elements = if axes.len() == rank { total(reduction, &x) } else { None };
        one(Fact::new(x.dtype, shape).with(elements))
    }

    pub(super) fn cumsum(&mut self, exclusive: bool, reverse: bool) -> Result<Outputs, InferError> {
        let x = self.input(0)?;
        let elements = match &x.elements {
            Some(elements) if x.shape.len() == 1 && !exclusive && !reverse => {
                let mut sum = Some(Dim::default());
                let mut add = |e: &Option<Dim>| {
                    sum = Some(sum.as_ref()? + e.as_ref()?);
                    sum.clone()
                };
                Some(elements.iter().map(&mut add).collect::<Elements>())
            }
            _ => None,
        };
        one(Fact::new(x.dtype, x.shape.clone()).with(elements))
    }

    /// The scale must fit the normalized axes. In addition to the result: mean and inverse deviation, in fp32.
    pub(super) fn normalization(&mut self, axis: i64) -> Result<Outputs, InferError> {
        let (x, scale) = (self.input(0)?.clone(), self.input(1)?.clone());
        let axis = self.axis_of(0, axis)?;
        self.broadcast(&x.shape[axis..], &scale.shape, 0, 1)?;
        let mut statistics = x.shape.clone();
        statistics[axis..].fill(Dim::constant(1));
        let statistics = Some(Fact::new(DType::F32, statistics));
        Ok(vec![Some(Fact::new(x.dtype, x.shape)), statistics.clone(), statistics])
    }

    /// Result, mean, inverse deviation, and the sum of x and skip.
    pub(super) fn skip_normalization(&mut self) -> Result<Outputs, InferError> {
        self.require_rank(0, 1)?;
        let (x, skip, scale) = (self.input(0)?.clone(), self.input(1)?.clone(), self.input(2)?.clone());
        let shape = self.broadcast(&x.shape, &skip.shape, 0, 1)?;
        self.broadcast(&shape[shape.len() - 1..], &scale.shape, 0, 2)?;
        let mut statistics = shape.clone();
        statistics[shape.len() - 1] = Dim::constant(1);
        let statistics = Some(Fact::new(DType::F32, statistics));
        let result = Some(Fact::new(x.dtype, shape));
        Ok(vec![result.clone(), statistics.clone(), statistics, result])
    }
}

/// The only element of a full reduction.
fn total(reduction: Reduction, x: &Fact) -> Option<Elements> {
    let elements: Vec<&Dim> = x.elements.as_ref()?.iter().map(Option::as_ref).collect::<Option<_>>()?;
    let fold = |op: Binary, first: Dim, rest: &[&Dim]| {
        rest.iter()
            .try_fold(first, |sum, e| elements::binary(op, &sum, e, x.dtype))
    };
    let result = match reduction {
        Reduction::Sum => fold(Binary::Add, Dim::default(), &elements)?,
        Reduction::Prod => fold(Binary::Mul, Dim::constant(1), &elements)?,
        Reduction::Max => fold(Binary::Max, (*elements.first()?).clone(), &elements[1..])?,
        Reduction::Min => fold(Binary::Min, (*elements.first()?).clone(), &elements[1..])?,
        Reduction::Mean | Reduction::SumSquare | Reduction::LogSumExp => return None,
    };
    Some(vec![Some(result)])
}
