//! Computes the bytes of a derived constant. Movements work on raw elements of any dtype, including packed ones;
//! arithmetic uses fp32.

use bytes::Bytes;

use super::constant::{Constant, ConstantError, Derived, Transform};
use crate::tensor::element::{FloatElement, with_float};
use crate::tensor::quantized::{dequantize, quantize};
use crate::tensor::{DType, Tensor, packed};

pub(super) fn apply(derived: &Derived, dtype: DType, shape: &[usize]) -> Result<Tensor, ConstantError> {
    let input = |i: usize| derived.inputs[i].materialize();
    let bytes = match &derived.transform {
        Transform::Reshape => input(0)?.data().clone(),
        Transform::Transpose(perm) => transpose(&input(0)?, perm),
        Transform::Cast => cast(&input(0)?, dtype),
        Transform::Slice { axis, start, end } => slice(&input(0)?, *axis, *start, *end),
        Transform::Concat { axis } => concat(&derived.inputs, *axis)?,
        Transform::Scale(factor) => arithmetic(&input(0)?, |v| v * *factor as f32),
        Transform::Offset(addend) => arithmetic(&input(0)?, |v| v + *addend as f32),
        Transform::PlusProduct { scale } => plus_product(&input(0)?, &input(1)?, &input(2)?, *scale),
        Transform::RowLengths => row_lengths(&input(0)?, &input(1)?),
        Transform::Decode(decode) => {
            let inputs = derived.inputs.iter().map(Constant::materialize);
            decode.read(&inputs.collect::<Result<Vec<_>, _>>()?)
        }
        Transform::RoundToNearest(quantize) => super::quantize::apply(quantize, &derived.inputs)?.data().clone(),
        Transform::Factors { axis } => super::quantize::with_factors(&input(0)?, &input(1)?, *axis)
            .data()
            .clone(),
        Transform::Dequantize(granularity) => {
            let zero_points = derived.inputs.get(2).map(Constant::materialize).transpose()?;
            dequantize(&input(0)?, &input(1)?, zero_points.as_ref(), *granularity)
                .data()
                .clone()
        }
        Transform::Quantize(granularity) => {
            let zero_points = derived.inputs.get(2).map(Constant::materialize).transpose()?;
            quantize(dtype, &input(0)?, &input(1)?, zero_points.as_ref(), *granularity)
                .data()
                .clone()
        }
        Transform::HalfRange => half_range_moved(&input(0)?),
        Transform::SwapHalves => {
            let bytes = input(0)?
                .data()
                .iter()
                .map(|byte| byte.rotate_left(4))
                .collect::<Vec<u8>>();
            Bytes::from(bytes)
        }
        Transform::Bytes => input(0)?.data().clone(),
        Transform::Take { axis } => take(&input(0)?, *axis, &input(1)?),
        Transform::Order => {
            let keys = input(0)?.to_i64();
            let mut order: Vec<i64> = (0..keys.len() as i64).collect();
            order.sort_by_key(|i| keys[*i as usize]);
            Tensor::from_i64(shape.to_vec(), &order).data().clone()
        }
    };
    Ok(Tensor::new(dtype, shape.to_vec(), bytes).expect("a transform keeps its promised size"))
}

/// The two's complement of a code minus half the range differs from it only in the highest bit.
fn half_range_moved(input: &Tensor) -> Bytes {
    let flip: u8 = match input.dtype().bits() {
        2 => 0b1010_1010,
        4 => 0b1000_1000,
        _ => 0b1000_0000,
    };
    let mut bytes: Vec<u8> = input.data().iter().map(|byte| byte ^ flip).collect();
    // Bits after the last element stay 0.
    let (bits, used) = (input.dtype().bits(), input.len() * input.dtype().bits() % 8);
    if let (true, Some(last)) = (bits < 8 && used > 0, bytes.last_mut()) {
        *last &= (1 << used) - 1;
    }
    Bytes::from(bytes)
}

fn take(input: &Tensor, axis: usize, indices: &Tensor) -> Bytes {
    let elements = Elements::of(input);
    let shape = input.shape();
    let run = shape[axis + 1..].iter().product::<usize>() * elements.size;
    let extent = shape[axis];
    let outer: usize = shape[..axis].iter().product();
    let indices = indices.to_i64();
    let mut out = Vec::with_capacity(outer * indices.len() * run);
    for row in 0..outer {
        for index in &indices {
            // An index out of range is refused when the constant is created; here it selects the last slice.
            let at = usize::try_from(*index).unwrap_or(0).min(extent.saturating_sub(1));
            let start = (row * extent + at) * run;
            out.extend_from_slice(&elements.data[start..start + run]);
        }
    }
    elements.stored(out)
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

/// Every row scaled to its length. A row of zeros has no direction: it becomes NaN, as the formula gives.
fn row_lengths(matrix: &Tensor, lengths: &Tensor) -> Bytes {
    let width = matrix.shape()[1].max(1);
    let mut rows = matrix.to_f32();
    for (row, length) in rows.chunks_mut(width).zip(lengths.to_f32()) {
        let norm = row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
        let factor = (f64::from(length) / norm) as f32;
        row.iter_mut().for_each(|v| *v *= factor);
    }
    Tensor::from_f32(matrix.shape().to_vec(), &rows).data().clone()
}

/// Element conversion: between floats of at most 32 bits one by one, anything else through f64 or i64.
fn cast(input: &Tensor, dtype: DType) -> Bytes {
    let small = |dtype: DType| dtype.is_float() && dtype != DType::F64;
    if small(input.dtype()) && small(dtype) {
        return with_float!(input.dtype(), A => with_float!(dtype, B => {
            convert::<A, B>(input.data())
        }, else unreachable!("a float")), else unreachable!("a float"));
    }
    let shape = input.shape().to_vec();
    let made = match dtype {
        DType::Bool => Tensor::from_bool(shape, &input.to_f64().iter().map(|v| *v != 0.0).collect::<Vec<_>>()),
        to if to.is_float_format() => Tensor::from_f64_as(to, shape, &input.to_f64()),
        to => Tensor::from_i64_as(to, shape, &input.to_i64()),
    };
    made.data().clone()
}

fn convert<A: FloatElement, B: FloatElement>(data: &[u8]) -> Bytes {
    let elements = data.chunks_exact(size_of::<A>());
    let mut out = vec![0u8; elements.len() * size_of::<B>()];
    for (from, to) in elements.zip(out.chunks_exact_mut(size_of::<B>())) {
        B::from_f32(A::read(from).to_f32()).write(to);
    }
    Bytes::from(out)
}

/// The elements of a tensor as runs of whole bytes for movements: one element of an ordinary dtype, or one packed
/// element expanded to a byte.
struct Elements {
    data: Bytes,
    /// Bytes per element.
    size: usize,
    dtype: DType,
}

impl Elements {
    fn of(tensor: &Tensor) -> Elements {
        let dtype = tensor.dtype();
        match dtype.is_packed() {
            true => Elements {
                data: Bytes::from(tensor.codes()),
                size: 1,
                dtype,
            },
            false => Elements {
                data: tensor.data().clone(),
                size: dtype.element_bytes(),
                dtype,
            },
        }
    }

    /// Moved elements in the dtype's storage format.
    fn stored(&self, moved: Vec<u8>) -> Bytes {
        Bytes::from(match self.dtype.is_packed() {
            true => packed::pack(&moved, self.dtype.bits()),
            false => moved,
        })
    }
}

fn transpose(input: &Tensor, perm: &[usize]) -> Bytes {
    let elements = Elements::of(input);
    let moved = match (elements.size, perm) {
        (4, [1, 0]) => transpose_2d::<4>(input.shape(), &elements.data),
        (2, [1, 0]) => transpose_2d::<2>(input.shape(), &elements.data),
        (1, [1, 0]) => transpose_2d::<1>(input.shape(), &elements.data),
        (size, _) => transpose_any(input.shape(), &elements.data, perm, size),
    };
    elements.stored(moved)
}

/// Transposes `[in, out]` to `[out, in]` in blocks, so that both sides stay within cache lines.
fn transpose_2d<const N: usize>(shape: &[usize], data: &[u8]) -> Vec<u8> {
    const BLOCK: usize = 32;
    let (rows, columns) = (shape[0], shape[1]);
    let from = data.as_chunks::<N>().0;
    let mut bytes = vec![0u8; data.len()];
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

fn transpose_any(shape: &[usize], data: &[u8], perm: &[usize], size: usize) -> Vec<u8> {
    let mut strides = vec![1usize; shape.len()];
    for i in (0..shape.len().saturating_sub(1)).rev() {
        strides[i] = strides[i + 1] * shape[i + 1];
    }
    let out_shape: Vec<usize> = perm.iter().map(|p| shape[*p]).collect();
    let out_strides: Vec<usize> = perm.iter().map(|p| strides[*p]).collect();
    let mut out = Vec::with_capacity(data.len());
    let mut index = vec![0usize; shape.len()];
    for _ in 0..data.len() / size {
        let at: usize = index.iter().zip(&out_strides).map(|(i, s)| i * s).sum();
        out.extend_from_slice(&data[at * size..(at + 1) * size]);
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

fn slice(input: &Tensor, axis: usize, start: usize, end: usize) -> Bytes {
    let shape = input.shape();
    let behind = shape[axis + 1..].iter().product::<usize>();
    let outer: usize = shape[..axis].iter().product();
    // Packed elements are cut in place if every cut is between bytes.
    let whole = input.dtype().bits() * behind;
    if whole.is_multiple_of(8) {
        return Bytes::from(cut(input.data(), outer, shape[axis], start..end, whole / 8));
    }
    let elements = Elements::of(input);
    elements.stored(cut(
        &elements.data,
        outer,
        shape[axis],
        start..end,
        behind * elements.size,
    ))
}

/// A range of every row of `extent` runs of `run` bytes.
fn cut(data: &[u8], rows: usize, extent: usize, range: std::ops::Range<usize>, run: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(rows * range.len() * run);
    for row in 0..rows {
        let row = row * extent;
        out.extend_from_slice(&data[(row + range.start) * run..(row + range.end) * run]);
    }
    out
}

fn concat(parts: &[Constant], axis: usize) -> Result<Bytes, ConstantError> {
    let tensors = parts.iter().map(Constant::materialize).collect::<Result<Vec<_>, _>>()?;
    let outer: usize = parts[0].shape()[..axis].iter().product();
    let runs_are_bytes = |t: &Tensor| (t.len() / outer.max(1) * t.dtype().bits()).is_multiple_of(8);
    if tensors.iter().all(runs_are_bytes) {
        let data: Vec<&Bytes> = tensors.iter().map(Tensor::data).collect();
        return Ok(Bytes::from(join(&data, outer)));
    }
    let elements: Vec<Elements> = tensors.iter().map(Elements::of).collect();
    let data: Vec<&Bytes> = elements.iter().map(|e| &e.data).collect();
    Ok(elements[0].stored(join(&data, outer)))
}

/// The rows of all parts, side by side.
fn join(parts: &[&Bytes], rows: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(parts.iter().map(|data| data.len()).sum());
    for row in 0..rows {
        for data in parts {
            let run = data.len() / rows;
            out.extend_from_slice(&data[row * run..(row + 1) * run]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::quantized::Granularity;

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
    fn rows_get_their_lengths() {
        let matrix = Constant::tensor(Tensor::from_f32(vec![3, 2], &[3.0, 4.0, 0.0, -2.0, 0.0, 0.0]));
        let lengths = Constant::tensor(Tensor::from_f32(vec![3], &[10.0, 0.5, 1.0]));
        let scaled = matrix.with_row_lengths(&lengths).materialize().unwrap().to_f32();
        assert_eq!(scaled[..4], [6.0, 8.0, 0.0, -0.5]);
        assert!(scaled[4].is_nan());
    }

    /// Codes minus half their range and back, with a partial last byte.
    #[test]
    fn unsigned_codes_become_signed() {
        for dtype in [DType::U8, DType::U4, DType::U2] {
            let half = 1i64 << (dtype.bits() - 1);
            let values: Vec<i64> = (0..15).map(|i| i * 7 % (2 * half)).collect();
            let codes = Constant::tensor(Tensor::from_i64_as(dtype, vec![3, 5], &values));
            let signed = codes.half_range_moved().materialize().unwrap();
            let expected: Vec<i64> = values.iter().map(|v| v - half).collect();
            assert_eq!(signed.to_i64(), expected, "{dtype}");
            let again = Tensor::from_i64_as(signed.dtype(), vec![3, 5], &expected);
            assert_eq!(signed.data(), again.data());
            let back = Constant::tensor(again).half_range_moved().materialize().unwrap();
            assert_eq!((back.dtype(), back.to_i64()), (dtype, values));
        }
    }

    #[test]
    fn slices_in_the_order_of_groups() {
        let groups = Constant::tensor(Tensor::from_i64(vec![6], &[1, 0, 1, 2, 0, 2]));
        let order = groups.order();
        assert_eq!(order.materialize().unwrap().to_i64(), [1, 4, 0, 2, 3, 5]);
        for dtype in [DType::F32, DType::U4] {
            let taken = iota(vec![2, 6]).cast(dtype).taken(1, &order).materialize().unwrap();
            assert_eq!(
                taken.to_f32(),
                [1.0, 4.0, 0.0, 2.0, 3.0, 5.0, 7.0, 10.0, 6.0, 8.0, 9.0, 11.0]
            );
        }
    }

    /// Codes of floats and their values, computed by hand.
    #[test]
    fn floats_become_codes() {
        let values = Constant::tensor(Tensor::from_f32(vec![2, 2], &[0.5, -1.3, 2.5, 1000.0]));
        let scales = Constant::tensor(Tensor::from_f32(vec![2], &[1.0, 0.5]));
        let channel = Granularity::Channel { axis: 0 };
        let codes = values.quantize(DType::I8, scales.clone(), None, channel).unwrap();
        assert_eq!(codes.materialize().unwrap().to_i64(), [0, -1, 5, 127]);
        let zeros = Constant::tensor(Tensor::from_i64_as(DType::U8, vec![2], &[3, 250]));
        let codes = values
            .quantize(DType::U8, scales.clone(), Some(zeros), channel)
            .unwrap();
        assert_eq!(codes.materialize().unwrap().to_i64(), [3, 2, 255, 255]);
        let codes = values.quantize(DType::F8E4M3Fn, scales, None, channel).unwrap();
        assert_eq!(codes.materialize().unwrap().to_f32(), [0.5, -1.25, 5.0, 448.0]);
    }

    #[test]
    fn absent_weights_say_what_to_do() {
        let error = Constant::absent(DType::F16, vec![4])
            .with_origin("lm_head")
            .cast(DType::F32)
            .materialize();
        assert!(error.unwrap_err().to_string().contains("lm_head"));
    }

    type Movement<'a> = &'a dyn Fn(&Constant, &Constant) -> Constant;

    /// Every movement of packed elements gives the same result as on the same numbers in i8.
    #[test]
    fn movements_of_packed_elements() {
        for (dtype, low) in [
            (DType::I4, -8),
            (DType::U4, 0),
            (DType::I2, -2),
            (DType::U2, 0),
            (DType::F4E2M1, 0),
        ] {
            let plain = |shape: &[usize]| {
                let n: usize = shape.iter().product();
                let span = 1 << dtype.bits();
                // Codes of a float are moved unchanged: halves of whole numbers up to 3.
                let values: Vec<f64> = match dtype {
                    DType::F4E2M1 => (0..n).map(|i| [0.0, 0.5, 1.0, -1.5, 2.0][i * 3 % 5]).collect(),
                    _ => (0..n).map(|i| (low + (i as i64 * 5) % span) as f64).collect(),
                };
                Constant::tensor(Tensor::from_f64_as(DType::F32, shape.to_vec(), &values))
            };
            // Odd and even extents: cuts within bytes and between them.
            for shape in [[3, 5], [4, 8], [1, 7], [2, 6]] {
                let (wide, other) = (plain(&shape), plain(&[shape[0], 3]));
                let (narrow, other_narrow) = (wide.cast(dtype), other.cast(dtype));
                let movements: [Movement<'_>; 6] = [
                    &|c, _| c.transposed(&[1, 0]),
                    &|c, _| c.reshaped(vec![1, shape[1], shape[0]]).transposed(&[2, 0, 1]),
                    &|c, _| c.sliced(1, 1, shape[1] - 1),
                    &|c, _| c.sliced(0, 0, 1),
                    &|c, o| Constant::concat(&[c.clone(), o.clone()], 1),
                    &|c, _| Constant::concat(&[c.clone(), c.clone()], 0),
                ];
                for (i, movement) in movements.iter().enumerate() {
                    let expected = movement(&wide, &other).materialize().unwrap();
                    let found = movement(&narrow, &other_narrow).materialize().unwrap();
                    assert_eq!(found.dtype(), dtype);
                    assert_eq!(found.to_f32(), expected.to_f32(), "{dtype} {shape:?} movement {i}");
                    assert_eq!(found.data().len(), dtype.byte_len(found.len()));
                }
            }
        }
    }
}
