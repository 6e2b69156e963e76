//! Operators on each element, softmax and reductions.
//!
//! ONNX broadcasts ranks, TensorRT does not: operands get leading 1s. ONNX compares and selects booleans; TensorRT's
//! layers only accept numbers, so these become logic layers. Swish is `x * sigmoid(x)`; powers with small whole
//! exponents are products, which are exact for negative bases.

use super::context::{Lowered, Lowering, network_dtype};
use super::dispatch::no_lowering;
use super::error::Reason;
use crate::graph::Node;
use crate::graph::op::{Binary, Op, Reduction, Unary};
use crate::network::{Activation, Elementwise, LayerKind, ReduceOp, TensorId, UnaryOp};
use crate::tensor::DType;

impl Lowering<'_> {
    /// The operators of [`Family::Elementwise`](crate::graph::op::Family::Elementwise).
    pub(super) fn elementwise_node(&mut self, node: &Node, name: &str) -> Lowered {
        match &node.op {
            Op::Unary(op) => self.unary(node, name, *op),
            Op::Binary(op) => self.binary(node, name, *op),
            Op::Gelu { tanh } => self.gelu(node, name, *tanh),
            Op::Swish { alpha } => self.swish(node, name, *alpha),
            Op::Elu { alpha } => self.elu(node, name, *alpha),
            Op::Clip => self.clip(node, name),
            Op::Cast { to } => self.cast(node, name, *to),
            Op::CastLike => self.cast_like(node, name),
            Op::Where => self.select(node, name),
            Op::Identity => self.data(node, 0),
            _ => no_lowering(node),
        }
    }

    /// The operators of [`Family::Reduction`](crate::graph::op::Family::Reduction).
    pub(super) fn reduction_node(&mut self, node: &Node, name: &str) -> Lowered {
        match &node.op {
            Op::Softmax { axis } => self.softmax(node, name, *axis, false),
            Op::LogSoftmax { axis } => self.softmax(node, name, *axis, true),
            Op::Reduce {
                reduction,
                keepdims,
                noop_with_empty_axes,
            } => self.reduce(node, name, *reduction, *keepdims, *noop_with_empty_axes),
            _ => no_lowering(node),
        }
    }

    pub(super) fn unary(&mut self, node: &Node, name: &str, op: Unary) -> Lowered {
        let x = self.data(node, 0)?;
        let whole = !self.b.dtype(x).is_float();
        let layer = match op {
            Unary::Relu => return Ok(self.b.activation(name, Activation::Relu, x)?),
            Unary::Sigmoid => return Ok(self.b.activation(name, Activation::Sigmoid, x)?),
            Unary::Softplus => return Ok(self.b.activation(name, Activation::Softplus, x)?),
            Unary::Tanh => return Ok(self.b.activation(name, Activation::Tanh, x)?),
            // TensorRT's unary layers accept only floats.
            Unary::Neg | Unary::Abs if whole => {
                let zero = self.number(self.b.dtype(x), self.b.rank(x), 0.0)?;
                if op == Unary::Neg {
                    return Ok(self.b.elementwise(name, Elementwise::Sub, zero, x)?);
                }
                let negative = self.b.elementwise(&format!("{name}/neg"), Elementwise::Sub, zero, x)?;
                return Ok(self.b.elementwise(name, Elementwise::Max, x, negative)?);
            }
            Unary::Abs => UnaryOp::Abs,
            Unary::Ceil => UnaryOp::Ceil,
            Unary::Cos => UnaryOp::Cos,
            Unary::Erf => UnaryOp::Erf,
            Unary::Exp => UnaryOp::Exp,
            Unary::Floor => UnaryOp::Floor,
            Unary::IsNan => UnaryOp::IsNan,
            Unary::Log => UnaryOp::Log,
            Unary::Neg => UnaryOp::Neg,
            Unary::Not => UnaryOp::Not,
            Unary::Reciprocal => UnaryOp::Recip,
            Unary::Round => UnaryOp::Round,
            Unary::Sign => UnaryOp::Sign,
            Unary::Sin => UnaryOp::Sin,
            Unary::Sqrt => UnaryOp::Sqrt,
        };
        Ok(self.b.unary(name, layer, x)?)
    }

    pub(super) fn binary(&mut self, node: &Node, name: &str, op: Binary) -> Lowered {
        if op == Binary::Pow {
            return self.pow(node, name);
        }
        let [a, b] = self.aligned(node, [0, 1])?;
        let dtype = self.b.dtype(a);
        let layer = match op {
            Binary::Add => Elementwise::Sum,
            Binary::Sub => Elementwise::Sub,
            Binary::Mul => Elementwise::Prod,
            Binary::Div => Elementwise::Div,
            Binary::Max => Elementwise::Max,
            Binary::Min => Elementwise::Min,
            Binary::And => Elementwise::And,
            Binary::Or => Elementwise::Or,
            Binary::Xor => Elementwise::Xor,
            Binary::Equal if dtype == DType::Bool => {
                let differs = self.b.elementwise(&format!("{name}/differs"), Elementwise::Xor, a, b)?;
                return Ok(self.b.unary(name, UnaryOp::Not, differs)?);
            }
            Binary::Equal => Elementwise::Equal,
            Binary::Less => Elementwise::Less,
            Binary::Greater => Elementwise::Greater,
            Binary::LessOrEqual => return self.at_most(name, a, b),
            Binary::GreaterOrEqual => return self.at_most(name, b, a),
            Binary::Mod if dtype.is_float() => return Reason::unsupported("the modulus of floats"),
            // The sign of the divisor, from floor division.
            Binary::Mod => {
                let quotient = self
                    .b
                    .elementwise(&format!("{name}/quotient"), Elementwise::FloorDiv, a, b)?;
                let whole = self
                    .b
                    .elementwise(&format!("{name}/whole"), Elementwise::Prod, quotient, b)?;
                return Ok(self.b.elementwise(name, Elementwise::Sub, a, whole)?);
            }
            Binary::Pow => unreachable!("lowered above"),
        };
        Ok(self.b.elementwise(name, layer, a, b)?)
    }

    fn pow(&mut self, node: &Node, name: &str) -> Lowered {
        let exponent = self.scalar(node, 1);
        let x = self.data(node, 0)?;
        // A scalar exponent of higher rank than x would raise the result's rank: left to the general case.
        let plain = self.rank_of(self.input_id(node, 1)?)? <= self.b.rank(x);
        match exponent.filter(|_| plain) {
            Some(1.0) => return Ok(x),
            Some(2.0) => return Ok(self.b.elementwise(name, Elementwise::Prod, x, x)?),
            Some(3.0) => {
                let square = self.b.elementwise(&format!("{name}/square"), Elementwise::Prod, x, x)?;
                return Ok(self.b.elementwise(name, Elementwise::Prod, square, x)?);
            }
            Some(0.5) if self.b.dtype(x).is_float() => return Ok(self.b.unary(name, UnaryOp::Sqrt, x)?),
            Some(-0.5) if self.b.dtype(x).is_float() => {
                let root = self.b.unary(&format!("{name}/root"), UnaryOp::Sqrt, x)?;
                return Ok(self.b.unary(name, UnaryOp::Recip, root)?);
            }
            _ => {}
        }
        let [x, exponent] = self.aligned(node, [0, 1])?;
        let exponent = self.b.cast(&format!("{name}/exponent"), self.b.dtype(x), exponent)?;
        Ok(self.b.elementwise(name, Elementwise::Pow, x, exponent)?)
    }

    pub(super) fn gelu(&mut self, node: &Node, name: &str, tanh: bool) -> Lowered {
        let x = self.data(node, 0)?;
        let op = match tanh {
            true => Activation::GeluTanh,
            false => Activation::GeluErf,
        };
        Ok(self.b.activation(name, op, x)?)
    }

    /// `x * sigmoid(alpha * x)`.
    pub(super) fn swish(&mut self, node: &Node, name: &str, alpha: f32) -> Lowered {
        let x = self.data(node, 0)?;
        let scaled = self.scaled(&format!("{name}/alpha"), x, alpha)?;
        let gate = self
            .b
            .activation(&format!("{name}/sigmoid"), Activation::Sigmoid, scaled)?;
        Ok(self.b.elementwise(name, Elementwise::Prod, x, gate)?)
    }

    /// `max(x, 0) + alpha * (exp(min(x, 0)) - 1)`: TensorRT's own ELU has a factor that the binding cannot set.
    fn elu(&mut self, node: &Node, name: &str, alpha: f32) -> Lowered {
        let x = self.data(node, 0)?;
        let part = |part: &str| format!("{name}/{part}");
        let (dtype, rank) = (self.b.dtype(x), self.b.rank(x));
        let (zero, one) = (self.number(dtype, rank, 0.0)?, self.number(dtype, rank, 1.0)?);
        let positive = self.b.elementwise(&part("positive"), Elementwise::Max, x, zero)?;
        let negative = self.b.elementwise(&part("negative"), Elementwise::Min, x, zero)?;
        let exp = self.b.unary(&part("exp"), UnaryOp::Exp, negative)?;
        let bent = self.b.elementwise(&part("bent"), Elementwise::Sub, exp, one)?;
        let scaled = self.scaled(&part("alpha"), bent, alpha)?;
        Ok(self.b.elementwise(name, Elementwise::Sum, positive, scaled)?)
    }

    pub(super) fn clip(&mut self, node: &Node, name: &str) -> Lowered {
        let mut x = self.data(node, 0)?;
        let rank = self.b.rank(x);
        for (i, op, part) in [(1, Elementwise::Max, "min"), (2, Elementwise::Min, "max")] {
            if node.input(i).is_some() {
                let bound = self.operand(node, i, rank)?;
                x = self.b.elementwise(&format!("{name}/{part}"), op, x, bound)?;
            }
        }
        Ok(x)
    }

    pub(super) fn cast(&mut self, node: &Node, name: &str, to: DType) -> Lowered {
        let x = self.data(node, 0)?;
        Ok(self.b.cast(name, network_dtype(to), x)?)
    }

    pub(super) fn cast_like(&mut self, node: &Node, name: &str) -> Lowered {
        let x = self.data(node, 0)?;
        match self.graph.value(self.input_id(node, 1)?).dtype {
            Some(to) => Ok(self.b.cast(name, network_dtype(to), x)?),
            None => Reason::unsupported("the dtype to cast to is not known"),
        }
    }

    pub(super) fn select(&mut self, node: &Node, name: &str) -> Lowered {
        let [condition, yes, no] = self.aligned(node, [0, 1, 2])?;
        if self.b.dtype(yes) != DType::Bool {
            return Ok(self.b.add(name, LayerKind::Select, &[condition, yes, no])?);
        }
        let part = |part: &str| format!("{name}/{part}");
        let kept = self.b.elementwise(&part("then"), Elementwise::And, condition, yes)?;
        let otherwise = self.b.unary(&part("not"), UnaryOp::Not, condition)?;
        let other = self.b.elementwise(&part("else"), Elementwise::And, otherwise, no)?;
        Ok(self.b.elementwise(name, Elementwise::Or, kept, other)?)
    }

    pub(super) fn softmax(&mut self, node: &Node, name: &str, axis: i64, log: bool) -> Lowered {
        let x = self.data(node, 0)?;
        let axis = self.axis(axis, self.b.rank(x))?;
        if !log {
            return Ok(self.b.add(name, LayerKind::Softmax { axis }, &[x])?);
        }
        // x - max - ln(sum(exp(x - max))): the logarithm of a softmax loses small probabilities.
        let part = |part: &str| format!("{name}/{part}");
        let reduce = |op| LayerKind::Reduce {
            op,
            axes: vec![axis],
            keep_dims: true,
        };
        let max = self.b.add(&part("max"), reduce(ReduceOp::Max), &[x])?;
        let shifted = self.b.elementwise(&part("shifted"), Elementwise::Sub, x, max)?;
        let exp = self.b.unary(&part("exp"), UnaryOp::Exp, shifted)?;
        let sum = self.b.add(&part("sum"), reduce(ReduceOp::Sum), &[exp])?;
        let log = self.b.unary(&part("log"), UnaryOp::Log, sum)?;
        Ok(self.b.elementwise(name, Elementwise::Sub, shifted, log)?)
    }

    pub(super) fn reduce(
        &mut self,
        node: &Node,
        name: &str,
        reduction: Reduction,
        keep_dims: bool,
        noop_with_empty_axes: bool,
    ) -> Lowered {
        let mut x = self.data(node, 0)?;
        let rank = self.b.rank(x);
        let given = self.integers(node, 1)?.unwrap_or_default();
        let mut axes = given
            .iter()
            .map(|a| self.axis(*a, rank))
            .collect::<Lowered<Vec<usize>>>()?;
        if reduction == Reduction::SumSquare {
            x = self.b.elementwise(&format!("{name}/square"), Elementwise::Prod, x, x)?;
        }
        if axes.is_empty() {
            if noop_with_empty_axes || rank == 0 {
                return Ok(x);
            }
            axes = (0..rank).collect();
        }
        axes.sort_unstable();
        let op = match reduction {
            Reduction::LogSumExp => return self.log_sum_exp(name, x, &axes, keep_dims),
            Reduction::Mean => ReduceOp::Avg,
            Reduction::Sum | Reduction::SumSquare => ReduceOp::Sum,
            Reduction::Max => ReduceOp::Max,
            Reduction::Min => ReduceOp::Min,
            Reduction::Prod => ReduceOp::Prod,
        };
        Ok(self.b.add(name, LayerKind::Reduce { op, axes, keep_dims }, &[x])?)
    }

    /// The logarithm of the sum of exponentials, taken of what is left of each without the largest.
    fn log_sum_exp(&mut self, name: &str, x: TensorId, axes: &[usize], keep_dims: bool) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let reduced = |op| LayerKind::Reduce {
            op,
            axes: axes.to_vec(),
            keep_dims: true,
        };
        let most = self.b.add(&part("most"), reduced(ReduceOp::Max), &[x])?;
        // Infinity less infinity would be no number.
        let (dtype, rank) = (self.b.dtype(x), self.b.rank(x));
        let largest = match dtype {
            DType::F16 => 65504.0,
            _ => 3e38,
        };
        let bounds = [self.number(dtype, rank, -largest)?, self.number(dtype, rank, largest)?];
        let most = self
            .b
            .elementwise(&part("not_below"), Elementwise::Max, most, bounds[0])?;
        let most = self
            .b
            .elementwise(&part("not_above"), Elementwise::Min, most, bounds[1])?;
        let below = self.b.elementwise(&part("below"), Elementwise::Sub, x, most)?;
        let exponentials = self.b.unary(&part("exponentials"), UnaryOp::Exp, below)?;
        let sum = self.b.add(&part("sum"), reduced(ReduceOp::Sum), &[exponentials])?;
        let log = self.b.unary(&part("log"), UnaryOp::Log, sum)?;
        let whole = if keep_dims { name.to_string() } else { part("kept") };
        let result = self.b.elementwise(&whole, Elementwise::Sum, log, most)?;
        if keep_dims {
            return Ok(result);
        }
        let shape = self.b.shape(result).iter().enumerate();
        let shape = shape
            .filter(|(axis, _)| !axes.contains(axis))
            .map(|(_, dim)| dim.clone());
        let shape = shape.collect();
        self.reshape(name, result, shape)
    }

    /// An ONNX axis, which may count from the end.
    pub(super) fn axis(&self, axis: i64, rank: usize) -> Lowered<usize> {
        let from_start = if axis < 0 { axis + rank as i64 } else { axis };
        match usize::try_from(from_start).ok().filter(|a| *a < rank) {
            Some(axis) => Ok(axis),
            None => Reason::unsupported(format!("axis {axis} does not exist in rank {rank}")),
        }
    }

    /// `x` with its dims of 1 repeated up to those of `to`, of equal rank.
    pub(super) fn expanded(&mut self, name: &str, x: TensorId, to: &[crate::dim::Dim]) -> Lowered {
        let shape = self.b.shape(x);
        if shape == to {
            return Ok(x);
        }
        let stride = shape.iter().zip(to).map(|(from, to)| i64::from(from == to)).collect();
        let kind = LayerKind::Slice {
            start: vec![0; to.len()],
            size: to.to_vec(),
            stride,
        };
        Ok(self.b.add(name, kind, &[x])?)
    }
}
