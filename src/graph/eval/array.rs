//! Shapes, strides and element vectors shared by the operator families.
//!
//! There are two classes of arithmetic: every float type in f64 (rounded to the dtype when the result is stored, which
//! for f32 and the halves is at least as exact as arithmetic in the type itself), every integer type and bool in i64
//! (wrapped to the dtype). Operators that only move elements work on bytes of any dtype through [`take`].

use bytes::Bytes;

use super::{EvalError, error::shape_error};
use crate::tensor::{DType, Tensor};

/// Results above this many elements are refused: the shape comes from an untrusted file.
const MAX_ELEMENTS: usize = 1 << 30;

pub(super) type Result<T> = std::result::Result<T, EvalError>;

/// Elements in one of the two classes of arithmetic.
pub(super) enum Data {
    Float(Vec<f64>),
    Int(Vec<i64>),
}

impl Data {
    pub fn of(tensor: &Tensor) -> Data {
        if tensor.dtype().is_float_format() {
            Data::Float(tensor.to_f64())
        } else {
            Data::Int(tensor.to_i64())
        }
    }
}

/// Floats stored as a float dtype, rounded to nearest even.
pub(super) fn floats(dtype: DType, shape: Vec<usize>, values: &[f64]) -> Tensor {
    if !dtype.is_half() {
        return Tensor::from_f64_as(dtype, shape, values);
    }
    // Through f32 for the halves: the reference arithmetic for them is fp32.
    let rounded: Vec<f64> = values.iter().map(|v| f64::from(*v as f32)).collect();
    Tensor::from_f64_as(dtype, shape, &rounded)
}

/// Integers stored as an integer dtype or bool, wrapping as two's complement.
pub(super) fn ints(dtype: DType, shape: Vec<usize>, values: &[i64]) -> Tensor {
    Tensor::from_i64_as(dtype, shape, values)
}

pub(super) fn store(dtype: DType, shape: Vec<usize>, data: Data) -> Tensor {
    match data {
        Data::Float(values) => floats(dtype, shape, &values),
        Data::Int(values) => ints(dtype, shape, &values),
    }
}

/// Number of elements of a shape that an operator computed.
pub(super) fn volume(shape: &[usize]) -> Result<usize> {
    shape
        .iter()
        .try_fold(1usize, |n, d| n.checked_mul(*d))
        .filter(|n| *n <= MAX_ELEMENTS)
        .ok_or_else(|| shape_error(format!("a result of shape {shape:?} is too large to evaluate")))
}

/// Row-major strides, in elements.
pub(super) fn strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1usize; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * shape[i + 1];
    }
    strides
}

/// An axis of `rank`, negative ones counted from the end.
pub(super) fn axis(axis: i64, rank: usize) -> Result<usize> {
    let resolved = if axis < 0 { axis + rank as i64 } else { axis };
    usize::try_from(resolved)
        .ok()
        .filter(|a| *a < rank)
        .ok_or_else(|| shape_error(format!("axis {axis} of a tensor of rank {rank}")))
}

/// An index into `length` elements, negative ones counted from the end.
pub(super) fn index(index: i64, length: usize) -> Result<usize> {
    let resolved = if index < 0 { index + length as i64 } else { index };
    usize::try_from(resolved)
        .ok()
        .filter(|i| *i < length)
        .ok_or_else(|| shape_error(format!("index {index} into an axis of length {length}")))
}

/// The common shape of operands under NumPy's rules.
pub(super) fn broadcast(shapes: &[&[usize]]) -> Result<Vec<usize>> {
    let rank = shapes.iter().map(|s| s.len()).max().unwrap_or(0);
    let mut out = vec![1usize; rank];
    for shape in shapes {
        let skip = rank - shape.len();
        for (i, d) in shape.iter().enumerate() {
            let o = &mut out[skip + i];
            match (*o, *d) {
                (a, b) if a == b || b == 1 => {}
                (1, b) => *o = b,
                _ => return Err(shape_error(format!("shapes {shapes:?} do not broadcast"))),
            }
        }
    }
    volume(&out)?;
    Ok(out)
}

/// Offset of the source element of each element of `shape`, row-major: `base + sum(index[k] * steps[k])`.
pub(super) fn walk(shape: &[usize], steps: &[isize], base: isize) -> Vec<usize> {
    let total = shape.iter().product();
    let mut offsets = Vec::with_capacity(total);
    let mut counter = vec![0usize; shape.len()];
    let mut at = base;
    for _ in 0..total {
        offsets.push(at as usize);
        for k in (0..shape.len()).rev() {
            counter[k] += 1;
            at += steps[k];
            if counter[k] < shape[k] {
                break;
            }
            at -= steps[k] * shape[k] as isize;
            counter[k] = 0;
        }
    }
    offsets
}

/// For each element of a broadcast to shape `to`, the offset in the tensor of shape `from`.
pub(super) fn broadcast_offsets(from: &[usize], to: &[usize]) -> Vec<usize> {
    let own = strides(from);
    let skip = to.len() - from.len();
    let steps: Vec<isize> = (0..to.len())
        .map(|k| {
            if k < skip || from[k - skip] == 1 {
                0
            } else {
                own[k - skip] as isize
            }
        })
        .collect();
    walk(to, &steps, 0)
}

/// Elements selected from a tensor of any dtype, in order.
pub(super) fn take(tensor: &Tensor, shape: Vec<usize>, offsets: &[usize]) -> Tensor {
    let data = tensor.data();
    let bytes: Vec<u8> = match tensor.dtype().element_bytes() {
        1 => offsets.iter().map(|o| data[*o]).collect(),
        2 => pick::<2>(data, offsets),
        4 => pick::<4>(data, offsets),
        _ => pick::<8>(data, offsets),
    };
    Tensor::new(tensor.dtype(), shape, Bytes::from(bytes)).expect("one offset per element")
}

fn pick<const N: usize>(data: &[u8], offsets: &[usize]) -> Vec<u8> {
    let elements = data.as_chunks::<N>().0;
    offsets.iter().flat_map(|o| elements[*o]).collect()
}

/// The tensor broadcast to a compatible shape.
pub(super) fn expand(tensor: &Tensor, to: &[usize]) -> Tensor {
    if tensor.shape() == to {
        return tensor.clone();
    }
    take(tensor, to.to_vec(), &broadcast_offsets(tensor.shape(), to))
}

pub(super) fn transpose(tensor: &Tensor, perm: &[usize]) -> Tensor {
    let own = strides(tensor.shape());
    let shape: Vec<usize> = perm.iter().map(|p| tensor.shape()[*p]).collect();
    let steps: Vec<isize> = perm.iter().map(|p| own[*p] as isize).collect();
    let offsets = walk(&shape, &steps, 0);
    take(tensor, shape, &offsets)
}

/// The same bytes under another shape; the volumes must agree.
pub(super) fn reshape(tensor: &Tensor, shape: Vec<usize>) -> Result<Tensor> {
    tensor.reshaped(shape.clone()).map_err(|_| {
        shape_error(format!(
            "a tensor of shape {:?} cannot be reshaped to {shape:?}",
            tensor.shape()
        ))
    })
}

/// Splits a shape at an axis: elements before, on and after it.
pub(super) fn around(shape: &[usize], axis: usize) -> (usize, usize, usize) {
    (
        shape[..axis].iter().product(),
        shape[axis],
        shape[axis + 1..].iter().product(),
    )
}
