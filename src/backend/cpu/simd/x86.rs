//! AVX-512, and AVX2 with FMA and F16C.

use std::arch::x86_64::*;

use super::Simd;
use super::tile::{TileArgs, tile_body, tile_by_rows};

#[derive(Clone, Copy)]
pub struct Avx512;

impl Simd for Avx512 {
    type V = __m512;
    const LANES: usize = 16;
    const TILE_ROWS: usize = 14;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: registers only, and AVX-512 is there by the trait's contract.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: `p` has a vector of f32 (unaligned load), and AVX-512 is there.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        // SAFETY: `p` has a vector of halves (unaligned load), and AVX-512 is there.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        // SAFETY: `p` has a vector of halves (unaligned load), and AVX-512 is there.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        // SAFETY: `p` has room for a vector of f32 (unaligned store), and AVX-512 is there.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m512) {
        // SAFETY: `p` has room for a vector of halves (unaligned store), and AVX-512 is there.
        unsafe {
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            _mm256_storeu_si256(p.cast(), half)
        }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: registers only, and AVX-512 is there.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: registers only, and AVX-512 is there.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: registers only, and AVX-512 is there.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a hint that SSE has, which x86-64 includes; an address that is not mapped does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        // SAFETY: registers only, and AVX-512 is there.
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    unsafe fn transpose(load: impl Fn(usize) -> __m512, mut store: impl FnMut(usize, __m512)) {
        // SAFETY: registers only, and AVX-512 is there; memory is the closures' own matter.
        unsafe {
            let mut r = [_mm512_setzero_ps(); 16];
            for (i, r) in r.iter_mut().enumerate() {
                *r = load(i);
            }
            // 2x2 blocks of floats, then of pairs, then of 128-bit lanes twice.
            let mut t = r;
            for i in 0..8 {
                t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..4 {
                let d = |j: usize| _mm512_castps_pd(t[4 * i + j]);
                r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(0), d(2)));
                r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(0), d(2)));
                r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(d(1), d(3)));
                r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(d(1), d(3)));
            }
            for i in 0..4 {
                t[i] = _mm512_shuffle_f32x4::<0x88>(r[i], r[4 + i]);
                t[4 + i] = _mm512_shuffle_f32x4::<0xdd>(r[i], r[4 + i]);
                t[8 + i] = _mm512_shuffle_f32x4::<0x88>(r[8 + i], r[12 + i]);
                t[12 + i] = _mm512_shuffle_f32x4::<0xdd>(r[8 + i], r[12 + i]);
            }
            for i in 0..4 {
                store(i, _mm512_shuffle_f32x4::<0x88>(t[i], t[8 + i]));
                store(8 + i, _mm512_shuffle_f32x4::<0xdd>(t[i], t[8 + i]));
                store(4 + i, _mm512_shuffle_f32x4::<0x88>(t[4 + i], t[12 + i]));
                store(12 + i, _mm512_shuffle_f32x4::<0xdd>(t[4 + i], t[12 + i]));
            }
        }
    }
    #[inline(always)]
    unsafe fn tile(rows: usize, args: TileArgs) {
        tile_by_rows!(
            Avx512,
            rows,
            args,
            "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c",
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
        )
    }
}

#[derive(Clone, Copy)]
pub struct Avx2;

impl Simd for Avx2 {
    type V = __m256;
    const LANES: usize = 8;
    const TILE_ROWS: usize = 6;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: registers only, and AVX2 is there by the trait's contract.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: `p` has a vector of f32 (unaligned load), and AVX2 is there.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m256 {
        // SAFETY: `p` has a vector of halves (unaligned load), and AVX2 is there.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m256 {
        // SAFETY: `p` has a vector of halves (unaligned load), and AVX2 is there.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        // SAFETY: `p` has room for a vector of f32 (unaligned store), and AVX2 is there.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m256) {
        // SAFETY: `p` has room for a vector of halves (unaligned store), and AVX2 is there.
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: registers only, and AVX2 is there.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: registers only, and AVX2 is there.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: registers only, and AVX2 is there.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a hint that SSE has, which x86-64 includes; an address that is not mapped does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m256) -> f32 {
        // SAFETY: registers only, and AVX2 is there.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    unsafe fn transpose(load: impl Fn(usize) -> __m256, mut store: impl FnMut(usize, __m256)) {
        // SAFETY: registers only, and AVX2 is there; memory is the closures' own matter.
        unsafe {
            let mut r = [_mm256_setzero_ps(); 8];
            for (i, r) in r.iter_mut().enumerate() {
                *r = load(i);
            }
            let mut t = r;
            for i in 0..4 {
                t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
                t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
            }
            for i in 0..2 {
                let d = |j: usize| _mm256_castps_pd(t[4 * i + j]);
                r[4 * i] = _mm256_castpd_ps(_mm256_unpacklo_pd(d(0), d(2)));
                r[4 * i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(d(0), d(2)));
                r[4 * i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(d(1), d(3)));
                r[4 * i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(d(1), d(3)));
            }
            for i in 0..4 {
                store(i, _mm256_permute2f128_ps::<0x20>(r[i], r[4 + i]));
                store(4 + i, _mm256_permute2f128_ps::<0x31>(r[i], r[4 + i]));
            }
        }
    }
    #[inline(always)]
    unsafe fn tile(rows: usize, args: TileArgs) {
        tile_by_rows!(Avx2, rows, args, "avx2,fma,f16c", [1, 2, 3, 4, 5, 6])
    }
}
