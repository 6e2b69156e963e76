//! The instruction set that the compile target guarantees.

use half::f16;

use super::Simd;
use super::tile::{TileArgs, tile_body, tile_by_rows};

/// Four lanes in plain Rust, which the compiler vectorizes for the target.
#[derive(Clone, Copy)]
pub struct Portable;

impl Simd for Portable {
    type V = [f32; 4];
    type W = [u32; 4];
    type Table = [f32; 16];
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
    unsafe fn sub(a: [f32; 4], b: [f32; 4]) -> [f32; 4] {
        std::array::from_fn(|i| a[i] - b[i])
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
    #[inline(always)]
    unsafe fn words(p: *const u8) -> [u32; 4] {
        // SAFETY: `p` has four words, read unaligned.
        unsafe { p.cast::<[u32; 4]>().read_unaligned() }.map(u32::from_le)
    }
    #[inline(always)]
    unsafe fn first_words(p: *const u8, bytes: usize) -> [u32; 4] {
        let mut all = [0u8; 16];
        for (i, byte) in all.iter_mut().enumerate().take(bytes) {
            // SAFETY: `p` has `bytes` bytes.
            *byte = unsafe { *p.add(i) };
        }
        std::array::from_fn(|i| u32::from_le_bytes([all[4 * i], all[4 * i + 1], all[4 * i + 2], all[4 * i + 3]]))
    }
    #[inline(always)]
    unsafe fn select_bits(w: [u32; 4], mask: u32, bits: u32) -> [u32; 4] {
        w.map(|w| (w & mask) ^ bits)
    }
    #[inline(always)]
    unsafe fn or(a: [u32; 4], b: [u32; 4]) -> [u32; 4] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn shift_right(w: [u32; 4], n: u32) -> [u32; 4] {
        w.map(|w| w >> n)
    }
    #[inline(always)]
    unsafe fn shift_left(w: [u32; 4], n: u32) -> [u32; 4] {
        w.map(|w| w << n)
    }
    #[inline(always)]
    unsafe fn bits_above(w: [u32; 4], limit: u32, bits: u32) -> [u32; 4] {
        w.map(|w| if w > limit { bits } else { 0 })
    }
    #[inline(always)]
    unsafe fn as_floats(w: [u32; 4]) -> [f32; 4] {
        w.map(f32::from_bits)
    }
    #[inline(always)]
    unsafe fn as_words(v: [f32; 4]) -> [u32; 4] {
        v.map(f32::to_bits)
    }
    #[inline(always)]
    unsafe fn table(p: *const f32) -> [f32; 16] {
        // SAFETY: `p` has 16 elements, read unaligned.
        unsafe { p.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn lookup(table: [f32; 16], w: [u32; 4]) -> [f32; 4] {
        w.map(|w| table[(w & 15) as usize])
    }
    #[inline(always)]
    unsafe fn permute(v: [f32; 4], index: [u32; 4]) -> [f32; 4] {
        index.map(|i| v[(i & 3) as usize])
    }
    #[inline(always)]
    unsafe fn deinterleave(a: [f32; 4], b: [f32; 4]) -> ([f32; 4], [f32; 4]) {
        ([a[0], a[2], b[0], b[2]], [a[1], a[3], b[1], b[3]])
    }
    #[inline(always)]
    unsafe fn first_f32(p: *const f32, n: usize) -> [f32; 4] {
        std::array::from_fn(|i| match i < n {
            // SAFETY: elements below `n` are in bounds, read unaligned.
            true => unsafe { p.add(i).read_unaligned() },
            false => 0.0,
        })
    }
    #[inline(always)]
    unsafe fn first_f16(p: *const u16, n: usize) -> [f32; 4] {
        // SAFETY: elements below `n` are in bounds, read unaligned.
        let bits = |i: usize| if i < n { unsafe { p.add(i).read_unaligned() } } else { 0 };
        std::array::from_fn(|i| f16::from_bits(bits(i)).to_f32())
    }
    #[inline(always)]
    unsafe fn first_bf16(p: *const u16, n: usize) -> [f32; 4] {
        // SAFETY: elements below `n` are in bounds, read unaligned.
        let bits = |i: usize| if i < n { unsafe { p.add(i).read_unaligned() } } else { 0 };
        std::array::from_fn(|i| f32::from_bits(u32::from(bits(i)) << 16))
    }
    #[inline(always)]
    unsafe fn first_i8(p: *const i8, n: usize) -> [f32; 4] {
        // SAFETY: elements below `n` are in bounds.
        std::array::from_fn(|i| if i < n { f32::from(unsafe { *p.add(i) }) } else { 0.0 })
    }
}
