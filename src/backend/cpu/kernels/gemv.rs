//! A few rows times `[out, in]` weights: dot products that stream the weights once.
//!
//! These products are nearly the whole cost of decode. Every weight is read once per token, so no byte should be read
//! twice, and reads must be prefetched. Weights are converted to f32 in registers.

use super::super::simd::{Bf16, Element, F16, F32, Kernel, Simd};
use crate::tensor::DType;

/// Maximum rows of x for which streaming the weights is faster than packing them.
pub const MAX_ROWS: usize = 8;

/// How far ahead of a row's reads its cache lines are prefetched. Weight rows are adjacent, so this reaches the next
/// rows. The best of 2, 4, 8, 9 and 16 KiB on a Xeon (Emerald Rapids): f32 decode of SmolLM2 20.0 ms against 22 at two
/// whole blocks, f16 the same.
const PREFETCH_BYTES: usize = 8192;

/// Rows of a left side and of a result.
///
/// An element of the result depends only on its own row, bit for bit, however many rows there are and wherever they
/// are: sequences that decode together rely on it.
#[derive(Clone, Copy)]
pub enum Rows {
    /// At regular distances.
    Even {
        /// `[rows, depth]`, rows `x_stride` elements apart, no alignment: it may be a constant in a mapped file.
        x: *const f32,
        x_stride: usize,
        /// `[rows, columns]`, rows `y_stride` elements apart.
        y: *mut f32,
        y_stride: usize,
    },
    /// Each at its own pair of addresses: its x, and its y.
    Apart(*const (*const f32, *mut f32)),
}

impl Rows {
    /// The row's elements of the left side.
    ///
    /// # Safety
    /// There is such a row.
    #[inline(always)]
    pub unsafe fn x(&self, row: usize) -> *const f32 {
        // SAFETY: this function's own contract.
        unsafe {
            match self {
                Rows::Even { x, x_stride, .. } => x.add(row * x_stride),
                Rows::Apart(places) => (*places.add(row)).0,
            }
        }
    }

    /// The row's elements of the result.
    ///
    /// # Safety
    /// There is such a row.
    #[inline(always)]
    pub unsafe fn y(&self, row: usize) -> *mut f32 {
        // SAFETY: this function's own contract.
        unsafe {
            match self {
                Rows::Even { y, y_stride, .. } => y.add(row * y_stride),
                Rows::Apart(places) => (*places.add(row)).1,
            }
        }
    }
}

/// `y[i, j] = sum_p x[i, p] * w[j, p]` for the `j` in `columns`.
#[derive(Clone)]
pub struct Gemv {
    pub rows: usize,
    pub places: Rows,
    /// Length of the sums.
    pub depth: usize,
    /// `[columns, depth]` of `storage`, rows `w_stride` elements apart, no alignment.
    pub w: *const u8,
    pub w_stride: usize,
    pub storage: DType,
    pub columns: std::ops::Range<usize>,
}

impl Kernel for Gemv {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the storage is that of `w`; the rest is this function's own contract.
        unsafe {
            match self.storage {
                DType::F32 => self.columns::<S, F32>(),
                DType::F16 => self.columns::<S, F16>(),
                DType::Bf16 => self.columns::<S, Bf16>(),
                other => unreachable!("{other} weights"),
            }
        }
    }
}

impl Gemv {
    /// # Safety
    /// As [`Kernel::run`]; `E` is the storage of `w`.
    #[inline(always)]
    unsafe fn columns<S: Simd, E: Element>(&self) {
        let mut column = self.columns.start;
        // SAFETY: every block begins at or after `columns.start` and ends at or before `columns.end`.
        unsafe {
            while column + 4 <= self.columns.end {
                self.rows_of::<S, E, 4>(column);
                column += 4;
            }
            while column < self.columns.end {
                self.rows_of::<S, E, 1>(column);
                column += 1;
            }
        }
    }

    /// # Safety
    /// As [`Gemv::columns`]; columns `column..column + C` are in bounds.
    #[inline(always)]
    unsafe fn rows_of<S: Simd, E: Element, const C: usize>(&self, column: usize) {
        let mut row = 0;
        // SAFETY: every block ends at or before the last row.
        unsafe {
            while row + 4 <= self.rows {
                self.block::<S, E, C, 4>(row, column);
                row += 4;
            }
            match self.rows - row {
                0 => {}
                1 => self.block::<S, E, C, 1>(row, column),
                2 => self.block::<S, E, C, 2>(row, column),
                _ => self.block::<S, E, C, 3>(row, column),
            }
        }
    }

    /// `C` columns by `R` rows of y.
    ///
    /// # Safety
    /// As [`Gemv::rows_of`]; rows `row..row + R` are in bounds.
    #[inline(always)]
    unsafe fn block<S: Simd, E: Element, const C: usize, const R: usize>(&self, row: usize, column: usize) {
        // SAFETY: rows `row..row + R` and columns `column..column + C` are in bounds, so each pointer of `x` and `w`
        // has `depth` elements behind it, of which vectors end at `whole <= depth`. `y` is aligned (kernels/mod.rs) and
        // no other item writes these columns.
        unsafe {
            let x: [*const f32; R] = std::array::from_fn(|r| self.places.x(row + r));
            let w: [*const u8; C] = std::array::from_fn(|c| self.w.add((column + c) * self.w_stride * E::SIZE));
            let mut acc = [[S::splat(0.0); R]; C];
            let whole = self.depth / S::LANES * S::LANES;
            let mut p = 0;
            while p < whole {
                let xs: [S::V; R] = std::array::from_fn(|r| S::load(x[r].add(p)));
                for c in 0..C {
                    S::prefetch(w[c].wrapping_add(p * E::SIZE + PREFETCH_BYTES));
                    let weight = E::load::<S>(w[c], p);
                    for r in 0..R {
                        acc[c][r] = S::fma(weight, xs[r], acc[c][r]);
                    }
                }
                p += S::LANES;
            }
            for c in 0..C {
                for r in 0..R {
                    let mut sum = S::sum(acc[c][r]);
                    for p in whole..self.depth {
                        sum = S::mul_add(E::get(w[c], p), x[r].add(p).read_unaligned(), sum);
                    }
                    *self.places.y(row + r).add(column + c) = sum;
                }
            }
        }
    }
}
