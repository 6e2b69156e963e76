//! What the compile target guarantees.

use half::f16;

use super::Simd;
use super::tile::{TileArgs, tile_body, tile_by_rows};

/// Four lanes in plain Rust, which the compiler turns into whatever the target has.
#[derive(Clone, Copy)]
pub struct Portable;

impl Simd for Portable {
    type V = [f32; 4];
    const LANES: usize = 4;
    const TILE_ROWS: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 4] {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 4] {
        // SAFETY: `p` has four f32, read unaligned.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> [f32; 4] {
        // SAFETY: `p` has four elements, read unaligned.
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> [f32; 4] {
        // SAFETY: `p` has four elements, read unaligned.
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 4]) {
        // SAFETY: `p` has four f32, written unaligned.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: [f32; 4]) {
        // SAFETY: `p` has four elements, written unaligned.
        unsafe {
            p.cast::<[u16; 4]>()
                .write_unaligned(v.map(|x| f16::from_f32(x).to_bits()))
        }
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 4], b: [f32; 4], c: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| Self::mul_add(a[i], b[i], c[i]))
    }
    #[inline(always)]
    fn prefetch(_: *const u8) {}
    #[inline(always)]
    unsafe fn sum(v: [f32; 4]) -> f32 {
        (v[0] + v[2]) + (v[1] + v[3])
    }
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        // Without hardware support `f32::mul_add` is a call into libm.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            a.mul_add(b, c)
        } else {
            a * b + c
        }
    }
    #[inline(always)]
    unsafe fn transpose(load: impl Fn(usize) -> [f32; 4], mut store: impl FnMut(usize, [f32; 4])) {
        let rows: [[f32; 4]; 4] = std::array::from_fn(load);
        for i in 0..4 {
            store(i, std::array::from_fn(|j| rows[j][i]));
        }
    }
    #[inline(always)]
    unsafe fn tile(rows: usize, args: TileArgs) {
        tile_by_rows!(Portable, rows, args, , [1, 2, 3, 4])
    }
}
