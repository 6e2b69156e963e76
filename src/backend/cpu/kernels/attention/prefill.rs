//! Attention of many query rows, as in prefill: scores and outputs are tiles of a matrix product.

use super::super::gemm::{Matrix, Panel};
use super::super::math;
use super::{ALL, Attention, BLOCK, NONE};
use crate::backend::cpu::simd::{Isa, Kernel, Simd, TileArgs};
use crate::tensor::DType;

/// One panel of query rows (as many as a GEMM tile has columns) of one KV head, all slots.
pub struct PrefillPanel {
    pub attention: Attention,
    /// `(batch * kv_heads + kv_head) * panels + panel`
    pub item: usize,
    /// [`prefill_scratch`] elements.
    pub scratch: *mut f32,
}

/// Items of [`PrefillPanel`] for each batch row and KV head.
pub fn prefill_panels(isa: Isa, group_rows: usize) -> usize {
    group_rows.div_ceil(isa.tile_columns())
}

/// Elements of scratch that [`PrefillPanel`] needs.
pub fn prefill_scratch(isa: Isa, dim: usize) -> usize {
    let width = isa.tile_columns();
    // Queries and outputs `[dim, width]`, keys `[dim, BLOCK]`, values `[BLOCK, dim]`, scores `[BLOCK, width]`.
    2 * dim * width + 2 * dim * BLOCK + BLOCK * width
}

/// The widest tile of any instruction set.
const WIDEST: usize = 32;

impl Kernel for PrefillPanel {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let a = &self.attention;
        let width = 2 * S::LANES;
        let panels = a.group_rows().div_ceil(width);
        let (pair, panel) = (self.item / panels, self.item % panels);
        let (b, g) = (pair / a.kv_heads, pair % a.kv_heads);
        let first_row = panel * width;
        let rows = width.min(a.group_rows() - first_row);
        // SAFETY: `scratch` has the five tables in this order (`prefill_scratch`), all written before they are read: queries
        // and outputs at once, the others block by block. Query rows `first_row..first_row + rows` are rows of this KV head
        // and of no other panel; blocks end at `blocks()` and slots of a block at `a.slots`. q is read unaligned, and
        // so is v where it is used in place (`tile_body`): both may be constants in a mapped file. `out` is aligned.
        unsafe {
            let queries = self.scratch;
            let outputs = queries.add(a.dim * width);
            let keys = outputs.add(a.dim * width);
            let values = keys.add(a.dim * BLOCK);
            let scores = values.add(BLOCK * a.dim);
            for j in 0..width {
                if j >= rows {
                    for i in 0..a.dim {
                        *queries.add(i * width + j) = 0.0;
                    }
                    continue;
                }
                let (h, t) = a.place(g, first_row + j);
                let q: *const f32 = a.q.row(b, h, t).cast_const().cast();
                for i in 0..a.dim {
                    *queries.add(i * width + j) = q.add(i).read_unaligned();
                }
            }
            for i in 0..a.dim * width {
                *outputs.add(i) = 0.0;
            }
            let mut max = [f32::NEG_INFINITY; WIDEST];
            let mut sum = [0f32; WIDEST];
            for block in 0..a.blocks() {
                let mut states = [NONE; WIDEST];
                let mut seen = (false, true);
                for (j, state) in states[..rows].iter_mut().enumerate() {
                    let (h, t) = a.place(g, first_row + j);
                    *state = a.mask.as_ref().map_or(ALL, |mask| mask.state(b, h, t, block));
                    seen = (seen.0 || *state != NONE, seen.1 && *state == ALL);
                }
                if !seen.0 {
                    continue;
                }
                let first = block * BLOCK;
                let count = BLOCK.min(a.slots - first);
                let matrix = Matrix {
                    base: a.k.row(b, g, first),
                    storage: a.k.storage,
                    row_stride: 1,
                    column_stride: a.k.strides[2],
                };
                Panel::whole(matrix, a.dim, count).pack::<S>(keys, BLOCK);
                let product = TileArgs {
                    depth: a.dim,
                    a: keys,
                    a_stride: BLOCK,
                    b: queries,
                    b_stride: width,
                    c: scores,
                    c_stride: width,
                    accumulate: false,
                };
                tiles::<S>(count, product);
                if !seen.1
                    && let Some(mask) = &a.mask
                {
                    for (j, state) in states[..rows].iter().enumerate() {
                        if *state == ALL {
                            continue;
                        }
                        let (h, t) = a.place(g, first_row + j);
                        for s in 0..count {
                            let bias = mask.bias(b, h, t, first + s);
                            let score = scores.add(s * width + j);
                            *score = if bias == f32::NEG_INFINITY { bias } else { *score + bias };
                        }
                    }
                }
                softmax_block::<S>(scores, count, &mut max, &mut sum, outputs, a.dim);
                let (values, stride) = if a.v.storage == DType::F32 {
                    (a.v.row(b, g, first).cast_const().cast::<f32>(), a.v.strides[2] as usize)
                } else {
                    let matrix = Matrix {
                        base: a.v.row(b, g, first),
                        storage: a.v.storage,
                        row_stride: a.v.strides[2],
                        column_stride: 1,
                    };
                    Panel::whole(matrix, count, a.dim).pack::<S>(values, a.dim);
                    (values.cast_const(), a.dim)
                };
                let product = TileArgs {
                    depth: count,
                    a: values,
                    a_stride: stride,
                    b: scores,
                    b_stride: width,
                    c: outputs,
                    c_stride: width,
                    accumulate: true,
                };
                tiles::<S>(a.dim, product);
            }
            for j in 0..rows {
                let (h, t) = a.place(g, first_row + j);
                let out: *mut f32 = a.out.row(b, h, t).cast();
                let scale = if sum[j] == 0.0 { 0.0 } else { 1.0 / sum[j] };
                for i in 0..a.dim {
                    *out.add(i) = *outputs.add(i * width + j) * scale;
                }
            }
        }
    }
}

/// A product of `rows` rows, tile by tile. `BLOCK` and most head sizes are multiples of 8, which leaves no thin tile.
///
/// # Safety
/// As [`Simd::tile`] for each tile; `a` has `rows` elements in each row and `c` has `rows` rows.
#[inline(always)]
unsafe fn tiles<S: Simd>(rows: usize, product: TileArgs) {
    let mut first = 0;
    while first < rows {
        let most = S::TILE_ROWS.min(rows - first).min(8);
        // SAFETY: `first < rows`: still inside `a`'s first row and `c`'s rows.
        let args = unsafe {
            TileArgs {
                a: product.a.add(first),
                c: product.c.add(first * product.c_stride),
                ..product
            }
        };
        // SAFETY: rows `first..first + most` of a product of `rows`; `most` is at most `TILE_ROWS`.
        unsafe { S::tile(most, args) };
        first += most;
    }
}

/// Scores `[count, width]` become exponentials; the running maximum, sum and outputs `[dim, width]` are rescaled to the
/// new base.
///
/// # Safety
/// Both tables have those elements, aligned; nothing else uses them at the same time.
#[inline(always)]
unsafe fn softmax_block<S: Simd>(
    scores: *mut f32,
    count: usize,
    max: &mut [f32; WIDEST],
    sum: &mut [f32; WIDEST],
    outputs: *mut f32,
    dim: usize,
) {
    let width = 2 * S::LANES;
    // SAFETY: `s < count`, `i < dim` and `j < width`: inside the tables.
    unsafe {
        let mut new = *max;
        for s in 0..count {
            for (j, new) in new[..width].iter_mut().enumerate() {
                let x = *scores.add(s * width + j);
                *new = if x > *new { x } else { *new };
            }
        }
        let mut scale = [0f32; WIDEST];
        let mut base = [0f32; WIDEST];
        for j in 0..width {
            base[j] = if new[j] == f32::NEG_INFINITY { 0.0 } else { new[j] };
            scale[j] = math::exp::<S>(max[j] - base[j]);
            sum[j] *= scale[j];
        }
        for s in 0..count {
            for j in 0..width {
                let score = scores.add(s * width + j);
                *score = math::exp::<S>(*score - base[j]);
                sum[j] += *score;
            }
        }
        if new != *max {
            for i in 0..dim {
                for (j, scale) in scale[..width].iter().enumerate() {
                    *outputs.add(i * width + j) *= scale;
                }
            }
        }
        *max = new;
    }
}
