//! Computes the bytes of a derived constant. Byte-moving transforms work on raw elements of any dtype; arithmetic goes
//! through fp32.

use bytes::Bytes;
use half::{bf16, f16};

use super::constant::{Constant, ConstantError, Derived, Transform};
use crate::tensor::{DType, Tensor};

pub(super) fn apply(derived: &Derived, dtype: DType, shape: &[usize]) -> Result<Tensor, ConstantError> {
    let input = |i: usize| derived.inputs[i].materialize();
    let bytes = match &derived.transform {
        Transform::Reshape => input(0)?.data().clone(),
        Transform::Transpose(perm) => Bytes::from(transpose(&input(0)?, perm)),
        Transform::Cast => Bytes::from(cast(&input(0)?, dtype)),
        Transform::Slice { axis, start, end } => Bytes::from(slice(&input(0)?, *axis, *start, *end)),
        Transform::Concat { axis } => Bytes::from(concat(&derived.inputs, *axis)?),
        Transform::Scale(factor) => arithmetic(&input(0)?, |v| v * *factor as f32),
        Transform::Offset(addend) => arithmetic(&input(0)?, |v| v + *addend as f32),
        Transform::PlusProduct { scale } => plus_product(&input(0)?, &input(1)?, &input(2)?, *scale),
    };
    Ok(Tensor::new(dtype, shape.to_vec(), bytes).expect("a transform keeps its promised size"))
}

fn arithmetic(input: &Tensor, f: impl Fn(f32) -> f32) -> Bytes {
    let values: Vec<f64> = input.to_f32().into_iter().map(|v| f64::from(f(v))).collect();
    Tensor::from_f64_as(input.dtype(), input.shape().to_vec(), &values)
        .data()
        .clone()
}

/// `w + scale * b a`, row by row, so that the rows of `a`, which are few, stay in the cache.
fn plus_product(w: &Tensor, b: &Tensor, a: &Tensor, scale: f64) -> Bytes {
    let width = w.shape()[1];
    let (mut sum, b, a) = (w.to_f32(), b.to_f32(), a.to_f32());
    let rank = a.len() / width.max(1);
    for (row, factors) in sum.chunks_mut(width.max(1)).zip(b.chunks(rank.max(1))) {
        for (factor, a) in factors.iter().zip(a.chunks(width.max(1))) {
            let factor = factor * scale as f32;
            for (sum, a) in row.iter_mut().zip(a) {
                *sum += factor * a;
            }
        }
    }
    Tensor::from_f32(w.shape().to_vec(), &sum).data().clone()
}

/// Element conversion, chunk by chunk for the float pairs that weights use; anything else goes through f64.
fn cast(input: &Tensor, dtype: DType) -> Vec<u8> {
    let data = input.data();
    match (input.dtype(), dtype) {
        (DType::F32, DType::F16) => map_elements(data, |b: [u8; 4]| f16::from_f32(f32::from_le_bytes(b)).to_le_bytes()),
        (DType::F32, DType::Bf16) => {
            map_elements(data, |b: [u8; 4]| bf16::from_f32(f32::from_le_bytes(b)).to_le_bytes())
        }
        (DType::F16, DType::F32) => map_elements(data, |b: [u8; 2]| f16::from_le_bytes(b).to_f32().to_le_bytes()),
        (DType::Bf16, DType::F32) => map_elements(data, |b: [u8; 2]| bf16::from_le_bytes(b).to_f32().to_le_bytes()),
        (DType::F16, DType::Bf16) => map_elements(data, |b: [u8; 2]| {
            bf16::from_f32(f16::from_le_bytes(b).to_f32()).to_le_bytes()
        }),
        (DType::Bf16, DType::F16) => map_elements(data, |b: [u8; 2]| {
            f16::from_f32(bf16::from_le_bytes(b).to_f32()).to_le_bytes()
        }),
        (_, to) if to.is_float() => Tensor::from_f64_as(to, input.shape().to_vec(), &input.to_f64())
            .data()
            .to_vec(),
        (_, DType::I64) => input.to_i64().into_iter().flat_map(i64::to_le_bytes).collect(),
        (_, DType::I32) => input
            .to_i64()
            .into_iter()
            .flat_map(|v| (v as i32).to_le_bytes())
            .collect(),
        (_, DType::I8 | DType::U8) => input.to_i64().into_iter().map(|v| v as u8).collect(),
        (_, DType::Bool) => input.to_f64().into_iter().map(|v| u8::from(v != 0.0)).collect(),
        (_, _) => unreachable!("float targets are handled above"),
    }
}

fn map_elements<const A: usize, const B: usize>(data: &[u8], f: impl Fn([u8; A]) -> [u8; B]) -> Vec<u8> {
    let mut out = vec![0u8; data.len() / A * B];
    for (from, to) in data.as_chunks::<A>().0.iter().zip(out.as_chunks_mut::<B>().0) {
        *to = f(*from);
    }
    out
}

fn transpose(input: &Tensor, perm: &[usize]) -> Vec<u8> {
    let size = input.dtype().size();
    match (size, perm) {
        (4, [1, 0]) => transpose_2d::<4>(input),
        (2, [1, 0]) => transpose_2d::<2>(input),
        _ => transpose_any(input, perm, size),
    }
}

/// Weights of `[in, out]` become `[out, in]`: blocked, so that both sides stay within cache lines.
fn transpose_2d<const N: usize>(input: &Tensor) -> Vec<u8> {
    const BLOCK: usize = 32;
    let (rows, columns) = (input.shape()[0], input.shape()[1]);
    let from = input.data().as_chunks::<N>().0;
    let mut bytes = vec![0u8; input.data().len()];
    let to = bytes.as_chunks_mut::<N>().0;
    for r0 in (0..rows).step_by(BLOCK) {
        for c0 in (0..columns).step_by(BLOCK) {
            for c in c0..(c0 + BLOCK).min(columns) {
                for r in r0..(r0 + BLOCK).min(rows) {
                    to[c * rows + r] = from[r * columns + c];
                }
            }
        }
    }
    bytes
}

fn transpose_any(input: &Tensor, perm: &[usize], size: usize) -> Vec<u8> {
    let shape = input.shape();
    let mut strides = vec![1usize; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * shape[i + 1];
    }
    let out_shape: Vec<usize> = perm.iter().map(|p| shape[*p]).collect();
    let out_strides: Vec<usize> = perm.iter().map(|p| strides[*p]).collect();
    let mut out = Vec::with_capacity(input.data().len());
    let mut index = vec![0usize; shape.len()];
    for _ in 0..input.len() {
        let at: usize = index.iter().zip(&out_strides).map(|(i, s)| i * s).sum();
        out.extend_from_slice(&input.data()[at * size..(at + 1) * size]);
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            if index[axis] < out_shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    out
}

fn slice(input: &Tensor, axis: usize, start: usize, end: usize) -> Vec<u8> {
    let shape = input.shape();
    let inner: usize = shape[axis + 1..].iter().product::<usize>() * input.dtype().size();
    let outer: usize = shape[..axis].iter().product();
    let mut out = Vec::with_capacity(outer * (end - start) * inner);
    for o in 0..outer {
        let row = o * shape[axis];
        out.extend_from_slice(&input.data()[(row + start) * inner..(row + end) * inner]);
    }
    out
}

fn concat(parts: &[Constant], axis: usize) -> Result<Vec<u8>, ConstantError> {
    let tensors = parts.iter().map(Constant::materialize).collect::<Result<Vec<_>, _>>()?;
    let outer: usize = parts[0].shape()[..axis].iter().product();
    let mut out = Vec::with_capacity(tensors.iter().map(|t| t.data().len()).sum());
    for o in 0..outer {
        for tensor in &tensors {
            let run = tensor.data().len() / outer;
            out.extend_from_slice(&tensor.data()[o * run..(o + 1) * run]);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn iota(shape: Vec<usize>) -> Constant {
        let n: usize = shape.iter().product();
        Constant::tensor(Tensor::from_f32(shape, &(0..n).map(|i| i as f32).collect::<Vec<_>>()))
    }

    #[test]
    fn recipes_compose() {
        let weight = iota(vec![2, 3]).with_origin("w");
        let derived = weight.transposed(&[1, 0]).sliced(0, 1, 3).cast(DType::F16);
        assert_eq!(derived.origin(), Some("w"));
        let tensor = derived.materialize().unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (DType::F16, &[2, 2][..]));
        assert_eq!(tensor.to_f32(), [1.0, 4.0, 2.0, 5.0]);
    }

    #[test]
    fn general_and_blocked_transposes_agree() {
        let weight = iota(vec![37, 65]);
        let blocked = weight.transposed(&[1, 0]).materialize().unwrap();
        let general = weight
            .reshaped(vec![1, 37, 65])
            .transposed(&[2, 1, 0])
            .materialize()
            .unwrap();
        assert_eq!(blocked.to_f32(), general.to_f32());
        assert_eq!(blocked.to_f32()[1], 65.0);
    }

    #[test]
    fn concat_scale_and_offset() {
        let joined = Constant::concat(&[iota(vec![2, 1]), iota(vec![2, 2])], 1)
            .scaled(2.0)
            .offset(1.0);
        assert_eq!(joined.materialize().unwrap().to_f32(), [1.0, 1.0, 3.0, 3.0, 5.0, 7.0]);
    }

    #[test]
    fn absent_weights_say_what_to_do() {
        let error = Constant::absent(DType::F16, vec![4])
            .with_origin("lm_head")
            .cast(DType::F32)
            .materialize();
        assert!(error.unwrap_err().to_string().contains("lm_head"));
    }
}
