//! A few rows times quantized `[out, in]` weights: the codes are streamed once and converted to f32 in registers.
//!
//! A word of codes holds neighboring elements of a row, so x is first rearranged into the order of [`super::codes`]:
//! its elements for the `k`-th codes of a vector of words become a vector. Each thread does that once per step, in its
//! own scratch ([`Prepared`]). Products of a vector of words are summed, and zero point and scale are applied to the
//! sum, which is within one block for each lane: `sum(x * (code - zero)) = sum(x * code) - zero * sum(x)`. Both sums
//! are over the codes of one word, so their difference is as exact as a sum of products in another order.

use super::super::simd::{Kernel, Simd};
use super::codes::{Code, Float8, Integer, Mixed, Numbered};
use super::gemv::Rows;
use super::quantized::{Format, QuantizedRows};

/// How far ahead of a row's reads its cache lines are prefetched, as in [`super::gemv`].
const PREFETCH_BYTES: usize = 4096;

/// Identifies a piece of work in a program's runs: data that a thread prepared for another piece is not reused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scope {
    /// Of the program.
    pub run: u64,
    /// A phase whose steps do not write their inputs, or a step.
    pub part: u64,
}

/// `y[i, j] = sum_p x[i, p] * w[j, p]` for the `j` in `columns`.
#[derive(Clone)]
pub struct QuantizedGemv {
    pub rows: usize,
    pub places: Rows,
    pub w: QuantizedRows,
    pub columns: std::ops::Range<usize>,
    /// [`scratch_len`] f32 that this thread keeps between items, aligned for u64.
    pub scratch: *mut f32,
    pub scope: Scope,
}

/// Whether a matrix has the form of the fast kernels: blocks only along rows and of whole words, rows of whole bytes.
pub fn is_fast(format: Format, depth: usize, block: [usize; 2]) -> bool {
    let whole = (depth * format.bits()).is_multiple_of(8);
    whole && block[0] == 1 && (block[1] >= depth || block[1].is_multiple_of(format.per_word()))
}

/// Size of the tag at the start of the scratch, in u64.
const TAG: usize = 8;

/// f32 of scratch that a [`QuantizedGemv`] needs on an instruction set of this many lanes.
pub fn scratch_len(lanes: usize, format: Format, rows: usize, depth: usize) -> usize {
    let chunks = depth.div_ceil(lanes * format.per_word());
    // Indices and blocks of every chunk; sums and x of every row. The general path keeps a row of weights.
    2 * TAG + (chunks * (lanes + 2) + rows * chunks * lanes * (1 + format.per_word())).max(depth)
}

/// The kernel's other inputs besides codes and scales, in the thread's scratch.
#[derive(Clone, Copy)]
struct Prepared {
    chunks: usize,
    /// `[chunks, LANES]` words: which of a chunk's scales belongs to a lane.
    lanes: *mut u32,
    /// `[chunks, 2]`: the first block of a chunk and its number of blocks.
    blocks: *mut u32,
    /// `[rows, chunks, LANES]`: minus the sums of `x` over the codes of a word.
    sums: *mut f32,
    /// `[rows, chunks, PER_WORD, LANES]`, 0 beyond the depth.
    x: *mut f32,
}

impl Kernel for QuantizedGemv {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let w = &self.w;
        // SAFETY: this function's own contract; the kind of codes is the format's.
        unsafe {
            if !is_fast(w.format, w.depth, w.block) {
                return self.general::<S>();
            }
            let center = w.center;
            let flip = |signed: bool, bits: usize| u32::from(signed) << (bits - 1);
            match w.format {
                Format::Integer { bits: 4, signed } => {
                    let flip = flip(signed, 4);
                    self.columns::<S, _>(Mixed {
                        table: S::table(w.numbers),
                        integer: Integer { flip, center },
                    })
                }
                Format::Numbered => self.columns::<S, _>(Numbered(S::table(w.numbers))),
                Format::Integer { bits: 2, signed } => {
                    let flip = flip(signed, 2);
                    self.columns::<S, _>(Integer::<2> { flip, center })
                }
                Format::Integer { signed, .. } => {
                    let flip = flip(signed, 8);
                    self.columns::<S, _>(Integer::<8> { flip, center })
                }
                Format::F8E4M3Fn => self.columns::<S, _>(Float8::<4>),
                Format::F8E5M2 => self.columns::<S, _>(Float8::<5>),
            }
        }
    }
}

impl QuantizedGemv {
    /// Any form: a row of weights is computed in scratch and multiplied.
    ///
    /// # Safety
    /// As [`Kernel::run`].
    #[inline(always)]
    unsafe fn general<S: Simd>(&self) {
        let depth = self.w.depth;
        let whole = depth / S::LANES * S::LANES;
        // SAFETY: the scratch has `depth` elements behind the tag; the columns are rows of the weights. Vectors end at
        // `whole <= depth`. `y` is aligned, and no other item writes these columns. The tag says that nothing is prepared.
        unsafe {
            self.scratch.cast::<[u64; TAG]>().write([0; TAG]);
            let row = self.scratch.add(2 * TAG);
            for column in self.columns.clone() {
                self.w.row(column, 0, depth, row);
                for r in 0..self.rows {
                    let x = self.places.x(r);
                    let mut acc = S::splat(0.0);
                    for p in (0..whole).step_by(S::LANES) {
                        acc = S::fma(S::load(row.add(p)), S::load(x.add(p)), acc);
                    }
                    let mut sum = S::sum(acc);
                    for p in whole..depth {
                        sum = S::mul_add(*row.add(p), x.add(p).read_unaligned(), sum);
                    }
                    *self.places.y(r).add(column) = sum;
                }
            }
        }
    }

    /// # Safety
    /// As [`Kernel::run`]; the weights have the form of [`is_fast`], and codes of this kind.
    #[inline(always)]
    unsafe fn columns<S: Simd, K: Code<S>>(&self, code: K) {
        let mut column = self.columns.start;
        // SAFETY: every block begins at or after `columns.start` and ends at or before `columns.end`.
        unsafe {
            let prepared = self.prepare::<S, K>();
            while column + 2 <= self.columns.end {
                self.rows_of::<S, K, 2>(code, &prepared, column);
                column += 2;
            }
            while column < self.columns.end {
                self.rows_of::<S, K, 1>(code, &prepared, column);
                column += 1;
            }
        }
    }

    /// # Safety
    /// As [`QuantizedGemv::columns`]; columns `column..column + C` are in bounds.
    #[inline(always)]
    unsafe fn rows_of<S: Simd, K: Code<S>, const C: usize>(&self, code: K, prepared: &Prepared, column: usize) {
        let mut row = 0;
        // SAFETY: every block ends at or before the last row.
        unsafe {
            if let Rows::Apart(_) = self.places {
                // Rows of different sequences, each of which must get the same result as alone.
                while row + 2 <= self.rows {
                    self.block::<S, K, C, 2, true>(code, prepared, row, column);
                    row += 2;
                }
            }
            while row + 4 <= self.rows {
                self.block::<S, K, C, 4, false>(code, prepared, row, column);
                row += 4;
            }
            for row in row..self.rows {
                self.block::<S, K, C, 1, true>(code, prepared, row, column);
            }
        }
    }

    /// `C` columns by `R` rows of y. With `IN_TURN`, a row has two alternating sums, whose additions are independent:
    /// for few rows.
    ///
    /// # Safety
    /// As [`QuantizedGemv::rows_of`]; rows `row..row + R` are in bounds.
    #[inline(always)]
    unsafe fn block<S: Simd, K: Code<S>, const C: usize, const R: usize, const IN_TURN: bool>(
        &self,
        code: K,
        prepared: &Prepared,
        row: usize,
        column: usize,
    ) {
        let w = &self.w;
        let (lanes, bytes) = (S::LANES, 4 * S::LANES);
        let row_bytes = w.depth * 4 / K::PER_WORD;
        let zeros = !w.zeros.is_null();
        // SAFETY: rows `row..row + R` of x and y and columns `column..column + C` are in bounds. A chunk is a vector of
        // words of each column; the last one reads the remaining bytes of the row. `Prepared` has a vector of x for
        // each code of a word of each chunk, and the blocks of each chunk, for which there are scales and zero points.
        unsafe {
            let codes: [*const u8; C] = std::array::from_fn(|c| w.codes.add((column + c) * row_bytes));
            let mut acc = [[S::splat(0.0); R]; C];
            for chunk in 0..prepared.chunks {
                let at = chunk * bytes;
                let left = row_bytes - at;
                let words: [S::W; C] = std::array::from_fn(|c| {
                    let from = codes[c].add(at);
                    S::prefetch(from.wrapping_add(PREFETCH_BYTES));
                    match left >= bytes {
                        true => S::words(from),
                        false => S::first_words(from, left),
                    }
                });
                let from = |r: usize| (row + r) * prepared.chunks + chunk;
                let mut parts = [[[S::splat(0.0); R]; C]; 2];
                for k in 0..K::PER_WORD {
                    let part = &mut parts[if IN_TURN { k % 2 } else { 0 }];
                    let xs: [S::V; R] =
                        std::array::from_fn(|r| S::load(prepared.x.add((from(r) * K::PER_WORD + k) * lanes)));
                    for c in 0..C {
                        let weight = code.decode(words[c], k);
                        for r in 0..R {
                            part[c][r] = S::fma(weight, xs[r], part[c][r]);
                        }
                    }
                }
                let [mut part, other] = parts;
                if IN_TURN {
                    for (part, other) in part.iter_mut().zip(other) {
                        (0..R).for_each(|r| part[r] = S::add(part[r], other[r]));
                    }
                }
                let index = S::words(prepared.lanes.add(chunk * lanes).cast());
                let (first, n) = (*prepared.blocks.add(2 * chunk), *prepared.blocks.add(2 * chunk + 1));
                for c in 0..C {
                    let at = (column + c) * w.strides[0] + first as usize * w.strides[1];
                    let scale = S::permute(w.first_scales::<S>(at, n as usize), index);
                    if zeros {
                        let zero = S::permute(S::first_i8(w.zeros.add(at), n as usize), index);
                        for r in 0..R {
                            let sum = S::load(prepared.sums.add(from(r) * lanes));
                            part[c][r] = S::fma(zero, sum, part[c][r]);
                        }
                    }
                    for r in 0..R {
                        acc[c][r] = S::fma(part[c][r], scale, acc[c][r]);
                    }
                }
            }
            for c in 0..C {
                for r in 0..R {
                    *self.places.y(row + r).add(column + c) = S::sum(acc[c][r]);
                }
            }
        }
    }

    /// x and the indices of scales in the order of the codes, unless this thread has them from another item.
    ///
    /// # Safety
    /// As [`QuantizedGemv::columns`].
    #[inline(always)]
    unsafe fn prepare<S: Simd, K: Code<S>>(&self) -> Prepared {
        let (lanes, per_word) = (S::LANES, K::PER_WORD);
        let (depth, block) = (self.w.depth, self.w.block[1]);
        let chunks = depth.div_ceil(lanes * per_word);
        // SAFETY: `scratch_len` counts these parts, and is for this format, these rows and this depth. The tag names all
        // that the prepared parts depend on, and x is not written while `scope` is the same.
        unsafe {
            let base = self.scratch.add(2 * TAG);
            let prepared = Prepared {
                chunks,
                lanes: base.cast(),
                blocks: base.add(chunks * lanes).cast(),
                sums: base.add(chunks * (lanes + 2)),
                x: base.add(chunks * (lanes + 2) + self.rows * chunks * lanes),
            };
            let (x, x_stride) = match self.places {
                Rows::Even { x, x_stride, .. } => (x, x_stride),
                // Within one scope, equal beginnings mean equal data.
                Rows::Apart(places) => ((*places).0, usize::MAX),
            };
            let tag = [
                self.scope.run,
                self.scope.part,
                x as u64,
                x_stride as u64,
                self.rows as u64,
                depth as u64,
                block as u64,
                per_word as u64,
            ];
            let known = self.scratch.cast::<[u64; TAG]>();
            if *known == tag {
                return prepared;
            }
            for chunk in 0..chunks {
                let first = chunk * lanes * per_word;
                let first_block = first / block;
                let last_block = (first + lanes * per_word).min(depth).saturating_sub(1) / block;
                *prepared.blocks.add(2 * chunk) = first_block as u32;
                *prepared.blocks.add(2 * chunk + 1) = (last_block - first_block + 1) as u32;
                for lane in 0..lanes {
                    // Lanes beyond the depth are multiplied by zeros.
                    let of = ((first + lane * per_word) / block).min(last_block);
                    *prepared.lanes.add(chunk * lanes + lane) = (of - first_block) as u32;
                }
                for row in 0..self.rows {
                    let x = self.places.x(row).add(first);
                    let left = depth - first;
                    let mut parts = [S::splat(0.0); 16];
                    for (i, part) in parts.iter_mut().enumerate().take(per_word) {
                        let n = left.saturating_sub(i * lanes).min(lanes);
                        *part = match n == lanes {
                            true => S::load(x.add(i * lanes)),
                            false => S::first_f32(x.wrapping_add(i * lanes), n),
                        };
                    }
                    // Elements of equal rest by 2, then by 4, ..
                    let mut apart = 1;
                    while apart < per_word {
                        let from = parts;
                        for i in 0..per_word / 2 {
                            (parts[i], parts[per_word / 2 + i]) = S::deinterleave(from[2 * i], from[2 * i + 1]);
                        }
                        apart *= 2;
                    }
                    let place = row * chunks + chunk;
                    let mut sum = S::splat(0.0);
                    for (k, part) in parts.iter().enumerate().take(per_word) {
                        S::store(prepared.x.add((place * per_word + k) * lanes), *part);
                        sum = S::sub(sum, *part);
                    }
                    S::store(prepared.sums.add(place * lanes), sum);
                }
            }
            *known = tag;
            prepared
        }
    }
}
