//! Many rows times quantized `[out, in]` weights: panels of the weights are converted to f32 in the first-level cache
//! and multiplied there with every tile of the packed left matrix, as in [`super::gemm`].
//!
//! As many rows of codes as a vector has lanes are decoded at a time: code `k` of every word of a row is a vector, and
//! transposing the square of such vectors gives the rows of the panel.

use super::super::simd::{Kernel, Simd};
use super::codes::{Code, Float8, Integer, Numbered};
use super::gemm::{DEPTH, Tiles};
use super::quantized::{Format, QuantizedRows};
use super::quantized_gemv::is_fast;

/// All tiles of the packed left matrix times one panel of the weights.
pub struct QuantizedGemm {
    pub rows: usize,
    pub columns: usize,
    /// From [`PackLeft`](super::gemm::PackLeft).
    pub left: *const f32,
    /// `[columns, depth]`.
    pub right: QuantizedRows,
    /// `[rows, columns]`, rows `out_stride` apart.
    pub out: *mut f32,
    pub out_stride: usize,
    /// [`scratch_len`](super::gemm::scratch_len) elements.
    pub scratch: *mut f32,
    pub panel: usize,
}

impl Kernel for QuantizedGemm {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = 2 * S::LANES;
        let total = self.right.depth;
        let first_column = self.panel * width;
        let columns = width.min(self.columns - first_column);
        let tiles = Tiles {
            rows: self.rows,
            depth: total,
            left: self.left,
            // SAFETY: the panel's first column is one of `out`.
            out: unsafe { self.out.add(first_column) },
            out_stride: self.out_stride,
            scratch: self.scratch,
            columns,
        };
        let pieces = total.div_ceil(DEPTH).max(1);
        // SAFETY: the panel's columns are rows of the weights and columns of `out`, and pieces of `DEPTH`, the last one
        // shorter, partition the depth. `scratch` holds such a piece of the panel. Panels are items: no other writes their
        // columns.
        unsafe {
            for i in 0..pieces {
                let first = i * DEPTH;
                let depth = DEPTH.min(total - first);
                self.pack::<S>(first_column, columns, first, depth);
                tiles.multiply::<S>(first, depth);
            }
        }
    }
}

impl QuantizedGemm {
    /// `scratch[p, j]` becomes element `[column + j, first + p]` of the weights, 0 for `j` from `columns` on.
    ///
    /// # Safety
    /// As [`Kernel::run`]; the elements are in bounds.
    #[inline(always)]
    unsafe fn pack<S: Simd>(&self, column: usize, columns: usize, first: usize, depth: usize) {
        let w = &self.right;
        let width = 2 * S::LANES;
        // SAFETY: this function's own contract; the kind of codes is the format's.
        unsafe {
            if !is_fast(w.format, w.depth, w.block) {
                for j in 0..width {
                    let to = self.scratch.add(j);
                    match j < columns {
                        true => w.elements(column + j, first, depth, |p, x| to.add(p * width).write(x)),
                        false => (0..depth).for_each(|p| to.add(p * width).write(0.0)),
                    }
                }
                return;
            }
            let center = w.center;
            let flip = |signed: bool, bits: usize| u32::from(signed) << (bits - 1);
            let of = [column, columns, first, depth];
            match w.format {
                Format::Integer { bits: 4, .. } | Format::Numbered => {
                    self.pack_codes::<S, _>(Numbered(S::table(w.numbers)), of)
                }
                Format::Integer { bits: 2, signed } => {
                    let flip = flip(signed, 2);
                    self.pack_codes::<S, _>(Integer::<2> { flip, center }, of)
                }
                Format::Integer { signed, .. } => {
                    let flip = flip(signed, 8);
                    self.pack_codes::<S, _>(Integer::<8> { flip, center }, of)
                }
                Format::F8E4M3Fn => self.pack_codes::<S, _>(Float8::<4>, of),
                Format::F8E5M2 => self.pack_codes::<S, _>(Float8::<5>, of),
            }
        }
    }

    /// # Safety
    /// As [`QuantizedGemm::pack`]; the weights have the form of [`is_fast`], and codes of this kind. `first` is a multiple of
    /// `DEPTH`, and so of the codes of a vector of words.
    #[inline(always)]
    unsafe fn pack_codes<S: Simd, K: Code<S>>(&self, code: K, [column, columns, first, depth]: [usize; 4]) {
        let w = &self.right;
        let (lanes, per_word) = (S::LANES, K::PER_WORD);
        let (width, block) = (2 * lanes, w.block[1]);
        let row_bytes = w.depth * 4 / per_word;
        // SAFETY: rows `column..column + columns` of the weights are in bounds, with the codes, scales and zero points
        // of `first..first + depth`; a vector of words reads no byte past its row. The scratch has `depth` rows of
        // `width`; `store` writes only the vector at `left`, for rows below `depth`.
        unsafe {
            for left in [0, lanes] {
                let live = columns.saturating_sub(left).min(lanes);
                for start in (0..depth).step_by(lanes * per_word) {
                    let place = first + start;
                    let here = (depth - start).min(lanes * per_word);
                    let (first_block, last_block) = (place / block, (place + here - 1) / block);
                    let mut index = [0u32; 16];
                    for (lane, index) in index.iter_mut().enumerate().take(lanes) {
                        let of = ((place + lane * per_word) / block).min(last_block);
                        *index = (of - first_block) as u32;
                    }
                    let (index, n) = (S::words(index.as_ptr().cast()), last_block - first_block + 1);
                    let mut words = [S::as_words(S::splat(0.0)); 16];
                    let mut scales = [S::splat(0.0); 16];
                    let mut zeros = [S::splat(0.0); 16];
                    for j in 0..live {
                        let row = column + left + j;
                        let from = place * 4 / per_word;
                        let bytes = row_bytes - from;
                        let codes = w.codes.add(row * row_bytes + from);
                        words[j] = match bytes >= 4 * lanes {
                            true => S::words(codes),
                            false => S::first_words(codes, bytes),
                        };
                        let at = row * w.strides[0] + first_block * w.strides[1];
                        scales[j] = S::permute(w.first_scales::<S>(at, n), index);
                        if !w.zeros.is_null() {
                            zeros[j] = S::permute(S::first_i8(w.zeros.add(at), n), index);
                        }
                    }
                    let to = self.scratch.add(start * width + left);
                    for k in 0..per_word {
                        S::transpose(
                            |j| match j < live {
                                true => S::mul(S::sub(code.decode(words[j], k), zeros[j]), scales[j]),
                                false => S::splat(0.0),
                            },
                            |i, v| {
                                let p = i * per_word + k;
                                if p < here {
                                    S::store(to.add(p * width), v);
                                }
                            },
                        );
                    }
                }
            }
        }
    }
}
