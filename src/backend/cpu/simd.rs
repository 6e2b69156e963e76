//! Vectors of f32 for three instruction sets, and the choice among them at run time.
//!
//! A kernel is written once, generic over [`Simd`], as a [`Kernel`]; [`Isa::run`] calls it compiled for AVX-512, for
//! AVX2 + FMA + F16C, or for the compile target's baseline. Everything a kernel calls must be `#[inline(always)]`, or it
//! is compiled for the baseline and called out of line: correct, but slow.

use half::{bf16, f16};

/// The instruction set a program runs on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Isa {
    /// AVX-512 F, BW, DQ and VL, with FMA and F16C.
    Avx512,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// What the compile target guarantees.
    Portable,
}

impl Isa {
    /// The best this machine has. `LAPIDARY_CPU_ISA=avx512|avx2|portable` asks for less.
    pub fn detect() -> Isa {
        let best = Isa::available()[0];
        let asked = match std::env::var("LAPIDARY_CPU_ISA").as_deref() {
            Ok("avx2") => Isa::Avx2,
            Ok("portable") => Isa::Portable,
            _ => best,
        };
        if asked.is_available() { asked } else { best }
    }

    /// Every instruction set this machine can run, best first.
    pub fn available() -> Vec<Isa> {
        let all = [Isa::Avx512, Isa::Avx2, Isa::Portable];
        all.into_iter().filter(|isa| isa.is_available()).collect()
    }

    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma") && has!("f16c");
            match self {
                Isa::Avx512 => avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl"),
                Isa::Avx2 => avx2,
                Isa::Portable => true,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Isa::Portable
        }
    }

    /// Vector lanes.
    pub fn lanes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::LANES,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::LANES,
            _ => Portable::LANES,
        }
    }

    /// Most rows of a GEMM tile.
    pub fn tile_rows(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Avx512::TILE_ROWS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Avx2::TILE_ROWS,
            _ => Portable::TILE_ROWS,
        }
    }

    /// Columns of a GEMM tile: two vectors.
    pub fn tile_columns(self) -> usize {
        2 * self.lanes()
    }

    /// Runs `kernel` compiled for this instruction set.
    ///
    /// # Safety
    /// The kernel's own contract; and `self` must be available, which [`Isa::detect`] and [`Isa::available`] ensure.
    #[inline]
    pub unsafe fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            unsafe fn avx512<K: Kernel>(kernel: K) -> K::Output {
                unsafe { kernel.run::<Avx512>() }
            }
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2<K: Kernel>(kernel: K) -> K::Output {
                unsafe { kernel.run::<Avx2>() }
            }
            match self {
                Isa::Avx512 => return unsafe { avx512(kernel) },
                Isa::Avx2 => return unsafe { avx2(kernel) },
                Isa::Portable => {}
            }
        }
        unsafe { kernel.run::<Portable>() }
    }
}

/// A function generic over the instruction set. Implementations mark `run` `#[inline(always)]`.
pub trait Kernel {
    type Output;
    /// # Safety
    /// Whatever pointers the kernel holds must be valid, and the instruction set of `S` available.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// A vector of `LANES` f32 and the operations the kernels need.
///
/// # Safety of the methods
/// Pointers need not be aligned but must be valid for the lanes touched; the instruction set must be available.
#[allow(clippy::missing_safety_doc)]
pub trait Simd: Copy + Send + Sync + 'static {
    type V: Copy;
    const LANES: usize;
    /// Rows of the largest GEMM tile whose `2 * TILE_ROWS` accumulators stay in registers.
    const TILE_ROWS: usize;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn load_f16(p: *const u16) -> Self::V;
    unsafe fn load_bf16(p: *const u16) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    /// Rounds to nearest even.
    unsafe fn store_f16(p: *mut u16, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused where the hardware does.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Asks for the cache line at `p`, which need not be mapped.
    fn prefetch(p: *const u8);
    /// Sum of the lanes.
    unsafe fn sum(v: Self::V) -> f32;
    /// `a * b + c` of scalars, in the form that vectorises.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
    /// A square block of `LANES` rows transposed in registers; `load(row)` gives a row.
    unsafe fn transpose(load: impl Fn(usize) -> Self::V, store: impl FnMut(usize, Self::V));
    /// A GEMM tile out of line: `c[i][j] (+)= sum_p a[p*a_stride + i] * b[p*2*LANES + j]` for `i < rows`, `j < 2*LANES`.
    unsafe fn tile(rows: usize, args: TileArgs);
}

/// Arguments of [`Simd::tile`].
#[derive(Clone, Copy)]
pub struct TileArgs {
    /// Length of the sums.
    pub depth: usize,
    /// `[depth, a_stride]`, of which the first `rows` of each row are used.
    pub a: *const f32,
    pub a_stride: usize,
    /// `[depth, b_stride]`, of which the first `2 * LANES` of each row are used.
    pub b: *const f32,
    pub b_stride: usize,
    /// `[rows, c_stride]`.
    pub c: *mut f32,
    pub c_stride: usize,
    /// Add to `c` and not overwrite it.
    pub accumulate: bool,
}

/// The tile for a number of rows known at compile time, so that the accumulators live in registers.
#[inline(always)]
unsafe fn tile_body<S: Simd, const M: usize>(t: TileArgs) {
    unsafe {
        let zero = S::splat(0.0);
        let mut acc = [[zero; 2]; M];
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.depth {
            let b0 = S::load(b);
            let b1 = S::load(b.add(S::LANES));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = S::splat(*a.add(i));
                acc[0] = S::fma(x, b0, acc[0]);
                acc[1] = S::fma(x, b1, acc[1]);
            }
            a = a.add(t.a_stride);
            b = b.add(t.b_stride);
        }
        for (i, acc) in acc.iter().enumerate() {
            let c = t.c.add(i * t.c_stride);
            if t.accumulate {
                S::store(c, S::add(S::load(c), acc[0]));
                S::store(c.add(S::LANES), S::add(S::load(c.add(S::LANES)), acc[1]));
            } else {
                S::store(c, acc[0]);
                S::store(c.add(S::LANES), acc[1]);
            }
        }
    }
}

macro_rules! tile_by_rows {
    ($simd:ty, $rows:expr, $args:expr, $($feature:literal)?, [$($m:literal),*]) => {{
        $(#[target_feature(enable = $feature)])?
        unsafe fn tile<const M: usize>(args: TileArgs) {
            unsafe { tile_body::<$simd, M>(args) }
        }
        match $rows {
            $($m => unsafe { tile::<$m>($args) },)*
            other => unreachable!("a tile of {other} rows"),
        }
    }};
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::*;

    #[derive(Clone, Copy)]
    pub struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;
        const LANES: usize = 16;
        const TILE_ROWS: usize = 14;

        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> __m512 {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn store_f16(p: *mut u16, v: __m512) {
            unsafe {
                let half = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
                _mm256_storeu_si256(p.cast(), half)
            }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn sum(v: __m512) -> f32 {
            unsafe { _mm512_reduce_add_ps(v) }
        }
        #[inline(always)]
        fn mul_add(a: f32, b: f32, c: f32) -> f32 {
            a.mul_add(b, c)
        }
        #[inline(always)]
        unsafe fn transpose(load: impl Fn(usize) -> __m512, mut store: impl FnMut(usize, __m512)) {
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
            unsafe { _mm256_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m256 {
            unsafe { _mm256_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u16) -> __m256 {
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u16) -> __m256 {
            unsafe {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m256) {
            unsafe { _mm256_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn store_f16(p: *mut u16, v: __m256) {
            unsafe { _mm_storeu_si128(p.cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)) }
        }
        #[inline(always)]
        unsafe fn add(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m256, b: __m256) -> __m256 {
            unsafe { _mm256_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
            unsafe { _mm256_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        fn prefetch(p: *const u8) {
            unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
        }
        #[inline(always)]
        unsafe fn sum(v: __m256) -> f32 {
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
}

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
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> [f32; 4] {
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u16) -> [f32; 4] {
        let bits = unsafe { p.cast::<[u16; 4]>().read_unaligned() };
        bits.map(|b| f32::from_bits(u32::from(b) << 16))
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: [f32; 4]) {
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn store_f16(p: *mut u16, v: [f32; 4]) {
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
