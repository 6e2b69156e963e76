//! Checks of a layer's inputs that several rules share, each with its own error.

use super::{LayerFault, Typed};
use crate::dim::Dim;
use crate::network::{Shape, Tensor};
use crate::tensor::DType;

pub(super) fn same(x: &Tensor) -> Typed {
    (x.dtype, x.shape.clone())
}

pub(super) fn is_number(dtype: DType) -> bool {
    dtype.is_float() || is_index(dtype)
}

/// Whether layers compute with it: TensorRT has no f64, and no arithmetic on storage-only types.
pub(super) fn is_computed(dtype: DType) -> bool {
    dtype != DType::F64 && !dtype.is_storage_only()
}

/// Whether a Dequantize layer accepts codes of it.
pub(super) fn is_code(dtype: DType) -> bool {
    matches!(dtype, DType::I8 | DType::I4 | DType::F8E4M3Fn)
}

pub(super) fn is_index(dtype: DType) -> bool {
    matches!(dtype, DType::I32 | DType::I64)
}

pub(super) fn arity(inputs: &[&Tensor], allowed: &[usize], expected: &'static str) -> Result<(), LayerFault> {
    let found = inputs.len();
    match allowed.contains(&found) {
        true => Ok(()),
        false => Err(LayerFault::Arity { expected, found }),
    }
}

pub(super) fn check_dtype(
    input: usize,
    found: DType,
    ok: impl Fn(DType) -> bool,
    wanted: &'static str,
) -> Result<(), LayerFault> {
    match ok(found) && is_computed(found) {
        true => Ok(()),
        false => Err(LayerFault::DType { input, found, wanted }),
    }
}

pub(super) fn check_rank(
    inputs: &[&Tensor],
    input: usize,
    rank: usize,
    wanted: &'static str,
) -> Result<(), LayerFault> {
    let found = inputs[input].shape.len();
    match found == rank {
        true => Ok(()),
        false => Err(LayerFault::Rank { input, found, wanted }),
    }
}

pub(super) fn check_extent(what: impl FnOnce() -> String, wanted: &Dim, found: &Dim) -> Result<(), LayerFault> {
    match wanted == found {
        true => Ok(()),
        false => Err(LayerFault::Extent {
            what: what(),
            wanted: wanted.clone(),
            found: found.clone(),
        }),
    }
}

pub(super) fn check_axes(axes: &[usize], rank: usize) -> Result<(), LayerFault> {
    if axes.is_empty() {
        return Err(LayerFault::Parameter("no axis is given".to_string()));
    }
    match axes.iter().find(|a| **a >= rank) {
        None => Ok(()),
        Some(axis) => Err(LayerFault::Axis { axis: *axis, rank }),
    }
}

pub(super) fn equal_ranks(inputs: &[&Tensor], left: usize, right: usize) -> Result<(), LayerFault> {
    match inputs[left].shape.len() == inputs[right].shape.len() {
        true => Ok(()),
        false => Err(LayerFault::UnlikeRanks { left, right }),
    }
}

/// Equal dtypes and ranks.
pub(super) fn like(inputs: &[&Tensor], left: usize, right: usize) -> Result<(), LayerFault> {
    if inputs[left].dtype != inputs[right].dtype {
        return Err(LayerFault::UnlikeDTypes { left, right });
    }
    equal_ranks(inputs, left, right)
}

pub(super) fn broadcast(inputs: &[&Tensor], left: usize, right: usize) -> Result<Shape, LayerFault> {
    broadcast_shapes(&inputs[left].shape, &inputs[right].shape)
}

pub(super) fn broadcast_shapes(left: &[Dim], right: &[Dim]) -> Result<Shape, LayerFault> {
    let pairs = left.iter().zip(right).enumerate();
    let dims = pairs.map(|(axis, (l, r))| match (l, r) {
        (l, r) if l == r || r.is_one() => Ok(l.clone()),
        (l, r) if l.is_one() => Ok(r.clone()),
        (l, r) => Err(LayerFault::Broadcast {
            axis,
            left: l.clone(),
            right: r.clone(),
        }),
    });
    dims.collect()
}

pub(super) fn permuted(shape: &[Dim], order: &[usize]) -> Result<Shape, LayerFault> {
    let rank = shape.len();
    let mut seen = vec![false; rank];
    let mut valid = order.len() == rank;
    for axis in order {
        valid &= *axis < rank && !std::mem::replace(&mut seen[*axis], true);
    }
    match valid {
        true => Ok(order.iter().map(|a| shape[*a].clone()).collect()),
        false => Err(LayerFault::Permutation {
            order: order.to_vec(),
            rank,
        }),
    }
}

/// Number of elements; saturates, as dims do.
pub(crate) fn volume(shape: &[Dim]) -> Dim {
    let numbers = shape.iter().filter_map(Dim::as_const).fold(1, i64::saturating_mul);
    let symbols = shape.iter().filter(|d| d.as_const().is_none());
    symbols.fold(Dim::constant(numbers), |product, dim| &product * dim)
}
