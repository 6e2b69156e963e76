//! AVX-512, and AVX2 with FMA and F16C.

use std::arch::x86_64::*;

use super::Simd;
use super::tile::{TileArgs, tile_body, tile_by_rows};

#[derive(Clone, Copy)]
pub struct Avx512;

impl Simd for Avx512 {
    type V = __m512;
    type W = __m512i;
    type Table = __m512;
    const LANES: usize = 16;
    const TILE_ROWS: usize = 14;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: registers only, and AVX-512 is available by the trait's contract.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: `p` has a vector of f32 (unaligned load), and AVX-512 is available.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        // SAFETY: `p` has a vector of halves (unaligned load), and AVX-512 is available.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m512 {
        // SAFETY: `p` has a vector of halves (unaligned load), and AVX-512 is available.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m512) {
        // SAFETY: `p` has room for a vector of f32 (unaligned store), and AVX-512 is available.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m512) {
        // SAFETY: `p` has room for a vector of halves (unaligned store), and AVX-512 is available.
        unsafe {
            let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            _mm256_storeu_si256(p.cast(), half)
        }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a hint that SSE has, which x86-64 includes; an address that is not mapped does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m512) -> f32 {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_reduce_add_ps(v) }
    }
    #[inline(always)]
    fn mul_add(a: f32, b: f32, c: f32) -> f32 {
        a.mul_add(b, c)
    }
    #[inline(always)]
    unsafe fn transpose(load: impl Fn(usize) -> __m512, mut store: impl FnMut(usize, __m512)) {
        // SAFETY: registers only, and AVX-512 is available; memory is the closures' own matter.
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
    #[inline(always)]
    unsafe fn words(p: *const u8) -> __m512i {
        // SAFETY: `p` has a vector of words (unaligned load), and AVX-512 is available.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn first_words(p: *const u8, bytes: usize) -> __m512i {
        // SAFETY: the masked load reads `bytes` bytes, and AVX-512 is available.
        unsafe { _mm512_maskz_loadu_epi8(first(bytes), p.cast()) }
    }
    #[inline(always)]
    unsafe fn select_bits(w: __m512i, mask: u32, bits: u32) -> __m512i {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_ternarylogic_epi32::<0x6a>(w, _mm512_set1_epi32(mask as i32), _mm512_set1_epi32(bits as i32)) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn shift_right(w: __m512i, n: u32) -> __m512i {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_srl_epi32(w, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn shift_left(w: __m512i, n: u32) -> __m512i {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_sll_epi32(w, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn bits_above(w: __m512i, limit: u32, bits: u32) -> __m512i {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_maskz_set1_epi32(_mm512_cmpgt_epi32_mask(w, _mm512_set1_epi32(limit as i32)), bits as i32) }
    }
    #[inline(always)]
    unsafe fn as_floats(w: __m512i) -> __m512 {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_castsi512_ps(w) }
    }
    #[inline(always)]
    unsafe fn as_words(v: __m512) -> __m512i {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_castps_si512(v) }
    }
    #[inline(always)]
    unsafe fn table(p: *const f32) -> __m512 {
        // SAFETY: `p` has 16 elements (unaligned load), and AVX-512 is available.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn lookup(table: __m512, w: __m512i) -> __m512 {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_permutexvar_ps(w, table) }
    }
    #[inline(always)]
    unsafe fn permute(v: __m512, index: __m512i) -> __m512 {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe { _mm512_permutexvar_ps(index, v) }
    }
    #[inline(always)]
    unsafe fn deinterleave(a: __m512, b: __m512) -> (__m512, __m512) {
        // SAFETY: registers only, and AVX-512 is available.
        unsafe {
            let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
            let odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
            (_mm512_permutex2var_ps(a, even, b), _mm512_permutex2var_ps(a, odd, b))
        }
    }
    #[inline(always)]
    unsafe fn first_f32(p: *const f32, n: usize) -> __m512 {
        // SAFETY: the masked load reads `n` elements, and AVX-512 is available.
        unsafe { _mm512_maskz_loadu_ps(first(n) as u16, p) }
    }
    #[inline(always)]
    unsafe fn first_f16(p: *const u16, n: usize) -> __m512 {
        // SAFETY: the masked load reads `n` elements, and AVX-512 is available.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n) as u16, p.cast())) }
    }
    #[inline(always)]
    unsafe fn first_bf16(p: *const u16, n: usize) -> __m512 {
        // SAFETY: the masked load reads `n` elements, and AVX-512 is available.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n) as u16, p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn first_i8(p: *const i8, n: usize) -> __m512 {
        // SAFETY: the masked load reads `n` elements, and AVX-512 is available.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n) as u16, p))) }
    }
}

/// The mask of the first `n` of 64.
#[inline(always)]
fn first(n: usize) -> u64 {
    match n {
        64.. => u64::MAX,
        _ => (1 << n) - 1,
    }
}

#[derive(Clone, Copy)]
pub struct Avx2;

impl Simd for Avx2 {
    type V = __m256;
    type W = __m256i;
    type Table = [__m256; 2];
    const LANES: usize = 8;
    const TILE_ROWS: usize = 6;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        // SAFETY: registers only, and AVX2 is available by the trait's contract.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m256 {
        // SAFETY: `p` has a vector of f32 (unaligned load), and AVX2 is available.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m256 {
        // SAFETY: `p` has a vector of halves (unaligned load), and AVX2 is available.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> __m256 {
        // SAFETY: `p` has a vector of halves (unaligned load), and AVX2 is available.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: __m256) {
        // SAFETY: `p` has room for a vector of f32 (unaligned store), and AVX2 is available.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: __m256) {
        // SAFETY: `p` has room for a vector of halves (unaligned store), and AVX2 is available.
        unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        // SAFETY: registers only, and AVX2 is available.
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        // SAFETY: registers only, and AVX2 is available.
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        // SAFETY: registers only, and AVX2 is available.
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        // SAFETY: registers only, and AVX2 is available.
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        // SAFETY: a hint that SSE has, which x86-64 includes; an address that is not mapped does nothing.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    unsafe fn sum(v: __m256) -> f32 {
        // SAFETY: registers only, and AVX2 is available.
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
        // SAFETY: registers only, and AVX2 is available; memory is the closures' own matter.
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
    #[inline(always)]
    unsafe fn words(p: *const u8) -> __m256i {
        // SAFETY: `p` has a vector of words (unaligned load), and AVX2 is available.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    unsafe fn first_words(p: *const u8, bytes: usize) -> __m256i {
        let mut all = [0u8; 32];
        // SAFETY: `p` has `bytes` bytes, at most 32 by the contract; AVX2 is available.
        unsafe {
            std::ptr::copy_nonoverlapping(p, all.as_mut_ptr(), bytes.min(32));
            _mm256_loadu_si256(all.as_ptr().cast())
        }
    }
    #[inline(always)]
    unsafe fn select_bits(w: __m256i, mask: u32, bits: u32) -> __m256i {
        // SAFETY: registers only, and AVX2 is available.
        unsafe {
            _mm256_xor_si256(
                _mm256_and_si256(w, _mm256_set1_epi32(mask as i32)),
                _mm256_set1_epi32(bits as i32),
            )
        }
    }
    #[inline(always)]
    unsafe fn or(a: __m256i, b: __m256i) -> __m256i {
        // SAFETY: registers only, and AVX2 is available.
        unsafe { _mm256_or_si256(a, b) }
    }
    #[inline(always)]
    unsafe fn shift_right(w: __m256i, n: u32) -> __m256i {
        // SAFETY: registers only, and AVX2 is available.
        unsafe { _mm256_srl_epi32(w, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn shift_left(w: __m256i, n: u32) -> __m256i {
        // SAFETY: registers only, and AVX2 is available.
        unsafe { _mm256_sll_epi32(w, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn bits_above(w: __m256i, limit: u32, bits: u32) -> __m256i {
        // SAFETY: registers only, and AVX2 is available.
        unsafe {
            _mm256_and_si256(
                _mm256_cmpgt_epi32(w, _mm256_set1_epi32(limit as i32)),
                _mm256_set1_epi32(bits as i32),
            )
        }
    }
    #[inline(always)]
    unsafe fn as_floats(w: __m256i) -> __m256 {
        // SAFETY: registers only, and AVX2 is available.
        unsafe { _mm256_castsi256_ps(w) }
    }
    #[inline(always)]
    unsafe fn as_words(v: __m256) -> __m256i {
        // SAFETY: registers only, and AVX2 is available.
        unsafe { _mm256_castps_si256(v) }
    }
    #[inline(always)]
    unsafe fn table(p: *const f32) -> [__m256; 2] {
        // SAFETY: `p` has 16 elements (unaligned load), and AVX2 is available.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn lookup(table: [__m256; 2], w: __m256i) -> __m256 {
        // SAFETY: registers only, and AVX2 is available.
        unsafe {
            // Look up both halves by the lowest three bits; the fourth bit, moved to the sign, selects.
            let [low, high] = table.map(|half| _mm256_permutevar8x32_ps(half, w));
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(w)))
        }
    }
    #[inline(always)]
    unsafe fn permute(v: __m256, index: __m256i) -> __m256 {
        // SAFETY: registers only, and AVX2 is available.
        unsafe { _mm256_permutevar8x32_ps(v, index) }
    }
    #[inline(always)]
    unsafe fn deinterleave(a: __m256, b: __m256) -> (__m256, __m256) {
        // SAFETY: registers only, and AVX2 is available.
        unsafe {
            let (low, high) = (
                _mm256_permute2f128_ps::<0x20>(a, b),
                _mm256_permute2f128_ps::<0x31>(a, b),
            );
            // Of a = a0..a7 and b: [a0..a3, b0..b3] and [a4..a7, b4..b7]; the shuffle takes pairs from each in turn.
            let even = _mm256_shuffle_ps::<0x88>(low, high);
            let odd = _mm256_shuffle_ps::<0xdd>(low, high);
            (even, odd)
        }
    }
    #[inline(always)]
    unsafe fn first_f32(p: *const f32, n: usize) -> __m256 {
        // SAFETY: as many elements as are read are in bounds by the contract, and AVX2 is available.
        unsafe {
            match n {
                8 => _mm256_loadu_ps(p),
                4 => _mm256_zextps128_ps256(_mm_loadu_ps(p)),
                2 => _mm256_zextps128_ps256(_mm_castsi128_ps(_mm_loadl_epi64(p.cast()))),
                1 => _mm256_zextps128_ps256(_mm_load_ss(p)),
                _ => {
                    let mut all = [0f32; 8];
                    std::ptr::copy_nonoverlapping(p.cast::<u8>(), all.as_mut_ptr().cast(), 4 * n.min(8));
                    _mm256_loadu_ps(all.as_ptr())
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn first_f16(p: *const u16, n: usize) -> __m256 {
        // SAFETY: the contract of `first_halves`; AVX2 is available.
        unsafe { _mm256_cvtph_ps(first_halves(p, n)) }
    }
    #[inline(always)]
    unsafe fn first_bf16(p: *const u16, n: usize) -> __m256 {
        // SAFETY: the contract of `first_halves`; AVX2 is available.
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(first_halves(p, n)))) }
    }
    #[inline(always)]
    unsafe fn first_i8(p: *const i8, n: usize) -> __m256 {
        // SAFETY: as many elements as are read are in bounds by the contract, and AVX2 is available.
        unsafe {
            let bytes = match n {
                4 => i64::from(p.cast::<u32>().read_unaligned()),
                2 => i64::from(p.cast::<u16>().read_unaligned()),
                1 => i64::from(p.cast::<u8>().read()),
                _ => {
                    let mut all = [0u8; 8];
                    std::ptr::copy_nonoverlapping(p.cast::<u8>(), all.as_mut_ptr(), n.min(8));
                    i64::from_le_bytes(all)
                }
            };
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)))
        }
    }
}

/// The first `n <= 8` halves from `p` on; no others are read, and the rest is 0.
///
/// # Safety
/// `p` has `n` halves, of any alignment.
#[inline(always)]
unsafe fn first_halves(p: *const u16, n: usize) -> __m128i {
    // SAFETY: as many halves as are read are in bounds by the contract; SSE2 is part of x86-64.
    unsafe {
        match n {
            8 => _mm_loadu_si128(p.cast()),
            4 => _mm_loadl_epi64(p.cast()),
            2 => _mm_cvtsi32_si128(p.cast::<i32>().read_unaligned()),
            1 => _mm_cvtsi32_si128(i32::from(p.read_unaligned())),
            _ => {
                let mut all = [0u16; 8];
                std::ptr::copy_nonoverlapping(p.cast::<u8>(), all.as_mut_ptr().cast(), 2 * n.min(8));
                _mm_loadu_si128(all.as_ptr().cast())
            }
        }
    }
}
