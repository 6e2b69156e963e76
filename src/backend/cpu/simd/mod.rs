//! Vectors of f32 for three instruction sets, and the choice among them at run time.
//!
//! A kernel is written once, generic over [`Simd`], as a [`Kernel`]; [`Isa::run`] calls it compiled for AVX-512, for
//! AVX2 + FMA + F16C, or for the compile target's baseline. Everything a kernel calls must be `#[inline(always)]`, or it
//! is compiled for the baseline and called out of line: correct, but slow.

mod element;
mod portable;
mod tile;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::fmt;

pub use element::{Bf16, Element, F16, F32};
pub use portable::Portable;
pub use tile::TileArgs;
#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

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
    /// The best of this machine. `LAPIDARY_CPU_ISA=avx512|avx2|portable` selects a lower one.
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

    /// Whether this machine supports it.
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

    /// Maximum rows of a GEMM tile.
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
    /// The kernel's own contract; and `self` is available: [`Isa::is_available`], which `CompileOptions` asks.
    #[inline]
    pub unsafe fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        {
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
            unsafe fn avx512<K: Kernel>(kernel: K) -> K::Output {
                // SAFETY: compiled for, and called only with, these features; else the contract of `Isa::run`.
                unsafe { kernel.run::<Avx512>() }
            }
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2<K: Kernel>(kernel: K) -> K::Output {
                // SAFETY: as above.
                unsafe { kernel.run::<Avx2>() }
            }
            match self {
                // SAFETY: `self` is available by this function's contract, and has these features then (`is_available`).
                Isa::Avx512 => return unsafe { avx512(kernel) },
                // SAFETY: as above.
                Isa::Avx2 => return unsafe { avx2(kernel) },
                Isa::Portable => {}
            }
        }
        // SAFETY: the compile target's own instructions; else this function's contract.
        unsafe { kernel.run::<Portable>() }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Isa::Avx512 => "AVX-512",
            Isa::Avx2 => "AVX2",
            Isa::Portable => "portable",
        })
    }
}

/// A function generic over the instruction set. Implementations mark `run` `#[inline(always)]`.
pub trait Kernel {
    type Output;
    /// # Safety
    /// The pointers that the kernel holds are valid for the shapes that it states, no other thread touches what its
    /// item writes or writes what it reads, and the instruction set of `S` is available. `kernels` explains how steps
    /// ensure this.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// A vector of `LANES` f32 and the operations the kernels need.
///
/// Safety of all unsafe methods: the instruction set is available, and a pointer is valid for `LANES` elements (of `tile`:
/// for what [`TileArgs`] states). No pointer need be aligned.
#[allow(clippy::missing_safety_doc)] // one contract for all, above
pub trait Simd: Copy + Send + Sync + 'static {
    type V: Copy;
    /// `LANES` 32-bit words, into which codes of quantized weights are loaded.
    type W: Copy;
    /// A lookup table of sixteen f32.
    type Table: Copy;
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
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, fused if the hardware supports it.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// Prefetches the cache line at `p`, which need not be mapped.
    fn prefetch(p: *const u8);
    /// Sum of the lanes.
    unsafe fn sum(v: Self::V) -> f32;
    /// `a * b + c` of scalars, in the form that vectorizes.
    fn mul_add(a: f32, b: f32, c: f32) -> f32;
    /// A square block of `LANES` rows transposed in registers; `load(row)` returns a row.
    unsafe fn transpose(load: impl Fn(usize) -> Self::V, store: impl FnMut(usize, Self::V));
    /// A GEMM tile out of line: `c[i][j] (+)= sum_p a[p*a_stride + i] * b[p*2*LANES + j]` for `i < rows`, `j < 2*LANES`.
    unsafe fn tile(rows: usize, args: TileArgs);

    // Codes of quantized weights

    /// `4 * LANES` bytes.
    unsafe fn words(p: *const u8) -> Self::W;
    /// The first `bytes` of `4 * LANES` bytes; no others are read, and the rest is 0.
    unsafe fn first_words(p: *const u8, bytes: usize) -> Self::W;
    /// `(w & mask) ^ bits` of every word.
    unsafe fn select_bits(w: Self::W, mask: u32, bits: u32) -> Self::W;
    /// `a | b` of every word.
    unsafe fn or(a: Self::W, b: Self::W) -> Self::W;
    /// `w >> n` of every word, for `n < 32`.
    unsafe fn shift_right(w: Self::W, n: u32) -> Self::W;
    /// `w << n` of every word, for `n < 32`.
    unsafe fn shift_left(w: Self::W, n: u32) -> Self::W;
    /// `bits` in the words that are above `limit`, else 0; both sides are below 2^31.
    unsafe fn bits_above(w: Self::W, limit: u32, bits: u32) -> Self::W;
    /// Words read as f32.
    unsafe fn as_floats(w: Self::W) -> Self::V;
    /// Floats read as words.
    unsafe fn as_words(v: Self::V) -> Self::W;
    /// A table of the 16 elements from `p` on.
    unsafe fn table(p: *const f32) -> Self::Table;
    /// The elements indexed by the lowest four bits of each word.
    unsafe fn lookup(table: Self::Table, w: Self::W) -> Self::V;
    /// Lane `i` of the result is lane `index[i]` of `v`, for indices below `LANES`.
    unsafe fn permute(v: Self::V, index: Self::W) -> Self::V;
    /// The even and the odd elements of `a[0], a[1], .. b[0], b[1], ..`.
    unsafe fn deinterleave(a: Self::V, b: Self::V) -> (Self::V, Self::V);
    /// The first `n <= LANES` elements from `p` on; no others are read, and the other lanes are 0.
    unsafe fn first_f32(p: *const f32, n: usize) -> Self::V;
    /// Like [`Simd::first_f32`], for halves.
    unsafe fn first_f16(p: *const u16, n: usize) -> Self::V;
    /// Like [`Simd::first_f32`], for bf16.
    unsafe fn first_bf16(p: *const u16, n: usize) -> Self::V;
    /// Like [`Simd::first_f32`], for signed bytes.
    unsafe fn first_i8(p: *const i8, n: usize) -> Self::V;
}
