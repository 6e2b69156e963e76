//! Quantized weights in the form of the kernels.
//!
//! Input: a quantized [`Constant`] of two axes, `[out, in]`. Output: a [`QuantizedMatrix`]: codes in place (in a mapped
//! file, if stored in this order), scales in place unless they are quantized themselves, zero points as one byte each.
//! [`QuantizedWeights`] caches them, so that programs of one device share them, and a weight that is both embedding and
//! head is stored once.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use half::f16;

use super::kernels::quantized::{Format, QuantizedRows};
use super::mapped_pages::release;
use crate::graph::{Constant, ConstantError, ConstantSource};
use crate::tensor::quantized::Granularity;
use crate::tensor::{DType, Numbers, Tensor, packed};

/// Fewer scales are not converted.
const WORTH_NARROWING: usize = 1024;

/// A matrix `[rows, depth]` of codes. [`QuantizedRows`] documents the fields.
pub struct QuantizedMatrix {
    codes: Tensor,
    scales: Tensor,
    zeros: Option<Vec<i8>>,
    format: Format,
    center: f32,
    numbers: Box<[f32; 256]>,
    block: [usize; 2],
    strides: [usize; 2],
}

impl QuantizedMatrix {
    /// Whether a constant is quantized with codes that kernels support: all but i32.
    pub fn takes(constant: &Constant) -> bool {
        let parts = constant.as_quantized();
        parts.is_some_and(|parts| format(parts.codes.dtype()).is_some())
    }

    /// The matrix of a constant of two axes that [`QuantizedMatrix::takes`].
    fn new(constant: &Constant) -> Result<QuantizedMatrix, ConstantError> {
        let parts = constant.as_quantized().expect("quantized, as `takes` says");
        let (codes, scales) = (parts.codes.materialize()?, narrowed(parts.scales.materialize()?));
        let zero_points = parts.zero_points.map(Constant::materialize).transpose()?;
        let dtype = codes.dtype();
        let format = format(dtype).expect("a format, as `takes` says");
        let (rows, depth) = (codes.shape()[0], codes.shape()[1]);
        let (block, strides) = match parts.granularity {
            Granularity::Tensor => ([rows, depth], [0, 0]),
            Granularity::Channel { axis: 0 } => ([1, depth], [1, 0]),
            Granularity::Channel { .. } => ([rows, 1], [0, 1]),
            Granularity::Block { axis: 0, size } => ([size, 1], [depth, 1]),
            Granularity::Block { size, .. } => ([1, size], [depth / size, 1]),
        };
        let Centered { center, zeros } = centered(format, zero_points.as_ref());
        // All codes, with the dtype's values.
        let count = 1usize << format.bits();
        let all: Vec<u8> = (0..count).map(|code| code as u8).collect();
        let all = match format.bits() {
            8 => all,
            bits => packed::pack(&all, bits),
        };
        let all = Tensor::new(dtype, vec![count], all.into()).expect("a byte or less for each");
        let mut numbers = Box::new([0f32; 256]);
        let half = if dtype.numbers() == Numbers::Signed {
            (count / 2) as f32
        } else {
            0.0
        };
        for (number, value) in numbers.iter_mut().zip(all.to_f32()) {
            *number = value + half - center;
        }
        Ok(QuantizedMatrix {
            codes,
            scales,
            zeros,
            format,
            center,
            numbers,
            // A block over all rows is treated as a block per row with a scale stride of 0.
            block: [if strides[0] == 0 { 1 } else { block[0] }, block[1]].map(|size| size.max(1)),
            strides,
        })
    }

    /// Rows: the outputs of a linear layer.
    pub fn rows(&self) -> usize {
        self.codes.shape()[0]
    }
    /// Elements per row.
    pub fn depth(&self) -> usize {
        self.codes.shape()[1]
    }
    /// How codes are read.
    pub fn format(&self) -> Format {
        self.format
    }
    /// Bytes per row, including its scales and zero points.
    pub fn row_bytes(&self) -> usize {
        let zeros = self.zeros.as_ref().map_or(0, Vec::len);
        (self.codes.data().len() + self.scales.data().len() + zeros).div_ceil(self.rows().max(1))
    }
    /// Whether rows from a multiple of `count` on form a matrix: codes start at a byte, blocks at a row.
    pub fn starts_at_multiples_of(&self, count: usize) -> bool {
        let bits = self.depth() * self.format.bits();
        bits.is_multiple_of(8) && count.is_multiple_of(self.block[0])
    }
    /// The matrix from a row on, where [`QuantizedMatrix::starts_at_multiples_of`] allows it.
    pub fn kernel_from(&self, row: usize) -> QuantizedRows {
        let all = self.kernel();
        let block = row / self.block[0] * self.strides[0];
        let zeros = match all.zeros.is_null() {
            true => all.zeros,
            false => all.zeros.wrapping_add(block),
        };
        QuantizedRows {
            codes: all.codes.wrapping_add(row * self.depth() * self.format.bits() / 8),
            scales: all.scales.wrapping_add(block * self.scales.dtype().element_bytes()),
            zeros,
            ..all
        }
    }
    /// The matrix for kernels, valid as long as `self`.
    pub fn kernel(&self) -> QuantizedRows {
        QuantizedRows {
            codes: self.codes.data().as_ptr(),
            format: self.format,
            depth: self.depth(),
            center: self.center,
            numbers: self.numbers.as_ptr(),
            block: self.block,
            scales: self.scales.data().as_ptr(),
            scale_storage: self.scales.dtype(),
            strides: self.strides,
            zeros: self.zeros.as_ref().map_or(std::ptr::null(), |zeros| zeros.as_ptr()),
        }
    }
}

impl fmt::Debug for QuantizedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "QuantizedMatrix({:?} by {:?} in {:?})",
            self.codes, self.scales, self.block
        )
    }
}

/// The encoding of a dtype's codes; `None` if kernels do not support them.
fn format(dtype: DType) -> Option<Format> {
    match (dtype, dtype.numbers(), dtype.bits()) {
        (DType::F8E4M3Fn, ..) => Some(Format::F8E4M3Fn),
        (DType::F8E5M2, ..) => Some(Format::F8E5M2),
        (_, Numbers::Signed, bits @ (2 | 4 | 8)) => Some(Format::Integer { bits, signed: true }),
        (_, Numbers::Unsigned, bits @ (2 | 4 | 8)) => Some(Format::Integer { bits, signed: false }),
        (_, Numbers::Signed | Numbers::Unsigned | Numbers::Bool, _) => None,
        (_, _, 4) => Some(Format::Numbered),
        _ => None,
    }
}

/// Scales that f16 represents exactly, as f16: each token reads codes and scales, and for 4-bit codes in groups of 32,
/// f32 scales are a fifth of that.
fn narrowed(scales: Tensor) -> Tensor {
    let half = |bytes: &[u8; 4]| {
        let value = f32::from_le_bytes(*bytes);
        let half = f16::from_f32(value);
        (half.to_f32() == value).then_some(half.to_le_bytes())
    };
    if scales.dtype() != DType::F32 || scales.len() < WORTH_NARROWING {
        return scales;
    }
    let (all, _) = scales.data().as_chunks::<4>();
    let mut bytes = Vec::with_capacity(2 * all.len());
    for value in all {
        match half(value) {
            Some(half) => bytes.extend(half),
            None => return scales,
        }
    }
    Tensor::new(DType::F16, scales.shape().to_vec(), bytes.into()).expect("two bytes for each")
}

struct Centered {
    /// What codes are relative to, in ascending order from 0.
    center: f32,
    /// For every block, its zero point minus the center; `None` if all are 0.
    zeros: Option<Vec<i8>>,
}

/// If all zero points are equal, that is the center.
fn centered(format: Format, zero_points: Option<&Tensor>) -> Centered {
    let Format::Integer { bits, signed } = format else {
        return Centered {
            center: 0.0,
            zeros: None,
        };
    };
    let half = 1i64 << (bits - 1);
    let lowest = if signed { -half } else { 0 };
    let values = zero_points.map_or_else(Vec::new, Tensor::to_i64);
    let first = values.first().copied().unwrap_or(0);
    if values.iter().all(|value| *value == first) {
        let center = (first - lowest) as f32;
        return Centered { center, zeros: None };
    }
    let zeros = values.iter().map(|value| (value - lowest - half) as i8).collect();
    Centered {
        center: half as f32,
        zeros: Some(zeros),
    }
}

/// The matrices so far. The sources of a matrix are identified by their addresses, and stored with it.
#[derive(Default)]
pub struct QuantizedWeights {
    /// Source bytes that the matrix does not read: their file pages can be released.
    spent: Mutex<Vec<Bytes>>,
    made: Mutex<HashMap<String, (Constant, Arc<QuantizedMatrix>)>>,
}

impl QuantizedWeights {
    /// The matrix of a constant of two axes that [`QuantizedMatrix::takes`].
    pub fn get(&self, constant: &Constant) -> Result<Arc<QuantizedMatrix>, ConstantError> {
        let identity = constant.identity();
        let mut made = self.made.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((_, matrix)) = made.get(&identity) {
            return Ok(matrix.clone());
        }
        let matrix = Arc::new(QuantizedMatrix::new(constant)?);
        let mut sources = Vec::new();
        sources_of(constant, &mut sources);
        let read = [&matrix.codes, &matrix.scales].map(|tensor| tensor.data().as_ptr());
        sources.retain(|bytes| !read.contains(&bytes.as_ptr()));
        self.spent
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .extend(sources);
        made.insert(identity, (constant.clone(), matrix.clone()));
        Ok(matrix)
    }
}

impl QuantizedWeights {
    /// Releases memory that was only needed to build matrices.
    pub fn settle(&self) {
        let spent = std::mem::take(&mut *self.spent.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        if !spent.is_empty() {
            release(&spent);
        }
    }
}

/// The source tensors of a constant.
fn sources_of(constant: &Constant, sources: &mut Vec<Bytes>) {
    match constant.source() {
        ConstantSource::Tensor(tensor) => sources.push(tensor.data().clone()),
        ConstantSource::Derived(derived) => derived.inputs.iter().for_each(|input| sources_of(input, sources)),
        ConstantSource::Absent => {}
    }
}

impl fmt::Debug for QuantizedWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let made = self.made.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        write!(f, "QuantizedWeights({})", made.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(shape: &[usize], granularity: Granularity) -> Constant {
        let count: i64 = shape.iter().product::<usize>() as i64;
        let codes = Tensor::from_i64_as(DType::U4, shape.to_vec(), &(0..count).collect::<Vec<_>>());
        let of = granularity.scale_shape(shape).unwrap();
        let scales = Tensor::from_f32(of.clone(), &vec![0.5; of.iter().product()]);
        Constant::quantized(codes.into(), scales.into(), None, granularity).unwrap()
    }

    #[test]
    fn codes_and_scales_are_read_where_they_lie_and_shared() {
        let constant = weight(&[4, 32], Granularity::Block { axis: 1, size: 8 });
        let weights = QuantizedWeights::default();
        let matrix = weights.get(&constant).unwrap();
        let parts = constant.as_quantized().unwrap();
        let address = |part: &Constant| part.materialize().unwrap().data().as_ptr();
        assert_eq!(matrix.codes.data().as_ptr(), address(parts.codes));
        assert_eq!(matrix.scales.data().as_ptr(), address(parts.scales));
        // Applying the same movement twice gives one copy.
        let turned = constant.transposed(&[1, 0]);
        let again = constant.transposed(&[1, 0]);
        assert!(Arc::ptr_eq(&weights.get(&constant.clone()).unwrap(), &matrix));
        assert!(Arc::ptr_eq(
            &weights.get(&turned).unwrap(),
            &weights.get(&again).unwrap()
        ));
        assert_eq!(weights.made.lock().unwrap().len(), 2);
    }

    #[test]
    fn scales_become_narrow_where_nothing_is_lost() {
        let values: Vec<f32> = (0..WORTH_NARROWING).map(|i| i as f32 / 1024.0).collect();
        let exact = Tensor::from_f32(vec![values.len()], &values);
        let found = narrowed(exact.clone());
        assert_eq!((found.dtype(), found.to_f32()), (DType::F16, values.clone()));
        for other in [0.1, f32::NAN, 1e6, 1e-9] {
            let mut values = values.clone();
            values[700] = other;
            assert_eq!(
                narrowed(Tensor::from_f32(vec![values.len()], &values)).dtype(),
                DType::F32
            );
        }
        assert_eq!(narrowed(Tensor::from_f32(vec![2], &values[..2])).dtype(), DType::F32);
    }

    #[test]
    fn zero_points_that_are_all_the_same_are_the_center() {
        let four = Format::Integer { bits: 4, signed: false };
        let signed = Format::Integer { bits: 4, signed: true };
        let points = |dtype, values: &[i64]| Tensor::from_i64_as(dtype, vec![values.len()], values);
        let of = |format, points: Option<&Tensor>| {
            let Centered { center, zeros } = centered(format, points);
            (center, zeros)
        };
        assert_eq!(of(four, None), (0.0, None));
        assert_eq!(of(signed, None), (8.0, None));
        assert_eq!(of(four, Some(&points(DType::U4, &[8, 8]))), (8.0, None));
        assert_eq!(of(four, Some(&points(DType::U4, &[0, 15]))), (8.0, Some(vec![-8, 7])));
        assert_eq!(of(signed, Some(&points(DType::I4, &[-8, 7]))), (8.0, Some(vec![-8, 7])));
    }
}
