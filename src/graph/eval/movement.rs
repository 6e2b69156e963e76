//! Operators that move, repeat or generate elements without arithmetic on them.

use super::array::{Data, Result, around, axis, broadcast, expand, ints, reshape, store, strides, take, volume, walk};
use super::error::{invalid, shape_error};
use super::{Operands, no_evaluator};
use crate::graph::Op;
use crate::tensor::{DType, Tensor};

/// The operators of this family.
pub(super) fn eval(op: &Op, operands: &Operands) -> Result<Vec<Option<Tensor>>> {
    let (need, maybe) = (|i| operands.need(i), |i| operands.maybe(i));
    let result = match op {
        Op::Shape { start, end } => shape_of(need(0)?, *start, *end),
        Op::Size => size_of(need(0)?),
        Op::Reshape { allowzero } => reshape_to(need(0)?, need(1)?, *allowzero)?,
        Op::Transpose { perm } => permute(need(0)?, perm.as_deref())?,
        Op::Squeeze => squeeze(need(0)?, maybe(1))?,
        Op::Unsqueeze => unsqueeze(need(0)?, need(1)?)?,
        Op::Flatten { axis } => flatten(need(0)?, *axis)?,
        Op::Expand => expand_to(need(0)?, need(1)?)?,
        Op::Tile => tile(need(0)?, need(1)?)?,
        Op::Concat { axis } => {
            let parts = (0..operands.inputs.len()).map(need).collect::<Result<Vec<_>>>()?;
            concat(&parts, *axis)?
        }
        Op::Split { axis } => {
            let parts = split(need(0)?, *axis, maybe(1), operands.outputs)?;
            return Ok(parts.into_iter().map(Some).collect());
        }
        Op::Slice => slice(need(0)?, need(1)?, need(2)?, maybe(3), maybe(4))?,
        Op::Range => range(need(0)?, need(1)?, need(2)?)?,
        Op::ConstantOfShape { value } => constant_of_shape(need(0)?, value)?,
        Op::Trilu { upper } => trilu(need(0)?, maybe(1), *upper)?,
        _ => return no_evaluator(op),
    };
    Ok(vec![Some(result)])
}

/// The dims from `start` to `end`, both counted from the end when negative and clamped to the rank.
pub(super) fn shape_of(x: &Tensor, start: i64, end: Option<i64>) -> Tensor {
    let rank = x.shape().len() as i64;
    let clamp = |at: i64| (if at < 0 { at + rank } else { at }).clamp(0, rank) as usize;
    let (start, end) = (clamp(start), clamp(end.unwrap_or(rank)));
    let dims: Vec<i64> = x.shape()[start..end.max(start)].iter().map(|d| *d as i64).collect();
    Tensor::from_i64(vec![dims.len()], &dims)
}

/// Target of `Reshape`: 0 copies a dim unless `allowzero`, and one -1 is inferred.
pub(crate) fn reshape_target(from: &[usize], target: &[i64], allowzero: bool) -> Result<Vec<usize>> {
    let bad = || shape_error(format!("a tensor of shape {from:?} cannot be reshaped to {target:?}"));
    let mut shape = Vec::with_capacity(target.len());
    let mut wild = None;
    for (i, d) in target.iter().enumerate() {
        shape.push(match *d {
            0 if !allowzero => *from.get(i).ok_or_else(bad)?,
            -1 if wild.is_none() => {
                wild = Some(i);
                1
            }
            d => usize::try_from(d).map_err(|_| bad())?,
        });
    }
    if let Some(i) = wild {
        let known = shape
            .iter()
            .try_fold(1usize, |n, d| n.checked_mul(*d))
            .ok_or_else(bad)?;
        let total: usize = from.iter().product();
        // If the other dims have size zero, the -1 is undetermined; 0 keeps the volume, as NumPy and ONNX Runtime do.
        shape[i] = match total.checked_div(known) {
            Some(rest) if rest * known == total => rest,
            None if total == 0 => 0,
            _ => return Err(bad()),
        };
    }
    Ok(shape)
}

pub(super) fn reshape_to(x: &Tensor, target: &Tensor, allowzero: bool) -> Result<Tensor> {
    reshape(x, reshape_target(x.shape(), &target.to_i64(), allowzero)?)
}

pub(super) fn permute(x: &Tensor, perm: Option<&[usize]>) -> Result<Tensor> {
    let rank = x.shape().len();
    let reversed: Vec<usize> = (0..rank).rev().collect();
    let perm = perm.unwrap_or(&reversed);
    let mut sorted = perm.to_vec();
    sorted.sort_unstable();
    if !sorted.into_iter().eq(0..rank) {
        return Err(shape_error(format!("{perm:?} does not permute {rank} axes")));
    }
    Ok(super::array::transpose(x, perm))
}

pub(super) fn squeeze(x: &Tensor, axes: Option<&Tensor>) -> Result<Tensor> {
    let rank = x.shape().len();
    let mut gone = vec![false; rank];
    match axes {
        Some(axes) => {
            for a in axes.to_i64() {
                let a = axis(a, rank)?;
                if x.shape()[a] != 1 {
                    return Err(shape_error(format!("axis {a} of {:?} is not 1", x.shape())));
                }
                gone[a] = true;
            }
        }
        None => x.shape().iter().zip(&mut gone).for_each(|(d, g)| *g = *d == 1),
    }
    let kept = (0..rank).filter(|k| !gone[*k]).map(|k| x.shape()[k]).collect();
    reshape(x, kept)
}

pub(super) fn unsqueeze(x: &Tensor, axes: &Tensor) -> Result<Tensor> {
    let axes = axes.to_i64();
    let rank = x.shape().len() + axes.len();
    let mut new = vec![false; rank];
    for a in &axes {
        if std::mem::replace(&mut new[axis(*a, rank)?], true) {
            return Err(shape_error(format!("axes {axes:?} name one axis twice")));
        }
    }
    let mut old = x.shape().iter();
    let shape = new
        .iter()
        .map(|new| {
            if *new {
                1
            } else {
                *old.next().expect("as many old axes as counted")
            }
        })
        .collect();
    reshape(x, shape)
}

/// `[product before axis, product from axis on]`; the axis may be the rank itself.
pub(super) fn flatten(x: &Tensor, at: i64) -> Result<Tensor> {
    let rank = x.shape().len();
    let at = if at == rank as i64 {
        rank
    } else {
        axis(at, rank + 1 - usize::from(at < 0))?
    };
    let rows = x.shape()[..at].iter().product();
    let columns = x.shape()[at..].iter().product();
    reshape(x, vec![rows, columns])
}

/// A list of sizes read from an i64 tensor.
pub(super) fn sizes(tensor: &Tensor) -> Result<Vec<usize>> {
    tensor
        .to_i64()
        .into_iter()
        .map(|d| usize::try_from(d).map_err(|_| shape_error(format!("a negative size, {d}"))))
        .collect()
}

/// Two-way broadcast: if the target has a 1, the input's dim stays.
pub(super) fn expand_to(x: &Tensor, target: &Tensor) -> Result<Tensor> {
    let shape = broadcast(&[x.shape(), &sizes(target)?])?;
    Ok(expand(x, &shape))
}

pub(super) fn tile(x: &Tensor, repeats: &Tensor) -> Result<Tensor> {
    let repeats = sizes(repeats)?;
    if repeats.len() != x.shape().len() {
        return Err(shape_error(format!("repeats {repeats:?} for a shape {:?}", x.shape())));
    }
    // Each axis as [repeat, length] with a stride of 0 on the repeat.
    let own = strides(x.shape());
    let split: Vec<usize> = repeats.iter().zip(x.shape()).flat_map(|(r, d)| [*r, *d]).collect();
    volume(&split)?;
    let steps: Vec<isize> = own.iter().flat_map(|s| [0, *s as isize]).collect();
    let shape = repeats.iter().zip(x.shape()).map(|(r, d)| r * d).collect();
    Ok(take(x, shape, &walk(&split, &steps, 0)))
}

pub(super) fn concat(parts: &[&Tensor], at: i64) -> Result<Tensor> {
    let Some(first) = parts.first() else {
        return Err(super::EvalError::MissingInput { input: 0 });
    };
    let at = axis(at, first.shape().len())?;
    let mut shape = first.shape().to_vec();
    for part in &parts[1..] {
        let same = part.shape().len() == shape.len()
            && (0..shape.len()).all(|k| k == at || part.shape()[k] == shape[k])
            && part.dtype() == first.dtype();
        if !same {
            return Err(shape_error(format!("{parts:?} cannot be joined on axis {at}")));
        }
        shape[at] += part.shape()[at];
    }
    let total = volume(&shape)?;
    let (outer, ..) = around(&shape, at);
    let mut bytes = Vec::with_capacity(first.dtype().byte_len(total));
    for o in 0..outer {
        for part in parts {
            let run = part.data().len() / outer;
            bytes.extend_from_slice(&part.data()[o * run..(o + 1) * run]);
        }
    }
    Ok(Tensor::new(first.dtype(), shape, bytes.into()).expect("the parts' bytes"))
}

/// `sizes` on the axis, or `outputs` equal parts, the last one possibly smaller.
pub(super) fn split(x: &Tensor, at: i64, sizes_given: Option<&Tensor>, outputs: usize) -> Result<Vec<Tensor>> {
    let at = axis(at, x.shape().len())?;
    let length = x.shape()[at];
    let parts = match sizes_given {
        Some(given) => sizes(given)?,
        None => {
            let chunk = length.div_ceil(outputs.max(1));
            (0..outputs)
                .map(|i| chunk.min(length.saturating_sub(i * chunk)))
                .collect()
        }
    };
    if parts.iter().try_fold(0usize, |s, p| s.checked_add(*p)) != Some(length) {
        return Err(shape_error(format!(
            "an axis of length {length} cannot be split into {parts:?}"
        )));
    }
    let mut start = 0;
    Ok(parts
        .into_iter()
        .map(|part| {
            let range = slice_axis(x, at, start, part);
            start += part;
            range
        })
        .collect())
}

fn slice_axis(x: &Tensor, at: usize, start: usize, length: usize) -> Tensor {
    let (outer, full, inner) = around(x.shape(), at);
    let inner = inner * x.dtype().element_bytes();
    let mut bytes = Vec::with_capacity(outer * length * inner);
    for o in 0..outer {
        let row = o * full + start;
        bytes.extend_from_slice(&x.data()[row * inner..(row + length) * inner]);
    }
    let mut shape = x.shape().to_vec();
    shape[at] = length;
    Tensor::new(x.dtype(), shape, bytes.into()).expect("the slice's bytes")
}

/// First element, step and count that a `Slice` takes from an axis of `length`, ONNX's clamping applied.
pub(crate) fn slice_range(length: usize, start: i64, end: i64, step: i64) -> Option<(usize, i64, usize)> {
    let length = length as i64;
    if step == 0 {
        return None;
    }
    if length == 0 {
        return Some((0, step, 0));
    }
    let from_end = |at: i64| if at < 0 { at.saturating_add(length) } else { at };
    let (start, end) = (from_end(start), from_end(end));
    let (start, end) = if step > 0 {
        (start.clamp(0, length), end.clamp(0, length))
    } else {
        (start.clamp(0, length - 1), end.clamp(-1, length - 1))
    };
    let span = if step > 0 { end - start } else { start - end };
    let count = if span <= 0 {
        0
    } else {
        (span - 1) / step.saturating_abs() + 1
    };
    Some((start as usize, step, count as usize))
}

pub(super) fn slice(
    x: &Tensor,
    starts: &Tensor,
    ends: &Tensor,
    axes: Option<&Tensor>,
    steps: Option<&Tensor>,
) -> Result<Tensor> {
    let rank = x.shape().len();
    let (starts, ends) = (starts.to_i64(), ends.to_i64());
    let axes = axes.map_or_else(|| (0..starts.len() as i64).collect(), |a| a.to_i64());
    let steps = steps.map_or_else(|| vec![1; starts.len()], |s| s.to_i64());
    if [ends.len(), axes.len(), steps.len()].iter().any(|n| *n != starts.len()) {
        return Err(shape_error("starts, ends, axes and steps differ in length".into()));
    }
    let own = strides(x.shape());
    let mut shape = x.shape().to_vec();
    let mut walk_steps: Vec<isize> = own.iter().map(|s| *s as isize).collect();
    let mut base = 0isize;
    for i in 0..starts.len() {
        let a = axis(axes[i], rank)?;
        let (start, step, count) =
            slice_range(x.shape()[a], starts[i], ends[i], steps[i]).ok_or_else(|| invalid("a slice step of 0"))?;
        shape[a] = count;
        base += start as isize * own[a] as isize;
        // A single element needs no step; this keeps a huge step from overflowing.
        walk_steps[a] = if count > 1 { step as isize * own[a] as isize } else { 0 };
    }
    let offsets = walk(&shape, &walk_steps, base);
    Ok(take(x, shape, &offsets))
}

pub(super) fn range(start: &Tensor, limit: &Tensor, delta: &Tensor) -> Result<Tensor> {
    let dtype = start.dtype();
    if [start, limit, delta].iter().any(|t| t.len() != 1 || t.dtype() != dtype) {
        return Err(invalid(format!(
            "{start:?}, {limit:?} and {delta:?} are not scalars of one dtype"
        )));
    }
    let data = match (Data::of(start), Data::of(limit), Data::of(delta)) {
        (Data::Float(s), Data::Float(l), Data::Float(d)) => {
            let count = ((l[0] - s[0]) / d[0]).ceil();
            if !count.is_finite() {
                return Err(invalid("a range without end"));
            }
            let count = count.max(0.0) as usize;
            volume(&[count])?;
            Data::Float((0..count).map(|i| s[0] + i as f64 * d[0]).collect())
        }
        (Data::Int(s), Data::Int(l), Data::Int(d)) => {
            let (s, l, d) = (i128::from(s[0]), i128::from(l[0]), i128::from(d[0]));
            if d == 0 {
                return Err(invalid("a range with a step of 0"));
            }
            let span = if d > 0 { l - s } else { s - l };
            let count = if span <= 0 { 0 } else { (span - 1) / d.abs() + 1 };
            let count = volume(&[usize::try_from(count).unwrap_or(usize::MAX)])?;
            Data::Int((0..count as i128).map(|i| (s + i * d) as i64).collect())
        }
        _ => unreachable!("one dtype"),
    };
    let count = match &data {
        Data::Float(v) => v.len(),
        Data::Int(v) => v.len(),
    };
    Ok(store(dtype, vec![count], data))
}

pub(super) fn constant_of_shape(shape: &Tensor, value: &Tensor) -> Result<Tensor> {
    if value.len() != 1 {
        return Err(shape_error(format!("a fill value of shape {:?}", value.shape())));
    }
    let shape = sizes(shape)?;
    let count = volume(&shape)?;
    Ok(take(value, shape, &vec![0; count]))
}

/// Keeps the upper (or lower) triangle of the last two axes, `k` diagonals up; the rest is zero.
pub(super) fn trilu(x: &Tensor, k: Option<&Tensor>, upper: bool) -> Result<Tensor> {
    let [.., rows, columns] = *x.shape() else {
        return Err(shape_error(format!(
            "a tensor of shape {:?} is not a matrix",
            x.shape()
        )));
    };
    let k = k.map_or(0, |k| k.to_i64().first().copied().unwrap_or(0));
    let size = x.dtype().element_bytes();
    let mut bytes = x.data().to_vec();
    for (n, element) in bytes.chunks_exact_mut(size).enumerate() {
        let (row, column) = ((n / columns % rows) as i64, (n % columns) as i64);
        let diagonal = column - row;
        if if upper { diagonal < k } else { diagonal > k } {
            element.fill(0);
        }
    }
    Ok(Tensor::new(x.dtype(), x.shape().to_vec(), bytes.into()).expect("the same size"))
}

pub(super) fn size_of(x: &Tensor) -> Tensor {
    ints(DType::I64, vec![], &[x.len() as i64])
}
