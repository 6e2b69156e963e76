//! Activations rounded to the values of codes: [`Op::RoundToCodes`] and [`Op::DynamicRoundToCodes`], in fp32.
//!
//! Elementwise layers round and clamp to integer codes; a product of them follows in floating point, as in the graph.
//! Rounding to float codes is a conversion.

use super::context::{Lowered, Lowering};
use super::dispatch::no_lowering;
use super::error::Reason;
use crate::graph::op::Rounding;
use crate::graph::{Node, Op};
use crate::network::{Elementwise, LayerKind, ReduceOp, TensorId, UnaryOp};
use crate::tensor::DType;

impl Lowering<'_> {
    /// The operators of [`Family::Quantization`](crate::graph::op::Family::Quantization).
    pub(super) fn quantization_node(&mut self, node: &Node, name: &str) -> Lowered {
        match &node.op {
            Op::RoundToCodes { to, scale, zero_point } => {
                let (to, scale, zero_point) = (*to, *scale, *zero_point);
                let x = self.data(node, 0)?;
                self.rounded(name, x, Rounding { to, scale, zero_point })
            }
            Op::DynamicRoundToCodes => self.dynamic_round_to_codes(node, name),
            _ => no_lowering(node),
        }
    }

    /// Every element rounded to the value of its nearest code, in x's type.
    pub(super) fn rounded(&mut self, name: &str, x: TensorId, how: Rounding) -> Lowered {
        let Rounding { to, scale, zero_point } = how;
        let part = |part: &str| format!("{name}/{part}");
        let (dtype, rank) = (self.b.dtype(x), self.b.rank(x));
        let wide = self.b.cast(&part("wide"), DType::F32, x)?;
        let scale = self.number(DType::F32, rank, f64::from(scale))?;
        let quotient = self.b.elementwise(&part("quotient"), Elementwise::Div, wide, scale)?;
        if to.is_float_format() {
            let round = match to {
                DType::F8E4M3Fn => UnaryOp::RoundE4M3,
                DType::F8E5M2 => UnaryOp::RoundE5M2,
                other => return Reason::unsupported(format!("activations as codes of {other}")),
            };
            let whole = self.b.unary(&part("whole"), round, quotient)?;
            let product = self.b.elementwise(&part("product"), Elementwise::Prod, whole, scale)?;
            return Ok(self.b.cast(name, dtype, product)?);
        }
        let whole = self.b.unary(&part("whole"), UnaryOp::Round, quotient)?;
        // Clamped without the zero point, which shifts the range instead.
        let (low, high) = to.int_range();
        let low = self.number(DType::F32, rank, (low - zero_point) as f64)?;
        let high = self.number(DType::F32, rank, (high - zero_point) as f64)?;
        let above = self.b.elementwise(&part("above"), Elementwise::Max, whole, low)?;
        let within = self.b.elementwise(&part("within"), Elementwise::Min, above, high)?;
        let product = self.b.elementwise(&part("product"), Elementwise::Prod, within, scale)?;
        Ok(self.b.cast(name, dtype, product)?)
    }

    fn dynamic_round_to_codes(&mut self, node: &Node, name: &str) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let x = self.data(node, 0)?;
        let (dtype, rank) = (self.b.dtype(x), self.b.rank(x));
        let wide = self.b.cast(&part("wide"), DType::F32, x)?;
        let number = |lowering: &mut Self, value: f64| lowering.number(DType::F32, rank, value);
        let (zero, largest) = (number(self, 0.0)?, number(self, 255.0)?);
        // If all are zero, the range is 0 and any scale works.
        let least = number(self, f64::from(f32::MIN_POSITIVE))?;
        let end = |lowering: &mut Self, which: &str, op: ReduceOp, side: Elementwise| -> Lowered<TensorId> {
            let kind = LayerKind::Reduce {
                op,
                axes: (0..rank).collect(),
                keep_dims: true,
            };
            let found = lowering.b.add(&part(which), kind, &[wide])?;
            Ok(lowering
                .b
                .elementwise(&part(&format!("{which}.zero")), side, found, zero)?)
        };
        let high = end(self, "high", ReduceOp::Max, Elementwise::Max)?;
        let low = end(self, "low", ReduceOp::Min, Elementwise::Min)?;
        let range = self.b.elementwise(&part("range"), Elementwise::Sub, high, low)?;
        let scale = self.b.elementwise(&part("scale"), Elementwise::Div, range, largest)?;
        let scale = self
            .b
            .elementwise(&part("scale.positive"), Elementwise::Max, scale, least)?;
        let below = self.b.elementwise(&part("below"), Elementwise::Div, low, scale)?;
        let below = self.b.unary(&part("below.whole"), UnaryOp::Round, below)?;
        let above = self.b.elementwise(&part("above"), Elementwise::Sum, below, largest)?;
        let quotient = self.b.elementwise(&part("quotient"), Elementwise::Div, wide, scale)?;
        let whole = self.b.unary(&part("whole"), UnaryOp::Round, quotient)?;
        let whole = self.b.elementwise(&part("from"), Elementwise::Max, whole, below)?;
        let whole = self.b.elementwise(&part("to"), Elementwise::Min, whole, above)?;
        let product = self.b.elementwise(&part("product"), Elementwise::Prod, whole, scale)?;
        Ok(self.b.cast(name, dtype, product)?)
    }
}
