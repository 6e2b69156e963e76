//! Floats as they are stored: what a vector of each is loaded from and stored to.

use half::{bf16, f16};

use super::Simd;

/// How a weight or cache stores its floats.
#[allow(clippy::missing_safety_doc)]
pub trait Element: Copy + Send + Sync + 'static {
    const SIZE: usize;
    /// `LANES` elements from element `i` on. No alignment is needed.
    unsafe fn load<S: Simd>(p: *const u8, i: usize) -> S::V;
    /// Element `i`.
    unsafe fn get(p: *const u8, i: usize) -> f32;
    /// `LANES` elements written from element `i` on, rounded to nearest even.
    unsafe fn store<S: Simd>(p: *mut u8, i: usize, v: S::V);
    unsafe fn set(p: *mut u8, i: usize, x: f32);
}

#[derive(Clone, Copy)]
pub struct F32;
#[derive(Clone, Copy)]
pub struct F16;
#[derive(Clone, Copy)]
pub struct Bf16;

impl Element for F32 {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8, i: usize) -> S::V {
        unsafe { S::load(p.cast::<f32>().add(i)) }
    }
    #[inline(always)]
    unsafe fn get(p: *const u8, i: usize) -> f32 {
        unsafe { p.cast::<f32>().add(i).read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut u8, i: usize, v: S::V) {
        unsafe { S::store(p.cast::<f32>().add(i), v) }
    }
    #[inline(always)]
    unsafe fn set(p: *mut u8, i: usize, x: f32) {
        unsafe { p.cast::<f32>().add(i).write_unaligned(x) }
    }
}

impl Element for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8, i: usize) -> S::V {
        unsafe { S::load_f16(p.cast::<u16>().add(i)) }
    }
    #[inline(always)]
    unsafe fn get(p: *const u8, i: usize) -> f32 {
        f16::from_bits(unsafe { p.cast::<u16>().add(i).read_unaligned() }).to_f32()
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut u8, i: usize, v: S::V) {
        unsafe { S::store_f16(p.cast::<u16>().add(i), v) }
    }
    #[inline(always)]
    unsafe fn set(p: *mut u8, i: usize, x: f32) {
        unsafe { p.cast::<u16>().add(i).write_unaligned(f16::from_f32(x).to_bits()) }
    }
}

impl Element for Bf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8, i: usize) -> S::V {
        unsafe { S::load_bf16(p.cast::<u16>().add(i)) }
    }
    #[inline(always)]
    unsafe fn get(p: *const u8, i: usize) -> f32 {
        f32::from_bits(u32::from(unsafe { p.cast::<u16>().add(i).read_unaligned() }) << 16)
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut u8, i: usize, v: S::V) {
        // Rounding in integer arithmetic, one lane at a time: bf16 caches are written a few rows a token.
        let mut lanes = [0f32; 16];
        unsafe {
            S::store(lanes.as_mut_ptr(), v);
            for (j, x) in lanes[..S::LANES].iter().enumerate() {
                Self::set(p, i + j, *x);
            }
        }
    }
    #[inline(always)]
    unsafe fn set(p: *mut u8, i: usize, x: f32) {
        unsafe { p.cast::<u16>().add(i).write_unaligned(bf16::from_f32(x).to_bits()) }
    }
}
