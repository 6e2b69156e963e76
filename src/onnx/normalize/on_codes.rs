//! Operators on codes in one node, as ONNX Runtime's quantizers and its optimizer write them. They become
//! `DequantizeLinear` of each operand, the operator on floats, and `QuantizeLinear` of the result, which is their
//! definition (<https://onnx.ai/onnx/operators/onnx__QLinearMatMul.html> and
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>):
//!
//! - `QLinearMatMul`, `QLinearAdd`, `QLinearMul`, `QLinearSigmoid`, `QLinearSoftmax`, `QLinearConcat`, `QLinearWhere`
//!   return codes;
//! - `QGemm` returns codes, or floats if it has no scale for its result; its bias is i32, in units of both scales;
//! - `MatMulIntegerToFloat` returns floats, with a bias;
//! - `DynamicQuantizeMatMul` takes floats on the left, which `DynamicQuantizeLinear` turns into codes.

use super::quantized::is_idle;
use super::{Failure, Replacement, SourceNode};
use crate::graph::op::{Binary, Op, Unary};
use crate::graph::{Constant, ValueId};
use crate::tensor::quantized::Granularity;
use crate::tensor::{DType, Tensor};

/// The parameters of codes.
#[derive(Clone, Copy)]
struct Parts {
    codes: Option<ValueId>,
    scale: Option<ValueId>,
    zero: Option<ValueId>,
}

/// An operand of the operator on floats.
enum Operand {
    /// Codes, with the axis of their scales if there are several.
    Codes(Parts, i64),
    /// Floats that are quantized dynamically.
    Dynamic(Option<ValueId>),
    Constant(Constant),
    /// No codes.
    Plain(Option<ValueId>),
}

/// An operator whose operands are codes.
pub(super) struct OnCodes {
    op: Op,
    operands: Vec<Operand>,
    /// Added to the result, in floating point.
    bias: Option<ValueId>,
    /// Scale, zero point and type of codes that the result becomes.
    to: Option<(Parts, DType)>,
}

impl OnCodes {
    fn replacement(op: Op, operands: Vec<Operand>, to: Option<(Parts, DType)>) -> Result<Replacement, Failure> {
        Ok(Replacement::OnCodes(Box::new(OnCodes {
            op,
            operands,
            bias: None,
            to,
        })))
    }
}

impl SourceNode<'_> {
    fn parts(&self, [codes, scale, zero]: [usize; 3]) -> Parts {
        Parts {
            codes: self.input(codes),
            scale: self.input(scale),
            zero: self.input(zero),
        }
    }

    /// Scale and zero point of the result. Without a zero point it has the type of the codes `like`.
    fn result(&self, [scale, zero]: [usize; 2], like: usize) -> Result<Option<(Parts, DType)>, Failure> {
        let dtype = |i: usize| self.input(i).and_then(|v| self.graph.value(v).dtype);
        let Some(dtype) = dtype(zero).or_else(|| dtype(like)) else {
            return Err(Failure::Unsupported("zero points of an unknown type".to_string()));
        };
        let parts = Parts {
            codes: None,
            scale: self.input(scale),
            zero: self.input(zero),
        };
        Ok(Some((parts, dtype)))
    }

    /// An operand with one scale, or several on an axis.
    fn operand(&self, inputs: [usize; 3], axis: i64) -> Result<Operand, Failure> {
        let [codes, scales, zeros] = inputs.map(|i| self.constant_input(i));
        let (Some(codes), Some(scales)) = (codes, scales) else {
            return Ok(Operand::Codes(self.parts(inputs), axis));
        };
        if zeros.is_none() && self.input(inputs[2]).is_some() {
            return Ok(Operand::Codes(self.parts(inputs), axis));
        }
        let granularity = Granularity::of_attributes(codes.shape().len(), axis, 0, scales.shape());
        let Some(granularity) = granularity else {
            let shape = codes.shape();
            return Err(Failure::Problem(format!(
                "its axis is {axis}, of a constant of {shape:?}"
            )));
        };
        let zeros = zeros.filter(|zeros| !is_idle(zeros, codes.dtype()));
        Ok(Operand::Constant(Constant::quantized(
            codes,
            scales,
            zeros,
            granularity,
        )?))
    }

    /// An operator on codes; `None` for any other.
    pub(super) fn on_codes(&self) -> Result<Option<Replacement>, Failure> {
        let unary = |op: Op| OnCodes::replacement(op, vec![self.operand([0, 1, 2], 1)?], self.result([3, 4], 0)?);
        let binary = |op: Binary| {
            let operands = vec![self.operand([0, 1, 2], 1)?, self.operand([3, 4, 5], 1)?];
            OnCodes::replacement(Op::Binary(op), operands, self.result([6, 7], 0)?)
        };
        match self.op_type {
            "QLinearAdd" => binary(Binary::Add),
            "QLinearMul" => binary(Binary::Mul),
            "QLinearSigmoid" => unary(Op::Unary(Unary::Sigmoid)),
            "QLinearSoftmax" => unary(Op::Softmax {
                axis: self.softmax_axis()?,
            }),
            "QLinearConcat" => self.q_linear_concat(),
            "QLinearWhere" => {
                let operands = vec![
                    Operand::Plain(self.input(0)),
                    self.operand([1, 2, 3], 1)?,
                    self.operand([4, 5, 6], 1)?,
                ];
                OnCodes::replacement(Op::Where, operands, self.result([7, 8], 1)?)
            }
            "QGemm" => self.q_gemm(),
            "MatMulIntegerToFloat" => self.mat_mul_integer_to_float(),
            "DynamicQuantizeMatMul" => self.dynamic_quantize_mat_mul(),
            _ => return Ok(None),
        }
        .map(Some)
    }

    /// The axis of a softmax, by the node's opset: before 13 all axes from it on count as one.
    fn softmax_axis(&self) -> Result<i64, Failure> {
        let axis = self.attributes.int_or("axis", -1)?;
        let opset = self.attributes.int_or("opset", 13)?;
        let rank = self
            .input(0)
            .and_then(|x| self.graph.shape(x))
            .map(|shape| shape.len() as i64);
        let is_last = axis == -1 || rank.is_some_and(|rank| axis == rank - 1);
        match opset < 13 && !is_last {
            true => Err(Failure::Unsupported(format!("opset={opset}, axis={axis}"))),
            false => Ok(axis),
        }
    }

    /// Inputs: scale and zero point of the result, and of each operand codes, scale and zero point.
    fn q_linear_concat(&self) -> Result<Replacement, Failure> {
        let Some(axis) = self.attributes.int("axis")? else {
            return Err("its attribute \"axis\" is missing".into());
        };
        let count = self.inputs.len().saturating_sub(2);
        if count == 0 || !count.is_multiple_of(3) {
            return Err(Failure::Problem(format!(
                "it has {} inputs, and 2 and 3 of each operand are needed",
                self.inputs.len()
            )));
        }
        let operands: Result<Vec<Operand>, Failure> = (2..2 + count)
            .step_by(3)
            .map(|i| self.operand([i, i + 1, i + 2], 1))
            .collect();
        OnCodes::replacement(Op::Concat { axis }, operands?, self.result([0, 1], 2)?)
    }

    /// Inputs: a, its scale and zero point, b, its scale and zero point, scale and zero point of the result.
    pub(super) fn q_linear_mat_mul(&self) -> Result<Replacement, Failure> {
        let operands = vec![self.operand([0, 1, 2], -2)?, self.right([3, 4, 5], 1)?];
        OnCodes::replacement(Op::MatMul, operands, self.result([6, 7], 0)?)
    }

    /// `alpha * (a · b + c)` with c of i32 in units of both scales. Inputs: a, its scale and zero point, b, its scale and zero
    /// point, c (optional), scale and zero point of the result (optional).
    fn q_gemm(&self) -> Result<Replacement, Failure> {
        let alpha = self.attributes.float_or("alpha", 1.0)?;
        let (trans_a, trans_b) = (
            self.attributes.flag("transA", false)?,
            self.attributes.flag("transB", false)?,
        );
        let mut operands = vec![
            self.operand([0, 1, 2], 1)?,
            self.right([3, 4, 5], usize::from(!trans_b))?,
        ];
        if self.input(6).is_some() {
            let bias = self.required_constant(6, "bias")?;
            let [a, b] = [(1, "scale"), (4, "scales")].map(|(i, what)| self.required_constant(i, what));
            operands.push(Operand::Constant(integer_bias(bias, &a?, &b?, alpha)?));
        }
        let to = match self.input(7) {
            Some(_) => self.result([7, 8], 0)?,
            None => None,
        };
        let op = Op::Gemm {
            alpha,
            beta: 1.0,
            trans_a,
            trans_b,
        };
        OnCodes::replacement(op, operands, to)
    }

    /// Inputs: a, b, their scales, their zero points (optional), a bias (optional).
    fn mat_mul_integer_to_float(&self) -> Result<Replacement, Failure> {
        Ok(Replacement::OnCodes(Box::new(OnCodes {
            op: Op::MatMul,
            operands: vec![self.operand([0, 2, 4], -2)?, self.right([1, 3, 5], 1)?],
            bias: self.input(6),
            to: None,
        })))
    }

    /// Inputs: a in floating point, b, its scale, its zero point (optional), a bias (optional).
    fn dynamic_quantize_mat_mul(&self) -> Result<Replacement, Failure> {
        Ok(Replacement::OnCodes(Box::new(OnCodes {
            op: Op::MatMul,
            operands: vec![Operand::Dynamic(self.input(0)), self.right([1, 2, 3], 1)?],
            bias: self.input(4),
            to: None,
        })))
    }

    /// A matrix with one scale, or one per output on this axis of `[in, out]`. All outputs may share a zero point.
    fn right(&self, inputs: [usize; 3], axis: usize) -> Result<Operand, Failure> {
        let [codes, scales, zeros] = inputs.map(|i| self.constant_input(i));
        let (Some(codes), Some(scales)) = (codes, scales) else {
            return Ok(Operand::Codes(self.parts(inputs), axis as i64 - 2));
        };
        let &[rows, columns] = codes.shape() else {
            return Err(Failure::Unsupported(format!("a constant of shape {:?}", codes.shape())));
        };
        let outputs = [rows, columns][axis];
        if zeros.is_none() && self.input(inputs[2]).is_some() {
            return Err(Failure::Unsupported("zero points that are not constant".to_string()));
        }
        let of_all = scales.len() == 1 && zeros.as_ref().is_none_or(|zeros| zeros.len() == 1);
        let spread = |part: Constant| match part.len() {
            1 if of_all => part.reshaped(Vec::new()),
            1 => Constant::concat(&vec![part.reshaped(vec![1]); outputs], 0),
            n if n == outputs => part.reshaped(vec![outputs]),
            // The check of all quantized constants reports any other number.
            _ => part,
        };
        let granularity = match of_all {
            true => Granularity::Tensor,
            false => Granularity::Channel { axis },
        };
        let zeros = zeros.filter(|zeros| !is_idle(zeros, codes.dtype())).map(spread);
        Ok(Operand::Constant(Constant::quantized(
            codes,
            spread(scales),
            zeros,
            granularity,
        )?))
    }

    /// Adds the nodes of an operator.
    pub(super) fn emit_on_codes(&mut self, operator: OnCodes, outputs: Vec<Option<ValueId>>) {
        let mut operands = Vec::new();
        for (name, operand) in ('a'..).zip(operator.operands) {
            let value = match operand {
                Operand::Plain(value) => value,
                Operand::Codes(parts, axis) => self.dequantized(&name.to_string(), parts, axis),
                Operand::Dynamic(x) => {
                    let [codes, scale, zero] = ["codes", "scale", "zero_point"].map(|part| self.made(part));
                    self.emit(Op::DynamicQuantizeLinear, vec![x], vec![codes, scale, zero]);
                    self.dequantized(&name.to_string(), Parts { codes, scale, zero }, -2)
                }
                Operand::Constant(constant) => {
                    let origin = constant.origin().unwrap_or(&self.name).to_string();
                    Some(self.graph.add_constant(&format!("{origin}.weight"), constant))
                }
            };
            operands.push(value);
        }
        let mut steps = vec![(operator.op, operands)];
        if let Some(bias) = operator.bias {
            steps.push((Op::Binary(Binary::Add), vec![None, Some(bias)]));
        }
        if let Some((parts, to)) = operator.to {
            let (axis, block_size) = (1, 0);
            let mut inputs = vec![None, parts.scale];
            inputs.extend(parts.zero.map(Some));
            steps.push((Op::QuantizeLinear { axis, block_size, to }, inputs));
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

/// A bias of i32 as floats: in units of `alpha` times the scale of a times that of b, or of each of its columns.
fn integer_bias(bias: Constant, a: &Constant, b: &Constant, alpha: f32) -> Result<Constant, Failure> {
    if bias.dtype() != DType::I32 {
        return Err(Failure::Problem(format!(
            "its bias is {} but must be i32",
            bias.dtype()
        )));
    }
    let (Ok(a), Ok(b)) = (a.materialize(), b.materialize()) else {
        return Err(Failure::Unsupported("absent scales".to_string()));
    };
    let Some(a) = a.scalar() else {
        return Err(Failure::Unsupported(format!("scales of a of shape {:?}", a.shape())));
    };
    let units: Vec<f32> = b.to_f32().iter().map(|b| alpha * (a as f32 * b)).collect();
    let columns = bias.shape().last().copied();
    let (shape, granularity) = match units.len() {
        1 => (Vec::new(), Granularity::Tensor),
        n if Some(n) == columns => (
            vec![n],
            Granularity::Channel {
                axis: bias.shape().len() - 1,
            },
        ),
        n => {
            let shape = bias.shape();
            return Err(Failure::Problem(format!(
                "its bias has the shape {shape:?}, and b has {n} scales"
            )));
        }
    };
    let units = Tensor::from_f32(shape, &units);
    Ok(Constant::quantized(bias, units.into(), None, granularity)?)
}
