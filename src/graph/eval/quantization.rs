//! Quantization and dequantization: <https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html> and related operators.
//! The arithmetic is that of [`crate::tensor::quantized`].

use super::array::{Result, floats};
use super::elementwise::{binary, cast};
use super::error::shape_error;
use super::linear::matmul;
use super::{Operands, no_evaluator};
use crate::graph::op::{Binary, Op, Rounding};
use crate::tensor::quantized::{Granularity, dequantize, quantize};
use crate::tensor::{DType, Tensor};

/// The operators of this family.
pub(super) fn eval(op: &Op, operands: &Operands) -> Result<Vec<Option<Tensor>>> {
    let (need, maybe) = (|i| operands.need(i), |i| operands.maybe(i));
    Ok(match op {
        Op::QuantizeLinear {
            axis: on,
            block_size,
            to,
        } => {
            let (x, scales) = (need(0)?, need(1)?);
            let how = granularity(x, scales, *on, *block_size)?;
            let x = if x.dtype().is_float() {
                x.clone()
            } else {
                cast(x, DType::F32)
            };
            checked(*to, x.shape(), scales, maybe(2), how)?;
            vec![Some(quantize(*to, &x, scales, maybe(2), how))]
        }
        Op::DequantizeLinear { axis: on, block_size } => {
            let (codes, scales) = (need(0)?, need(1)?);
            let how = granularity(codes, scales, *on, *block_size)?;
            checked(codes.dtype(), codes.shape(), scales, maybe(2), how)?;
            vec![Some(dequantize(codes, scales, maybe(2), how))]
        }
        Op::DynamicQuantizeLinear => {
            let x = need(0)?;
            let values = x.to_f32();
            let Range { scale, zero_point } = Range::of(&values);
            let codes: Vec<i64> = values.iter().map(|v| code(*v, scale, zero_point)).collect();
            vec![
                Some(Tensor::from_i64_as(DType::U8, x.shape().to_vec(), &codes)),
                Some(Tensor::from_f32(Vec::new(), &[scale])),
                Some(Tensor::from_i64_as(DType::U8, Vec::new(), &[zero_point])),
            ]
        }
        Op::MatMulInteger => {
            let less = |codes: &Tensor, zero: Option<&Tensor>, rows: bool| -> Result<Tensor> {
                let wide = cast(codes, DType::I32);
                let Some(zero) = zero else {
                    return Ok(wide);
                };
                let mut zero = cast(zero, DType::I32);
                // A zero point for each row of a.
                if rows && zero.shape().len() == 1 && zero.len() > 1 {
                    let shape = vec![zero.len(), 1];
                    zero = zero.reshaped(shape).map_err(|e| shape_error(e.to_string()))?;
                }
                binary(Binary::Sub, &wide, &zero)
            };
            let (a, b) = (less(need(0)?, maybe(2), true)?, less(need(1)?, maybe(3), false)?);
            vec![Some(matmul(&a, &b)?)]
        }
        Op::RoundToCodes { to, scale, zero_point } => {
            let (to, scale, zero_point) = (*to, *scale, *zero_point);
            vec![Some(round_to_codes(need(0)?, Rounding { to, scale, zero_point }))]
        }
        Op::DynamicRoundToCodes => vec![Some(dynamic_round(need(0)?))],
        _ => return no_evaluator(op),
    })
}

fn granularity(x: &Tensor, scales: &Tensor, on: i64, block_size: usize) -> Result<Granularity> {
    let rank = x.shape().len();
    Granularity::of_attributes(rank, on, block_size, scales.shape())
        .ok_or_else(|| shape_error(format!("axis {on} of a tensor of rank {rank}")))
}

fn checked(codes: DType, shape: &[usize], scales: &Tensor, zeros: Option<&Tensor>, how: Granularity) -> Result<()> {
    let zeros = zeros.map(|z| (z.dtype(), z.shape()));
    crate::tensor::quantized::check_types((codes, shape), (scales.dtype(), scales.shape()), zeros, how)
        .map_err(|error| shape_error(error.to_string()))
}

/// Scale and zero point of u8 codes over the range of some numbers, extended to include 0.
struct Range {
    scale: f32,
    zero_point: i64,
}

impl Range {
    fn of(values: &[f32]) -> Range {
        let (low, high) = values
            .iter()
            .fold((0f32, 0f32), |(low, high), v| (low.min(*v), high.max(*v)));
        let scale = (high - low) / 255.0;
        let zero = if scale == 0.0 {
            0.0
        } else {
            (-low / scale).round_ties_even()
        };
        Range {
            scale,
            zero_point: zero.clamp(0.0, 255.0) as i64,
        }
    }
}

fn code(value: f32, scale: f32, zero_point: i64) -> i64 {
    if scale == 0.0 {
        return zero_point;
    }
    ((value / scale).round_ties_even() as i64)
        .saturating_add(zero_point)
        .clamp(0, 255)
}

/// The semantics of [`Op::RoundToCodes`].
pub(super) fn round_to_codes(x: &Tensor, how: Rounding) -> Tensor {
    let Rounding { to, scale, zero_point } = how;
    let scales = Tensor::from_f32(Vec::new(), &[scale]);
    let zeros = (!to.is_float_format()).then(|| Tensor::from_i64_as(to, Vec::new(), &[zero_point]));
    let codes = quantize(to, x, &scales, zeros.as_ref(), Granularity::Tensor);
    let wide = dequantize(&codes, &scales, zeros.as_ref(), Granularity::Tensor);
    floats(x.dtype(), x.shape().to_vec(), &wide.to_f64())
}

fn dynamic_round(x: &Tensor) -> Tensor {
    let values = x.to_f32();
    let Range { scale, zero_point } = Range::of(&values);
    let near = |value: f32| f64::from((code(value, scale, zero_point) - zero_point) as f32 * scale);
    let wide: Vec<f64> = values.into_iter().map(near).collect();
    floats(x.dtype(), x.shape().to_vec(), &wide)
}
