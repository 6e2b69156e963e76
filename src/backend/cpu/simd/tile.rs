//! The GEMM tile: accumulators in registers, one function for each number of rows.

use super::Simd;

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
    /// Add to `c` instead of overwriting it.
    pub accumulate: bool,
}

/// The tile for a number of rows known at compile time, so that the accumulators stay in registers.
///
/// # Safety
/// As [`Simd::tile`], for `M` rows.
#[inline(always)]
pub(super) unsafe fn tile_body<S: Simd, const M: usize>(t: TileArgs) {
    // SAFETY: row `p < depth` of `a` has `M` elements and of `b` two vectors, row `i < M` of `c` two vectors. `a` is read
    // unaligned: attention uses values where they lie, which may be a constant in a mapped file. The pointers that the last
    // round steps to are not read, so they are made without a claim that they are inside.
    unsafe {
        let zero = S::splat(0.0);
        let mut acc = [[zero; 2]; M];
        let (mut a, mut b) = (t.a, t.b);
        for _ in 0..t.depth {
            let b0 = S::load(b);
            let b1 = S::load(b.add(S::LANES));
            for (i, acc) in acc.iter_mut().enumerate() {
                let x = S::splat(a.add(i).read_unaligned());
                acc[0] = S::fma(x, b0, acc[0]);
                acc[1] = S::fma(x, b1, acc[1]);
            }
            a = a.wrapping_add(t.a_stride);
            b = b.wrapping_add(t.b_stride);
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
        /// # Safety
        /// As [`Simd::tile`], for `M` rows.
        unsafe fn tile<const M: usize>(args: TileArgs) {
            // SAFETY: the same contract; the features are those of the instruction set.
            unsafe { tile_body::<$simd, M>(args) }
        }
        match $rows {
            $(
                // SAFETY: the contract of `Simd::tile`, which this macro is the body of: the instruction set is available.
                $m => unsafe { tile::<$m>($args) },
            )*
            other => unreachable!("a tile of {other} rows"),
        }
    }};
}

pub(super) use tile_by_rows;
