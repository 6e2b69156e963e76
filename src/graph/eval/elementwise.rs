//! Operators that compute each element from the elements at the same place, with broadcasting.

use super::array::{Data, Result, broadcast, broadcast_offsets, expand, floats, ints, store};
use super::error::{EvalError, invalid, shape_error};
use super::{Operands, no_evaluator};
use crate::graph::op::{Binary, Op, Unary};
use crate::tensor::{DType, Tensor};
/// The operators of this family.
pub(super) fn eval(op: &Op, operands: &Operands) -> Result<Vec<Option<Tensor>>> {
    let (need, maybe) = (|i| operands.need(i), |i| operands.maybe(i));
    let result = match op {
        Op::Unary(op) => unary(*op, need(0)?)?,
        Op::Binary(op) => binary(*op, need(0)?, need(1)?)?,
        Op::Gelu { tanh } => gelu(need(0)?, *tanh)?,
        Op::Swish { alpha } => swish(need(0)?, *alpha)?,
        Op::Elu { alpha } => elu(need(0)?, *alpha)?,
        Op::Clip => clip(need(0)?, maybe(1), maybe(2))?,
        Op::Identity => need(0)?.clone(),
        Op::Cast { to } => cast(need(0)?, *to),
        Op::CastLike => cast(need(0)?, need(1)?.dtype()),
        Op::Where => select(need(0)?, need(1)?, need(2)?)?,
        _ => return no_evaluator(op),
    };
    Ok(vec![Some(result)])
}

pub(super) fn unary(op: Unary, x: &Tensor) -> Result<Tensor> {
    let (dtype, shape) = (x.dtype(), x.shape().to_vec());
    let data = match (op, Data::of(x)) {
        (Unary::Not, Data::Int(v)) if dtype == DType::Bool => Data::Int(v.iter().map(|v| i64::from(*v == 0)).collect()),
        (Unary::Not, _) => return Err(EvalError::DType { what: "x", dtype }),
        (Unary::IsNan, Data::Float(v)) => {
            let nan: Vec<i64> = v.iter().map(|v| i64::from(v.is_nan())).collect();
            return Ok(ints(DType::Bool, shape, &nan));
        }
        (Unary::Abs, Data::Int(v)) => Data::Int(v.iter().map(|v| v.wrapping_abs()).collect()),
        (Unary::Neg, Data::Int(v)) => Data::Int(v.iter().map(|v| v.wrapping_neg()).collect()),
        (Unary::Sign, Data::Int(v)) => Data::Int(v.iter().map(|v| v.signum()).collect()),
        (Unary::Relu, Data::Int(v)) => Data::Int(v.iter().map(|v| *v.max(&0)).collect()),
        (_, Data::Int(_)) => return Err(EvalError::DType { what: "x", dtype }),
        (op, Data::Float(v)) => Data::Float(v.iter().map(|v| float_unary(op, *v)).collect()),
    };
    Ok(store(dtype, shape, data))
}

fn float_unary(op: Unary, x: f64) -> f64 {
    match op {
        Unary::Abs => x.abs(),
        Unary::Ceil => x.ceil(),
        Unary::Cos => x.cos(),
        Unary::Erf => erf(x),
        Unary::Exp => x.exp(),
        Unary::Floor => x.floor(),
        Unary::Log => x.ln(),
        Unary::Neg => -x,
        Unary::Reciprocal => 1.0 / x,
        // Not `max`, which would turn a NaN into 0.
        Unary::Relu => {
            if x < 0.0 {
                0.0
            } else {
                x
            }
        }
        Unary::Round => x.round_ties_even(),
        Unary::Sigmoid => sigmoid(x),
        Unary::Sign if x == 0.0 || x.is_nan() => x,
        Unary::Sign => x.signum(),
        Unary::Sin => x.sin(),
        // ln(1 + e^x) without overflow.
        Unary::Softplus => x.max(0.0) + (-x.abs()).exp().ln_1p(),
        Unary::Sqrt => x.sqrt(),
        Unary::Tanh => x.tanh(),
        Unary::IsNan | Unary::Not => unreachable!("handled by the caller"),
    }
}

pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The error function by the series `2/√π e^(-x²) Σ 2ⁿ x^(2n+1) / (2n+1)!!` (Abramowitz and Stegun 7.1.6), whose terms
/// all have one sign, so nothing cancels. Beyond 6 the result is ±1 in f64.
pub(super) fn erf(x: f64) -> f64 {
    if x.is_nan() {
        return x;
    }
    if x.abs() > 6.0 {
        return x.signum();
    }
    let (mut term, mut sum, mut n) = (x, x, 0.0);
    while term.abs() > sum.abs() * 1e-17 {
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
        sum += term;
    }
    2.0 / std::f64::consts::PI.sqrt() * (-x * x).exp() * sum
}

pub(super) fn gelu(x: &Tensor, tanh: bool) -> Result<Tensor> {
    map_float(x, |x| {
        if tanh {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        } else {
            0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2))
        }
    })
}

pub(super) fn swish(x: &Tensor, alpha: f32) -> Result<Tensor> {
    map_float(x, |x| x * sigmoid(f64::from(alpha) * x))
}

fn elu(x: &Tensor, alpha: f32) -> Result<Tensor> {
    map_float(x, |x| if x > 0.0 { x } else { f64::from(alpha) * x.exp_m1() })
}

pub(super) fn map_float(x: &Tensor, f: impl Fn(f64) -> f64) -> Result<Tensor> {
    if !x.dtype().is_float() {
        return Err(EvalError::DType {
            what: "x",
            dtype: x.dtype(),
        });
    }
    let values: Vec<f64> = x.to_f64().into_iter().map(f).collect();
    Ok(floats(x.dtype(), x.shape().to_vec(), &values))
}

fn is_comparison(op: Binary) -> bool {
    use Binary::*;
    matches!(op, Equal | Less | LessOrEqual | Greater | GreaterOrEqual)
}

pub(super) fn binary(op: Binary, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let dtype = a.dtype();
    if op == Binary::Pow {
        return pow(a, b);
    }
    if dtype != b.dtype() {
        return Err(invalid(format!("operands of two dtypes, {dtype} and {}", b.dtype())));
    }
    if matches!(op, Binary::And | Binary::Or | Binary::Xor) && dtype != DType::Bool {
        return Err(EvalError::DType { what: "a", dtype });
    }
    let shape = broadcast(&[a.shape(), b.shape()])?;
    let (left, right) = (
        broadcast_offsets(a.shape(), &shape),
        broadcast_offsets(b.shape(), &shape),
    );
    let pairs = left.iter().zip(&right);
    if is_comparison(op) {
        let truth: Vec<i64> = match (Data::of(a), Data::of(b)) {
            (Data::Float(x), Data::Float(y)) => pairs.map(|(i, j)| compare(op, x[*i], y[*j])).collect(),
            (Data::Int(x), Data::Int(y)) => pairs.map(|(i, j)| compare(op, x[*i], y[*j])).collect(),
            _ => unreachable!("one dtype"),
        };
        return Ok(ints(DType::Bool, shape, &truth));
    }
    let data = match (Data::of(a), Data::of(b)) {
        (Data::Float(x), Data::Float(y)) => Data::Float(pairs.map(|(i, j)| float_binary(op, x[*i], y[*j])).collect()),
        (Data::Int(x), Data::Int(y)) => Data::Int(
            pairs
                .map(|(i, j)| int_binary(op, x[*i], y[*j]))
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| invalid("an integer is divided by zero"))?,
        ),
        _ => unreachable!("one dtype"),
    };
    Ok(store(dtype, shape, data))
}

fn compare<T: PartialOrd>(op: Binary, x: T, y: T) -> i64 {
    i64::from(match op {
        Binary::Equal => x == y,
        Binary::Less => x < y,
        Binary::LessOrEqual => x <= y,
        Binary::Greater => x > y,
        _ => x >= y,
    })
}

fn float_binary(op: Binary, x: f64, y: f64) -> f64 {
    match op {
        Binary::Add => x + y,
        Binary::Sub => x - y,
        Binary::Mul => x * y,
        Binary::Div => x / y,
        Binary::Mod => x % y,
        // `f64::max` drops a NaN; ONNX follows NumPy, which keeps it.
        Binary::Max | Binary::Min if x.is_nan() || y.is_nan() => f64::NAN,
        Binary::Max => x.max(y),
        Binary::Min => x.min(y),
        other => unreachable!("{other:?} is not arithmetic on floats"),
    }
}

/// `None`: division by zero.
fn int_binary(op: Binary, x: i64, y: i64) -> Option<i64> {
    Some(match op {
        Binary::Add => x.wrapping_add(y),
        Binary::Sub => x.wrapping_sub(y),
        Binary::Mul => x.wrapping_mul(y),
        Binary::Div | Binary::Mod if y == 0 => return None,
        Binary::Div => x.wrapping_div(y),
        // The result takes the sign of the divisor.
        Binary::Mod => {
            let r = x.wrapping_rem(y);
            if r != 0 && (r < 0) != (y < 0) { r + y } else { r }
        }
        Binary::Max => x.max(y),
        Binary::Min => x.min(y),
        Binary::And => x & y,
        Binary::Or => x | y,
        Binary::Xor => x ^ y,
        other => unreachable!("{other:?} is not arithmetic on integers"),
    })
}

/// The exponent may have another dtype; the result has the base's.
fn pow(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let shape = broadcast(&[a.shape(), b.shape()])?;
    let (left, right) = (
        broadcast_offsets(a.shape(), &shape),
        broadcast_offsets(b.shape(), &shape),
    );
    let pairs = left.iter().zip(&right);
    let data = match (Data::of(a), Data::of(b)) {
        (Data::Int(x), Data::Int(y)) => Data::Int(pairs.map(|(i, j)| int_pow(x[*i], y[*j])).collect()),
        (Data::Int(x), Data::Float(y)) => Data::Int(pairs.map(|(i, j)| (x[*i] as f64).powf(y[*j]) as i64).collect()),
        (Data::Float(x), Data::Float(y)) => Data::Float(pairs.map(|(i, j)| x[*i].powf(y[*j])).collect()),
        (Data::Float(x), Data::Int(y)) => Data::Float(pairs.map(|(i, j)| x[*i].powf(y[*j] as f64)).collect()),
    };
    Ok(store(a.dtype(), shape, data))
}

fn int_pow(base: i64, exponent: i64) -> i64 {
    match u32::try_from(exponent) {
        Ok(exponent) => base.wrapping_pow(exponent),
        Err(_) => (base as f64).powf(exponent as f64) as i64,
    }
}

/// `min(max(x, low), high)`: if the bounds cross, the high one wins, as in ONNX.
pub(super) fn clip(x: &Tensor, low: Option<&Tensor>, high: Option<&Tensor>) -> Result<Tensor> {
    let mut result = x.clone();
    for (op, bound) in [(Binary::Max, low), (Binary::Min, high)] {
        if let Some(bound) = bound {
            if bound.len() != 1 {
                return Err(shape_error(format!(
                    "a bound of shape {:?}, not a scalar",
                    bound.shape()
                )));
            }
            let bound = bound.reshaped(vec![]).expect("one element");
            result = binary(op, &result, &bound)?;
        }
    }
    Ok(result)
}

/// Float to integer truncates toward zero (out of range is undefined in ONNX; here it saturates, NaN is 0), integer to
/// narrower integer wraps, anything to bool is "not zero", float to narrower float rounds to nearest even, past the
/// range to infinity.
pub(super) fn cast(x: &Tensor, to: DType) -> Tensor {
    if x.dtype() == to {
        return x.clone();
    }
    let shape = x.shape().to_vec();
    match (Data::of(x), to) {
        (Data::Float(v), DType::Bool) => {
            let truth: Vec<i64> = v.iter().map(|v| i64::from(*v != 0.0)).collect();
            ints(to, shape, &truth)
        }
        (Data::Float(v), to) if to.is_float_format() => floats(to, shape, &v),
        (Data::Float(v), to) => {
            let (low, high) = to.int_range();
            let whole: Vec<i64> = v.iter().map(|v| v.clamp(low as f64, high as f64) as i64).collect();
            ints(to, shape, &whole)
        }
        (Data::Int(v), to) if to.is_float_format() => {
            let values: Vec<f64> = v.iter().map(|v| *v as f64).collect();
            floats(to, shape, &values)
        }
        (Data::Int(v), to) => ints(to, shape, &v),
    }
}

pub(super) fn select(condition: &Tensor, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    if condition.dtype() != DType::Bool {
        return Err(EvalError::DType {
            what: "condition",
            dtype: condition.dtype(),
        });
    }
    if x.dtype() != y.dtype() {
        return Err(invalid(format!(
            "choices of two dtypes, {} and {}",
            x.dtype(),
            y.dtype()
        )));
    }
    let shape = broadcast(&[condition.shape(), x.shape(), y.shape()])?;
    let (condition, x, y) = (expand(condition, &shape), expand(x, &shape), expand(y, &shape));
    let size = x.dtype().element_bytes();
    let mut bytes = y.data().to_vec();
    for (i, chosen) in condition.data().iter().enumerate() {
        if *chosen != 0 {
            bytes[i * size..(i + 1) * size].copy_from_slice(&x.data()[i * size..(i + 1) * size]);
        }
    }
    Ok(Tensor::new(x.dtype(), shape, bytes.into()).expect("the size of y"))
}
