//! The layers of a decoder: normalization, rotary embedding, attention and its cache.

use super::checks::{arity, check_axes, check_dtype, check_extent, check_rank, like, same};
use super::{LayerFault, Typed};
use crate::dim::Dim;
use crate::network::Tensor;
use crate::tensor::DType;

pub(super) fn normalization(axes: &[usize], inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    arity(inputs, &[3], "3")?;
    let x = inputs[0];
    check_dtype(0, x.dtype, DType::is_float, "a float")?;
    check_axes(axes, x.shape.len())?;
    for i in [1, 2] {
        like(inputs, 0, i)?;
        for (a, dim) in x.shape.iter().enumerate() {
            let wanted = if axes.contains(&a) {
                dim.clone()
            } else {
                Dim::from(1usize)
            };
            check_extent(|| format!("axis {a} of input {i}"), &wanted, &inputs[i].shape[a])?;
        }
    }
    Ok(same(x))
}

pub(super) fn rotary(rotary_dim: usize, inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    arity(inputs, &[4], "4")?;
    let [x, cos, sin, positions] = inputs[..] else {
        unreachable!("four inputs")
    };
    check_dtype(0, x.dtype, DType::is_float, "a float")?;
    check_dtype(3, positions.dtype, |d| d == DType::I32, "i32")?;
    for (i, wanted, text) in [(0, 4, "4"), (1, 2, "2"), (2, 2, "2"), (3, 2, "2")] {
        check_rank(inputs, i, wanted, text)?;
    }
    for i in [1, 2] {
        if inputs[i].dtype != x.dtype {
            return Err(LayerFault::UnlikeDTypes { left: 0, right: i });
        }
        let half = Dim::from(rotary_dim / 2);
        check_extent(|| format!("the last axis of input {i}"), &half, &inputs[i].shape[1])?;
    }
    check_extent(
        || "the rows of the sine table".to_string(),
        &cos.shape[0],
        &sin.shape[0],
    )?;
    check_extent(
        || "the batch of the positions".to_string(),
        &x.shape[0],
        &positions.shape[0],
    )?;
    check_extent(
        || "the tokens of the positions".to_string(),
        &x.shape[2],
        &positions.shape[1],
    )?;
    let head_dim = x.shape[3].as_const();
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || head_dim.is_none_or(|d| rotary_dim as i64 > d) {
        return Err(LayerFault::Parameter(format!(
            "rotary_dim {rotary_dim} must be even, above 0 and within the head's {}",
            x.shape[3]
        )));
    }
    Ok(same(x))
}

pub(super) fn attention(inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    arity(inputs, &[3, 4], "3 or 4")?;
    let q = inputs[0];
    check_dtype(0, q.dtype, DType::is_float, "a float")?;
    for i in 0..inputs.len() {
        check_rank(inputs, i, 4, "4")?;
    }
    for i in [1, 2] {
        like(inputs, 0, i)?;
        check_extent(|| format!("the batch of input {i}"), &q.shape[0], &inputs[i].shape[0])?;
        check_extent(
            || format!("the head size of input {i}"),
            &q.shape[3],
            &inputs[i].shape[3],
        )?;
    }
    let (k, v) = (inputs[1], inputs[2]);
    check_extent(|| "the KV heads of the values".to_string(), &k.shape[1], &v.shape[1])?;
    check_extent(|| "the slots of the values".to_string(), &k.shape[2], &v.shape[2])?;
    let heads = (q.shape[1].as_const(), k.shape[1].as_const());
    if !matches!(heads, (Some(q), Some(kv)) if kv > 0 && q % kv == 0) {
        return Err(LayerFault::Parameter(format!(
            "{} query heads are not a multiple of {} KV heads",
            q.shape[1], k.shape[1]
        )));
    }
    if let Some(mask) = inputs.get(3) {
        if mask.dtype != DType::Bool && mask.dtype != q.dtype {
            return Err(LayerFault::DType {
                input: 3,
                found: mask.dtype,
                wanted: "bool or the dtype of the query",
            });
        }
        // NvInfer.h: "with batchSize and numHeadsQuery broadcastable"; tokens and slots are not.
        for (axis, wanted) in [&q.shape[0], &q.shape[1], &q.shape[2], &k.shape[2]]
            .into_iter()
            .enumerate()
        {
            if !(mask.shape[axis] == *wanted || axis < 2 && mask.shape[axis].is_one()) {
                return Err(LayerFault::Extent {
                    what: format!("axis {axis} of the mask"),
                    wanted: wanted.clone(),
                    found: mask.shape[axis].clone(),
                });
            }
        }
    }
    Ok(same(q))
}

pub(super) fn kv_cache_update(inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    arity(inputs, &[3], "3")?;
    let [cache, update, indices] = inputs[..] else {
        unreachable!("three inputs")
    };
    check_dtype(0, cache.dtype, DType::is_float, "a float")?;
    check_rank(inputs, 0, 4, "4")?;
    like(inputs, 0, 1)?;
    check_dtype(2, indices.dtype, |d| d == DType::I32, "i32")?;
    check_rank(inputs, 2, 1, "1")?;
    for axis in [0, 1, 3] {
        check_extent(
            || format!("axis {axis} of the update"),
            &cache.shape[axis],
            &update.shape[axis],
        )?;
    }
    check_extent(|| "the write indices".to_string(), &cache.shape[0], &indices.shape[0])?;
    if let Some(dim) = cache.shape.iter().find(|d| d.as_const().is_none()) {
        return Err(LayerFault::Parameter(format!(
            "the cache must have a static shape, but has {dim}"
        )));
    }
    if let (Some(tokens), Some(slots)) = (update.shape[2].as_const(), cache.shape[2].as_const())
        && tokens > slots
    {
        return Err(LayerFault::Parameter(format!(
            "{tokens} tokens do not fit a cache of {slots} slots"
        )));
    }
    Ok(same(cache))
}
