//! Products of codes in one operator, as ONNX Runtime's quantizers and its optimizer write them. By definition, they
//! become `DequantizeLinear` of both operands, `MatMul`, and the operator's treatment of the result:
//!
//! - `QLinearMatMul` gives codes, by `QuantizeLinear` (<https://onnx.ai/onnx/operators/onnx__QLinearMatMul.html>);
//! - `com.microsoft::MatMulIntegerToFloat` gives floats, with a bias;
//! - `com.microsoft::DynamicQuantizeMatMul` takes floats on the left, which `DynamicQuantizeLinear` quantizes.

use super::{Failure, Replacement, SourceNode};
use crate::graph::op::{Binary, Op};
use crate::graph::{Constant, ValueId};
use crate::tensor::DType;
use crate::tensor::quantized::Granularity;

/// Values that belong to codes.
#[derive(Clone, Copy)]
struct Parts {
    codes: Option<ValueId>,
    scale: Option<ValueId>,
    zero: Option<ValueId>,
}

/// The left operand of a product.
enum Left {
    Codes(Parts),
    /// Codes are made of it as it comes.
    Floats(Option<ValueId>),
}

/// The right operand of a product.
enum Right {
    Codes(Parts),
    Weight(Constant),
}

/// A product whose operands are codes.
pub(super) struct ProductOfCodes {
    left: Left,
    right: Right,
    bias: Option<ValueId>,
    /// Scale, zero point and type of codes that the result becomes.
    to: Option<(Parts, DType)>,
}

impl SourceNode<'_> {
    fn parts(&self, [codes, scale, zero]: [usize; 3]) -> Parts {
        Parts {
            codes: self.input(codes),
            scale: self.input(scale),
            zero: self.input(zero),
        }
    }

    /// Inputs: a, its scale and zero point, b, its scale and zero point, scale and zero point of the result.
    pub(super) fn q_linear_mat_mul(&self) -> Result<Replacement, Failure> {
        let zero = self.input(7).and_then(|zero| self.graph.value(zero).dtype);
        let Some(dtype) = zero else {
            return Err(Failure::Unsupported("zero points of an unknown type".to_string()));
        };
        Ok(Replacement::ProductOfCodes(Box::new(ProductOfCodes {
            left: Left::Codes(self.parts([0, 1, 2])),
            right: self.right([3, 4, 5])?,
            bias: None,
            to: Some((
                Parts {
                    codes: None,
                    scale: self.input(6),
                    zero: self.input(7),
                },
                dtype,
            )),
        })))
    }

    /// Inputs: a, b, their scales, their zero points (optional), a bias (optional).
    pub(super) fn mat_mul_integer_to_float(&self) -> Result<Replacement, Failure> {
        Ok(Replacement::ProductOfCodes(Box::new(ProductOfCodes {
            left: Left::Codes(self.parts([0, 2, 4])),
            right: self.right([1, 3, 5])?,
            bias: self.input(6),
            to: None,
        })))
    }

    /// Inputs: a in floating point, b, its scale, its zero point (optional), a bias (optional).
    pub(super) fn dynamic_quantize_mat_mul(&self) -> Result<Replacement, Failure> {
        Ok(Replacement::ProductOfCodes(Box::new(ProductOfCodes {
            left: Left::Floats(self.input(0)),
            right: self.right([1, 2, 3])?,
            bias: self.input(4),
            to: None,
        })))
    }

    /// A matrix `[in, out]` of one scale, or of one for each column. Its zero point may be one for all columns.
    fn right(&self, inputs: [usize; 3]) -> Result<Right, Failure> {
        let [codes, scales, zeros] = inputs.map(|i| self.constant_input(i));
        let (Some(codes), Some(scales)) = (codes, scales) else {
            return Ok(Right::Codes(self.parts(inputs)));
        };
        let [_, columns] = codes.shape()[..] else {
            return Err(Failure::Unsupported(format!("a constant of shape {:?}", codes.shape())));
        };
        if zeros.is_none() && self.input(inputs[2]).is_some() {
            return Err(Failure::Unsupported("zero points that are not constant".to_string()));
        }
        let of_all = scales.len() == 1 && zeros.as_ref().is_none_or(|zeros| zeros.len() == 1);
        let spread = |part: Constant| match part.len() {
            1 if of_all => part.reshaped(Vec::new()),
            1 => Constant::concat(&vec![part.reshaped(vec![1]); columns], 0),
            n if n == columns => part.reshaped(vec![columns]),
            // Named by what is to be checked of all quantized constants.
            _ => part,
        };
        let granularity = match of_all {
            true => Granularity::Tensor,
            false => Granularity::Channel { axis: 1 },
        };
        let zeros = zeros
            .filter(|zeros| !super::quantized::is_idle(zeros, codes.dtype()))
            .map(spread);
        Ok(Right::Weight(Constant::quantized(
            codes,
            spread(scales),
            zeros,
            granularity,
        )?))
    }

    /// Adds the nodes of a product.
    pub(super) fn product_of_codes(&mut self, product: ProductOfCodes, outputs: Vec<Option<ValueId>>) {
        let left = match product.left {
            Left::Codes(parts) => parts,
            Left::Floats(x) => {
                let [codes, scale, zero] = ["codes", "scale", "zero_point"].map(|part| self.made(part));
                self.emit(Op::DynamicQuantizeLinear, vec![x], vec![codes, scale, zero]);
                Parts { codes, scale, zero }
            }
        };
        let a = self.dequantized("a", left, -2);
        let b = match product.right {
            Right::Codes(parts) => self.dequantized("b", parts, -1),
            Right::Weight(weight) => {
                let name = weight.origin().unwrap_or(&self.name).to_string();
                Some(self.graph.add_constant(&format!("{name}.weight"), weight))
            }
        };
        let mut steps = vec![(Op::MatMul, vec![a, b])];
        if let Some(bias) = product.bias {
            steps.push((Op::Binary(Binary::Add), vec![None, Some(bias)]));
        }
        if let Some((parts, to)) = product.to {
            let (axis, block_size) = (1, 0);
            steps.push((
                Op::QuantizeLinear { axis, block_size, to },
                vec![None, parts.scale, parts.zero],
            ));
        }
        let count = steps.len();
        let mut before = None;
        for (i, (op, mut inputs)) in steps.into_iter().enumerate() {
            if i > 0 {
                inputs[0] = before;
            }
            let results = match i + 1 == count {
                true => outputs.clone(),
                false => vec![self.made(&format!("{i}"))],
            };
            before = results.first().copied().flatten();
            self.emit(op, inputs, results);
        }
    }

    fn made(&mut self, part: &str) -> Option<ValueId> {
        Some(self.graph.add_value(&format!("{}.{part}", self.name)))
    }

    fn dequantized(&mut self, name: &str, parts: Parts, axis: i64) -> Option<ValueId> {
        let result = self.made(name);
        let mut inputs = vec![parts.codes, parts.scale];
        inputs.extend(parts.zero.map(Some));
        self.emit(Op::DequantizeLinear { axis, block_size: 0 }, inputs, vec![result]);
        result
    }
}
