//! Quantized matrices in the form of the kernels: rows of codes, the location of their scales and zero points, and
//! access to single elements. The general path for every form of blocks is here; forms whose blocks are whole words of
//! codes along a row have faster kernels in [`super::quantized_gemv`] and [`super::quantized_gemm`].

use super::super::simd::{Bf16, Element, F16, F32, Kernel, Simd};
use super::moves::{BadIndex, index_at};
use crate::tensor::DType;

/// The encoding of codes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Format {
    /// Integers; two's complement if `signed`.
    Integer {
        /// Bits of a code.
        bits: usize,
        /// Whether the highest bit is a sign.
        signed: bool,
    },
    /// 4-bit codes that index a table of values.
    Numbered,
    /// fp8 e4m3fn.
    F8E4M3Fn,
    /// fp8 e5m2.
    F8E5M2,
}

impl Format {
    /// Bits per code.
    pub fn bits(self) -> usize {
        match self {
            Format::Integer { bits, .. } => bits,
            Format::Numbered => 4,
            Format::F8E4M3Fn | Format::F8E5M2 => 8,
        }
    }
    /// Codes per 32-bit word.
    pub fn per_word(self) -> usize {
        32 / self.bits()
    }
}

/// A matrix `[rows, depth]` of codes: element `[o, p]` is
/// `(number(code) - center - zero[o / block[0], p / block[1]]) * scale[o / block[0], p / block[1]]`.
#[derive(Clone, Copy)]
pub struct QuantizedRows {
    /// `[rows, depth]` packed without gaps, no alignment.
    pub codes: *const u8,
    pub format: Format,
    pub depth: usize,
    /// What codes are relative to, among codes whose sign bit is flipped ([`super::codes::Integer`]).
    pub center: f32,
    /// `number - center` for each code: 256 f32, of which those of `format` are used.
    pub numbers: *const f32,
    /// Rows and columns of a block.
    pub block: [usize; 2],
    /// Scales; `strides` are the distances to the next block of rows and of columns, in elements. No alignment.
    pub scales: *const u8,
    /// f32, f16 or bf16.
    pub scale_storage: DType,
    pub strides: [usize; 2],
    /// Zero points minus `center`, in the same order as the scales; null if all are 0.
    pub zeros: *const i8,
}

impl QuantizedRows {
    /// Scale number `i`.
    ///
    /// # Safety
    /// There are this many scales.
    #[inline(always)]
    pub unsafe fn scale(&self, i: usize) -> f32 {
        // SAFETY: scale `i` is in bounds, and of that storage.
        unsafe {
            match self.scale_storage {
                DType::F16 => F16::get(self.scales, i),
                DType::Bf16 => Bf16::get(self.scales, i),
                _ => F32::get(self.scales, i),
            }
        }
    }

    /// Scales `i..i + n`, the other lanes 0.
    ///
    /// # Safety
    /// There are this many scales; `n <= LANES`; `S` is available.
    #[inline(always)]
    pub unsafe fn first_scales<S: Simd>(&self, i: usize, n: usize) -> S::V {
        // SAFETY: scales `i..i + n` are in bounds, and of that storage.
        unsafe {
            match self.scale_storage {
                DType::F16 => S::first_f16(self.scales.cast::<u16>().add(i), n),
                DType::Bf16 => S::first_bf16(self.scales.cast::<u16>().add(i), n),
                _ => S::first_f32(self.scales.cast::<f32>().add(i), n),
            }
        }
    }

    /// Zero point number `i`.
    ///
    /// # Safety
    /// There are this many.
    #[inline(always)]
    unsafe fn zero(&self, i: usize) -> f32 {
        match self.zeros.is_null() {
            true => 0.0,
            // SAFETY: zero point `i` is in bounds.
            false => f32::from(unsafe { *self.zeros.add(i) }),
        }
    }

    /// Calls `put` with the elements `first..first + n` of row `o`, each with its index from 0 on.
    ///
    /// # Safety
    /// They are elements of the matrix.
    #[inline(always)]
    pub unsafe fn elements(&self, o: usize, first: usize, n: usize, mut put: impl FnMut(usize, f32)) {
        let bits = self.format.bits();
        let (per_byte, mask) = (8 / bits, ((1u32 << bits) - 1) as u8);
        let mut p = first;
        while p < first + n {
            let block = p / self.block[1];
            let end = ((block + 1).saturating_mul(self.block[1])).min(first + n);
            let at = o / self.block[0] * self.strides[0] + block * self.strides[1];
            // SAFETY: the element is in the matrix, so its block has a scale and a zero point, and its code lies in the
            // byte computed here; `numbers` has a number for each code.
            unsafe {
                let (scale, zero) = (self.scale(at), self.zero(at));
                for q in p..end {
                    let code = o * self.depth + q;
                    let byte = *self.codes.add(code / per_byte);
                    let code = byte >> (code % per_byte * bits) & mask;
                    put(q - first, (*self.numbers.add(code as usize) - zero) * scale);
                }
            }
            p = end;
        }
    }

    /// `to[0..n]` becomes the elements `first..first + n` of row `o`.
    ///
    /// # Safety
    /// They are elements of the matrix; `to` has `n` f32.
    #[inline(always)]
    pub unsafe fn row(&self, o: usize, first: usize, n: usize, to: *mut f32) {
        // SAFETY: places are below `n`.
        unsafe { self.elements(o, first, n, |i, x| to.add(i).write(x)) }
    }
}

/// `out[i, ..] = rows[indices[i], ..]` in f32, for the `i` in `items`.
pub struct QuantizedGather {
    pub rows: QuantizedRows,
    pub count: usize,
    /// Dense.
    pub indices: *const u8,
    pub index_storage: DType,
    /// `[indices, depth]`.
    pub out: *mut f32,
    pub items: std::ops::Range<usize>,
}

impl Kernel for QuantizedGather {
    type Output = Result<(), BadIndex>;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Result<(), BadIndex> {
        let depth = self.rows.depth;
        for item in self.items.clone() {
            // SAFETY: items number the indices.
            let index = unsafe { index_at(self.indices, self.index_storage, item as isize) };
            if index < 0 || index >= self.count as i64 {
                let bound = self.count;
                return Err(BadIndex { index, bound });
            }
            // SAFETY: the checked index is a row; the output has a row for each item, which no other item writes.
            unsafe { self.rows.row(index as usize, 0, depth, self.out.add(item * depth)) };
        }
        Ok(())
    }
}
