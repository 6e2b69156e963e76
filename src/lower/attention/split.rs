//! Attention of one token over a long cache, with the cache cut into parts that are read in parallel.
//!
//! TensorRT's attention kernel uses one multiprocessor per KV head for one token: a few of more than a hundred. As
//! single layers over `[kv_heads, parts, slots / parts, d]` there are `parts` times as many pieces. The softmax is over
//! all parts at once, in fp32, so partial sums need no correction.

use super::MASKED;
use crate::dim::Dim;
use crate::lower::context::{Lowered, Lowering};
use crate::network::{Elementwise, LayerKind, MatrixOp, ReduceOp, Shape, TensorId, UnaryOp};
use crate::tensor::DType;

impl Lowering<'_> {
    /// The layers, or `None` if this form does not apply: several tokens, a mask by head, slots that do not divide.
    pub(in crate::lower) fn split_attention(
        &mut self,
        name: &str,
        [q, k, v]: [TensorId; 3],
        mask: Option<TensorId>,
        parts: usize,
    ) -> Lowered<Option<TensorId>> {
        let shape = self.b.shape(q).clone();
        let number = |dim: &Dim| dim.as_const().and_then(|n| usize::try_from(n).ok());
        let (Some((kv_heads, group)), Some(batch)) = (self.groups(&shape, k), number(&shape[0])) else {
            return Ok(None);
        };
        let Some(slots) = number(&self.b.shape(k)[2]) else {
            return Ok(None);
        };
        let mask_fits = mask.is_none_or(|mask| {
            let shape = self.b.shape(mask);
            self.b.dtype(mask) == DType::Bool && shape[1].is_one() && shape[2].is_one() && shape[0].is_one()
        });
        // Fewer parts if there are not enough slots for all.
        let parts = (1..=parts).rev().find(|p| slots.is_multiple_of(*p) && slots / p >= 32);
        let (Some(parts), true, true) = (parts, shape[2].is_one(), mask_fits) else {
            return Ok(None);
        };
        let part = |part: &str| format!("{name}/{part}");
        let (rows, dtype) = (batch * kv_heads, self.b.dtype(q));
        let width = |x: TensorId, b: &crate::network::NetworkBuilder| b.shape(x)[3].clone();
        let (d, dv) = (width(q, &self.b), width(v, &self.b));
        let dims = |a: usize, b: usize, c: usize, d: Dim| -> Shape { vec![a.into(), b.into(), c.into(), d] };
        let product = |op_b| LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b,
        };
        let q = self.reshape(&part("folded"), q, dims(rows, 1, group, d.clone()))?;
        let k = self.reshape(&part("key_parts"), k, dims(rows, parts, slots / parts, d))?;
        let v = self.reshape(&part("value_parts"), v, dims(rows, parts, slots / parts, dv.clone()))?;
        let scores = self.b.add(&part("scores"), product(MatrixOp::Transpose), &[q, k])?;
        let mut scores = self.b.cast(&part("scores/wide"), DType::F32, scores)?;
        if let Some(mask) = mask {
            let of_parts = dims(1, parts, 1, (slots / parts).into());
            let mask = self.reshape(&part("mask"), mask, of_parts)?;
            let never = self.number(DType::F32, 4, MASKED)?;
            scores = self.b.add(&part("masked"), LayerKind::Select, &[mask, scores, never])?;
        }
        let reduced = |op, axes: &[usize]| LayerKind::Reduce {
            op,
            axes: axes.to_vec(),
            keep_dims: true,
        };
        let largest = self
            .b
            .add(&part("largest"), reduced(ReduceOp::Max, &[1, 3]), &[scores])?;
        let below = self.b.elementwise(&part("below"), Elementwise::Sub, scores, largest)?;
        let weights = self.b.unary(&part("exp"), UnaryOp::Exp, below)?;
        let sum = self.b.add(&part("sum"), reduced(ReduceOp::Sum, &[1, 3]), &[weights])?;
        let weights = self.b.cast(&part("exp/narrow"), dtype, weights)?;
        let of_parts = self.b.add(&part("attended"), product(MatrixOp::None), &[weights, v])?;
        let of_parts = self.b.cast(&part("attended/wide"), DType::F32, of_parts)?;
        let attended = self
            .b
            .add(&part("joined_parts"), reduced(ReduceOp::Sum, &[1]), &[of_parts])?;
        let attended = self
            .b
            .elementwise(&part("normalized"), Elementwise::Div, attended, sum)?;
        let attended = self.b.cast(&part("narrow"), dtype, attended)?;
        let mut to = shape;
        to[3] = dv;
        self.reshape(name, attended, to).map(Some)
    }
}
