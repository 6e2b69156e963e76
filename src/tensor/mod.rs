//! Element types, tensors as bytes, and quantized blocks.
//!
//! A [`Tensor`] is a [`DType`], a shape and little-endian bytes. The bytes are [`Bytes`], so a tensor in a mapped file
//! takes no memory and clones are free. Everything that computes on elements converts with the typed accessors; the
//! only arithmetic here is that of codes: [`quantized::dequantize`] computes their values, [`mod@quantize`] finds
//! codes.

pub mod compensate;
mod dtype;
pub(crate) mod element;
mod narrow;
pub mod npy;
pub(crate) mod packed;
pub mod quantize;
pub mod quantized;

use std::fmt;

use bytes::Bytes;

pub(crate) use dtype::Numbers;
pub use dtype::{DType, UnknownDType};
use element::{FloatElement, with_float};

/// The bytes do not fit the dtype and shape.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{dtype} {shape:?} needs {expected} bytes, found {found}")]
pub struct SizeMismatch {
    /// Element type.
    pub dtype: DType,
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// Bytes that dtype and shape require.
    pub expected: usize,
    /// Bytes found.
    pub found: usize,
}

/// A dense row-major tensor. Bytes are little-endian and carry no alignment promise: they can be anywhere in a file.
/// Elements below a byte are packed as ONNX packs them, the first in the lowest bits, without gaps between rows.
#[derive(Clone, PartialEq)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Bytes,
}

impl Tensor {
    /// A tensor over bytes, exactly as many as [`DType::byte_len`] returns.
    pub fn new(dtype: DType, shape: Vec<usize>, data: Bytes) -> Result<Self, SizeMismatch> {
        // Shapes come from untrusted files: a product that overflows never matches the number of bytes.
        let expected = dtype.byte_len_of(&shape).unwrap_or(usize::MAX);
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

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Extents, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// The elements, little-endian and packed.
    pub fn data(&self) -> &Bytes {
        &self.data
    }
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }
    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same bytes under another shape of the same volume.
    pub fn reshaped(&self, shape: Vec<usize>) -> Result<Tensor, SizeMismatch> {
        Tensor::new(self.dtype, shape, self.data.clone())
    }

    /// Values as f32. Panics if they are not as many as the shape says, as do all constructors from values.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Tensor {
        Self::of_bytes(DType::F32, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }
    /// Values as i64.
    pub fn from_i64(shape: Vec<usize>, values: &[i64]) -> Tensor {
        Self::of_bytes(DType::I64, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }
    /// Values as i32.
    pub fn from_i32(shape: Vec<usize>, values: &[i32]) -> Tensor {
        Self::of_bytes(DType::I32, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }
    /// Values as bool.
    pub fn from_bool(shape: Vec<usize>, values: &[bool]) -> Tensor {
        Self::of_bytes(DType::Bool, shape, values.iter().map(|v| u8::from(*v)).collect())
    }

    /// Floats stored as a float type, narrow ones too, rounded to nearest even. f16, bf16 and f32 overflow to infinity, the
    /// narrow types saturate. Panics if `dtype` is not a float type.
    pub fn from_f64_as(dtype: DType, shape: Vec<usize>, values: &[f64]) -> Tensor {
        let bytes = match dtype {
            DType::F64 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            _ => with_float!(dtype, F => {
                let mut bytes = Vec::with_capacity(values.len() * size_of::<F>());
                values.iter().for_each(|v| F::from_f64(*v).push_to(&mut bytes));
                bytes
            }, else {
                assert!(dtype.is_float_format(), "{dtype} is not a float type");
                let codes: Vec<u8> = values.iter().map(|v| narrow::encode(dtype, *v)).collect();
                coded(dtype, codes)
            }),
        };
        Self::of_bytes(dtype, shape, bytes)
    }

    /// Integers stored as an integer type or bool, wrapping as two's complement; bool is whether they are not 0. Panics
    /// if `dtype` is a float type.
    pub fn from_i64_as(dtype: DType, shape: Vec<usize>, values: &[i64]) -> Tensor {
        assert!(!dtype.is_float_format(), "{dtype} is not an integer type");
        let bytes = match dtype {
            DType::Bool => values.iter().map(|v| u8::from(*v != 0)).collect(),
            _ if dtype.bits() <= 8 => coded(dtype, values.iter().map(|v| *v as u8).collect()),
            _ => {
                let bytes = values.iter().map(|v| v.to_le_bytes());
                bytes.flat_map(|b| b.into_iter().take(dtype.element_bytes())).collect()
            }
        };
        Self::of_bytes(dtype, shape, bytes)
    }

    fn of_bytes(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Tensor {
        Tensor::new(dtype, shape, Bytes::from(bytes)).expect("one value per element")
    }

    /// The bits of every element of a type of at most 8 bits, one element a byte.
    pub(crate) fn codes(&self) -> Vec<u8> {
        match self.dtype.is_packed() {
            true => packed::unpack(&self.data, self.dtype.bits(), self.len()),
            false => self.data.to_vec(),
        }
    }

    /// Every element as f32 (f64 is rounded, integers converted, bool is 0 or 1).
    pub fn to_f32(&self) -> Vec<f32> {
        if let Some(values) = element::widened(self.dtype, &self.data) {
            return values;
        }
        match self.dtype.numbers() {
            Numbers::Float(_) if self.dtype == DType::F64 => chunks(&self.data, |b| f64::from_le_bytes(b) as f32),
            Numbers::Float(_) | Numbers::Table(_) => {
                let numbers: Vec<f32> = (0..=u8::MAX).map(|code| narrow::decode(self.dtype, code)).collect();
                self.codes()
                    .into_iter()
                    .map(|code| numbers[usize::from(code)])
                    .collect()
            }
            _ => self.to_i64().into_iter().map(|v| v as f32).collect(),
        }
    }

    /// Every element as f64.
    pub fn to_f64(&self) -> Vec<f64> {
        match self.dtype.numbers() {
            Numbers::Float(_) if self.dtype == DType::F64 => chunks(&self.data, f64::from_le_bytes),
            Numbers::Float(_) | Numbers::Table(_) => self.to_f32().into_iter().map(f64::from).collect(),
            _ => self.to_i64().into_iter().map(|v| v as f64).collect(),
        }
    }

    /// Every element as i64 (floats are truncated toward zero, bool is 0 or 1).
    pub fn to_i64(&self) -> Vec<i64> {
        let d = &self.data;
        let bits = self.dtype.bits();
        match self.dtype.numbers() {
            Numbers::Signed if bits == 64 => chunks(d, i64::from_le_bytes),
            Numbers::Signed if bits == 32 => chunks(d, |b| i64::from(i32::from_le_bytes(b))),
            Numbers::Signed => self.codes().into_iter().map(|c| packed::sign_extend(c, bits)).collect(),
            Numbers::Unsigned => self.codes().into_iter().map(i64::from).collect(),
            Numbers::Bool => chunks(d, |b: [u8; 1]| i64::from(b[0] != 0)),
            Numbers::Float(_) | Numbers::Table(_) => self.to_f64().into_iter().map(|v| v as i64).collect(),
        }
    }

    /// The only element, as f64, if there is exactly one.
    pub fn scalar(&self) -> Option<f64> {
        (self.len() == 1).then(|| self.to_f64()[0])
    }
}

/// The bytes of elements of at most 8 bits, given one a byte.
fn coded(dtype: DType, codes: Vec<u8>) -> Vec<u8> {
    match dtype.is_packed() {
        true => packed::pack(&codes, dtype.bits()),
        false => codes,
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

    #[test]
    fn packed_and_narrow_elements() {
        let fours = Tensor::from_i64_as(DType::I4, vec![3], &[-8, 7, -1]);
        assert_eq!(fours.data()[..], [0x78, 0x0f]);
        assert_eq!(fours.to_i64(), [-8, 7, -1]);
        assert_eq!(fours.to_f32(), [-8.0, 7.0, -1.0]);
        assert_eq!(
            Tensor::from_i64_as(DType::U2, vec![5], &[0, 1, 2, 3, 6]).to_i64(),
            [0, 1, 2, 3, 2]
        );
        assert_eq!(
            Tensor::from_i64_as(DType::I32, vec![2], &[-2, 1 << 40]).to_i64(),
            [-2, 0]
        );
        for dtype in [DType::F8E4M3Fn, DType::F8E5M2, DType::F4E2M1] {
            let tensor = Tensor::from_f64_as(dtype, vec![3], &[0.5, -1.5, 1e9]);
            assert_eq!(tensor.data().len(), dtype.byte_len(3));
            assert_eq!(tensor.to_f64(), [0.5, -1.5, dtype.max()], "{dtype}");
        }
        for dtype in [DType::Nf4, DType::Fp4] {
            let tensor = Tensor::from_f64_as(dtype, vec![5], &[0.0, 1.0, -1.0, 0.3, 7.0]);
            assert_eq!(tensor.data().len(), 3);
            let near = [
                0.0,
                1.0,
                -1.0,
                if dtype == DType::Nf4 {
                    0.337_915_24
                } else {
                    0.333_333_34
                },
                1.0,
            ];
            assert_eq!(tensor.to_f32(), near, "{dtype}");
        }
        let short = Tensor::new(DType::U4, vec![3], Bytes::from_static(&[0]));
        assert_eq!(short.unwrap_err().to_string(), "u4 [3] needs 2 bytes, found 1");
    }
}
