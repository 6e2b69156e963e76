//! Arithmetic on the elements of small tensors, as dims (lengths) or numbers (constants).

use super::Elements;
use super::MAX_CONTENTS;
use crate::dim::Dim;
use crate::graph::op::{Binary, Unary};
use crate::graph::{Constant, ConstantSource};
use crate::tensor::DType;

/// Beyond this, fp32 does not represent every whole number.
const MAX_EXACT: f64 = 16_777_216.0;

/// The elements of a constant, if it is small.
pub(super) fn of_constant(constant: &Constant) -> Option<Elements> {
    if constant.len() > MAX_CONTENTS || constant.is_empty() && constant.shape().len() > 1 {
        return None;
    }
    if matches!(constant.source(), ConstantSource::Absent) {
        return None;
    }
    let tensor = constant.materialize().ok()?;
    Some(if tensor.dtype().is_float_format() {
        let whole = |v: f64| (v.fract() == 0.0 && v.abs() <= MAX_EXACT).then(|| Dim::constant(v as i64));
        tensor.to_f64().into_iter().map(whole).collect()
    } else {
        tensor.to_i64().into_iter().map(|v| Some(Dim::constant(v))).collect()
    })
}

/// The number of elements of a shape, if it is constant and small.
pub(super) fn volume(shape: &[Dim]) -> Option<usize> {
    let volume = shape.iter().try_fold(1usize, |n, d| {
        let d = usize::try_from(d.as_const()?).ok()?;
        n.checked_mul(d)
    })?;
    (volume <= MAX_CONTENTS).then_some(volume)
}

/// For each element of `to`, the index of the element of `from` that broadcasts to it. Both constant and small.
pub(super) fn broadcast_indices(from: &[Dim], to: &[Dim]) -> Option<Vec<usize>> {
    let volume = volume(to)?;
    let size = |d: &Dim| d.as_const().and_then(|d| usize::try_from(d).ok());
    let to: Vec<usize> = to.iter().map(size).collect::<Option<_>>()?;
    let from: Vec<usize> = from.iter().map(size).collect::<Option<_>>()?;
    let missing = to.len().checked_sub(from.len())?;
    let mut strides = vec![0usize; to.len()];
    let mut stride = 1;
    for (axis, size) in from.iter().enumerate().rev() {
        if *size != 1 {
            strides[missing + axis] = stride;
        }
        stride *= size;
    }
    let index = |mut flat: usize| {
        let mut at = 0;
        for axis in (0..to.len()).rev() {
            at += flat % to[axis] * strides[axis];
            flat /= to[axis];
        }
        at
    };
    Some((0..volume).map(index).collect())
}

pub(super) fn unary(op: Unary, x: &Dim, dtype: DType) -> Option<Dim> {
    match op {
        Unary::Neg => Some(&Dim::default() - x),
        Unary::Abs => match (x.lower_bound(), x.upper_bound()) {
            (Some(low), _) if low >= 0 => Some(x.clone()),
            (_, Some(high)) if high <= 0 => Some(&Dim::default() - x),
            _ => None,
        },
        Unary::Not => Some(Dim::constant(i64::from(x.as_const()? == 0))),
        // The floor of a whole number is itself.
        Unary::Floor | Unary::Ceil | Unary::Round => Some(x.clone()),
        Unary::Relu => x.lower_bound().filter(|low| *low >= 0).map(|_| x.clone()),
        Unary::Sign => match (x.lower_bound(), x.upper_bound()) {
            (Some(low), _) if low > 0 => Some(Dim::constant(1)),
            (_, Some(high)) if high < 0 => Some(Dim::constant(-1)),
            _ => x.as_const().map(|v| Dim::constant(v.signum())),
        },
        Unary::Sqrt if dtype.is_float() => {
            let value = x.as_const().filter(|v| *v >= 0)?;
            let root = value.isqrt();
            (root * root == value).then(|| Dim::constant(root))
        }
        _ => None,
    }
}

/// Whether `a < b`, if that can be decided.
fn less(a: &Dim, b: &Dim) -> Option<bool> {
    let difference = b - a;
    match (difference.lower_bound(), difference.upper_bound()) {
        (Some(low), _) if low > 0 => Some(true),
        (_, Some(high)) if high <= 0 => Some(false),
        _ => None,
    }
}

fn equal(a: &Dim, b: &Dim) -> Option<bool> {
    if a == b {
        return Some(true);
    }
    let apart = less(a, b) == Some(true) || less(b, a) == Some(true);
    apart.then_some(false)
}

pub(super) fn binary(op: Binary, a: &Dim, b: &Dim, dtype: DType) -> Option<Dim> {
    let truth = |known: Option<bool>| known.map(|t| Dim::constant(i64::from(t)));
    match op {
        Binary::Add => Some(a + b),
        Binary::Sub => Some(a - b),
        Binary::Mul => Some(a * b),
        Binary::Div => divide(a, b, dtype),
        Binary::Mod => {
            let (a, b) = (a.as_const()?, b.as_const()?);
            let remainder = a.checked_rem_euclid(b)?;
            // Euclid's remainder is never negative; ONNX's has the sign of the divisor for integers.
            let signed = if b < 0 && remainder != 0 {
                remainder + b
            } else {
                remainder
            };
            (!dtype.is_float() || a >= 0 && b > 0).then(|| Dim::constant(signed))
        }
        Binary::Pow => {
            let power = u32::try_from(b.as_const()?).ok().filter(|p| *p <= 8)?;
            Some((0..power).fold(Dim::constant(1), |product, _| &product * a))
        }
        Binary::Max => match less(a, b) {
            _ if a == b => Some(a.clone()),
            Some(true) => Some(b.clone()),
            Some(false) => Some(a.clone()),
            // If a < b is undecided, b <= a may be decidable, as for `past` and 0: not less, possibly equal.
            None => less(b, a).map(|b_less| if b_less { a.clone() } else { b.clone() }),
        },
        Binary::Min => match less(a, b) {
            _ if a == b => Some(a.clone()),
            Some(true) => Some(a.clone()),
            Some(false) => Some(b.clone()),
            None => less(b, a).map(|b_less| if b_less { b.clone() } else { a.clone() }),
        },
        Binary::Equal => truth(equal(a, b)),
        Binary::Less => truth(less(a, b)),
        Binary::Greater => truth(less(b, a)),
        Binary::LessOrEqual => truth(less(b, a).map(|t| !t)),
        Binary::GreaterOrEqual => truth(less(a, b).map(|t| !t)),
        // Bool elements are 0 or 1.
        Binary::And => Some(Dim::constant(a.as_const()? & b.as_const()?)),
        Binary::Or => Some(Dim::constant(a.as_const()? | b.as_const()?)),
        Binary::Xor => Some(Dim::constant(a.as_const()? ^ b.as_const()?)),
    }
}

/// Integers round toward zero; floats are known only if the division is exact.
fn divide(a: &Dim, b: &Dim, dtype: DType) -> Option<Dim> {
    if let Some(exact) = a.div_exact(b) {
        return Some(exact);
    }
    let (a, b) = (a.as_const()?, b.as_const()?);
    (!dtype.is_float()).then(|| a.checked_div(b).map(Dim::constant))?
}

/// An element converted to another dtype.
pub(super) fn cast(x: &Dim, to: DType) -> Option<Dim> {
    let within = |low: i64, high: i64| x.as_const().filter(|v| (low..=high).contains(v)).map(Dim::constant);
    match to {
        DType::I64 | DType::F64 | DType::F32 => Some(x.clone()),
        // A length that exceeds an i32 does not fit into memory either.
        DType::I32 => match x.as_const() {
            Some(_) => within(i64::from(i32::MIN), i64::from(i32::MAX)),
            None => Some(x.clone()),
        },
        DType::Bool => equal(x, &Dim::default()).map(|zero| Dim::constant(i64::from(!zero))),
        // For floats, only what they represent exactly.
        narrow => {
            let (low, high) = narrow.int_range();
            within(low, high)
        }
    }
}

/// Elements selected by index; unknown if the index is out of range.
pub(super) fn pick(elements: &[Option<Dim>], indices: impl IntoIterator<Item = usize>) -> Elements {
    let at = |i: usize| elements.get(i).cloned().flatten();
    indices.into_iter().map(at).collect()
}
