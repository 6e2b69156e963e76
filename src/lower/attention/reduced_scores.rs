//! Attention of one token whose scores are reductions.
//!
//! For a matrix product TensorRT transposes the keys first, which copies the cache in every layer. As
//! `sum(q * k)` over the head dim, the keys are read in place. The same for the values, `sum(p * v)` over the slots, was slower
//! than the product and its copy at every capacity (docs/explanation/gpu.md).

use super::MASKED;
use crate::lower::context::{Lowered, Lowering};
use crate::network::{Elementwise, LayerKind, MatrixOp, ReduceOp, Shape, TensorId};
use crate::tensor::DType;

impl Lowering<'_> {
    /// The layers, or `None` if this form does not apply: several tokens or sequences, a mask by head.
    pub(in crate::lower) fn reduced_attention(
        &mut self,
        name: &str,
        [q, k, v]: [TensorId; 3],
        mask: Option<TensorId>,
    ) -> Lowered<Option<TensorId>> {
        let shape = self.b.shape(q).clone();
        let Some((kv_heads, group)) = self.groups(&shape, k) else {
            return Ok(None);
        };
        let of_one = |mask: TensorId| {
            let shape = self.b.shape(mask);
            self.b.dtype(mask) == DType::Bool && shape[..3].iter().all(|dim| dim.is_one())
        };
        if !shape[0].is_one() || !shape[2].is_one() || !mask.is_none_or(of_one) {
            return Ok(None);
        }
        let part = |part: &str| format!("{name}/{part}");
        let dtype = self.b.dtype(q);
        let slots = self.b.shape(k)[2].clone();
        let (d, dv) = (shape[3].clone(), self.b.shape(v)[3].clone());
        let dims = |a: usize, b: usize, c: crate::dim::Dim, d| -> Shape { vec![a.into(), b.into(), c, d] };
        let q = self.reshape(&part("folded"), q, dims(kv_heads, group, 1usize.into(), d.clone()))?;
        let keys = self.reshape(&part("keys"), k, dims(kv_heads, 1, slots.clone(), d))?;
        let q = self.b.cast(&part("query/wide"), DType::F32, q)?;
        let keys = self.b.cast(&part("keys/wide"), DType::F32, keys)?;
        let terms = self.b.elementwise(&part("terms"), Elementwise::Prod, keys, q)?;
        let sum = LayerKind::Reduce {
            op: ReduceOp::Sum,
            axes: vec![3],
            keep_dims: true,
        };
        let scores = self.b.add(&part("scores"), sum, &[terms])?;
        let flat = vec![kv_heads.into(), group.into(), slots.clone()];
        let mut scores = self.reshape(&part("scores/flat"), scores, flat)?;
        if let Some(mask) = mask {
            let mask = self.reshape(&part("mask"), mask, vec![1usize.into(), 1usize.into(), slots.clone()])?;
            let never = self.number(DType::F32, 3, MASKED)?;
            scores = self.b.add(&part("masked"), LayerKind::Select, &[mask, scores, never])?;
        }
        let weights = self
            .b
            .add(&part("softmax"), LayerKind::Softmax { axis: 2 }, &[scores])?;
        let weights = self.b.cast(&part("softmax/narrow"), dtype, weights)?;
        let values = self.reshape(&part("values"), v, vec![kv_heads.into(), slots, dv.clone()])?;
        let product = LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b: MatrixOp::None,
        };
        let attended = self.b.add(&part("attended"), product, &[weights, values])?;
        let mut to = shape;
        to[3] = dv;
        self.reshape(name, attended, to).map(Some)
    }
}
