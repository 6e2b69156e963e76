//! Operators that read or write elements at positions from an index tensor.

use super::array::{Data, Result, around, axis, index, store, strides, take, volume};
use super::error::{invalid, shape_error};
use super::{Operands, no_evaluator};
use crate::graph::op::{Op, ScatterMode};
use crate::tensor::Tensor;

/// The operators of this family.
pub(super) fn eval(op: &Op, operands: &Operands) -> Result<Vec<Option<Tensor>>> {
    let (need, maybe) = (|i| operands.need(i), |i| operands.maybe(i));
    let result = match op {
        Op::Gather { axis } => gather(need(0)?, need(1)?, *axis)?,
        Op::GatherElements { axis } => gather_elements(need(0)?, need(1)?, *axis)?,
        Op::GatherNd { batch_dims } => gather_nd(need(0)?, need(1)?, *batch_dims)?,
        Op::ScatterNd { mode } => scatter_nd(need(0)?, need(1)?, need(2)?, *mode)?,
        Op::ScatterElements { axis, mode } => scatter_elements(need(0)?, need(1)?, need(2)?, *axis, *mode)?,
        Op::TensorScatter { axis, circular } => tensor_scatter(need(0)?, need(1)?, maybe(2), *axis, *circular)?,
        _ => return no_evaluator(op),
    };
    Ok(vec![Some(result)])
}

pub(super) fn gather(x: &Tensor, indices: &Tensor, at: i64) -> Result<Tensor> {
    let at = axis(at, x.shape().len())?;
    let (outer, length, inner) = around(x.shape(), at);
    let picks = indices
        .to_i64()
        .into_iter()
        .map(|i| index(i, length))
        .collect::<Result<Vec<_>>>()?;
    let mut shape = x.shape()[..at].to_vec();
    shape.extend(indices.shape());
    shape.extend(&x.shape()[at + 1..]);
    volume(&shape)?;
    let run = inner * x.dtype().element_bytes();
    let mut bytes = Vec::with_capacity(outer * picks.len() * run);
    for o in 0..outer {
        for pick in &picks {
            let row = o * length + pick;
            bytes.extend_from_slice(&x.data()[row * run..(row + 1) * run]);
        }
    }
    Ok(Tensor::new(x.dtype(), shape, bytes.into()).expect("one row per index"))
}

/// Offsets in a tensor of shape `shape` that an element-wise gather or scatter accesses, one per index.
fn element_offsets(shape: &[usize], indices: &Tensor, at: usize) -> Result<Vec<usize>> {
    let fits =
        indices.shape().len() == shape.len() && (0..shape.len()).all(|k| k == at || indices.shape()[k] <= shape[k]);
    if !fits {
        return Err(shape_error(format!(
            "indices of shape {:?} into a tensor of shape {shape:?} on axis {at}",
            indices.shape()
        )));
    }
    let (own, theirs) = (strides(shape), strides(indices.shape()));
    let picks = indices.to_i64();
    picks
        .iter()
        .enumerate()
        .map(|(n, pick)| {
            let mut offset = index(*pick, shape[at])? * own[at];
            for k in (0..shape.len()).filter(|k| *k != at) {
                offset += n / theirs[k] % indices.shape()[k] * own[k];
            }
            Ok(offset)
        })
        .collect()
}

pub(super) fn gather_elements(x: &Tensor, indices: &Tensor, at: i64) -> Result<Tensor> {
    let at = axis(at, x.shape().len())?;
    let offsets = element_offsets(x.shape(), indices, at)?;
    Ok(take(x, indices.shape().to_vec(), &offsets))
}

/// Offsets of the blocks that index tuples `[.., depth]` name in the axes of `shape` from `batch_dims` on. Returns one
/// offset per tuple and the length of a block.
fn tuple_offsets(shape: &[usize], indices: &Tensor, batch_dims: usize) -> Result<(Vec<usize>, usize)> {
    let bad = || {
        shape_error(format!(
            "index tuples of shape {:?} into a tensor of shape {shape:?} with {batch_dims} batch axes",
            indices.shape()
        ))
    };
    let [prefix @ .., depth] = indices.shape() else {
        return Err(bad());
    };
    let batched =
        batch_dims <= prefix.len() && batch_dims <= shape.len() && prefix[..batch_dims] == shape[..batch_dims];
    if !batched || batch_dims + depth > shape.len() {
        return Err(bad());
    }
    let own = strides(shape);
    let batches: usize = shape[..batch_dims].iter().product();
    let per_batch: usize = shape[batch_dims..].iter().product();
    let tuples: usize = prefix.iter().product();
    let block: usize = shape[batch_dims + depth..].iter().product();
    let picks = indices.to_i64();
    let offsets = (0..tuples)
        .map(|t| {
            let batch = t / (tuples / batches);
            (0..*depth).try_fold(batch * per_batch, |offset, d| {
                let k = batch_dims + d;
                Ok(offset + index(picks[t * depth + d], shape[k])? * own[k])
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok((offsets, block))
}

pub(super) fn gather_nd(x: &Tensor, indices: &Tensor, batch_dims: usize) -> Result<Tensor> {
    let (offsets, block) = tuple_offsets(x.shape(), indices, batch_dims)?;
    let depth = *indices.shape().last().expect("checked by tuple_offsets");
    let mut shape = indices.shape()[..indices.shape().len() - 1].to_vec();
    shape.extend(&x.shape()[batch_dims + depth..]);
    let elements: Vec<usize> = offsets.iter().flat_map(|o| *o..o + block).collect();
    Ok(take(x, shape, &elements))
}

/// `x` with `updates[i]` combined into the element at `offsets[i]`, in order.
fn scatter(x: &Tensor, updates: &Tensor, offsets: &[usize], mode: ScatterMode) -> Result<Tensor> {
    if x.dtype() != updates.dtype() {
        return Err(invalid(format!(
            "updates of {} into a tensor of {}",
            updates.dtype(),
            x.dtype()
        )));
    }
    if mode == ScatterMode::Replace {
        let size = x.dtype().element_bytes();
        let mut bytes = x.data().to_vec();
        for (i, o) in offsets.iter().enumerate() {
            bytes[o * size..(o + 1) * size].copy_from_slice(&updates.data()[i * size..(i + 1) * size]);
        }
        return Ok(Tensor::new(x.dtype(), x.shape().to_vec(), bytes.into()).expect("the same size"));
    }
    let data = match (Data::of(x), Data::of(updates)) {
        (Data::Float(mut x), Data::Float(u)) => {
            for (i, o) in offsets.iter().enumerate() {
                x[*o] = match mode {
                    ScatterMode::Add => x[*o] + u[i],
                    ScatterMode::Mul => x[*o] * u[i],
                    ScatterMode::Max => x[*o].max(u[i]),
                    _ => x[*o].min(u[i]),
                };
            }
            Data::Float(x)
        }
        (Data::Int(mut x), Data::Int(u)) => {
            for (i, o) in offsets.iter().enumerate() {
                x[*o] = match mode {
                    ScatterMode::Add => x[*o].wrapping_add(u[i]),
                    ScatterMode::Mul => x[*o].wrapping_mul(u[i]),
                    ScatterMode::Max => x[*o].max(u[i]),
                    _ => x[*o].min(u[i]),
                };
            }
            Data::Int(x)
        }
        _ => unreachable!("one dtype"),
    };
    Ok(store(x.dtype(), x.shape().to_vec(), data))
}

pub(super) fn scatter_elements(
    x: &Tensor,
    indices: &Tensor,
    updates: &Tensor,
    at: i64,
    mode: ScatterMode,
) -> Result<Tensor> {
    let at = axis(at, x.shape().len())?;
    if indices.shape() != updates.shape() {
        return Err(shape_error(format!(
            "indices of shape {:?} with updates of shape {:?}",
            indices.shape(),
            updates.shape()
        )));
    }
    let offsets = element_offsets(x.shape(), indices, at)?;
    scatter(x, updates, &offsets, mode)
}

pub(super) fn scatter_nd(x: &Tensor, indices: &Tensor, updates: &Tensor, mode: ScatterMode) -> Result<Tensor> {
    let (offsets, block) = tuple_offsets(x.shape(), indices, 0)?;
    let elements: Vec<usize> = offsets.iter().flat_map(|o| *o..o + block).collect();
    if elements.len() != updates.len() {
        return Err(shape_error(format!(
            "indices of shape {:?} name {} elements, updates of shape {:?} has {}",
            indices.shape(),
            elements.len(),
            updates.shape(),
            updates.len()
        )));
    }
    scatter(x, updates, &elements, mode)
}

/// Writes `update` into the cache along `at`, in row `b` from `write_indices[b]` on; `circular` wraps around.
pub(super) fn tensor_scatter(
    cache: &Tensor,
    update: &Tensor,
    write_indices: Option<&Tensor>,
    at: i64,
    circular: bool,
) -> Result<Tensor> {
    let rank = cache.shape().len();
    let at = axis(at, rank)?;
    let fits = update.shape().len() == rank
        && at > 0
        && (0..rank).all(|k| match k == at {
            true => update.shape()[k] <= cache.shape()[k],
            false => update.shape()[k] == cache.shape()[k],
        });
    if !fits {
        return Err(shape_error(format!(
            "an update of shape {:?} on axis {at} of a cache of shape {:?}",
            update.shape(),
            cache.shape()
        )));
    }
    let batch = cache.shape()[0];
    let starts = match write_indices {
        Some(given) if given.len() == batch => given.to_i64(),
        Some(given) => {
            return Err(shape_error(format!(
                "{:?} write indices for batch {batch}",
                given.shape()
            )));
        }
        None => vec![0; batch],
    };
    let (outer, slots, inner) = around(cache.shape(), at);
    let length = update.shape()[at];
    let mut offsets = Vec::with_capacity(update.len());
    for o in 0..outer {
        let start = starts[o / (outer / batch)];
        for s in 0..length as i64 {
            let slot = if circular {
                (start + s).rem_euclid(slots as i64) as usize
            } else {
                usize::try_from(start + s)
                    .ok()
                    .filter(|slot| *slot < slots)
                    .ok_or_else(|| invalid(format!("slot {} of a cache with {slots} slots", start + s)))?
            };
            let row = (o * slots + slot) * inner;
            offsets.extend(row..row + inner);
        }
    }
    scatter(cache, update, &offsets, ScatterMode::Replace)
}
