//! Quantized tensors: codes, scales and zero points, as for ONNX's `DequantizeLinear`.
//!
//! `value = (code - zero point) * scale`, where [`Granularity`] says which codes share a scale: all, those of a channel,
//! or a run of codes on one axis (<https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html>, opset 21 and later). The
//! result has the scales' dtype. Codes are integers of at most 8 bits, i32 without zero points, or narrow floats.
//!
//! This module has the rules and the reference arithmetic; [`crate::graph::quantized`] does the same for constants
//! whose bytes may be absent, and moves blocks.

use std::fmt;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::element::{FloatElement, with_float};
use super::{DType, Numbers, Tensor};

/// Which codes share a scale and a zero point.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// All: the scales are a scalar, `[]` or `[1]`.
    Tensor,
    /// Those with the same index on `axis`: the scales are `[extent of axis]`.
    Channel {
        /// Axis of the codes.
        axis: usize,
    },
    /// Runs of `size` along `axis`: the scales have the codes' shape with `axis` divided by `size`.
    Block {
        /// Axis of the codes.
        axis: usize,
        /// Codes per run; divides the extent of the axis.
        size: usize,
    },
}

impl Granularity {
    /// From the attributes of `QuantizeLinear` and `DequantizeLinear`, for a tensor of this many axes: `axis` counts
    /// from the end if it is negative, a `block_size` of 0 is none, and scales of shape `[]` or `[1]` are one for all.
    /// `None`: there is no such axis.
    pub fn of_attributes(rank: usize, axis: i64, block_size: usize, scales: &[usize]) -> Option<Granularity> {
        if block_size == 0 && (scales.is_empty() || scales == [1]) {
            return Some(Granularity::Tensor);
        }
        let axis = if axis < 0 { axis + rank as i64 } else { axis };
        let axis = usize::try_from(axis).ok().filter(|axis| *axis < rank)?;
        Some(match block_size {
            0 => Granularity::Channel { axis },
            size => Granularity::Block { axis, size },
        })
    }

    /// The shape that scales and zero points have over codes of a shape.
    pub fn scale_shape(self, codes: &[usize]) -> Result<Vec<usize>, QuantizedError> {
        let extent = |axis: usize| {
            codes.get(axis).copied().ok_or(QuantizedError::Axis {
                axis,
                codes: codes.to_vec(),
            })
        };
        match self {
            Granularity::Tensor => Ok(Vec::new()),
            Granularity::Channel { axis } => Ok(vec![extent(axis)?]),
            Granularity::Block { axis, size } => {
                let along = extent(axis)?;
                if size == 0 || !along.is_multiple_of(size) {
                    return Err(QuantizedError::BlockSize {
                        size,
                        axis,
                        codes: codes.to_vec(),
                    });
                }
                let mut shape = codes.to_vec();
                shape[axis] = along / size;
                Ok(shape)
            }
        }
    }

    /// The flat index of the scale of the code at the flat index `at`. `inner`: the product of the extents after the
    /// axis.
    fn scale_of(self, at: usize, inner: usize, extent: usize) -> usize {
        match self {
            Granularity::Tensor => 0,
            Granularity::Channel { .. } => at / inner % extent,
            Granularity::Block { size, .. } => at / inner / size * inner + at % inner,
        }
    }
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Granularity::Tensor => write!(f, "per tensor"),
            Granularity::Channel { axis } => write!(f, "per channel of axis {axis}"),
            Granularity::Block { axis, size } => write!(f, "in blocks of {size} on axis {axis}"),
        }
    }
}

/// Codes, scales and zero points that do not fit together, or that no model can use.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizedError {
    /// Codes of a type that `DequantizeLinear` does not accept.
    #[error("codes cannot be {dtype}; they are integers of at most 8 bits, i32, floats of 4 or 8 bits, nf4 or fp4")]
    Codes {
        /// Element type of the codes.
        dtype: DType,
    },
    /// Scales that are not floats.
    #[error("scales cannot be {dtype}; they are f32, f16 or bf16")]
    Scales {
        /// Element type of the scales.
        dtype: DType,
    },
    /// An axis that the codes do not have.
    #[error("codes of shape {codes:?} have no axis {axis}")]
    Axis {
        /// As stated.
        axis: usize,
        /// Their shape.
        codes: Vec<usize>,
    },
    /// Blocks that do not divide the axis, or are empty.
    #[error("blocks of {size} do not divide axis {axis} of codes of shape {codes:?}")]
    BlockSize {
        /// Codes per block.
        size: usize,
        /// Axis of the codes.
        axis: usize,
        /// Their shape.
        codes: Vec<usize>,
    },
    /// Scales or zero points of a wrong shape.
    #[error("the {part} have the shape {found:?}; codes of shape {codes:?} {granularity} need {expected:?}")]
    Shape {
        /// `scales` or `zero points`.
        part: &'static str,
        /// Shape of the codes.
        codes: Vec<usize>,
        /// Granularity of scales and zero points.
        granularity: Granularity,
        /// What they must have.
        expected: Vec<usize>,
        /// What they have.
        found: Vec<usize>,
    },
    /// Zero points whose type differs from the codes'.
    #[error("the zero points are {found} but must be {codes}, like the codes")]
    ZeroPoints {
        /// Element type of the codes.
        codes: DType,
        /// Element type of the zero points.
        found: DType,
    },
    /// A zero point outside the range of codes.
    #[error("the zero point {value} at index {index} is out of range: codes of {codes} go from {} to {}", codes.int_range().0, codes.int_range().1)]
    ZeroPointRange {
        /// Element type of the codes.
        codes: DType,
        /// Flat, in the zero points.
        index: usize,
        /// What it is.
        value: i64,
    },
    /// A nonzero zero point of i32 or float codes.
    #[error("the zero point at index {index} is not 0, as it must be for codes of {codes}")]
    ZeroPointNotZero {
        /// Element type of the codes.
        codes: DType,
        /// Flat, in the zero points.
        index: usize,
    },
    /// A scale that is NaN or infinite.
    #[error("the scale at index {index} is {value}")]
    BadScale {
        /// Flat, in the scales.
        index: usize,
        /// What it is.
        value: f32,
    },
    /// A scale of 0 whose codes are not all the zero point: all their values would be 0.
    #[error("the scale at index {index} is 0, and its codes are not all zero")]
    ZeroScale {
        /// Flat, in the scales.
        index: usize,
    },
    /// A code that is NaN or infinite.
    #[error("the code at index {index} is {value}")]
    BadCode {
        /// Flat, in the codes.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// A movement that would split blocks.
    #[error("{what} splits what is quantized {granularity}")]
    Blocks {
        /// The movement.
        what: String,
        /// Granularity of the tensor.
        granularity: Granularity,
    },
    /// A format that values cannot be quantized to.
    #[error("nothing can be quantized to {format}: unsigned codes need zero points, and float codes have none")]
    Format {
        /// The requested format.
        format: super::quantize::Format,
    },
    /// Tensors to be joined that are not quantized in the same way.
    #[error("tensors to be joined are quantized differently: {left} and {right}")]
    Unlike {
        /// The first one.
        left: String,
        /// The one that differs from it.
        right: String,
    },
}

/// Checks that dtypes and shapes of codes, scales and zero points fit together. Reads no elements.
pub fn check_types(
    codes: (DType, &[usize]),
    scales: (DType, &[usize]),
    zero_points: Option<(DType, &[usize])>,
    granularity: Granularity,
) -> Result<(), QuantizedError> {
    let (dtype, shape) = codes;
    let is_code = match dtype.numbers() {
        Numbers::Signed | Numbers::Unsigned => dtype.bits() <= 8 || dtype == DType::I32,
        // Powers of two are scales that are codes themselves: see `Constant::microscales`.
        Numbers::Float(_) if dtype == DType::F8E8M0 => granularity == Granularity::Tensor,
        Numbers::Float(_) => dtype.is_storage_only(),
        Numbers::Table(_) => true,
        Numbers::Bool => false,
    };
    if !is_code {
        return Err(QuantizedError::Codes { dtype });
    }
    if !scales.0.is_float() || scales.0 == DType::F64 {
        return Err(QuantizedError::Scales { dtype: scales.0 });
    }
    let expected = granularity.scale_shape(shape)?;
    let fits = |found: &[usize]| found == expected || granularity == Granularity::Tensor && found == [1];
    let parts = [("scales", Some(scales)), ("zero points", zero_points)];
    for (part, found) in parts.into_iter().filter_map(|(part, of)| Some((part, of?.1))) {
        if !fits(found) {
            return Err(QuantizedError::Shape {
                part,
                codes: shape.to_vec(),
                granularity,
                expected,
                found: found.to_vec(),
            });
        }
    }
    match zero_points {
        Some((found, _)) if found != dtype => Err(QuantizedError::ZeroPoints { codes: dtype, found }),
        _ => Ok(()),
    }
}

/// Converts zero points from the exporter's integer type to the codes' type; each must be in the range of codes.
pub fn zero_points_as(codes: DType, zero_points: &Tensor) -> Result<Tensor, QuantizedError> {
    let found = zero_points.dtype();
    if found == codes {
        return Ok(zero_points.clone());
    }
    let integer = |dtype: DType| matches!(dtype.numbers(), Numbers::Signed | Numbers::Unsigned);
    if !integer(codes) || !integer(found) {
        return Err(QuantizedError::ZeroPoints { codes, found });
    }
    let values = zero_points.to_i64();
    let (low, high) = codes.int_range();
    match values.iter().position(|v| !(low..=high).contains(v)) {
        Some(index) => Err(QuantizedError::ZeroPointRange {
            codes,
            index,
            value: values[index],
        }),
        None => Ok(Tensor::from_i64_as(codes, zero_points.shape().to_vec(), &values)),
    }
}

/// Extent of the axis and product of those after it; `(1, 1)` per tensor.
fn axis_of(shape: &[usize], granularity: Granularity) -> (usize, usize) {
    match granularity {
        Granularity::Tensor => (1, 1),
        Granularity::Channel { axis } | Granularity::Block { axis, .. } => {
            (shape[axis].max(1), shape[axis + 1..].iter().product::<usize>().max(1))
        }
    }
}

/// Refuses values that no model can use: scales that are NaN or infinite, scales of 0 over codes that are not all the
/// zero point (exporters give blocks of zeros a scale of 0), codes that are not numbers, zero points for types without
/// them.
pub fn check_values(
    codes: &Tensor,
    scales: &Tensor,
    zero_points: Option<&Tensor>,
    granularity: Granularity,
) -> Result<(), QuantizedError> {
    check_types(
        (codes.dtype(), codes.shape()),
        (scales.dtype(), scales.shape()),
        zero_points.map(|z| (z.dtype(), z.shape())),
        granularity,
    )?;
    let dtype = codes.dtype();
    let scales = scales.to_f32();
    if let Some(index) = scales.iter().position(|s| !s.is_finite()) {
        let value = scales[index];
        return Err(QuantizedError::BadScale { index, value });
    }
    let zeros = zero_points.map(Tensor::to_f32);
    let has_zero_points = matches!(dtype.numbers(), Numbers::Signed | Numbers::Unsigned) && dtype.bits() <= 8;
    if let (Some(zeros), false) = (&zeros, has_zero_points)
        && let Some(index) = zeros.iter().position(|z| *z != 0.0)
    {
        return Err(QuantizedError::ZeroPointNotZero { codes: dtype, index });
    }
    let is_float = dtype.is_float_format();
    if !is_float && scales.iter().all(|s| *s != 0.0) {
        return Ok(());
    }
    let (extent, inner) = axis_of(codes.shape(), granularity);
    for (at, code) in codes.to_f32().into_iter().enumerate() {
        if !code.is_finite() {
            return Err(QuantizedError::BadCode { index: at, value: code });
        }
        let index = granularity.scale_of(at, inner, extent);
        let zero = zeros.as_ref().map_or(0.0, |z| z[index]);
        if scales[index] == 0.0 && code != zero {
            return Err(QuantizedError::ZeroScale { index });
        }
    }
    Ok(())
}

/// Elements that a thread processes at a time; a multiple of the codes per byte.
const PIECE: usize = 1 << 16;

/// The values of codes, in the scales' dtype: the difference is exact, the product is rounded once. Panics if
/// [`check_types`] refuses the parts.
pub fn dequantize(codes: &Tensor, scales: &Tensor, zero_points: Option<&Tensor>, granularity: Granularity) -> Tensor {
    let checked = check_types(
        (codes.dtype(), codes.shape()),
        (scales.dtype(), scales.shape()),
        zero_points.map(|z| (z.dtype(), z.shape())),
        granularity,
    );
    if let Err(error) = checked {
        panic!("bug: unchecked parts of a quantized tensor: {error}");
    }
    let (extent, inner) = axis_of(codes.shape(), granularity);
    let (factors, zeros) = (scales.to_f32(), zero_points.map(Tensor::to_f32));
    // Neighbors that share a scale.
    let run = match granularity {
        Granularity::Tensor => codes.len().max(1),
        Granularity::Channel { .. } => inner,
        Granularity::Block { size, .. } if inner == 1 => size,
        Granularity::Block { .. } => 1,
    };
    let (dtype, bits) = (scales.dtype(), codes.dtype().bits());
    let element = dtype.byte_len(1);
    let mut values = vec![0; dtype.byte_len(codes.len())];
    // Pieces for threads end at byte boundaries of codes.
    let pieces = values.par_chunks_mut(PIECE * element).enumerate();
    pieces.for_each(|(i, values)| {
        let (start, len) = (i * PIECE, values.len() / element);
        let bytes = codes.data.slice(start * bits / 8..((start + len) * bits).div_ceil(8));
        let piece = Tensor::new(codes.dtype(), vec![len], bytes).expect("the bytes of so many codes");
        let mut numbers = piece.to_f32();
        let mut from = 0;
        while from < len {
            let at = start + from;
            let to = (from + run - at % run).min(len);
            let scale = granularity.scale_of(at, inner, extent);
            let (zero, factor) = (zeros.as_ref().map_or(0.0, |zeros| zeros[scale]), factors[scale]);
            numbers[from..to]
                .iter_mut()
                .for_each(|code| *code = (*code - zero) * factor);
            from = to;
        }
        // At most 8 bits of code times 11 of a scale in 16 bits: the product in f32 is exact, and this the only rounding.
        with_float!(dtype, F => {
            let places = values.chunks_exact_mut(size_of::<F>());
            places.zip(numbers).for_each(|(to, value)| F::from_f32(value).write(to));
        }, else unreachable!("scales are floats of 16 or 32 bits"));
    });
    let shape = codes.shape().to_vec();
    Tensor::new(dtype, shape, values.into()).expect("as many bytes as the shape takes")
}

/// The codes of floats, as ONNX's `QuantizeLinear` defines them: `x / scale` rounded to nearest even, plus the zero
/// point, saturated to the range of `dtype`. Panics if [`check_types`] refuses the parts.
pub fn quantize(
    dtype: DType,
    values: &Tensor,
    scales: &Tensor,
    zero_points: Option<&Tensor>,
    granularity: Granularity,
) -> Tensor {
    let checked = check_types(
        (dtype, values.shape()),
        (scales.dtype(), scales.shape()),
        zero_points.map(|z| (z.dtype(), z.shape())),
        granularity,
    );
    if let Err(error) = checked {
        panic!("bug: unchecked parts of a tensor to be quantized: {error}");
    }
    let (extent, inner) = axis_of(values.shape(), granularity);
    let factors = scales.to_f32();
    let zeros = zero_points.map(Tensor::to_f64);
    let (low, high) = dtype.int_range();
    let is_float = dtype.is_float_format();
    let code = |(at, value): (usize, f32)| {
        let scale = granularity.scale_of(at, inner, extent);
        let quotient = f64::from(value / factors[scale]);
        if is_float {
            return quotient;
        }
        let zero = zeros.as_ref().map_or(0.0, |z| z[scale]);
        (quotient.round_ties_even() + zero).clamp(low as f64, high as f64)
    };
    let codes: Vec<f64> = values.to_f32().into_iter().enumerate().map(code).collect();
    let shape = values.shape().to_vec();
    match is_float {
        true => Tensor::from_f64_as(dtype, shape, &codes),
        false => Tensor::from_i64_as(dtype, shape, &codes.iter().map(|c| *c as i64).collect::<Vec<_>>()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ints(dtype: DType, shape: &[usize], values: &[i64]) -> Tensor {
        Tensor::from_i64_as(dtype, shape.to_vec(), values)
    }

    fn floats(shape: &[usize], values: &[f32]) -> Tensor {
        Tensor::from_f32(shape.to_vec(), values)
    }

    /// By hand, in every granularity.
    #[test]
    fn values_by_hand() {
        let codes = ints(DType::I4, &[2, 4], &[-8, -1, 0, 7, 1, 2, 3, 4]);
        let of = |scales: Tensor, zeros: Option<Tensor>, granularity| {
            dequantize(&codes, &scales, zeros.as_ref(), granularity).to_f32()
        };
        assert_eq!(
            of(floats(&[], &[0.5]), None, Granularity::Tensor),
            [-4.0, -0.5, 0.0, 3.5, 0.5, 1.0, 1.5, 2.0]
        );
        let zeros = ints(DType::I4, &[2], &[-8, 1]);
        assert_eq!(
            of(floats(&[2], &[1.0, 2.0]), Some(zeros), Granularity::Channel { axis: 0 }),
            [0.0, 7.0, 8.0, 15.0, 0.0, 2.0, 4.0, 6.0]
        );
        assert_eq!(
            of(
                floats(&[4], &[1.0, 2.0, 3.0, 4.0]),
                None,
                Granularity::Channel { axis: 1 }
            ),
            [-8.0, -2.0, 0.0, 28.0, 1.0, 4.0, 9.0, 16.0]
        );
        let rows = Granularity::Block { axis: 1, size: 2 };
        assert_eq!(
            of(floats(&[2, 2], &[1.0, 2.0, 3.0, 4.0]), None, rows),
            [-8.0, -1.0, 0.0, 14.0, 3.0, 6.0, 12.0, 16.0]
        );
        let columns = Granularity::Block { axis: 0, size: 2 };
        assert_eq!(
            of(floats(&[1, 4], &[1.0, 2.0, 3.0, 4.0]), None, columns),
            [-8.0, -2.0, 0.0, 28.0, 1.0, 4.0, 9.0, 16.0]
        );
    }

    /// More codes than a thread processes at a time, in every granularity, against the formula for each element.
    #[test]
    fn pieces_change_nothing() {
        let (rows, depth) = (37, 3 * 1776);
        let codes: Vec<i64> = (0..rows * depth).map(|i| (i as i64 * 7919 % 16) - 8).collect();
        assert!(codes.len() > 2 * PIECE && !codes.len().is_multiple_of(PIECE));
        let codes = ints(DType::I4, &[rows, depth], &codes);
        for granularity in [
            Granularity::Tensor,
            Granularity::Channel { axis: 0 },
            Granularity::Channel { axis: 1 },
            Granularity::Block { axis: 1, size: 48 },
            Granularity::Block { axis: 0, size: 37 },
        ] {
            let shape = granularity.scale_shape(&[rows, depth]).unwrap();
            let count: usize = shape.iter().product();
            let zeros: Vec<i64> = (0..count).map(|i| (i as i64 * 31 % 16) - 8).collect();
            let zeros = ints(DType::I4, &shape, &zeros);
            for dtype in [DType::F32, DType::F16, DType::Bf16] {
                let scales: Vec<f64> = (0..count).map(|i| 0.01 + (i % 113) as f64 / 64.0).collect();
                let scales = Tensor::from_f64_as(dtype, shape.clone(), &scales);
                let values = dequantize(&codes, &scales, Some(&zeros), granularity);
                let (numbers, factors, points) = (codes.to_f32(), scales.to_f32(), zeros.to_f32());
                let (extent, inner) = axis_of(&[rows, depth], granularity);
                let each = numbers.iter().enumerate().map(|(at, code)| {
                    let of = granularity.scale_of(at, inner, extent);
                    f64::from((code - points[of]) * factors[of])
                });
                let expected = Tensor::from_f64_as(dtype, vec![rows, depth], &each.collect::<Vec<_>>());
                assert!(values.data() == expected.data(), "{granularity} {dtype}");
            }
        }
    }

    #[test]
    fn every_type_of_codes_and_scales() {
        for codes in [
            ints(DType::U8, &[2], &[255, 3]),
            ints(DType::U4, &[2], &[15, 3]),
            ints(DType::U2, &[2], &[3, 3]),
        ] {
            let zeros = ints(codes.dtype(), &[], &[3]);
            for scale in [DType::F32, DType::F16, DType::Bf16] {
                let scales = Tensor::from_f64_as(scale, vec![], &[0.5]);
                let found = dequantize(&codes, &scales, Some(&zeros), Granularity::Tensor);
                let first = (codes.to_f32()[0] - 3.0) * 0.5;
                assert_eq!((found.dtype(), found.to_f32()), (scale, vec![first, 0.0]));
            }
        }
        let codes = Tensor::from_f64_as(DType::F8E4M3Fn, vec![2], &[448.0, -0.875]);
        let found = dequantize(&codes, &floats(&[1], &[0.25]), None, Granularity::Tensor);
        assert_eq!(found.to_f32(), [112.0, -0.21875]);
        let codes = Tensor::from_f64_as(DType::F4E2M1, vec![2], &[6.0, -0.5]);
        assert_eq!(
            dequantize(&codes, &floats(&[1], &[2.0]), None, Granularity::Tensor).to_f32(),
            [12.0, -1.0]
        );
        // 255 * 0.1 in f16 is rounded once: 0.0999755859375 * 255 = 25.4937744140625 lies between 25.484375 and 25.5.
        let scales = Tensor::from_f64_as(DType::F16, vec![], &[0.1]);
        let found = dequantize(&ints(DType::U8, &[1], &[255]), &scales, None, Granularity::Tensor);
        assert_eq!(found.to_f32(), [25.5]);
    }

    fn refused(codes: &Tensor, scales: &Tensor, zeros: Option<&Tensor>, granularity: Granularity) -> String {
        check_values(codes, scales, zeros, granularity).unwrap_err().to_string()
    }

    #[test]
    fn parts_that_do_not_belong_together() {
        let codes = ints(DType::U4, &[4, 6], &[1; 24]);
        let one = floats(&[], &[1.0]);
        let block = |axis, size| Granularity::Block { axis, size };
        assert_eq!(
            refused(&floats(&[1], &[0.0]), &one, None, Granularity::Tensor),
            "codes cannot be f32; they are integers of at most 8 bits, i32, floats of 4 or 8 bits, nf4 or fp4"
        );
        assert_eq!(
            refused(&codes, &ints(DType::I32, &[], &[1]), None, Granularity::Tensor),
            "scales cannot be i32; they are f32, f16 or bf16"
        );
        assert_eq!(
            refused(&codes, &one, None, Granularity::Channel { axis: 2 }),
            "codes of shape [4, 6] have no axis 2"
        );
        for size in [4, 0] {
            let message = format!("blocks of {size} do not divide axis 1 of codes of shape [4, 6]");
            assert_eq!(refused(&codes, &one, None, block(1, size)), message);
        }
        assert_eq!(
            refused(&codes, &floats(&[8], &[1.0; 8]), None, block(1, 3)),
            "the scales have the shape [8]; codes of shape [4, 6] in blocks of 3 on axis 1 need [4, 2]"
        );
        let scales = floats(&[4, 2], &[1.0; 8]);
        assert_eq!(
            refused(&codes, &scales, Some(&ints(DType::U4, &[4], &[0; 4])), block(1, 3)),
            "the zero points have the shape [4]; codes of shape [4, 6] in blocks of 3 on axis 1 need [4, 2]"
        );
        assert_eq!(
            refused(&codes, &scales, Some(&ints(DType::U8, &[4, 2], &[0; 8])), block(1, 3)),
            "the zero points are u8 but must be u4, like the codes"
        );
        assert_eq!(check_values(&codes, &scales, None, block(1, 3)), Ok(()));
    }

    #[test]
    fn values_that_no_model_can_use() {
        let codes = ints(DType::U4, &[2, 2], &[3, 3, 3, 5]);
        let channels = Granularity::Channel { axis: 0 };
        let zeros = ints(DType::U4, &[2], &[3, 3]);
        let with = |scales: [f32; 2]| check_values(&codes, &floats(&[2], &scales), Some(&zeros), channels);
        assert_eq!(with([0.0, -1.0]), Ok(()), "a block of zeros may have any scale");
        assert_eq!(with([1.0, 0.0]), Err(QuantizedError::ZeroScale { index: 1 }));
        assert_eq!(
            with([1.0, f32::INFINITY]).unwrap_err().to_string(),
            "the scale at index 1 is inf"
        );
        assert_eq!(
            with([f32::NAN, 1.0]).unwrap_err().to_string(),
            "the scale at index 0 is NaN"
        );
        let nan = Tensor::new(DType::F8E4M3Fn, vec![2], bytes::Bytes::from_static(&[0x10, 0x7f])).unwrap();
        assert_eq!(
            refused(&nan, &floats(&[], &[1.0]), None, Granularity::Tensor),
            "the code at index 1 is NaN"
        );
        let codes = ints(DType::I32, &[1], &[9]);
        let zero = ints(DType::I32, &[], &[1]);
        assert_eq!(
            refused(&codes, &floats(&[], &[1.0]), Some(&zero), Granularity::Tensor),
            "the zero point at index 0 is not 0, as it must be for codes of i32"
        );
    }

    #[test]
    fn zero_points_of_a_wider_type() {
        let given = |values: &[i64]| zero_points_as(DType::U4, &ints(DType::U8, &[2], values));
        assert_eq!(given(&[0, 15]).unwrap().to_i64(), [0, 15]);
        assert_eq!(
            given(&[8, 16]).unwrap_err().to_string(),
            "the zero point 16 at index 1 is out of range: codes of u4 go from 0 to 15"
        );
        let float = Tensor::from_f64_as(DType::F16, vec![1], &[8.0]);
        assert!(matches!(
            zero_points_as(DType::U4, &float),
            Err(QuantizedError::ZeroPoints { .. })
        ));
    }
}
