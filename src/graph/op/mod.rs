//! The operators of the graph level: ONNX operators as data, normalized to their opset-24 form.
//!
//! Attributes that became inputs in later opsets (axes of `ReduceMean`, `Squeeze`; sizes of `Split`) are always inputs
//! here, and variadic `Max`, `Min`, `Sum` are chains of two-operand nodes; the reader does this once. Inputs keep ONNX's
//! order; an omitted optional input is `None`. Specification: <https://onnx.ai/onnx/operators/>, for the contrib
//! operators <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>.
//!
//! `table` declares every operator once: its variant of [`Op`], its attributes with ONNX's names and defaults, its
//! operands, and properties for other levels ([`OperatorInfo`]). The reader, the writer, the dump and its parser, the
//! verifier and inference of the common cases are derived from it. The meaning of an operator is in the file of its
//! [`Family`] in `graph::infer`, `graph::eval` and `lower`. docs/contributing/adding-an-operator.md walks through one.

mod attributes;
mod declare;
mod experts;
mod info;
mod table;

pub(crate) use attributes::{Attribute, AttributeError, AttributeSource};
pub use experts::{ChosenWeights, ExpertActivation, Gating, RouterScores};
pub use info::{ElementTypes, Family, Input, Moves, OperatorInfo, RowWise, TypeRule};
pub(crate) use info::{LAPIDARY, MICROSOFT};
pub use table::{Attention, BiasedAttention, Experts, GroupQueryAttention, Op, RoundedAttention, Routing};

use crate::tensor::DType;
use declare::named;
use info::{any, boolean, float, int64, number, onnx};

named! {
    /// Operators of one operand without attributes that work on each element.
    Unary {
        Abs => "Abs", [1, 6, 13], number();
        Ceil => "Ceil", [1, 6, 13], float();
        Cos => "Cos", [7, 22], float();
        Erf => "Erf", [9, 13], float();
        Exp => "Exp", [1, 6, 13], float();
        Floor => "Floor", [1, 6, 13], float();
        IsNan => "IsNaN", [9, 13, 20], float();
        Log => "Log", [1, 6, 13], float();
        Neg => "Neg", [1, 6, 13], number();
        Not => "Not", [1], boolean();
        Reciprocal => "Reciprocal", [1, 6, 13], float();
        Relu => "Relu", [1, 6, 13, 14], number();
        Round => "Round", [11, 22], float();
        Sigmoid => "Sigmoid", [1, 6, 13], float();
        Sign => "Sign", [9, 13], number();
        Sin => "Sin", [7, 22], float();
        Softplus => "Softplus", [1, 22], float();
        Sqrt => "Sqrt", [1, 6, 13], float();
        Tanh => "Tanh", [1, 6, 13], float();
    }
    |VERSIONS, OPERAND| onnx("", VERSIONS, &[OPERAND]).family(Family::Elementwise).row_wise(RowWise::Always)
}

named! {
    /// Operators of two operands that broadcast.
    Binary {
        Add => "Add", [1, 6, 7, 13, 14], number().same();
        Sub => "Sub", [1, 6, 7, 13, 14], number().same();
        Mul => "Mul", [1, 6, 7, 13, 14], number().same();
        Div => "Div", [1, 6, 7, 13, 14], number().same();
        Pow => "Pow", [1, 7, 12, 13, 15], number();
        /// Integer: sign of the divisor. Floats need `fmod` and take the sign of the dividend.
        Mod => "Mod", [10, 13], number().same();
        Max => "Max", [1, 6, 8, 12, 13], number().same();
        Min => "Min", [1, 6, 8, 12, 13], number().same();
        And => "And", [1, 7], boolean();
        Or => "Or", [1, 7], boolean();
        Xor => "Xor", [1, 7], boolean();
        Equal => "Equal", [1, 7, 11, 13, 19], any().same();
        Less => "Less", [1, 7, 9, 13], number().same();
        LessOrEqual => "LessOrEqual", [12, 16], number().same();
        Greater => "Greater", [1, 7, 9, 13], number().same();
        GreaterOrEqual => "GreaterOrEqual", [12, 16], number().same();
    }
    |VERSIONS, OPERAND| onnx("", VERSIONS, &[OPERAND, OPERAND]).family(Family::Elementwise).row_wise(RowWise::Always)
}

named! {
    /// The function of an [`Op::Reduce`].
    Reduction {
        Mean => "ReduceMean", [1, 11, 13, 18], number();
        Sum => "ReduceSum", [1, 11, 13], number();
        Max => "ReduceMax", [1, 11, 12, 13, 18, 20], any();
        Min => "ReduceMin", [1, 11, 12, 13, 18, 20], any();
        Prod => "ReduceProd", [1, 11, 13, 18], number();
        SumSquare => "ReduceSumSquare", [1, 11, 13, 18], number();
        LogSumExp => "ReduceLogSumExp", [1, 11, 13, 18], float();
    }
    |VERSIONS, OPERAND| onnx("", VERSIONS, &[OPERAND, int64().optional().parameter()]).family(Family::Reduction)
}

impl Binary {
    /// Whether the result is bool regardless of the operands.
    pub fn is_predicate(self) -> bool {
        matches!(
            self,
            Binary::And
                | Binary::Or
                | Binary::Xor
                | Binary::Equal
                | Binary::Less
                | Binary::LessOrEqual
                | Binary::Greater
                | Binary::GreaterOrEqual
        )
    }
}

/// How scatters combine a new element with the old one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ScatterMode {
    /// The new element.
    Replace,
    /// Their sum.
    Add,
    /// Their product.
    Mul,
    /// The greater.
    Max,
    /// The smaller.
    Min,
}

/// Rounding of every element to the value of its nearest code; see [`Op::RoundToCodes`].
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rounding {
    /// The codes' type.
    pub to: DType,
    /// The value of one step of the codes.
    pub scale: f32,
    /// The code of 0; 0 for codes of floats.
    pub zero_point: i64,
}

impl Rounding {
    /// The rounding of an [`Op::RoundToCodes`]; `None` for another operator.
    pub fn of(op: &Op) -> Option<Rounding> {
        match *op {
            Op::RoundToCodes { to, scale, zero_point } => Some(Rounding { to, scale, zero_point }),
            _ => None,
        }
    }

    /// The operator for it.
    pub fn operator(self) -> Op {
        let Rounding { to, scale, zero_point } = self;
        Op::RoundToCodes { to, scale, zero_point }
    }

    /// The rounding of `factor * x` that is `factor` times this one of `x`. The factor is not 0; a negative one
    /// reverses the range of integer codes.
    pub fn scaled(self, factor: f64) -> Rounding {
        let zero_point = match factor < 0.0 && !self.to.is_float_format() {
            true => {
                let (low, high) = self.to.int_range();
                low + high - self.zero_point
            }
            false => self.zero_point,
        };
        Rounding {
            to: self.to,
            scale: (f64::from(self.scale) * factor.abs()) as f32,
            zero_point,
        }
    }

    /// The smallest value of a code.
    pub fn lowest(self) -> f64 {
        let code = match self.to.is_float_format() {
            true => -self.to.max(),
            false => (self.to.int_range().0 - self.zero_point) as f64,
        };
        code * f64::from(self.scale)
    }
}

impl Op {
    /// Whether it is an attention over queries, keys and values in the canonical form.
    pub fn is_attention(&self) -> bool {
        matches!(
            self,
            Op::Attention(_) | Op::RoundedAttention(_) | Op::BiasedAttention(_)
        )
    }

    /// The operator type as ONNX writes it, `Add` for example. For an unknown operator, with its domain if it has one.
    pub fn name(&self) -> String {
        match self {
            Op::Unknown { domain, op_type } if !domain.is_empty() => format!("{domain}::{op_type}"),
            _ => self.op_type().to_string(),
        }
    }

    /// `""` for ai.onnx.
    pub fn domain(&self) -> &str {
        match self {
            Op::Unknown { domain, .. } => domain,
            _ => self.info().domain,
        }
    }

    /// The operator type within its domain.
    pub fn op_type(&self) -> &str {
        match self {
            Op::Unknown { op_type, .. } => op_type,
            _ => self.info().op_type,
        }
    }

    /// The attributes that differ from ONNX's defaults, with their ONNX names, in the table's order. The `fmod` of a
    /// float `Mod` is not among them: it depends on the operands.
    pub(crate) fn attributes(&self) -> Vec<(&'static str, Attribute)> {
        let mut list = Vec::new();
        self.each_attribute(|name, value, is_default| {
            if let Some(value) = value.filter(|_| !is_default) {
                list.push((name, value));
            }
        });
        list
    }

    /// The axis attribute, ONNX's default if omitted; `None` for an operator without one.
    pub(crate) fn axis(&self) -> Option<i64> {
        let mut axis = None;
        self.each_attribute(|name, value, _| {
            if let ("axis", Some(Attribute::Int(value))) = (name, value) {
                axis = Some(value);
            }
        });
        axis
    }

    /// Whether the table has an operator of this name.
    pub fn is_known(domain: &str, op_type: &str) -> bool {
        Op::all().iter().any(|op| op.info().is_named(domain, op_type))
    }

    /// The operator of this name with these attributes; `None` if there is none. [`Op::Unknown`] is never the result.
    pub(crate) fn read<S: AttributeSource>(domain: &str, op_type: &str, source: &S) -> Result<Option<Op>, S::Error> {
        if domain.is_empty() {
            if let Some(op) = Unary::named(op_type) {
                return Ok(Some(Op::Unary(op)));
            }
            if let Some(op) = Binary::named(op_type) {
                return Ok(Some(Op::Binary(op)));
            }
        }
        Op::read_declared(domain, op_type, source)
    }
}

#[cfg(test)]
mod tests;
