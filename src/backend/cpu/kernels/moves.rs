//! Layers that move data by index: gather, rotary embedding, cache update.
//!
//! Indices come from the caller at run time, so each is checked; an item with an invalid index stops and reports it.

use super::super::simd::{Bf16, Element, F16, F32, Kernel, Simd};
use crate::tensor::DType;

/// An index outside its axis: the index and the axis's length.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadIndex {
    pub index: i64,
    pub bound: usize,
}

/// Element `i` of an integer tensor.
///
/// # Safety
/// It exists.
pub unsafe fn index_at(base: *const u8, storage: DType, i: isize) -> i64 {
    // SAFETY: this function's contract; no alignment is needed.
    unsafe {
        match storage {
            DType::I64 => base.cast::<i64>().wrapping_offset(i).read_unaligned(),
            _ => i64::from(base.cast::<i32>().wrapping_offset(i).read_unaligned()),
        }
    }
}

/// `out[o, i, ..] = data[o, indices[i], ..]` for the pairs (o, i) numbered `o * count + i` in `items`.
pub struct Gather {
    /// `[outer, axis, inner]`, dense.
    pub data: *const u8,
    pub storage: DType,
    pub axis: usize,
    pub inner: usize,
    /// `[count]`, dense.
    pub indices: *const u8,
    pub index_storage: DType,
    pub count: usize,
    /// `[outer, count, inner]`; floats as f32, everything else as in `data`.
    pub out: *mut u8,
    pub items: std::ops::Range<usize>,
}

impl Kernel for Gather {
    type Output = Result<(), BadIndex>;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Result<(), BadIndex> {
        let size = self.storage.element_bytes();
        for item in self.items.clone() {
            let (outer, i) = (item / self.count, item % self.count);
            // SAFETY: `i < count`, the number of indices.
            let index = unsafe { index_at(self.indices, self.index_storage, i as isize) };
            if index < 0 || index >= self.axis as i64 {
                return Err(BadIndex {
                    index,
                    bound: self.axis,
                });
            }
            let from = self
                .data
                .wrapping_add((outer * self.axis + index as usize) * self.inner * size);
            let to = self
                .out
                .wrapping_add(item * self.inner * if self.storage.is_float() { 4 } else { size });
            // SAFETY: `outer` and the checked `index` are inside the data's dims, `item` inside the output's; each has
            // `inner` elements there. The output is another buffer than the data, and this item's alone.
            unsafe {
                match self.storage {
                    DType::F16 => widen::<S, F16>(from, to, self.inner),
                    DType::Bf16 => widen::<S, Bf16>(from, to, self.inner),
                    _ => std::ptr::copy_nonoverlapping(from, to, self.inner * size),
                }
            }
        }
        Ok(())
    }
}

/// `n` elements as f32.
///
/// # Safety
/// `from` has `n` elements stored as `E`, `to` has `n` f32; neither need be aligned. `S` is available.
#[inline(always)]
unsafe fn widen<S: Simd, E: Element>(from: *const u8, to: *mut u8, n: usize) {
    // SAFETY: this function's contract.
    unsafe { convert::<S, E, F32>(from, to, n) }
}

/// A four-dimensional operand `[batch, heads, tokens, dim]` whose last axis is contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub base: *mut u8,
    pub storage: DType,
    /// Strides of batch, heads and tokens, in elements.
    pub strides: [isize; 3],
}

impl Heads {
    /// The address of a row.
    #[inline(always)]
    pub fn row(&self, batch: usize, head: usize, token: usize) -> *mut u8 {
        let [b, h, t] = self.strides;
        let at = batch as isize * b + head as isize * h + token as isize * t;
        self.base.wrapping_offset(at * self.storage.element_bytes() as isize)
    }
}

/// Rotary embedding of the rows numbered `(batch * tokens + token) * heads + head` in `items`.
pub struct Rotate {
    pub x: Heads,
    pub out: Heads,
    pub heads: usize,
    pub tokens: usize,
    pub dim: usize,
    pub rotary_dim: usize,
    pub interleaved: bool,
    /// `[max_position, rotary_dim / 2]` of `table_storage`, dense.
    pub cos: *const u8,
    pub sin: *const u8,
    pub table_storage: DType,
    pub max_position: usize,
    /// `[batch, tokens]` with strides.
    pub positions: *const u8,
    pub position_storage: DType,
    pub position_strides: [isize; 2],
    pub items: std::ops::Range<usize>,
}

impl Kernel for Rotate {
    type Output = Result<(), BadIndex>;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Result<(), BadIndex> {
        for item in self.items.clone() {
            let (row, head) = (item / self.heads, item % self.heads);
            let (batch, token) = (row / self.tokens, row % self.tokens);
            let [b, t] = self.position_strides;
            let at = batch as isize * b + token as isize * t;
            // SAFETY: `batch` and `token` are inside the positions' dims, which are x's first and third.
            let position = unsafe { index_at(self.positions, self.position_storage, at) };
            if position < 0 || position >= self.max_position as i64 {
                return Err(BadIndex {
                    index: position,
                    bound: self.max_position,
                });
            }
            let x: *const f32 = self.x.row(batch, head, token).cast_const().cast();
            let out: *mut f32 = self.out.row(batch, head, token).cast();
            let table = position as usize * (self.rotary_dim / 2) * self.table_storage.element_bytes();
            let (cos, sin) = (self.cos.wrapping_add(table), self.sin.wrapping_add(table));
            // SAFETY: the row's batch, head and token are inside x and `out`, which have `dim` elements there; the checked
            // position is a row of both tables, which have `rotary_dim / 2` elements there.
            unsafe {
                match self.table_storage {
                    DType::F16 => self.row::<F16>(x, out, cos, sin),
                    DType::Bf16 => self.row::<Bf16>(x, out, cos, sin),
                    _ => self.row::<F32>(x, out, cos, sin),
                }
            }
        }
        Ok(())
    }
}

impl Rotate {
    /// # Safety
    /// `x` and `out` have `dim` elements, `out` aligned and apart from x; `cos` and `sin` have `rotary_dim / 2` of `E`.
    #[inline(always)]
    unsafe fn row<E: Element>(&self, x: *const f32, out: *mut f32, cos: *const u8, sin: *const u8) {
        let half = self.rotary_dim / 2;
        let (step, partner) = if self.interleaved { (2, 1) } else { (1, half) };
        // SAFETY: the largest index is `rotary_dim - 1`, or `dim - 1` in the second loop, and the verifier keeps
        // `rotary_dim <= dim`. x is read unaligned: it may be a constant in a mapped file.
        unsafe {
            for i in 0..half {
                let (c, s) = (E::get(cos, i), E::get(sin, i));
                let (a, b) = (
                    x.add(i * step).read_unaligned(),
                    x.add(i * step + partner).read_unaligned(),
                );
                *out.add(i * step) = a * c - b * s;
                *out.add(i * step + partner) = a * s + b * c;
            }
            for i in self.rotary_dim..self.dim {
                *out.add(i) = x.add(i).read_unaligned();
            }
        }
    }
}

/// Writes `update[b, h, t]` into `cache[b, h, write_indices[b] + t]` for the rows numbered
/// `(b * heads + h) * tokens + t` in `items`.
pub struct CacheUpdate {
    pub cache: Heads,
    pub capacity: usize,
    pub update: Heads,
    pub heads: usize,
    pub tokens: usize,
    pub dim: usize,
    pub indices: *const u8,
    pub index_storage: DType,
    pub index_stride: isize,
    pub items: std::ops::Range<usize>,
}

impl Kernel for CacheUpdate {
    type Output = Result<(), BadIndex>;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> Result<(), BadIndex> {
        for item in self.items.clone() {
            let (row, token) = (item / self.tokens, item % self.tokens);
            let (batch, head) = (row / self.heads, row % self.heads);
            // SAFETY: there is an index for every row of the batch.
            let first = unsafe { index_at(self.indices, self.index_storage, batch as isize * self.index_stride) };
            if first < 0 || first > self.capacity as i64 - self.tokens as i64 {
                return Err(BadIndex {
                    index: first,
                    bound: (self.capacity + 1).saturating_sub(self.tokens),
                });
            }
            let to = self.cache.row(batch, head, first as usize + token);
            let from = self.update.row(batch, head, token).cast_const();
            // SAFETY: `first + token < capacity` by the check above, so both rows are inside and have `dim` elements. The
            // update is never in the cache's own buffer (`Compiler::cache_update`), and no other item writes this row: the
            // verifier lets one layer update a cache.
            unsafe {
                match (self.update.storage, self.cache.storage) {
                    (a, b) if a == b => std::ptr::copy_nonoverlapping(from, to, self.dim * a.element_bytes()),
                    (DType::F32, DType::F16) => convert::<S, F32, F16>(from, to, self.dim),
                    (DType::F32, DType::Bf16) => convert::<S, F32, Bf16>(from, to, self.dim),
                    (DType::F16, DType::F32) => convert::<S, F16, F32>(from, to, self.dim),
                    (DType::Bf16, DType::F32) => convert::<S, Bf16, F32>(from, to, self.dim),
                    (a, b) => unreachable!("{a} written into a cache of {b}"),
                }
            }
        }
        Ok(())
    }
}

/// `n` elements of storage `A` as storage `B`.
///
/// # Safety
/// `from` has `n` elements of `A`, `to` has `n` of `B`, apart from each other; neither need be aligned. `S` is available.
#[inline(always)]
unsafe fn convert<S: Simd, A: Element, B: Element>(from: *const u8, to: *mut u8, n: usize) {
    let whole = n / S::LANES * S::LANES;
    // SAFETY: vectors end at `whole <= n`; the scalars are below `n`.
    unsafe {
        for i in (0..whole).step_by(S::LANES) {
            B::store::<S>(to, i, A::load::<S>(from, i));
        }
        for i in whole..n {
            B::set(to, i, A::get(from, i));
        }
    }
}
