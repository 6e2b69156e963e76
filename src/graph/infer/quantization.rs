//! Quantization and dequantization.

use super::node::{NodeInference, Outputs, one};
use super::{Fact, InferError};
use crate::graph::op::Op;
use crate::tensor::DType;

impl NodeInference<'_> {
    /// The rules of [`Family::Quantization`](crate::graph::op::Family).
    pub(super) fn quantization_rule(&mut self) -> Result<Outputs, InferError> {
        match &self.node.op {
            Op::QuantizeLinear { to, .. } => self.like_input_as(*to),
            Op::DequantizeLinear { .. } => {
                let dtype = self.input(1)?.dtype;
                self.like_input_as(dtype)
            }
            Op::DynamicQuantizeLinear => {
                let codes = self.like_input_as(DType::U8)?;
                let scalar = |dtype| Some(Fact::new(dtype, Vec::new()));
                Ok([codes, vec![scalar(DType::F32), scalar(DType::U8)]].concat())
            }
            Op::MatMulInteger => {
                let mut outputs = self.matmul(false, false)?;
                for fact in outputs.iter_mut().flatten() {
                    fact.dtype = DType::I32;
                }
                Ok(outputs)
            }
            _ => self.no_rule(),
        }
    }

    /// The shape of input 0 with another dtype; its elements are unknown.
    fn like_input_as(&self, dtype: DType) -> Result<Outputs, InferError> {
        one(Fact::new(dtype, self.input(0)?.shape.clone()))
    }
}
