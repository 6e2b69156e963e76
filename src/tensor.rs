//! Element types and tensors as bytes.
//!
//! A [`Tensor`] is a dtype, a shape and little-endian bytes. The bytes are [`Bytes`], so a tensor that lies in a mapped
//! file costs no memory and clones are free. Everything that computes on elements converts with the typed accessors;
//! this module does not compute.

use std::fmt;

use bytes::Bytes;
use half::{bf16, f16};
use serde::{Deserialize, Serialize};

/// The element types Lapidary reads, lowers and executes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    Bool,
    U8,
    I8,
    I32,
    I64,
    F16,
    Bf16,
    F32,
    /// Appears only in constant arithmetic of some exporters; never lowered.
    F64,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::Bool | DType::U8 | DType::I8 => 1,
            DType::F16 | DType::Bf16 => 2,
            DType::I32 | DType::F32 => 4,
            DType::I64 | DType::F64 => 8,
        }
    }

    pub fn is_float(self) -> bool {
        matches!(self, DType::F16 | DType::Bf16 | DType::F32 | DType::F64)
    }

    pub fn is_int(self) -> bool {
        matches!(self, DType::U8 | DType::I8 | DType::I32 | DType::I64)
    }

    pub fn name(self) -> &'static str {
        match self {
            DType::Bool => "bool",
            DType::U8 => "u8",
            DType::I8 => "i8",
            DType::I32 => "i32",
            DType::I64 => "i64",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
            DType::F32 => "f32",
            DType::F64 => "f64",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The bytes do not fit the dtype and shape.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{dtype} {shape:?} needs {expected} bytes, found {found}")]
pub struct SizeMismatch {
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub expected: usize,
    pub found: usize,
}

/// A dense row-major tensor. Bytes are little-endian and carry no alignment promise: they may lie anywhere in a file.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Bytes,
}

impl Tensor {
    pub fn new(dtype: DType, shape: Vec<usize>, data: Bytes) -> Result<Self, SizeMismatch> {
        // Shapes come from untrusted files: a product that overflows can never match the bytes that are there.
        let expected = shape
            .iter()
            .try_fold(dtype.size(), |n, d| n.checked_mul(*d))
            .unwrap_or(usize::MAX);
        if expected != data.len() {
            return Err(SizeMismatch {
                dtype,
                shape,
                expected,
                found: data.len(),
            });
        }
        Ok(Tensor { dtype, shape, data })
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    pub fn data(&self) -> &Bytes {
        &self.data
    }
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same bytes under another shape of the same volume.
    pub fn reshaped(&self, shape: Vec<usize>) -> Result<Tensor, SizeMismatch> {
        Tensor::new(self.dtype, shape, self.data.clone())
    }

    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Tensor {
        Self::from_elements(DType::F32, shape, values.iter().flat_map(|v| v.to_le_bytes()))
    }
    pub fn from_i64(shape: Vec<usize>, values: &[i64]) -> Tensor {
        Self::from_elements(DType::I64, shape, values.iter().flat_map(|v| v.to_le_bytes()))
    }
    pub fn from_i32(shape: Vec<usize>, values: &[i32]) -> Tensor {
        Self::from_elements(DType::I32, shape, values.iter().flat_map(|v| v.to_le_bytes()))
    }
    pub fn from_bool(shape: Vec<usize>, values: &[bool]) -> Tensor {
        Self::from_elements(DType::Bool, shape, values.iter().map(|v| u8::from(*v)))
    }

    /// Floats stored as `dtype`, rounded to nearest even. Panics if `dtype` is not a float type or the count is wrong.
    pub fn from_f64_as(dtype: DType, shape: Vec<usize>, values: &[f64]) -> Tensor {
        let bytes: Vec<u8> = match dtype {
            DType::F16 => values.iter().flat_map(|v| f16::from_f64(*v).to_le_bytes()).collect(),
            DType::Bf16 => values.iter().flat_map(|v| bf16::from_f64(*v).to_le_bytes()).collect(),
            DType::F32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
            DType::F64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            other => panic!("{other} is not a float type"),
        };
        Tensor::new(dtype, shape, Bytes::from(bytes)).expect("one value per element")
    }

    fn from_elements(dtype: DType, shape: Vec<usize>, bytes: impl Iterator<Item = u8>) -> Tensor {
        let bytes: Vec<u8> = bytes.collect();
        Tensor::new(dtype, shape, Bytes::from(bytes)).expect("one value per element")
    }

    /// Every element as f32 (f64 is rounded, integers converted, bool is 0 or 1).
    pub fn to_f32(&self) -> Vec<f32> {
        let d = &self.data;
        match self.dtype {
            DType::F32 => chunks(d, f32::from_le_bytes),
            DType::F16 => chunks(d, |b| f16::from_le_bytes(b).to_f32()),
            DType::Bf16 => chunks(d, |b| bf16::from_le_bytes(b).to_f32()),
            DType::F64 => chunks(d, |b| f64::from_le_bytes(b) as f32),
            _ => self.to_i64().into_iter().map(|v| v as f32).collect(),
        }
    }

    /// Every element as f64.
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype {
            DType::F64 => chunks(&self.data, f64::from_le_bytes),
            DType::F16 | DType::Bf16 | DType::F32 => self.to_f32().into_iter().map(f64::from).collect(),
            _ => self.to_i64().into_iter().map(|v| v as f64).collect(),
        }
    }

    /// Every element as i64 (floats are truncated toward zero, bool is 0 or 1).
    pub fn to_i64(&self) -> Vec<i64> {
        let d = &self.data;
        match self.dtype {
            DType::I64 => chunks(d, i64::from_le_bytes),
            DType::I32 => chunks(d, |b| i64::from(i32::from_le_bytes(b))),
            DType::I8 => chunks(d, |b: [u8; 1]| i64::from(b[0] as i8)),
            DType::U8 => chunks(d, |b: [u8; 1]| i64::from(b[0])),
            DType::Bool => chunks(d, |b: [u8; 1]| i64::from(b[0] != 0)),
            _ => self.to_f64().into_iter().map(|v| v as i64).collect(),
        }
    }

    /// The only element, as f64, if there is exactly one.
    pub fn scalar(&self) -> Option<f64> {
        (self.len() == 1).then(|| self.to_f64()[0])
    }
}

fn chunks<const N: usize, T>(bytes: &[u8], read: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|chunk| read(*chunk)).collect()
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lying_shape_is_refused_even_when_its_volume_overflows() {
        let bytes = Bytes::from_static(&[0; 8]);
        assert!(Tensor::new(DType::F32, vec![2], bytes.clone()).is_ok());
        assert!(Tensor::new(DType::F32, vec![3], bytes.clone()).is_err());
        assert!(Tensor::new(DType::F32, vec![usize::MAX, usize::MAX], bytes).is_err());
    }

    #[test]
    fn halves_round_trip() {
        let tensor = Tensor::from_f64_as(DType::Bf16, vec![3], &[1.0, -2.5, 0.0]);
        assert_eq!(tensor.to_f32(), [1.0, -2.5, 0.0]);
        assert_eq!(tensor.data().len(), 6);
        assert_eq!(tensor.to_i64(), [1, -2, 0]);
    }
}
