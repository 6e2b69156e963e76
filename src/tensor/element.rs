//! The arithmetic floats of at most 32 bits as Rust types, in one place.

use half::{bf16, f16};

/// A float that widens to f32 without loss.
pub(crate) trait FloatElement: Copy {
    /// From little-endian bytes, as many as the type has.
    fn read(bytes: &[u8]) -> Self;
    /// Appends little-endian bytes.
    fn push_to(self, bytes: &mut Vec<u8>);
    /// Writes little-endian bytes, as many as the type has.
    fn write(self, bytes: &mut [u8]);
    fn to_f32(self) -> f32;
    /// Rounded to nearest even.
    fn from_f32(value: f32) -> Self;
    /// Rounded to nearest even, once.
    fn from_f64(value: f64) -> Self;
}

macro_rules! element {
    ($type:ty, $to_f32:expr, $from_f32:expr, $from_f64:expr) => {
        impl FloatElement for $type {
            #[inline]
            fn read(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("the bytes of one element"))
            }
            #[inline]
            fn push_to(self, bytes: &mut Vec<u8>) {
                bytes.extend_from_slice(&self.to_le_bytes());
            }
            #[inline]
            fn write(self, bytes: &mut [u8]) {
                bytes.copy_from_slice(&self.to_le_bytes());
            }
            #[inline]
            fn to_f32(self) -> f32 {
                $to_f32(self)
            }
            #[inline]
            fn from_f32(value: f32) -> Self {
                $from_f32(value)
            }
            #[inline]
            fn from_f64(value: f64) -> Self {
                $from_f64(value)
            }
        }
    };
}

element!(f16, f16::to_f32, f16::from_f32, f16::from_f64);
element!(bf16, bf16::to_f32, bf16::from_f32, bf16::from_f64);
element!(f32, |v| v, |v| v, |v| v as f32);

/// Runs a block with the Rust type of a float dtype of at most 32 bits; other dtypes run the block after `else`.
///
/// ```ignore
/// with_float!(tensor.dtype(), F => F::read(bytes).to_f32(), else panic!("no float"))
/// ```
macro_rules! with_float {
    ($dtype:expr, $float:ident => $body:expr, else $other:expr) => {
        match $dtype {
            $crate::tensor::DType::F16 => {
                type $float = half::f16;
                $body
            }
            $crate::tensor::DType::Bf16 => {
                type $float = half::bf16;
                $body
            }
            $crate::tensor::DType::F32 => {
                type $float = f32;
                $body
            }
            _ => $other,
        }
    };
}
pub(crate) use with_float;

/// The elements of little-endian bytes; `None` if the dtype is not a float of at most 32 bits.
pub(crate) fn widened(dtype: crate::tensor::DType, bytes: &[u8]) -> Option<Vec<f32>> {
    with_float!(dtype, F => Some(bytes.chunks_exact(size_of::<F>()).map(|b| F::read(b).to_f32()).collect()), else None)
}
