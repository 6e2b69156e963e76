//! Products of many rows: packed panels and register tiles.
//!
//! The left matrix is packed once per step into tiles of `[depth, rows]`. The right one, of any storage and order,
//! is converted and packed panel by panel (`2 * LANES` columns by at most [`DEPTH`]) into the first-level cache and
//! multiplied with every tile there. A panel is one item of work, so results do not depend on the thread; each element sums
//! over depth in order.

use super::super::simd::{Bf16, Element, F16, F32, Isa, Kernel, Simd, TileArgs};
use crate::tensor::DType;

/// Maximum depth packed at once: a panel of it fills two thirds of a 48 KiB first-level cache.
pub const DEPTH: usize = 256;

/// A strided matrix. Strides are in elements.
#[derive(Clone, Copy, Debug)]
pub struct Matrix {
    pub base: *const u8,
    pub storage: DType,
    pub row_stride: isize,
    pub column_stride: isize,
}

/// Start and length of piece `i` of the fewest nearly equal pieces of `total` that have at most `most`.
pub fn piece(total: usize, most: usize, i: usize) -> (usize, usize) {
    let count = total.div_ceil(most).max(1);
    let (base, longer) = (total / count, total % count);
    (i * base + i.min(longer), base + usize::from(i < longer))
}

/// Packs tile number `tile` of the left matrix: `packed[first_row * depth ..]` becomes `[depth, tile's rows]`.
pub struct PackLeft {
    pub rows: usize,
    pub depth: usize,
    pub matrix: Matrix,
    /// `rows * depth` elements for all tiles.
    pub packed: *mut f32,
    pub tile: usize,
}

impl Kernel for PackLeft {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (first, rows) = piece(self.rows, S::TILE_ROWS, self.tile);
        let matrix = self.matrix;
        // SAFETY: the tile's rows `first..first + rows` are rows of the matrix, and `packed` has `rows * depth` elements
        // for each tile. A vector store at row `p` of the tile writes at most `LANES` elements from `p * rows` on; it is
        // made only while `p + 2 * LANES <= depth`, so it ends before `depth * rows`. Elements are read unaligned.
        unsafe {
            let to = self.packed.add(first * self.depth);
            let size = matrix.storage.element_bytes() as isize;
            let from = matrix.base.wrapping_offset(first as isize * matrix.row_stride * size);
            let mut p = 0;
            if matrix.storage == DType::F32 && matrix.column_stride == 1 && rows <= S::LANES {
                let from = from.cast::<f32>();
                // A store writes a whole vector of a block's row; the next store overwrites what exceeds the tile's
                // rows. The scalar loop handles the last rows, so that nothing is written beyond the tile.
                let mut block = [0f32; 16 * 16];
                while p + 2 * S::LANES <= self.depth {
                    let block = block.as_mut_ptr();
                    S::transpose(
                        |i| {
                            let row = i.min(rows - 1) as isize;
                            S::load(from.wrapping_offset(row * matrix.row_stride).wrapping_add(p))
                        },
                        |j, v| S::store(block.add(j * S::LANES), v),
                    );
                    for j in 0..S::LANES {
                        S::store(to.add((p + j) * rows), S::load(block.add(j * S::LANES)));
                    }
                    p += S::LANES;
                }
            }
            while p < self.depth {
                for i in 0..rows {
                    let at = i as isize * matrix.row_stride + p as isize * matrix.column_stride;
                    let x = match matrix.storage {
                        DType::F32 => F32::get(from.wrapping_offset(at * 4), 0),
                        DType::F16 => F16::get(from.wrapping_offset(at * 2), 0),
                        DType::Bf16 => Bf16::get(from.wrapping_offset(at * 2), 0),
                        other => unreachable!("a matrix of {other}"),
                    };
                    *to.add(p * rows + i) = x;
                }
                p += 1;
            }
        }
    }
}

/// All tiles of the packed left matrix times one panel of the right one.
pub struct Gemm {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    /// From [`PackLeft`].
    pub left: *const f32,
    /// `[depth, columns]`.
    pub right: Matrix,
    /// `[rows, columns]`, rows `out_stride` apart.
    pub out: *mut f32,
    pub out_stride: usize,
    /// [`scratch_len`] elements.
    pub scratch: *mut f32,
    pub panel: usize,
}

/// Number of scratch elements that a [`Gemm`] needs.
pub fn scratch_len(isa: Isa) -> usize {
    (DEPTH + isa.tile_rows()) * isa.tile_columns()
}

impl Kernel for Gemm {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let width = 2 * S::LANES;
        let first_column = self.panel * width;
        let columns = width.min(self.columns - first_column);
        let tiles = Tiles {
            rows: self.rows,
            depth: self.depth,
            left: self.left,
            // SAFETY: the panel's first column is one of `out`.
            out: unsafe { self.out.add(first_column) },
            out_stride: self.out_stride,
            scratch: self.scratch,
            columns,
        };
        let pieces = self.depth.div_ceil(DEPTH).max(1);
        // SAFETY: the panel's columns are columns of the right matrix and of `out`, and pieces of at most `DEPTH` partition
        // the depth. `scratch` holds such a piece of the panel. Panels are items: no other writes their columns.
        unsafe {
            for i in 0..pieces {
                let (first, depth) = piece(self.depth, DEPTH, i);
                let panel = Panel {
                    matrix: self.right,
                    first_column,
                    columns,
                    first_row: first,
                    depth,
                };
                panel.pack::<S>(self.scratch, width);
                tiles.multiply::<S>(first, depth);
            }
        }
    }
}

/// Every tile of the packed left matrix, for one panel of a right matrix in scratch.
pub struct Tiles {
    pub rows: usize,
    /// Depth of the whole product.
    pub depth: usize,
    /// From [`PackLeft`].
    pub left: *const f32,
    /// `[rows, columns]`, rows `out_stride` apart.
    pub out: *mut f32,
    pub out_stride: usize,
    /// [`scratch_len`] elements: `[depth, width]` of the panel, and after [`DEPTH`] such rows one tile.
    pub scratch: *mut f32,
    /// Columns of the panel, at most its width.
    pub columns: usize,
}

impl Tiles {
    /// The products over the panel's `depth` inputs from `first` on; added to the output if `first` is not 0.
    ///
    /// # Safety
    /// As [`Kernel::run`]; `first + depth` is at most the product's depth, and `depth` at most [`DEPTH`].
    #[inline(always)]
    pub unsafe fn multiply<S: Simd>(&self, first: usize, depth: usize) {
        let width = 2 * S::LANES;
        let accumulate = first > 0;
        // SAFETY: tiles partition the rows, so `left` is read inside the packed matrix. A full tile writes `rows` rows of
        // `width` columns: to `out` only where the panel has this many, else to the tile behind the panel, of which the
        // panel's columns are copied.
        unsafe {
            let edge = self.scratch.add(DEPTH * width);
            for tile in 0..self.rows.div_ceil(S::TILE_ROWS) {
                let (row, rows) = piece(self.rows, S::TILE_ROWS, tile);
                let out = self.out.add(row * self.out_stride);
                let mut args = TileArgs {
                    depth,
                    a: self.left.add(row * self.depth + first * rows),
                    a_stride: rows,
                    b: self.scratch,
                    b_stride: width,
                    c: out,
                    c_stride: self.out_stride,
                    accumulate,
                };
                if self.columns == width {
                    S::tile(rows, args);
                    continue;
                }
                // The last, narrower panel uses a full tile of scratch.
                (args.c, args.c_stride, args.accumulate) = (edge, width, false);
                S::tile(rows, args);
                for r in 0..rows {
                    for c in 0..self.columns {
                        let (to, x) = (out.add(r * self.out_stride + c), *edge.add(r * width + c));
                        *to = if accumulate { *to + x } else { x };
                    }
                }
            }
        }
    }
}

/// A part of a matrix: `depth` rows from `first_row` on, `columns` columns from `first_column` on.
#[derive(Clone, Copy)]
pub struct Panel {
    pub matrix: Matrix,
    pub first_column: usize,
    pub columns: usize,
    pub first_row: usize,
    pub depth: usize,
}

impl Panel {
    /// All of a matrix of `depth` rows.
    #[inline(always)]
    pub fn whole(matrix: Matrix, depth: usize, columns: usize) -> Self {
        Panel {
            matrix,
            first_column: 0,
            columns,
            first_row: 0,
            depth,
        }
    }

    /// `to[p, j]` is element `[p, j]` of the panel as f32, for `p < depth`; columns from `columns` to `width` are 0.
    ///
    /// # Safety
    /// The matrix has those elements; `to` has `[depth, width]`.
    #[inline(always)]
    pub unsafe fn pack<S: Simd>(self, to: *mut f32, width: usize) {
        // SAFETY: the storage is the matrix's own; the rest is this function's own contract.
        unsafe {
            match self.matrix.storage {
                DType::F32 => pack::<S, F32>(self, to, width),
                DType::F16 => pack::<S, F16>(self, to, width),
                DType::Bf16 => pack::<S, Bf16>(self, to, width),
                other => unreachable!("a matrix of {other}"),
            }
        }
    }
}

/// # Safety
/// As [`Panel::pack`]; `E` is the matrix's storage.
#[inline(always)]
unsafe fn pack<S: Simd, E: Element>(panel: Panel, to: *mut f32, width: usize) {
    let Panel {
        matrix, columns, depth, ..
    } = panel;
    // SAFETY: elements are read at `p < depth` and `column < columns` alone. In the first branch a vector covers `LANES`
    // rows from `p` on, and `p + LANES <= depth`; a block stores `LANES` columns of each row of `to`, whose
    // width is a multiple of that. In the second a vector covers `LANES` columns from `column` on, and `column + LANES <= columns`.
    unsafe {
        let at = |row: usize, column: usize| {
            let row = (panel.first_row + row) as isize * matrix.row_stride;
            let column = (panel.first_column + column) as isize * matrix.column_stride;
            matrix.base.wrapping_offset((row + column) * E::SIZE as isize)
        };
        let lanes = S::LANES;
        if matrix.row_stride == 1 && width.is_multiple_of(lanes) {
            // A column is contiguous, as in `[out, in]` weights: square blocks are transposed in registers. They store
            // whole vectors, which requires rows of the full width.
            let mut column = 0;
            while column < width {
                let live = columns.saturating_sub(column).min(lanes);
                let mut p = 0;
                while live > 0 && p + lanes <= depth {
                    S::transpose(
                        |j| {
                            if j < live {
                                E::load::<S>(at(p, column + j), 0)
                            } else {
                                S::splat(0.0)
                            }
                        },
                        |i, v| S::store(to.add((p + i) * width + column), v),
                    );
                    p += lanes;
                }
                for p in p..depth {
                    for j in 0..lanes {
                        let x = if j < live { E::get(at(p, column + j), 0) } else { 0.0 };
                        *to.add(p * width + column + j) = x;
                    }
                }
                column += lanes;
            }
            return;
        }
        for p in 0..depth {
            let row = to.add(p * width);
            let mut column = 0;
            if matrix.column_stride == 1 {
                let from = at(p, 0);
                while column + lanes <= columns {
                    S::store(row.add(column), E::load::<S>(from, column));
                    column += lanes;
                }
            }
            for column in column..width {
                *row.add(column) = if column < columns {
                    E::get(at(p, column), 0)
                } else {
                    0.0
                };
            }
        }
    }
}
