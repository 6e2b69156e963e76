//! Converts codes of quantized weights to f32 in registers.
//!
//! Codes are read as words of 32 bits, a vector at a time: lane `i` of the word vector holds the codes `i * PER_WORD
//! ..` of the piece read, the first in its lowest bits, and [`Code::decode`] returns the `k`-th code of every word. So
//! the inner loop does not interleave: the other operand is rearranged into the same order first
//! ([`super::quantized_gemv`]), or an existing transpose restores the order ([`super::quantized_gemm`]).
//!
//! Integers need no conversion instruction: `(w & mask) ^ bits` puts the code into the mantissa of a float whose
//! exponent makes it `2^e + code`, and one subtraction removes `2^e` and the codes' offset. Both are exact.

use super::super::simd::Simd;

/// A kind of codes, ready for an instruction set.
pub trait Code<S: Simd>: Copy {
    /// Codes per word.
    const PER_WORD: usize;
    /// Code `k < PER_WORD` of every word as f32.
    ///
    /// # Safety
    /// The instruction set is available.
    unsafe fn decode(self, w: S::W, k: usize) -> S::V;
}

/// Integers of `BITS` bits, minus a number.
#[derive(Clone, Copy)]
pub struct Integer<const BITS: usize> {
    /// The sign bit of a code if it is two's complement, else 0: flipping it puts codes in the order of their values.
    pub flip: u32,
    /// What codes are relative to, among flipped codes.
    pub center: f32,
}

impl<const BITS: usize> Integer<BITS> {
    /// Codes of a word that are within the mantissa (23 bits) in place; the others are shifted down first.
    const LOW: usize = 23 / BITS;
}

impl<S: Simd, const BITS: usize> Code<S> for Integer<BITS> {
    const PER_WORD: usize = 32 / BITS;
    #[inline(always)]
    unsafe fn decode(self, w: S::W, k: usize) -> S::V {
        // SAFETY: registers only; the instruction set is available by the contract.
        unsafe {
            let (w, k) = match k < Self::LOW {
                true => (w, k),
                false => (S::shift_right(w, (Self::LOW * BITS) as u32), k - Self::LOW),
            };
            let at = (k * BITS) as u32;
            let mask = ((1u32 << BITS) - 1) << at;
            // A mantissa bit at `at` has the value 1 with the exponent 23 - at.
            let exponent = 23 - at;
            let whole = S::as_floats(S::select_bits(w, mask, (127 + exponent) << 23 | self.flip << at));
            S::sub(whole, S::splat((1u32 << exponent) as f32 + self.center))
        }
    }
}

/// 4-bit codes that index a table of values.
#[derive(Clone, Copy)]
pub struct Numbered<T>(pub T);

impl<S: Simd> Code<S> for Numbered<S::Table> {
    const PER_WORD: usize = 8;
    #[inline(always)]
    unsafe fn decode(self, w: S::W, k: usize) -> S::V {
        // SAFETY: registers only; the instruction set is available by the contract.
        unsafe { S::lookup(self.0, S::shift_right(w, 4 * k as u32)) }
    }
}

/// 4-bit integers, half of them by arithmetic and half by a table, if vectors have 16 lanes: on Zen 4 a lookup and the
/// shift before it keep two of four vector units busy and arithmetic the others, so that the two together are faster
/// than either.
#[derive(Clone, Copy)]
pub struct Mixed<T> {
    /// The values of the codes.
    pub table: T,
    /// The same by arithmetic.
    pub integer: Integer<4>,
}

impl<S: Simd> Code<S> for Mixed<S::Table> {
    const PER_WORD: usize = 8;
    #[inline(always)]
    unsafe fn decode(self, w: S::W, k: usize) -> S::V {
        // SAFETY: this function's own contract.
        unsafe {
            match S::LANES == 16 && (1..5).contains(&k) {
                true => Code::<S>::decode(self.integer, w, k),
                false => Code::<S>::decode(Numbered(self.table), w, k),
            }
        }
    }
}

/// 8-bit floats with `EXPONENT` bits of exponent: fp8 e4m3fn and e5m2.
#[derive(Clone, Copy)]
pub struct Float8<const EXPONENT: u32>;

impl<S: Simd, const EXPONENT: u32> Code<S> for Float8<EXPONENT> {
    const PER_WORD: usize = 4;
    #[inline(always)]
    unsafe fn decode(self, w: S::W, k: usize) -> S::V {
        let mantissa = 7 - EXPONENT;
        // The largest finite code: e4m3fn keeps one code for NaN, e5m2 an exponent for infinities and NaN.
        let largest = if EXPONENT == 4 { 0x7e } else { 0x7b };
        let bias = (1u32 << (EXPONENT - 1)) - 1;
        // SAFETY: registers only; the instruction set is available by the contract.
        unsafe {
            let byte = S::shift_right(w, 8 * k as u32);
            let magnitude = S::select_bits(byte, 0x7f, 0);
            // Exponent and mantissa where f32 has them; a product corrects the difference of the biases, also for
            // subnormal codes, which are subnormal f32 until then.
            let shifted = S::as_floats(S::shift_left(magnitude, 23 - mantissa));
            let value = S::mul(shifted, S::splat(f32::from_bits((127 + 127 - bias) << 23)));
            let sign = S::shift_left(S::select_bits(byte, 0x80, 0), 24);
            let special = S::bits_above(magnitude, largest, 0x7f80_0000);
            S::as_floats(S::or(S::or(S::as_words(value), sign), special))
        }
    }
}
