//! Stored floats: loading and storing vectors of each type.

use half::{bf16, f16};

use super::Simd;

/// The storage of floats in a weight or cache. Pointers need no alignment.
pub trait Element: Copy + Send + Sync + 'static {
    /// Bytes of one element.
    const SIZE: usize;
    /// `LANES` elements from element `i` on.
    ///
    /// # Safety
    /// Elements `i..i + LANES` from `p` on can be read, and `S` is available.
    unsafe fn load<S: Simd>(p: *const u8, i: usize) -> S::V;
    /// Element `i`.
    ///
    /// # Safety
    /// Element `i` from `p` on can be read.
    unsafe fn get(p: *const u8, i: usize) -> f32;
    /// `LANES` elements written from element `i` on, rounded to nearest even.
    ///
    /// # Safety
    /// Elements `i..i + LANES` from `p` on can be written, and `S` is available.
    unsafe fn store<S: Simd>(p: *mut u8, i: usize, v: S::V);
    /// Element `i` written, rounded to nearest even.
    ///
    /// # Safety
    /// Element `i` from `p` on can be written.
    unsafe fn set(p: *mut u8, i: usize, x: f32);
}

/// Four bytes, IEEE 754 binary32.
#[derive(Clone, Copy)]
pub struct F32;
/// Two bytes, IEEE 754 binary16.
#[derive(Clone, Copy)]
pub struct F16;
/// Two bytes, the upper half of an f32.
#[derive(Clone, Copy)]
pub struct Bf16;

impl Element for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8, i: usize) -> S::V {
        // SAFETY: `S::load` reads the `LANES` elements that the caller promises, of any alignment.
        unsafe { S::load(p.cast::<f32>().add(i)) }
    }
    #[inline(always)]
    unsafe fn get(p: *const u8, i: usize) -> f32 {
        // SAFETY: element `i` is in bounds by the contract, read unaligned.
        unsafe { p.cast::<f32>().add(i).read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut u8, i: usize, v: S::V) {
        // SAFETY: `S::store` writes the `LANES` elements that the caller promises, of any alignment.
        unsafe { S::store(p.cast::<f32>().add(i), v) }
    }
    #[inline(always)]
    unsafe fn set(p: *mut u8, i: usize, x: f32) {
        // SAFETY: element `i` is in bounds by the contract, written unaligned.
        unsafe { p.cast::<f32>().add(i).write_unaligned(x) }
    }
}

impl Element for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8, i: usize) -> S::V {
        // SAFETY: `S::load` reads the `LANES` elements that the caller promises, of any alignment.
        unsafe { S::load_f16(p.cast::<u16>().add(i)) }
    }
    #[inline(always)]
    unsafe fn get(p: *const u8, i: usize) -> f32 {
        // SAFETY: element `i` is in bounds by the contract, read unaligned.
        f16::from_bits(unsafe { p.cast::<u16>().add(i).read_unaligned() }).to_f32()
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut u8, i: usize, v: S::V) {
        // SAFETY: `S::store` writes the `LANES` elements that the caller promises, of any alignment.
        unsafe { S::store_f16(p.cast::<u16>().add(i), v) }
    }
    #[inline(always)]
    unsafe fn set(p: *mut u8, i: usize, x: f32) {
        // SAFETY: element `i` is in bounds by the contract, written unaligned.
        unsafe { p.cast::<u16>().add(i).write_unaligned(f16::from_f32(x).to_bits()) }
    }
}

impl Element for Bf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8, i: usize) -> S::V {
        // SAFETY: `S::load` reads the `LANES` elements that the caller promises, of any alignment.
        unsafe { S::load_bf16(p.cast::<u16>().add(i)) }
    }
    #[inline(always)]
    unsafe fn get(p: *const u8, i: usize) -> f32 {
        // SAFETY: element `i` is in bounds by the contract, read unaligned.
        f32::from_bits(u32::from(unsafe { p.cast::<u16>().add(i).read_unaligned() }) << 16)
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut u8, i: usize, v: S::V) {
        // Rounding in integer arithmetic, one lane at a time: only a few rows of bf16 caches are written per token.
        let mut lanes = [0f32; 16];
        // SAFETY: `lanes` has 16 elements and no instruction set more lanes; the caller promises those from `p` on.
        unsafe {
            S::store(lanes.as_mut_ptr(), v);
            for (j, x) in lanes[..S::LANES].iter().enumerate() {
                Self::set(p, i + j, *x);
            }
        }
    }
    #[inline(always)]
    unsafe fn set(p: *mut u8, i: usize, x: f32) {
        // SAFETY: element `i` is in bounds by the contract, written unaligned.
        unsafe { p.cast::<u16>().add(i).write_unaligned(bf16::from_f32(x).to_bits()) }
    }
}
