//! Operators that choose elements by their value.

use std::cmp::Ordering;

use super::array::{Data, Result, around, axis, ints, store, strides, take, volume};
use super::error::{invalid, shape_error};
use super::{Operands, no_evaluator};
use crate::graph::op::Op;
use crate::tensor::{DType, Tensor};

/// The operators of this family.
pub(super) fn eval(op: &Op, operands: &Operands) -> Result<Vec<Option<Tensor>>> {
    let need = |i| operands.need(i);
    Ok(match op {
        Op::TopK { axis, largest, .. } => {
            let [values, indices] = top_k(need(0)?, need(1)?, *axis, *largest)?;
            vec![Some(values), Some(indices)]
        }
        Op::ArgMax {
            axis,
            keepdims,
            select_last_index,
        } => vec![Some(arg_max(need(0)?, *axis, *keepdims, *select_last_index)?)],
        Op::NonZero => vec![Some(non_zero(need(0)?))],
        Op::OneHot { axis } => vec![Some(one_hot(need(0)?, need(1)?, need(2)?, *axis)?)],
        _ => return no_evaluator(op),
    })
}

/// Numbers from 0 on, the greatest of `of(number)` first; equal ones and those that do not compare in their order.
pub(super) fn falling(count: usize, of: impl Fn(usize) -> f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..count).collect();
    order.sort_by(|a, b| of(*b).partial_cmp(&of(*a)).unwrap_or(Ordering::Equal));
    order
}

fn top_k(x: &Tensor, k: &Tensor, at: i64, largest: bool) -> Result<[Tensor; 2]> {
    let at = axis(at, x.shape().len())?;
    let (outer, length, inner) = around(x.shape(), at);
    let k = k.to_i64().first().and_then(|k| usize::try_from(*k).ok());
    let Some(k) = k.filter(|k| *k <= length) else {
        return Err(shape_error(format!(
            "more elements are chosen than the {length} of an axis"
        )));
    };
    let values = x.to_f64();
    let sign = if largest { 1.0 } else { -1.0 };
    let mut shape = x.shape().to_vec();
    shape[at] = k;
    let (mut offsets, mut indices) = (vec![0; outer * k * inner], vec![0i64; outer * k * inner]);
    for o in 0..outer {
        for i in 0..inner {
            let order = falling(length, |n| sign * values[(o * length + n) * inner + i]);
            for (rank, n) in order.into_iter().take(k).enumerate() {
                let to = (o * k + rank) * inner + i;
                offsets[to] = (o * length + n) * inner + i;
                indices[to] = n as i64;
            }
        }
    }
    Ok([take(x, shape.clone(), &offsets), Tensor::from_i64(shape, &indices)])
}

fn arg_max(x: &Tensor, at: i64, keepdims: bool, last: bool) -> Result<Tensor> {
    let at = axis(at, x.shape().len())?;
    let (outer, length, inner) = around(x.shape(), at);
    if length == 0 {
        return Err(shape_error("the greatest of no elements".to_string()));
    }
    let values = x.to_f64();
    let mut found = Vec::with_capacity(outer * inner);
    for o in 0..outer {
        for i in 0..inner {
            let value = |n: usize| values[(o * length + n) * inner + i];
            let best = (1..length).fold(0, |best, n| match value(n).partial_cmp(&value(best)) {
                Some(Ordering::Greater) => n,
                Some(Ordering::Equal) if last => n,
                _ => best,
            });
            found.push(best as i64);
        }
    }
    let mut shape = x.shape().to_vec();
    match keepdims {
        true => shape[at] = 1,
        false => drop(shape.remove(at)),
    }
    Ok(ints(DType::I64, shape, &found))
}

fn non_zero(x: &Tensor) -> Tensor {
    let places: Vec<usize> = match Data::of(x) {
        Data::Float(values) => (0..values.len()).filter(|i| values[*i] != 0.0).collect(),
        Data::Int(values) => (0..values.len()).filter(|i| values[*i] != 0).collect(),
    };
    let shape = x.shape();
    // A scalar has one element, which has no index.
    let own = strides(shape);
    let mut indices = Vec::with_capacity(shape.len() * places.len());
    for (stride, dim) in own.iter().zip(shape) {
        indices.extend(places.iter().map(|place| (place / stride % dim) as i64));
    }
    Tensor::from_i64(vec![shape.len(), places.len()], &indices)
}

fn one_hot(indices: &Tensor, depth: &Tensor, values: &Tensor, at: i64) -> Result<Tensor> {
    let mut shape = indices.shape().to_vec();
    let at = axis(at, shape.len() + 1)?;
    let depth = depth.to_f64().first().map(|d| *d as i64).filter(|d| *d > 0);
    let (Some(depth), [2]) = (depth, values.shape()) else {
        return Err(invalid("a depth above 0 and two values are needed"));
    };
    shape.insert(at, depth as usize);
    let total = volume(&shape)?;
    let inner: usize = shape[at + 1..].iter().product();
    let picks = indices.to_f64();
    let mut hot = vec![0usize; total];
    for (n, pick) in picks.iter().enumerate() {
        let pick = *pick as i64;
        // An index outside the axis sets nothing.
        let pick = if pick < 0 { pick + depth } else { pick };
        if (0..depth).contains(&pick) {
            hot[(n / inner.max(1) * depth as usize + pick as usize) * inner + n % inner.max(1)] = 1;
        }
    }
    let data = match Data::of(values) {
        Data::Float(v) => Data::Float(hot.iter().map(|i| v[*i]).collect()),
        Data::Int(v) => Data::Int(hot.iter().map(|i| v[*i]).collect()),
    };
    Ok(store(values.dtype(), shape, data))
}
