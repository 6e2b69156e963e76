//! RMSNorm and LayerNorm, both in fp32 whatever the model's dtype.
//!
//! TensorRT has no RMSNorm layer; it fuses this chain into one kernel, and the CPU executor recognizes it: Cast(f32) →
//! Prod(x, x) → Reduce(Avg) → Sum(ε) → Sqrt → Div(x, ·) → Cast(back) → Prod(scale). The casts are omitted if the model
//! is fp32.

use super::context::{Lowered, Lowering, one};
use super::dispatch::no_lowering;
use crate::dim::Dim;
use crate::graph::{Node, Op};
use crate::network::{Elementwise, LayerKind, ReduceOp, TensorId, UnaryOp};
use crate::tensor::{DType, Tensor};

impl Lowering<'_> {
    /// The operators of [`Family::Normalization`](crate::graph::op::Family::Normalization).
    pub(super) fn normalization_node(&mut self, node: &Node, name: &str) -> Lowered {
        match &node.op {
            Op::LayerNormalization { axis, epsilon } => self.layer_norm(node, name, *axis, *epsilon),
            Op::RmsNormalization { axis, epsilon } => self.rms_norm(node, name, *axis, *epsilon),
            _ => no_lowering(node),
        }
    }

    pub(super) fn rms_norm(&mut self, node: &Node, name: &str, axis: i64, epsilon: f32) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let x = self.data(node, 0)?;
        let rank = self.b.rank(x);
        let axes: Vec<usize> = (self.axis(axis, rank)?..rank).collect();
        let wide = self.b.cast(&part("wide"), DType::F32, x)?;
        let square = self.b.elementwise(&part("square"), Elementwise::Prod, wide, wide)?;
        let mean = LayerKind::Reduce {
            op: ReduceOp::Avg,
            axes,
            keep_dims: true,
        };
        let mean = self.b.add(&part("mean"), mean, &[square])?;
        let epsilon = self.number(DType::F32, rank, f64::from(epsilon))?;
        let shifted = self.b.elementwise(&part("shifted"), Elementwise::Sum, mean, epsilon)?;
        let root = self.b.unary(&part("root"), UnaryOp::Sqrt, shifted)?;
        let normal = self.b.elementwise(&part("normal"), Elementwise::Div, wide, root)?;
        // ONNX: the result has the scale's dtype.
        let scale = self.operand(node, 1, rank)?;
        let normal = self.b.cast(&part("narrow"), self.b.dtype(scale), normal)?;
        Ok(self.b.elementwise(name, Elementwise::Prod, normal, scale)?)
    }

    pub(super) fn layer_norm(&mut self, node: &Node, name: &str, axis: i64, epsilon: f32) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let x = self.data(node, 0)?;
        let (dtype, shape) = (self.b.dtype(x), self.b.shape(x).clone());
        let rank = shape.len();
        let axis = self.axis(axis, rank)?;
        let axes: Vec<usize> = (axis..rank).collect();
        let wide = self.b.cast(&part("wide"), DType::F32, x)?;
        // The layer requires scale and bias in full, with 1 on every other axis.
        let mut full = vec![one(); axis];
        full.extend(shape[axis..].iter().cloned());
        let scale = self.norm_parameter(node, 1, &part("scale"), &full, 1.0)?;
        let bias = self.norm_parameter(node, 2, &part("bias"), &full, 0.0)?;
        let kind = LayerKind::Normalization { axes, epsilon };
        let normal = self.b.add(&part("normal"), kind, &[wide, scale, bias])?;
        Ok(self.b.cast(name, dtype, normal)?)
    }

    fn norm_parameter(&mut self, node: &Node, i: usize, name: &str, full: &[Dim], default: f64) -> Lowered<TensorId> {
        if node.input(i).is_some() {
            let given = self.operand(node, i, full.len())?;
            let wide = self.b.cast(&format!("{name}/wide"), DType::F32, given)?;
            return self.expanded(name, wide, full);
        }
        let sizes: Option<Vec<usize>> = full.iter().map(|d| d.as_const().map(|n| n as usize)).collect();
        match sizes {
            Some(shape) => {
                let values = vec![default as f32; shape.iter().product()];
                Ok(self.b.constant(name, Tensor::from_f32(shape, &values))?)
            }
            None => super::error::Reason::unsupported("it normalizes an axis whose size is not a number"),
        }
    }
}
