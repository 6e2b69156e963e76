//! Operators that TensorRT's ONNX parser supports and ModelOpt writes, domain `trt`: quantization to codes whose types
//! ONNX did not have at that time. Their meaning is that of ONNX's `QuantizeLinear` and `DequantizeLinear` without zero
//! points (`QuantDequantLinearHelper` in <https://github.com/onnx/onnx-tensorrt/blob/main/onnxOpImporters.cpp>); the
//! codes' type is in the operator's name, and the shapes of codes and scales give the block.

use super::quantized::viewed;
use super::{Failure, Replacement, SourceNode};
use crate::graph::Constant;
use crate::graph::op::Op;
use crate::tensor::DType;
use crate::tensor::quantized::Granularity;

/// The domain.
pub(super) const TENSORRT: &str = "trt";

impl SourceNode<'_> {
    pub(super) fn tensorrt_operator(&self) -> Result<Replacement, Failure> {
        match self.op_type {
            "TRT_FP8QuantizeLinear" => self.quantized_for_tensorrt(DType::F8E4M3Fn),
            "TRT_INT8QuantizeLinear" => self.quantized_for_tensorrt(DType::I8),
            "TRT_INT4QuantizeLinear" => self.quantized_for_tensorrt(DType::I4),
            "TRT_FP8DequantizeLinear" => self.dequantized_for_tensorrt(DType::F8E4M3Fn),
            "TRT_INT8DequantizeLinear" => self.dequantized_for_tensorrt(DType::I8),
            "TRT_INT4DequantizeLinear" => self.dequantized_for_tensorrt(DType::I4),
            _ => Ok(Replacement::Unknown(None)),
        }
    }

    fn quantized_for_tensorrt(&self, to: DType) -> Result<Replacement, Failure> {
        let (axis, size) = self.axis_and_block()?;
        let (Some(values), Some(scales)) = (self.constant_input(0), self.constant_input(1)) else {
            return of_activations(
                size,
                Op::QuantizeLinear {
                    axis,
                    block_size: 0,
                    to,
                },
            );
        };
        let granularity = granularity_of(values.shape(), &scales, axis, size)?;
        Ok(Replacement::Constant(values.quantize(to, scales, None, granularity)?))
    }

    fn dequantized_for_tensorrt(&self, from: DType) -> Result<Replacement, Failure> {
        let (axis, size) = self.axis_and_block()?;
        let (Some(codes), Some(scales)) = (self.constant_input(0), self.constant_input(1)) else {
            return of_activations(size, Op::DequantizeLinear { axis, block_size: 0 });
        };
        let codes = viewed(&codes, from, codes.shape().to_vec(), "codes")?;
        let granularity = granularity_of(codes.shape(), &scales, axis, size)?;
        let constant = Constant::quantized(codes, scales, None, granularity)?;
        Ok(Replacement::Constant(constant))
    }

    /// Common to both kinds: the axis, the size of a block or 0, and no zero points.
    fn axis_and_block(&self) -> Result<(i64, usize), Failure> {
        self.without_zero_points()?;
        let axis = self.attributes.int("axis")?.unwrap_or(1);
        Ok((axis, self.attributes.count("block_size")?.unwrap_or(0)))
    }

    fn without_zero_points(&self) -> Result<(), Failure> {
        match self.constant_input(2) {
            None if self.inputs.get(2).copied().flatten().is_none() => Ok(()),
            Some(zeros)
                if zeros
                    .materialize()
                    .is_ok_and(|zeros| zeros.to_f64().iter().all(|z| *z == 0.0)) =>
            {
                Ok(())
            }
            _ => Err(Failure::Unsupported("zero points".to_string())),
        }
    }
}

/// The operator on a value that is not a constant.
fn of_activations(size: usize, op: Op) -> Result<Replacement, Failure> {
    match size {
        0 => Ok(Replacement::Op(op)),
        _ => Err(Failure::Unsupported("blocks of activations".to_string())),
    }
}

/// Scales with as many axes as the codes have are block scales, on the axis on which the two differ; `size` is the
/// node's block size, or 0.
fn granularity_of(shape: &[usize], scales: &Constant, axis: i64, size: usize) -> Result<Granularity, Failure> {
    let of = scales.shape();
    let problem = |what: &str| Failure::Problem(format!("{what}: codes are {shape:?}, scales {of:?}"));
    if of.len() != shape.len() || shape.len() < 2 {
        if size != 0 {
            return Err(problem("it has a block_size, but its scales are not block scales"));
        }
        return Granularity::of_attributes(shape.len(), axis, 0, of).ok_or_else(|| problem("its axis does not exist"));
    }
    let mut differing = (0..shape.len()).filter(|i| shape[*i] != of[*i]);
    let (Some(axis), None) = (differing.next(), differing.next()) else {
        return Err(problem("its scales do not match blocks along one axis"));
    };
    match shape[axis].checked_div(of[axis]) {
        Some(found) if found * of[axis] == shape[axis] && (size == 0 || size == found) => {
            Ok(Granularity::Block { axis, size: found })
        }
        _ => Err(problem("its blocks do not divide")),
    }
}
