//! Reductions, softmax and running sums.

use super::array::{Data, Result, around, axis, floats, store, strides, walk};
use super::error::{EvalError, invalid, shape_error};
use super::{Operands, no_evaluator};
use crate::graph::op::{Op, Reduction};
use crate::tensor::{DType, Tensor};

/// The operators of this family.
pub(super) fn eval(op: &Op, operands: &Operands) -> Result<Vec<Option<Tensor>>> {
    let (need, maybe) = (|i| operands.need(i), |i| operands.maybe(i));
    let result = match op {
        Op::Softmax { axis } => softmax(need(0)?, *axis, false)?,
        Op::LogSoftmax { axis } => softmax(need(0)?, *axis, true)?,
        Op::Reduce {
            reduction: how,
            keepdims,
            noop_with_empty_axes,
        } => reduce(*how, *keepdims, *noop_with_empty_axes, need(0)?, maybe(1))?,
        Op::CumSum { exclusive, reverse } => cumsum(need(0)?, need(1)?, *exclusive, *reverse)?,
        _ => return no_evaluator(op),
    };
    Ok(vec![Some(result)])
}

pub(super) fn softmax(x: &Tensor, at: i64, log: bool) -> Result<Tensor> {
    if !x.dtype().is_float() {
        return Err(EvalError::DType {
            what: "x",
            dtype: x.dtype(),
        });
    }
    let (outer, length, inner) = around(x.shape(), axis(at, x.shape().len())?);
    let mut values = x.to_f64();
    for o in 0..outer {
        for i in 0..inner {
            let cell = |k: usize| (o * length + k) * inner + i;
            let max = (0..length).fold(f64::NEG_INFINITY, |m, k| m.max(values[cell(k)]));
            let sum: f64 = (0..length).map(|k| (values[cell(k)] - max).exp()).sum();
            for k in 0..length {
                let shifted = values[cell(k)] - max;
                values[cell(k)] = if log { shifted - sum.ln() } else { shifted.exp() / sum };
            }
        }
    }
    Ok(floats(x.dtype(), x.shape().to_vec(), &values))
}

/// Sum, product, extreme or mean over `axes`. Without elements: 0, 1, the extreme of the dtype, NaN.
pub(super) fn reduce(
    reduction: Reduction,
    keepdims: bool,
    noop_with_empty_axes: bool,
    x: &Tensor,
    axes: Option<&Tensor>,
) -> Result<Tensor> {
    let rank = x.shape().len();
    let given = axes.map(|t| t.to_i64()).unwrap_or_default();
    let mut reduced = vec![given.is_empty() && !noop_with_empty_axes; rank];
    for a in &given {
        reduced[axis(*a, rank)?] = true;
    }
    let own = strides(x.shape());
    let pick = |want: bool| -> (Vec<usize>, Vec<isize>) {
        (0..rank)
            .filter(|k| reduced[*k] == want)
            .map(|k| (x.shape()[k], own[k] as isize))
            .unzip()
    };
    let ((kept, kept_steps), (gone, gone_steps)) = (pick(false), pick(true));
    let within = walk(&gone, &gone_steps, 0);
    let starts = walk(&kept, &kept_steps, 0);
    let data = match Data::of(x) {
        Data::Float(v) => Data::Float(
            starts
                .iter()
                .map(|s| fold_floats(reduction, within.iter().map(|w| v[s + w])))
                .collect(),
        ),
        Data::Int(v) => Data::Int(
            starts
                .iter()
                .map(|s| fold_ints(reduction, x.dtype(), within.iter().map(|w| v[s + w])))
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| invalid("the mean of no integers"))?,
        ),
    };
    let shape = (0..rank)
        .filter(|k| keepdims || !reduced[*k])
        .map(|k| if reduced[k] { 1 } else { x.shape()[k] })
        .collect();
    Ok(store(x.dtype(), shape, data))
}

fn fold_floats(reduction: Reduction, values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    let keep_nan = |pick: fn(f64, f64) -> f64| {
        move |a: f64, b: f64| {
            if a.is_nan() || b.is_nan() { f64::NAN } else { pick(a, b) }
        }
    };
    match reduction {
        Reduction::Mean => values.sum::<f64>() / count,
        Reduction::Sum => values.sum(),
        Reduction::SumSquare => values.map(|v| v * v).sum(),
        Reduction::Prod => values.product(),
        Reduction::Max => values.fold(f64::NEG_INFINITY, keep_nan(f64::max)),
        Reduction::Min => values.fold(f64::INFINITY, keep_nan(f64::min)),
        Reduction::LogSumExp => {
            let values: Vec<f64> = values.collect();
            let most = values.iter().copied().fold(f64::NEG_INFINITY, keep_nan(f64::max));
            // Less the largest, no exponential overflows; nothing is less than infinity.
            let shift = if most.is_finite() { most } else { 0.0 };
            values.iter().map(|v| (v - shift).exp()).sum::<f64>().ln() + shift
        }
    }
}

/// `None`: the mean of nothing, or what only floats have.
fn fold_ints(reduction: Reduction, dtype: DType, values: impl ExactSizeIterator<Item = i64>) -> Option<i64> {
    let count = values.len() as i64;
    let (least, greatest) = match dtype {
        DType::Bool => (0, 1),
        DType::U8 => (0, 255),
        DType::I8 => (i64::from(i8::MIN), i64::from(i8::MAX)),
        DType::I32 => (i64::from(i32::MIN), i64::from(i32::MAX)),
        _ => (i64::MIN, i64::MAX),
    };
    Some(match reduction {
        Reduction::Mean => values.fold(0i64, i64::wrapping_add).checked_div(count)?,
        Reduction::Sum => values.fold(0, i64::wrapping_add),
        Reduction::SumSquare => values.fold(0, |s, v| s.wrapping_add(v.wrapping_mul(v))),
        Reduction::Prod => values.fold(1, i64::wrapping_mul),
        Reduction::Max => values.max().unwrap_or(least),
        Reduction::Min => values.min().unwrap_or(greatest),
        Reduction::LogSumExp => return None,
    })
}

pub(super) fn cumsum(x: &Tensor, at: &Tensor, exclusive: bool, reverse: bool) -> Result<Tensor> {
    let [at] = at.to_i64()[..] else {
        return Err(shape_error(format!("an axis of shape {:?}, not a scalar", at.shape())));
    };
    let (outer, length, inner) = around(x.shape(), axis(at, x.shape().len())?);
    let lines = (0..outer).flat_map(|o| (0..inner).map(move |i| (o * length) * inner + i));
    let cells = |start: usize| (0..length).map(move |k| start + if reverse { length - 1 - k } else { k } * inner);
    let data = match Data::of(x) {
        Data::Float(mut v) => {
            for start in lines {
                let mut sum = 0.0;
                for c in cells(start) {
                    let element = v[c];
                    v[c] = if exclusive { sum } else { sum + element };
                    sum += element;
                }
            }
            Data::Float(v)
        }
        Data::Int(mut v) => {
            for start in lines {
                let mut sum = 0i64;
                for c in cells(start) {
                    let element = v[c];
                    let with = sum.wrapping_add(element);
                    v[c] = if exclusive { sum } else { with };
                    sum = with;
                }
            }
            Data::Int(v)
        }
    };
    Ok(store(x.dtype(), x.shape().to_vec(), data))
}
